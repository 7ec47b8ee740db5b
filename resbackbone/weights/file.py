"""Weight files: ours (safetensors with metadata), and plain PyTorch files read without running code."""

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.error import URLError

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from resbackbone.atomic import write_atomically

MEAN = (0.485, 0.456, 0.406)  # ImageNet's, RGB, of values 0..1: the one input every backbone here takes
STD = (0.229, 0.224, 0.225)
INPUT = {"channel_order": "RGB", "range": [0.0, 1.0], "mean": list(MEAN), "std": list(STD)}

# Trained with the eps of maskrcnn-benchmark; torchvision sets it in the model when it loads these.
TORCHVISION_WITHOUT_EPS = {
    f"{kind}_ResNet50_FPN_Weights.COCO_V1" for kind in ("FasterRCNN", "MaskRCNN", "KeypointRCNN", "RetinaNet")
}

# What torch.load raises, by what is wrong with the file.
UNREADABLE = (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError)


class Weights(NamedTuple):
    """Tensors by name, what their file says about them (empty where it says nothing), and a name for messages.

    `is_file` is False for a state dict given as such: its owner knows what it is.
    """

    state: dict[str, Tensor]
    metadata: dict[str, object]
    source: str
    is_file: bool = True


def read_weights(source: str | os.PathLike | Mapping[str, Tensor]) -> Weights:
    """Read weights from a .safetensors, .pth or .pt file, from `torchvision:ENUM.MEMBER`, or from a state dict.

    PyTorch files are read with `weights_only=True`, so that no file can run code; a `state_dict` or `model` entry
    is taken where there is one. Raises ValueError, with a sentence, for a file that is not there or not readable.
    """
    if isinstance(source, Mapping):
        return Weights(dict(source), {}, "the given state dict", is_file=False)
    name = os.fspath(source)
    if name.startswith("torchvision:"):
        name_there = name.removeprefix("torchvision:")
        stated = {"stride_in_1x1": False, "eps": 0.0 if name_there in TORCHVISION_WITHOUT_EPS else 1e-5}
        return Weights(_from_torchvision(name_there), {"backbone": stated}, name)
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"weights {name!r}: no such file; give a .safetensors, .pth or .pt file, or torchvision:NAME")
    if path.suffix == ".safetensors":
        return Weights(*_read_safetensors(path), name)
    if path.suffix in (".pth", ".pt"):
        return Weights(_read_pytorch(path), {}, name)
    raise ValueError(f"weights {name!r}: unknown suffix {path.suffix!r}; choose from .safetensors, .pth, .pt")


def write_weights(path: str | os.PathLike, state: Mapping[str, Tensor], metadata: Mapping[str, object]) -> None:
    """Write a safetensors file, whole or not at all. Metadata values are kept as JSON; the input is added to them."""
    metadata = {"format": "resbackbone", "input": INPUT, **metadata}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    write_atomically(path, save(tensors, {key: json.dumps(value) for key, value in metadata.items()}))


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            text = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"weights {str(path)!r}: not a readable safetensors file ({error})") from None
    metadata = {}
    if "input" in text:  # one of ours
        try:
            metadata = {key: json.loads(value) for key, value in text.items()}
        except json.JSONDecodeError as error:
            raise ValueError(f"weights {str(path)!r}: metadata is not JSON ({error})") from None
        if metadata["input"] != INPUT:
            raise ValueError(f"weights {str(path)!r}: made for input {metadata['input']}, this library feeds {INPUT}")
    return state, metadata


def _read_pytorch(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise ValueError(f"weights {str(path)!r}: not a PyTorch file of plain tensors ({_reason(error)})") from None
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"weights {str(path)!r}: holds no state dict (tensors by name)")
    return dict(state)


def _from_torchvision(name: str) -> dict[str, Tensor]:
    import torchvision

    try:
        weights = torchvision.models.get_weight(name)
    except (ValueError, AttributeError, KeyError):
        raise ValueError(
            f"weights 'torchvision:{name}': torchvision knows no such weights; an example is "
            "torchvision:ResNet50_Weights.IMAGENET1K_V2"
        ) from None
    try:
        return dict(weights.get_state_dict(progress=True, check_hash=True, map_location="cpu", weights_only=True))
    except (URLError, *UNREADABLE) as error:  # no network, another hash, or a broken file where it keeps them
        place = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
        raise ValueError(
            f"weights 'torchvision:{name}': could not be downloaded or read ({_reason(error)}); "
            f"put {weights.url} at {place}"
        ) from None


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
