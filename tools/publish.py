"""Make a trained run a model for the Hugging Face Hub: a folder with weights, results and a model card; or upload it.

python tools/publish.py runs/mine --repo owner/name --licence apache-2.0      writes runs/mine/hub; read its README.md
python tools/publish.py runs/mine/hub --repo owner/name --upload              uploads it, with what you changed
python tools/publish.py runs/mine/best --repo owner/name --licence cc-by-4.0 --upload         both at once

`weights="hf:owner/name"` and `load_detector("hf:owner/name")` read the repository, and so do all commands. Of local
paths, only the last component is published.
"""

import json
import re
import shlex
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from resbackbone.cli.command import Auto, console, main_of, parse, progress_console

import tyro
import yaml
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, get_token
from huggingface_hub.utils import HFValidationError, validate_repo_id
from PIL import Image

from detection.evaluate import CLASSES_SHOWN, by_falling_ap
from detection.layouts import FILES as FILES_OF_DATA
from resbackbone.atomic import folder_atomically
from resbackbone.checks import UserError, nearest, sibling
from resbackbone.engine.best import is_best, read_best
from resbackbone.report.numbers import duration
from resbackbone.report.page import ENVIRONMENT
from resbackbone.report.run import RunLog
from resbackbone.weights import read_weights, write_weights
from resbackbone.weights.file import read_safetensors
from resbackbone.weights.sources import is_named
from resbackbone.weights.write import architecture_name
from resbackbone.weights.zoo import DETECTRON2_LICENCE, TORCHVISION_LICENCE

FILES = ("README.md", "config.json", "config.yaml", "example.jpg", "model.safetensors", "results.json")
METRIC_OF = {"top1": "accuracy", "top5": "accuracy"}  # the Hub's names; it has none for COCO's
# Licences that the Hub has names for; any other is "other" there, with a name of its own.
HUB_LICENCES = (
    *("apache-2.0", "mit", "isc", "bsd", "bsd-2-clause", "bsd-3-clause", "gpl-2.0", "gpl-3.0", "lgpl-2.1", "lgpl-3.0"),
    *("agpl-3.0", "mpl-2.0", "unlicense", "cc0-1.0", "cc-by-nd-4.0"),
    *(f"cc-by{kind}-{version}.0" for version in (4, 3) for kind in ("", "-sa", "-nc", "-nc-sa", "-nc-nd")),
)


@dataclass(frozen=True)
class Options:
    """Make a trained run a model for the Hugging Face Hub."""

    run: tyro.conf.Positional[Path]
    """Folder of a finished run of tools/train_coco.py or tools/pretrain.py, or best/ in it; or to upload, what this
    command wrote."""
    repo: str
    """The repository's name on the Hub: owner/name."""
    licence: Auto[str] = None
    """Licence of these weights, such as apache-2.0. Default: that of the weights which the run started from."""
    dataset: Auto[str] = None
    """The training data's name on the Hub, owner/name, for the card to link. Default: no link."""
    output: Auto[Path] = None
    """New folder for the files. Default: hub/ in the run's folder; for its best/ hub-best/ beside it."""
    picture: bool = True
    """Publish one of the run's pictures, which shows an image of the validation data."""
    upload: bool = False
    """Upload the files, with the token of `hf auth login` or $HF_TOKEN."""
    private: bool = True
    """Create a private repository; one that exists stays as it is."""
    quiet: bool = False
    """Print only warnings, errors and the result."""


def main(argv: list[str] | None = None) -> None:
    """A finished run -> a folder in the Hub's layout, and with --upload a repository."""
    options = parse(Options, argv)
    check_repo(options.repo)
    if not options.run.is_dir():
        what = "is a file" if options.run.is_file() else f"no such folder{sibling(options.run)}"
        raise UserError(f"{options.run}: {what}; give the folder of a finished run, or best/ in it")
    is_written = (options.run / "config.json").is_file()
    folder = written_folder(options) if is_written else write_folder(options)
    if options.upload:
        upload(folder, options)
        console.print(f"uploaded: https://huggingface.co/{options.repo}")


def written_folder(options: Options) -> Path:
    """The folder that an earlier command wrote, to upload it with what was changed since."""
    if not options.upload:
        raise UserError(f"{options.run}: is written already; add --upload, or give the run's folder to write it again")
    written = json.loads((options.run / "config.json").read_bytes()).get("repo")
    if written != options.repo:
        raise UserError(f"--repo {options.repo}: {options.run} was written for {written}; give the run's folder again")
    return options.run


def write_folder(options: Options) -> Path:
    """Write FILES of a run or its best/, and return their folder. Raises UserError if something is not known."""
    best = is_best(options.run)
    run = options.run.resolve().parent if best else options.run
    output = options.output or run / ("hub-best" if best else "hub")
    if output.is_dir() and (others := sorted({path.name for path in output.iterdir()} - {*FILES})):
        raise UserError(f"--output {output}: holds other files ({others[0]}, ..); give a new folder")
    results = read_results(options.run)
    state, metadata = read_safetensors(options.run / "model.safetensors")
    if "detector" not in metadata and "num_classes" not in metadata:
        raise UserError(f"{options.run} holds neither a detector nor a classifier of tools/pretrain.py")
    log = RunLog(run)
    last_step = log.train[-1]["step"] if log.train else 0
    if not best and last_step > max((line["step"] for line in log.evaluations), default=0):
        raise UserError(f"{run}: its training went on after its results; finish it with --resume, or give best/")
    start = log.config.get("weights")
    start_licence = start and licence_of(start)
    licence = options.licence or metadata.get("licence") or start_licence
    if licence in (None, "unknown"):
        raise UserError(f"the licence of {options.run} is not known; give it, for example --licence apache-2.0")
    metadata = {"source": f"hf:{options.repo}", **metadata, "licence": licence}
    config = without_folders(log.config)
    for name in FILES_OF_DATA:  # the card repeats the training with --data, which excludes them
        config.pop(name, None)
    started = f"{config['weights']}, {start_licence or 'of unknown licence'}" if start else "none; they were random"
    shows_these = not best or log.best["step"] == last_step  # the pictures are of the last weights
    pictures = sorted(run.glob("pictures/*.*")) if options.picture and shows_these else []
    facts = training_facts(log, config, f"{log.best['step']}, the best of {last_step}" if best else last_step or None)
    card = model_card(options, metadata, results, facts=facts, started=started, picture=bool(pictures))
    texts = {
        "README.md": str(card),
        "config.json": json.dumps({"format": "resbackbone", "repo": options.repo, **metadata}, indent=2) + "\n",
        "config.yaml": yaml.safe_dump(config, sort_keys=False),
        "results.json": json.dumps(results, indent=2) + "\n",
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    with folder_atomically(output) as folder:
        write_weights(folder / "model.safetensors", state, metadata)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        if pictures:
            Image.open(pictures[0]).convert("RGB").save(folder / "example.jpg", quality=90)
            progress_console.print("example.jpg shows an image of the validation data; --no-picture leaves it out")
    near = nearest(licence, HUB_LICENCES)
    known = licence.lower() in HUB_LICENCES
    note = "" if known else f"; none of the common ones{f'; did you mean {near}?' if near else ''}"
    progress_console.print(f"licence: {licence}{note}")
    console.print(f"folder: {output}")
    return output


def check_repo(repo: str) -> None:
    if repo.count("/") != 1:
        raise UserError(f"--repo {repo}: give owner/name; the owner is you or an organization on the Hub")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--repo {' '.join(str(error).split())}") from None


def read_results(run: Path) -> dict[str, Any]:
    """What was measured of the weights in a run's folder or its best/, without folders in the names of files.

    Raises UserError if nothing was.
    """
    if not (run / "model.safetensors").is_file():
        raise UserError(f"{run} holds no model.safetensors: give the folder of a run that has ended, or its best/")
    home, best = run.resolve().parent, read_best(run.resolve().parent) if is_best(run) else None
    places = [home / "eval-best/results.json", home / "results.json"] if best else [run / "results.json"]
    found = [json.loads(path.read_bytes()) for path in places if path.is_file()]
    if best:  # the others may be of other weights
        kept = best["result"]
        found = [one for one in found if kept.items() <= one.get("bbox", one).items()]
        found.append({"bbox": kept} if "AP" in kept else kept)
    if not found:
        raise UserError(
            f"{run} holds no results.json, so nothing is measured; evaluate it first (tools/evaluate_coco.py)"
        )
    results = found[0]
    if results.get("bbox", {}).get("AP", results.get("top1")) is None:
        raise UserError(f"{run}: its results have neither an AP nor an accuracy; evaluate it on images with objects")
    skipped = {name: lines for name, lines in results.items() if name.startswith("skipped_")}  # image FILE: REASON
    return results | {name: [without_folders(line.split(": ")[0]) for line in lines] for name, lines in skipped.items()}


def without_folders(value: Any, name: str = "") -> Any:
    """A value of config.yaml with paths as the last of their names; named sources and URLs stay, without a query."""
    if isinstance(value, Mapping):
        return {key: without_folders(one, key) for key, one in value.items()}
    if isinstance(value, list):
        return [without_folders(one, name) for one in value]
    if not isinstance(value, str) or name in ("hardware", "resumed"):
        return value
    if name == "command":
        parts = [re.split(r"(^--[\w.-]+=|tools/\w+\.py$)", word) for word in shlex.split(value)]
        return shlex.join("".join([*part[1:2], without_folders(part[-1])]) for part in parts)
    if "://" in value:  # without a user's name and password, and without a query, which may be a key
        url = urlsplit(value)
        return urlunsplit((url.scheme, url.netloc.rpartition("@")[2], url.path, "", ""))
    return value if is_named(value) else re.split(r"[/\\]", value.rstrip("/\\"))[-1]


def licence_of(weights: str) -> str | None:
    """The licence that the publisher of weights states, or their file; None if neither does."""
    scheme, _, name = weights.partition(":")
    if scheme == "timm":
        from timm.models import get_pretrained_cfg  # slow

        return getattr(get_pretrained_cfg(name), "license", None)
    stated = {"torchvision": TORCHVISION_LICENCE, "detectron2": DETECTRON2_LICENCE, "http": None, "https": None}
    if scheme in stated:
        return stated[scheme]
    with suppress(UserError):
        return read_weights(weights).metadata.get("licence")
    return None


def training_facts(log: RunLog, config: Mapping[str, Any], updates: str | int | None) -> dict[str, Any]:
    """The card's table about the training; None is unknown."""
    made = config.get("effective") or {}
    return {
        "command": f"`{made['command']}`" if made.get("command") else None,
        "commit of resbackbone": made.get("commit"),
        "hardware": made.get("hardware"),
        "resumed": "; ".join(made.get("resumed", [])) or None,
        "data": log.data_name(),
        **log.images(),
        "SHA-256 of the annotations or files": next((made[name] for name in made if name.endswith("sha256")), None),
        "recipe": config.get("recipe"),
        "updates": updates,
        "images per update": config.get("batch_size"),
        "time of all updates": duration(log.total("seconds")),
    }


def model_card(options: Options, metadata: Mapping[str, Any], results: Mapping[str, Any], **said: Any) -> ModelCard:
    """README.md: a header that the Hub reads, and the text of templates/model_card.md, which shows what is `said`."""
    detector, trunk, data = metadata.get("detector"), metadata["backbone"], said["facts"]["data"]
    network, name = trunk.get("timm") or architecture_name(trunk), options.repo.partition("/")[2]
    if detector:
        kind = "Cascade R-CNN" if detector["cascade_ious"] else "Faster R-CNN"
        what, classes = f"{kind} ({detector['variant']}) on {network}", [name for _, name in detector["categories"]]
        measured = results["bbox"]
    else:
        kind, what, classes = "classifier", f"{network} classifier", metadata["classes"]
        measured = {name: results[name] for name in METRIC_OF}
    task, licence = "object-detection" if detector else "image-classification", metadata["licence"]
    known = licence.lower() in HUB_LICENCES
    base = re.match(r"hf:([\w.-]+/[\w.-]+)", said["started"])
    header = ModelCardData(
        model_name=name,
        license=licence.lower() if known else "other",
        license_name=None if known else re.sub(r"[^a-z0-9.-]+", "-", licence.lower()),
        library_name="resbackbone",
        pipeline_tag=task,
        tags=["resbackbone", kind.lower().replace(" r-cnn", "-rcnn"), network],
        datasets=options.dataset and [options.dataset],
        base_model=base[1] if base else None,
        eval_results=[
            EvalResult(
                task_type=task,
                dataset_type=options.dataset or data,
                dataset_name=data,
                dataset_split="val",
                metric_type=METRIC_OF.get(metric, metric),
                metric_name=metric,
                metric_value=round(value, 4),
            )
            for metric, value in measured.items()
            if value is not None
        ],
    )
    markdown = ENVIRONMENT.overlay(autoescape=False, finalize=in_markdown, keep_trailing_newline=True)
    text = markdown.get_template("model_card.md").render(
        said,
        repo=options.repo,
        name=name,
        what=what,
        detects=detector is not None,
        classes=classes,
        shown=CLASSES_SHOWN,
        measured=list(measured.items()),
        images=f"{results['images']:,} validation images" if "images" in results else "the validation images",
        per_class=by_falling_ap(results.get("per_class", {})),
        licence=licence,
    )
    return ModelCard(f"---\n{header.to_yaml()}\n---\n\n{text}")


def in_markdown(value: Any) -> Any:
    """Text, in which names of classes and files come, as a cell of a table shows it; code in backticks as it is."""
    if not isinstance(value, str):
        return value
    line = " ".join(value.split()).replace("|", "\\|")
    return line if line.startswith("`") else re.sub(r"([<*`\[])", r"\\\1", line)


def upload(folder: Path, options: Options) -> None:
    """Create the repository, if there is none, and upload the folder. Raises UserError if the Hub does not let us."""
    if get_token() is None:
        raise UserError("--upload: no token for the Hugging Face Hub; run `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    try:
        api.create_repo(options.repo, private=options.private, exist_ok=True)
        message = f"resbackbone {folder.name}"
        api.upload_folder(repo_id=options.repo, folder_path=folder, commit_message=message, allow_patterns=[*FILES])
    except Exception as error:  # of the Hub, or of its HTTP library, which differs by version
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = " ".join(str(error).split()) or type(error).__name__
        advice = "; give a token that may write there, and a --repo of yours" if status in (401, 403) else ""
        raise UserError(f"--upload to {options.repo}: {reason}{advice}; the files are in {folder}") from None


def run() -> None:
    main_of(main)


if __name__ == "__main__":
    run()
