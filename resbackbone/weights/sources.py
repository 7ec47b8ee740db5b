"""Where weights lie: a file, a folder, or a named source to download, with what its publisher says about it."""

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from resbackbone.atomic import file_digest
from resbackbone.checks import UserError, nearest, require
from resbackbone.compat import check_torchvision
from resbackbone.weights.arguments import refuse_blurring_names
from resbackbone.weights.configs import stated_by_config, stated_by_timm
from resbackbone.weights.download import download
from resbackbone.weights.file import is_ours
from resbackbone.weights.inputs import BGR_255, BGR_255_WITH_STD, INPUT, RGB_255
from resbackbone.weights.zoo import (
    DETECTRON2_FASTER_RCNN,
    DETECTRON2_LICENCE,
    TORCHVISION_LICENCE,
)

_log = logging.getLogger("resbackbone")
# Trained without eps, as in maskrcnn-benchmark; torchvision sets eps to 0 when it loads these.
TORCHVISION_WITHOUT_EPS = (
    "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth",
    "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth",
    "keypointrcnn_resnet50_fpn_coco-fc266e95.pth",
    "retinanet_resnet50_fpn_coco-eeacb38b.pth",
)
# Published files that are recognised by their content, whatever they are called: the first digits of their sha256,
# which torch.hub's convention puts into their names, and what their publisher's code does that tensors do not show.
AKAMASTER = {
    "licence": "BSD-2-Clause",
    "cifar": {"shortcut": "A", "shortcut_padding": "both"},
    "input": INPUT,
    "stated_by": "github.com/akamaster/pytorch_resnet_cifar10, whose file this is by its sha256",
}
DETECTOR_WITHOUT_EPS = {
    "licence": TORCHVISION_LICENCE,
    "backbone": {"stride_in_1x1": False, "eps": 0.0},
    "input": INPUT,
    "stated_by": "torchvision, whose file this is by its sha256",
}
RECOGNISED = {
    **dict.fromkeys(("12fca82f", "d509ac18", "014dd654", "4bfd9763", "1d1ed7c2", "f3b1deed"), AKAMASTER),
    **dict.fromkeys((name[-12:-4] for name in TORCHVISION_WITHOUT_EPS), DETECTOR_WITHOUT_EPS),
}
STRIDE_IN_3X3 = {"stride_in_1x1": False, "eps": 1e-5}
STRIDE_IN_1X1 = {"stride_in_1x1": True, "eps": 1e-5}
LISTED = "resbackbone.weights.list_sources() names those that fit"
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
FOLDER_FILES = tuple(name for file in HUB_FILES for name in (file, f"{file}.index.json"))  # whole, or in shards

DETECTRON2_URL = "https://dl.fbaipublicfiles.com/detectron2/"
# What its configs set for files of its zoo: MSRA's input, and the stride in the 1x1, where they keep the defaults.
_DEFAULT = r"(?:ImageNetPretrained/MSRA/|COCO-|LVISv0\.5-|PascalVOC-|Cityscapes/|Detectron1-)"
DETECTRON2_STATED = {
    r"ImageNetPretrained/torchvision/": (STRIDE_IN_3X3, RGB_255),  # tools/convert-torchvision-to-d2.py
    rf"ImageNetPretrained/FAIR/X-101-32x8d|{_DEFAULT}.*_X_101_32x8d_": (STRIDE_IN_3X3, BGR_255_WITH_STD),
    rf"{_DEFAULT}.*R[-_](?:50|101)": (STRIDE_IN_1X1, BGR_255),
}


Located = tuple[Path, dict[str, Any]]  # a file on this machine, and what its publisher says about it


def is_named(source: str) -> bool:
    """Whether `source` is a name to look up (torchvision:, timm:, hf:, detectron2:, http: or https:) and not a path."""
    return source.partition(":")[0].lower() in _SOURCES and ":" in source


def locate(source: str) -> Located:
    """Return the file of a path or a named source, and what is stated about it; download it if it is not here.

    torchvision:ENUM.MEMBER                 torchvision.models.get_weight, in torch.hub's folder
    timm:ARCHITECTURE[.TAG]                 timm's registry of pretrained models, in the Hugging Face cache
    hf:OWNER/REPO[@REVISION][:FILE]         Hugging Face; FILE is model.safetensors, else pytorch_model.bin. What
                                            tools/publish.py wrote, or transformers or timm
    detectron2:PATH.pkl or CONFIG.yaml      detectron2's model zoo, in the folder detectron2 itself uses
    http(s)://HOST/PATH[#sha256=HEX]        anything else, in torch.hub's folder
    FOLDER                                  as transformers and timm write them, with a config.json
    FILE                                    as it is, with the config.json beside it if these wrote one
    NAME.index.json                         the shards beside it that this index of transformers lists

    What is stated has the layout of our own files' metadata: source and licence (perhaps "unknown") of a named source,
    and backbone (stride_in_1x1, eps), input, classes and recipe if they are known. "stated_by" is who states it, and
    "publisher" whose weights these are if more than their names shows it.

    Raises ValueError if the source does not exist or cannot be downloaded; then it says what to put where.
    """
    scheme, _, name = source.partition(":")
    path = Path(source)
    stated: dict[str, Any] = {}
    try:
        if is_named(source):
            find = _SOURCES[scheme.lower()]
            path, stated = find(source if find is _url else name)
        elif path.is_dir():
            files = [path / name for name in FOLDER_FILES if (path / name).is_file()]
            if not files:
                raise UserError(f"the folder holds no {' and no '.join(FOLDER_FILES)}")
            path, stated = files[0], _stated_beside(files[0])
        elif path.is_file():
            stated = _stated_beside(path)
        elif source.lower() in ("none", "random", "scratch", "false"):
            raise UserError("leave the weights out to start from random ones")
        else:
            raise UserError(
                f"no such file; {_meant(source)}give a weight file (.safetensors, .pth, .pkl, ..), a named source such "
                "as torchvision:ResNet50_Weights.IMAGENET1K_V2, or a URL"
            )
        refuse_blurring_names(source, path)
    except UserError as error:
        raise UserError(f"weights {source!r}: {error}") from None
    if re.fullmatch(r"[RX]-\d+(-\w+)*\.pkl", path.name):
        stated["publisher"] = "detectron2's ImageNetPretrained, by the file's name"
    if path.name in TORCHVISION_WITHOUT_EPS:
        stated["backbone"] = {**STRIDE_IN_3X3, "eps": 0.0}
    return path, stated


def _meant(source: str) -> str:
    """What a name without its scheme may mean, at the beginning of a list of what to give; "" if none is likely."""
    for pattern, meant in (
        (r"(\w+_Weights\.\w+)", r"torchvision:\1"),
        (r"((?:IMAGENET1K|COCO)_\w+|DEFAULT)", r"torchvision:ResNet50_Weights.\1, or another network's"),
        (r"imagenet\w*|pretrained|true", "torchvision:ResNet50_Weights.IMAGENET1K_V1, or another network's"),
        (r"((?:wide_)?resne[tx]t?\d\w*(?:\.\w+)?)", r"timm:\1"),
        (r"([\w-]+/[\w-]*resne[tx][\w.-]*)", r"hf:\1"),
    ):
        if match := re.fullmatch(pattern, source, re.IGNORECASE):
            return f"if a published network is meant: {match.expand(meant)}; else "
    return ""


def _stated_beside(path: Path) -> dict[str, Any]:
    """What the config.json beside a file says. One that other programs wrote is of no concern to other names."""
    if is_ours(path):
        return {}
    if path.name in FOLDER_FILES:
        return stated_by_config(path.parent)
    stated: dict[str, Any] = {}
    if (path.parent / "config.json").is_file() and _torchvision_publishes(path.name):
        _log.warning("weights from %s: torchvision's by name, so the config.json beside it is not used", path)
    elif stated := stated_by_config(path.parent, required=False):
        facts = [*stated.get("backbone", {}), *(["input"] if "input" in stated else [])]
        if facts:
            _log.warning("weights from %s: %s is from %s beside it", path, ", ".join(facts), stated["stated_by"])
    return stated


def _torchvision_publishes(file: str) -> bool:
    if not published_sha256(file) or find_spec("torchvision") is None:
        return False
    check_torchvision()
    return any(member.url.endswith(f"/{file}") for member in _published_by_torchvision())


def _published_by_torchvision() -> Iterator[Any]:
    from torchvision.models import get_model_weights, list_models

    return (member for name in list_models() for member in get_model_weights(name))


def recognised(path: Path) -> dict[str, Any]:
    """What the publisher of a file states, if the file's content is one of RECOGNISED; else nothing."""
    return dict(RECOGNISED.get(file_digest(path)[:8], {}))


def _torchvision(name: str) -> Located:
    check_torchvision()
    import torchvision

    try:
        weights = torchvision.models.get_weight(name)
    except (ValueError, AttributeError, KeyError):
        every = [f"{type(member).__name__}.{member.name}" for member in _published_by_torchvision()]
        meant = nearest(name, every)
        raise UserError(f"torchvision has no such weights; {f'did you mean {meant}?' if meant else LISTED}") from None
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    download(weights.url, path, sha256=published_sha256(path.name))
    stated: dict[str, Any] = {"source": f"torchvision:{weights}", "licence": TORCHVISION_LICENCE}
    stated["stated_by"] = "torchvision's registry"
    if "ResNe" in str(weights):  # other networks have another eps
        stated["backbone"] = dict(STRIDE_IN_3X3)
        preset = weights.transforms()  # a detector's has no mean and std: the detector normalizes, with ImageNet's
        mean, std = getattr(preset, "mean", INPUT["mean"]), getattr(preset, "std", INPUT["std"])
        stated["input"] = {**INPUT, "mean": list(mean), "std": list(std)}
    for ours, theirs in (("classes", "categories"), ("recipe", "recipe")):
        if theirs in weights.meta:
            stated[ours] = weights.meta[theirs]
    return path, stated


def _timm(name: str) -> Located:
    require("train", "timm", user="a timm: source")
    check_torchvision()  # timm imports it
    from timm.models import get_pretrained_cfg

    try:
        config = get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError:
        raise UserError(f"timm has no such weights; {LISTED}") from None
    assert config is not None  # allow_unregistered=False raises instead
    if not config.hf_hub_id:
        raise UserError("timm publishes no weights for it")
    said = stated_by_timm(config.to_dict())
    repository, _, revision = config.hf_hub_id.partition("@")
    _, path = _on_hub(repository, revision or None, [config.hf_hub_filename] if config.hf_hub_filename else HUB_FILES)
    name = f"{config.architecture}.{config.tag}" if config.tag else str(config.architecture)
    return path, {"source": f"timm:{name}", "licence": "unknown", **said, "stated_by": "timm's registry"}


def _hugging_face(name: str) -> Located:
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([^:@]+))?(?::([^:]+))?", name)
    if not match:
        raise UserError("Hugging Face sources are hf:OWNER/REPO[@REVISION][:FILE], such as hf:microsoft/resnet-50")
    repository, revision, file = match.groups()
    folder, path = _on_hub(repository, revision, [file] if file else HUB_FILES)
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    licence = re.match(r"---\n(?:(?!---).*\n)*?license:[ \t]*[\"']?([\w.+-]+)", text)  # in the YAML at its head
    stated = {"source": f"hf:{name}", "licence": licence[1] if licence else "unknown"}
    return path, {**stated, **({} if is_ours(path) else stated_by_config(folder))}


def _on_hub(repository: str, revision: str | None, files: Sequence[str]) -> tuple[Path, Path]:
    """A repository's folder in huggingface_hub's cache, and the first of `files` that it has."""
    require("train", "huggingface_hub", user="a source on the Hugging Face hub")
    import huggingface_hub
    from huggingface_hub import errors

    page = f"https://huggingface.co/{repository}"
    for file in files:
        wanted = [file, "config.json", "preprocessor_config.json", "processor_config.json", "README.md"]
        try:
            folder = Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=wanted))
        except errors.LocalEntryNotFoundError:
            url = huggingface_hub.hf_hub_url(repository, file, revision=revision)
            raise UserError(
                f"{url} could not be downloaded (offline, and not in the cache); download it elsewhere and give the "
                f"path of the downloaded {Path(file).name} instead"
            ) from None
        except Exception as error:  # of the hub, or of its HTTP library, which differs by version
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{page} could not be read: {reason}") from None
        if (folder / file).is_file():
            return folder, folder / file
    raise UserError(
        f"{page} holds no {' and no '.join(files)}, or this machine is offline and only other files are in its cache"
    )


def _detectron2(name: str) -> Located:
    config = name.removesuffix(".yaml")
    if config in DETECTRON2_FASTER_RCNN:
        name = f"{config}/{DETECTRON2_FASTER_RCNN[config][0]}"
    elif not name.endswith(".pkl") or not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", name) or ".." in name:
        raise UserError(
            f"give the path of a .pkl below its download folder, or a Faster R-CNN config of its zoo; {LISTED}"
        )
    # detectron2's own cache (iopath), so that each uses the other's copies
    cache = Path(os.environ.get("FVCORE_CACHE", "~/.torch/iopath_cache")).expanduser()
    path = cache / "detectron2" / name
    md5 = re.search(r"/model_final_([0-9a-f]{6})\.pkl$", name)  # its MODEL_ZOO.md: the digits begin the file's md5
    download(DETECTRON2_URL + name, path, md5=md5[1] if md5 else "")
    stated: dict[str, Any] = {"source": f"detectron2:{name}", "licence": DETECTRON2_LICENCE}
    stated["stated_by"] = stated["publisher"] = "detectron2's model zoo"
    if name.count("/") == 3:  # FOLDER/CONFIG/ID/model_final_MD5.pkl
        stated["recipe"] = f"detectron2 configs/{'/'.join(name.split('/')[:2])}.yaml"
    for pattern, (backbone, given) in DETECTRON2_STATED.items():
        if re.match(pattern, name):
            return path, {**stated, "backbone": dict(backbone), "input": given}
    return path, stated


def _url(source: str) -> Located:
    url, _, fragment = source.partition("#")
    public = url.partition("?")[0]  # a query may be a key, and the source is written into files
    file = re.sub(r"[^\w.+-]", "_", public.rpartition("/")[2])[-100:]
    is_url = re.fullmatch(r"https?://[\w.-]+(:\d+)?/[!-~]*", url, re.ASCII | re.IGNORECASE)
    if not is_url or not file.strip(".") or not re.fullmatch(r"(sha256=[0-9a-fA-F]{8,64})?", fragment):
        raise UserError(
            "a URL is https://HOST/PATH/FILE, in percent-encoded ASCII and without user name and password; "
            "it may end in #sha256= and 8 to 64 hexadecimal digits"
        )
    # One folder for each URL, as several may end in the same name (model_final.pth).
    folder = hashlib.sha256(url.encode()).hexdigest()[:16]
    path = Path(torch.hub.get_dir()) / "resbackbone" / folder / file
    download(url, path, sha256=fragment.removeprefix("sha256=") or published_sha256(file))
    return path, {"source": public, "licence": "unknown"}


def published_sha256(file: str) -> str:
    """The first 8 digits of a file's sha256, or all 64, where its name ends in them (resnet50-0676ba61.pth), else "".

    This is torch.hub's convention, which timm and mmdetection follow: a hyphen, the digits, then .pth (.pt, .th). Eight
    digits that read as a date (-20200130.pth) are no hash.
    """
    date = r"(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])"
    match = re.search(rf"-(?!{date}\.)([0-9a-f]{{64}}|[0-9a-f]{{8}})\.(?:pth?|th)$", file)
    return match[1] if match else ""


_SOURCES: dict[str, Callable[[str], Located]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "hf": _hugging_face,
    "detectron2": _detectron2,
    "http": _url,
    "https": _url,
}
