"""Named sources: find or download published weights, with what their publisher says about them."""

import difflib
import hashlib
import json
import os
import re
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urldefrag, urlsplit
from urllib.request import getproxies

import torch

from resbackbone.checks import UserError, require
from resbackbone.weights.download import download
from resbackbone.weights.inputs import BGR_255, BGR_255_WITH_STD, INPUT, RGB_255, check_input
from resbackbone.weights.zoo import (
    DETECTRON2_FASTER_RCNN,
    DETECTRON2_IMAGENET,
    DETECTRON2_LICENCE,
    TORCHVISION_LICENCE,
    detectron2_accuracy,
    torchvision_accuracy,
    torchvision_names,
)

# Trained without eps, as in maskrcnn-benchmark; torchvision sets eps to 0 when it loads these.
TORCHVISION_WITHOUT_EPS = {
    f"{kind}_ResNet50_FPN_Weights.COCO_V1" for kind in ("FasterRCNN", "MaskRCNN", "KeypointRCNN", "RetinaNet")
}
# timm's networks that blur before they subsample. Their tensors have the names and shapes of a ResNet's.
TIMM_ANTI_ALIASED = ("resnetaa", "resnetblur")
STRIDE_IN_3X3 = {"stride_in_1x1": False, "eps": 1e-5}
STRIDE_IN_1X1 = {"stride_in_1x1": True, "eps": 1e-5}

DETECTRON2_URL = "https://dl.fbaipublicfiles.com/detectron2/"
# Folders of its zoo whose configs keep the defaults: MSRA's input, and for the stride in the 1x1.
DETECTRON2_DEFAULT = ("ImageNetPretrained/MSRA/", "COCO-", "LVISv0.5-", "PascalVOC-", "Cityscapes/", "Detectron1-")


class Located(NamedTuple):
    """A file on this machine, and what its publisher says about it, in the layout of our own files' metadata.

    `stated` has source, licence (perhaps "unknown") and accuracy (perhaps []); and url, backbone (stride_in_1x1, eps),
    input, classes and recipe if they are known.
    """

    path: Path
    stated: dict[str, Any]


def is_named(source: str) -> bool:
    """Whether `source` is a name to look up (torchvision:, timm:, hf:, detectron2:, http: or https:) and not a path."""
    return source.partition(":")[0].lower() in _SOURCES and ":" in source


def locate(source: str) -> Located:
    """Return the file of a named source; download it if this machine does not have it.

    torchvision:ENUM.MEMBER                 torchvision.models.get_weight, in torch.hub's folder
    timm:ARCHITECTURE[.TAG]                 timm's registry of pretrained models, in the Hugging Face cache
    hf:OWNER/REPO[@REVISION][:FILE]         Hugging Face; FILE is model.safetensors, else pytorch_model.bin
    detectron2:PATH.pkl or CONFIG.yaml      detectron2's model zoo, in the folder detectron2 itself uses
    http(s)://HOST/PATH[#sha256=HEX]        anything else, in torch.hub's folder

    Raises ValueError if the source does not exist or cannot be downloaded; then it says what to put where.
    """
    if not is_named(source):
        raise UserError(f"weights {source!r}: not a named source; one begins with {':, '.join(_SOURCES)}:")
    scheme, _, name = source.partition(":")
    try:
        return _SOURCES[scheme.lower()](name if scheme.lower() not in ("http", "https") else source)
    except UserError as error:
        raise UserError(f"weights {source!r}: {error}") from None


def locate_in_folder(folder: Path) -> Located:
    """The weights in a folder that transformers wrote, and what its config.json says.

    Raises ValueError if it holds none.
    """
    files = [folder / name for name in HUB_FILES if (folder / name).is_file()]
    try:
        if not files:
            raise UserError(f"the folder holds no {' and no '.join(HUB_FILES)}")
        config, preprocessor = (_json(folder / name) for name in ("config.json", "preprocessor_config.json"))
    except UserError as error:
        raise UserError(f"weights {str(folder)!r}: {error}") from None
    resnet = config.get("model_type") == "resnet"
    return Located(files[0], _stated_by_transformers(config, preprocessor) if resnet else {})


def _torchvision(name: str) -> Located:
    import torchvision

    try:
        weights = torchvision.models.get_weight(name)
    except (ValueError, AttributeError, KeyError):
        example = "torchvision:ResNet50_Weights.IMAGENET1K_V2"
        raise UserError(
            f"torchvision has no such weights; {_close(name, torchvision_names(), f'for example {example}')}"
        ) from None
    file = Path(weights.url).name
    path = Path(torch.hub.get_dir()) / "checkpoints" / file
    download(weights.url, path, sha256=published_sha256(file))
    stated = {
        "source": f"torchvision:{weights}",
        "url": weights.url,
        "licence": TORCHVISION_LICENCE,
        "accuracy": torchvision_accuracy(weights),
    }
    if "ResNe" in str(weights):  # other networks have another eps
        stated["backbone"] = {**STRIDE_IN_3X3, **({"eps": 0.0} if str(weights) in TORCHVISION_WITHOUT_EPS else {})}
        preset = weights.transforms()  # a detector's has no mean and std: the detector normalizes, with ImageNet's
        mean, std = getattr(preset, "mean", INPUT["mean"]), getattr(preset, "std", INPUT["std"])
        stated["input"] = {**INPUT, "mean": list(mean), "std": list(std)}
    for ours, theirs in (("classes", "categories"), ("recipe", "recipe")):
        if theirs in weights.meta:
            stated[ours] = weights.meta[theirs]
    return Located(path, stated)


def _timm(name: str) -> Located:
    require("train", "timm", user="a timm: source")
    from timm.models import get_pretrained_cfg, is_model_in_modules, list_models

    try:
        config = get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError:
        names = [*list_models(module="resnet", pretrained=True), *list_models(module="resnet")]
        raise UserError(
            f"timm has no such weights; {_close(name, names, 'for example timm:resnet50.a1_in1k')}"
        ) from None
    if not is_model_in_modules(name, ("resnet",)):
        raise UserError("not one of timm's ResNets (timm/models/resnet.py); this package reads no others")
    _refuse_anti_aliased(name)
    assert config is not None  # allow_unregistered=False raises instead
    if not config.hf_hub_id:
        raise UserError("timm publishes no weights for it")
    repository, _, revision = config.hf_hub_id.partition("@")
    files = (config.hf_hub_filename,) if config.hf_hub_filename else HUB_FILES
    path = _hub_weights(repository, revision or None, files)
    name = f"{config.architecture}.{config.tag}" if config.tag else str(config.architecture)
    stated = {"source": f"timm:{name}", "url": f"https://huggingface.co/{repository}", "licence": "unknown"}
    return Located(path, {**stated, "accuracy": [], **_stated_by_timm(config.to_dict())})


def _refuse_anti_aliased(architecture: object) -> None:
    if str(architecture).startswith(TIMM_ANTI_ALIASED):
        raise UserError(f"timm's {architecture} blurs its maps before it subsamples them; no network here does")


def _stated_by_timm(config: Mapping) -> dict[str, Any]:
    """What a pretrained_cfg says, from timm's registry or from a config.json."""
    stated = {"backbone": dict(STRIDE_IN_3X3), **_input(config.get("mean"), config.get("std"))}
    if isinstance(config.get("license"), str):
        stated["licence"] = config["license"]
    if isinstance(config.get("label_names"), list | tuple):
        stated["classes"] = [str(name) for name in config["label_names"]]
    if config.get("tag") and config.get("paper_ids"):
        papers = config["paper_ids"]
        stated["recipe"] = f"{config['tag']} ({papers if isinstance(papers, str) else ', '.join(map(str, papers))})"
    return stated


def _hugging_face(name: str) -> Located:
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([^:@]+))?(?::([^:]+))?", name)
    if not match:
        raise UserError("Hugging Face sources are hf:OWNER/REPO[@REVISION][:FILE], such as hf:microsoft/resnet-50")
    repository, revision, file = match.groups()
    # The small files first: if the network fails in between, no weights are read without their description.
    config = _json(_hub_file(repository, revision, "config.json", optional=True))
    card = _hub_file(repository, revision, "README.md", optional=True)
    stated = {
        "source": f"hf:{name}",
        "url": f"https://huggingface.co/{repository}",
        "licence": _licence(card),
        "accuracy": [],
    }
    if config.get("model_type") == "resnet":
        preprocessor = _json(_hub_file(repository, revision, "preprocessor_config.json", optional=True))
        stated |= _stated_by_transformers(config, preprocessor)
    elif "architecture" in config:  # older files have its content at the top
        _refuse_anti_aliased(config["architecture"])
        inner = config.get("pretrained_cfg")
        stated |= _stated_by_timm({**config, **(inner if isinstance(inner, Mapping) else {})})
    return Located(_hub_weights(repository, revision, (file,) if file else HUB_FILES), stated)


def _stated_by_transformers(config: Mapping, preprocessor: Mapping) -> dict[str, Any]:
    stated: dict[str, Any] = {
        "backbone": {**STRIDE_IN_3X3, "stride_in_1x1": config.get("downsample_in_bottleneck") is True}
    }
    if preprocessor.get("do_normalize", True):
        stated |= _input(preprocessor.get("image_mean"), preprocessor.get("image_std"))
    labels = config.get("id2label")
    if isinstance(labels, Mapping) and set(labels) == {str(i) for i in range(len(labels))}:
        names = [str(labels[str(i)]) for i in range(len(labels))]
        if names and names != [f"LABEL_{i}" for i in range(len(names))]:  # what transformers writes for unnamed ones
            stated["classes"] = names
    return stated


HUB_FILES = ("model.safetensors", "pytorch_model.bin")


def _hub_weights(repository: str, revision: str | None, files: Sequence[str]) -> Path:
    for file in files:
        if path := _hub_file(repository, revision, file, optional=True):
            return path
    _hub_file(repository, revision, files[0])  # raises if the machine is offline
    raise UserError(f"https://huggingface.co/{repository} holds no {' and no '.join(files)}")


def _hub_file(repository: str, revision: str | None, file: str, *, optional: bool = False) -> Path | None:
    """The file in huggingface_hub's cache (it locks, resumes and checks), or None if the repository lacks it.

    An `optional` file is also None if it is neither in the cache nor on the network.
    """
    require("train", "huggingface_hub", user="a source on the Hugging Face hub")
    import huggingface_hub
    from huggingface_hub import errors

    try:
        cached_only: dict[str, Any] = {} if _hub_has_an_address() else {"local_files_only": True}
        return Path(huggingface_hub.hf_hub_download(repository, file, revision=revision, **cached_only))
    except errors.LocalEntryNotFoundError:
        if optional:
            return None
        url = huggingface_hub.hf_hub_url(repository, file, revision=revision)
        raise UserError(
            f"{url} could not be downloaded (offline, and not in the cache); download it elsewhere and give the path "
            f"of the downloaded {Path(file).name} instead"
        ) from None
    except errors.EntryNotFoundError:
        return None
    except Exception as error:  # of the hub, or of its HTTP library, which differs by version
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"https://huggingface.co/{repository} could not be read: {reason}") from None


def _hub_has_an_address() -> bool:
    """False on a machine without a network, where huggingface_hub would retry each file for half a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or getproxies():  # a proxy looks names up itself
        return True
    try:
        return bool(socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, None))
    except OSError:
        return False


def _json(path: Path | None) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no such file."""
    if path is None or not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"its {path.name} is not readable JSON ({str(error).splitlines()[0]})") from None
    if not isinstance(content, dict):
        raise UserError(f"its {path.name} holds a {type(content).__name__}, not an object")
    return content


def _licence(card: Path | None) -> str:
    """The `license` in the YAML at the head of a model card, or "unknown"."""
    text = "" if card is None else card.read_text(encoding="utf-8", errors="replace")
    line = re.match(r"---\n(?:(?!---).*\n)*?license:[ \t]*[\"']?([\w.+-]+)", text)
    return line[1] if line else "unknown"


def _detectron2(name: str) -> Located:
    config = name.removesuffix(".yaml")
    if config in DETECTRON2_FASTER_RCNN:
        name = f"{config}/{DETECTRON2_FASTER_RCNN[config][0]}"
    elif not name.endswith(".pkl") or not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", name) or ".." in name:
        known = [*DETECTRON2_IMAGENET, *(f"{config}.yaml" for config in DETECTRON2_FASTER_RCNN)]
        raise UserError(
            "give the path of a .pkl below its download folder, or a Faster R-CNN config of its zoo; "
            + _close(name, known, f"examples are {known[0]} and {known[-1]}")
        )
    # detectron2's own cache (iopath), so that each uses the other's copies
    cache = Path(os.environ.get("FVCORE_CACHE", "~/.torch/iopath_cache")).expanduser()
    path = cache / "detectron2" / name
    md5 = re.search(r"/model_final_([0-9a-f]{6})\.pkl$", name)  # its MODEL_ZOO.md: the digits begin the file's md5
    download(DETECTRON2_URL + name, path, md5=md5[1] if md5 else "")
    stated = {
        "source": f"detectron2:{name}",
        "url": DETECTRON2_URL + name,
        "licence": DETECTRON2_LICENCE,
        "accuracy": detectron2_accuracy(name),
        **_stated_by_detectron2(name),
    }
    if name.count("/") == 3:  # FOLDER/CONFIG/ID/model_final_MD5.pkl
        stated["recipe"] = f"detectron2 configs/{'/'.join(name.split('/')[:2])}.yaml"
    return Located(path, stated)


def _stated_by_detectron2(path: str) -> dict[str, Any]:
    """The input and the stride that detectron2's configs set for a file (its configs/ and config/defaults.py)."""
    if path.startswith("ImageNetPretrained/torchvision/"):  # its tools/convert-torchvision-to-d2.py
        return {"backbone": dict(STRIDE_IN_3X3), "input": dict(RGB_255)}
    if path.startswith("ImageNetPretrained/FAIR/X-101-32x8d") or (
        path.startswith(DETECTRON2_DEFAULT) and "_X_101_32x8d_" in path
    ):
        return {"backbone": dict(STRIDE_IN_3X3), "input": dict(BGR_255_WITH_STD)}
    if path.startswith(DETECTRON2_DEFAULT) and re.search(r"R[-_](50|101)", path):
        return {"backbone": dict(STRIDE_IN_1X1), "input": dict(BGR_255)}
    return {}


def _url(source: str) -> Located:
    try:
        url, fragment = urldefrag(source)
        parts = urlsplit(url)
    except ValueError as error:  # as for https://[host/
        raise UserError(f"not a URL ({error})") from None
    file = re.sub(r"[^\w.+-]", "_", unquote(parts.path).rsplit("/", 1)[-1])[-100:]
    named = parts.hostname and file.strip(".") and re.fullmatch(r"[!-~]+", url)
    if not named or parts.username or parts.password or not re.fullmatch(r"(sha256=[0-9a-fA-F]{8,64})?", fragment):
        raise UserError(
            "a URL is https://HOST/PATH/FILE, in percent-encoded ASCII and without user name and password; "
            "it may end in #sha256= and 8 to 64 hexadecimal digits"
        )
    sha256 = fragment.removeprefix("sha256=") or published_sha256(file)
    # One folder for each URL, as several may end in the same name (model_final.pth).
    folder = hashlib.sha256(url.encode()).hexdigest()[:16]
    path = Path(torch.hub.get_dir()) / "resbackbone" / folder / file
    download(url, path, sha256=sha256)
    public = parts._replace(query="").geturl()  # without the query: it may be a key, and this is written into files
    return Located(path, {"source": public, "url": public, "licence": "unknown", "accuracy": []})


def published_eps(file: str) -> dict[str, float]:
    """{"eps": 0.0} for a file with the name of one of TORCHVISION_WITHOUT_EPS, else nothing."""
    if "_resnet50_fpn_coco-" not in file:  # do not import torchvision for any other
        return {}
    import torchvision

    urls = (torchvision.models.get_weight(name).url for name in TORCHVISION_WITHOUT_EPS)
    return {"eps": 0.0} if any(Path(url).name == file for url in urls) else {}


def published_sha256(file: str) -> str:
    """The first 8 digits of a file's sha256, or all 64, where its name ends in them (resnet50-0676ba61.pth), else "".

    This is torch.hub's convention, which timm and mmdetection follow: a hyphen, the digits, then .pth or .pt. Eight
    digits that read as a date (-20200130.pth) are no hash.
    """
    match = re.search(r"-([0-9a-f]{64}|[0-9a-f]{8})\.pth?$", file)
    if not match or re.fullmatch(r"(19|20)\d\d(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])", match[1]):
        return ""
    return match[1]


def _input(mean: Any, std: Any) -> dict[str, Any]:
    """{"input": RGB in 0..1 with this mean and deviation}, or nothing if they are not three numbers each."""
    given = {**INPUT, "mean": mean, "std": std}
    try:
        check_input(given)
    except UserError:
        return {}
    return {"input": {**given, "mean": list(map(float, mean)), "std": list(map(float, std))}}


def _close(name: str, names: Iterable[str], otherwise: str) -> str:
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    return f"close names are {', '.join(dict.fromkeys(close))}" if close else otherwise


_SOURCES: dict[str, Callable[[str], Located]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "hf": _hugging_face,
    "detectron2": _detectron2,
    "http": _url,
    "https": _url,
}
