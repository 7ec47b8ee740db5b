"""Write weights in any known format, and compare what was written with the original."""

import json
import os
import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from resbackbone.atomic import folder_atomically, open_atomically, write_atomically
from resbackbone.checks import UserError, one_of
from resbackbone.resnet import DEPTHS, Bottleneck
from resbackbone.weights.file import NOTES, apart, write_weights
from resbackbone.weights.fit import backbone_part, check_pyramid, resolve_architecture
from resbackbone.weights.formats import EPS, FORMATS
from resbackbone.weights.inputs import INPUT, for_given_input
from resbackbone.weights.read import Weights, conv1_of
from resbackbone.weights.translate import HEADS, from_ours, merged_norms

OURS = "resbackbone"
TARGETS = (OURS, *FORMATS)
TIMM_LETTERS = {("deep", "D"): "d", ("deep", "B"): "c"}  # resnet50d, resnet50c


def write_as(path: str | os.PathLike, weights: Weights, format: str = OURS) -> None:
    """Write `weights`, as `read_weights` returns them, with the names and for the input of `format`.

    Ours is a safetensors file. For foreign formats the suffix of `path` selects the kind: .safetensors, .pth, .pt or
    .bin (PyTorch), or .pkl (detectron2 and msra: arrays in a pickle). transformers gets a folder with config.json that
    `from_pretrained` loads. Foreign files hold our metadata too, where their own readers allow it.

    Raises ValueError if the format cannot hold the network, and if the suffix is unknown.
    """
    one_of("format", format, TARGETS)
    path = Path(path)
    trunk = resolve_architecture(weights)
    metadata = {
        **{
            key: value
            for key, value in weights.metadata.items()
            if key not in ("format", "input", "not_built", "no_pyramid")
        },
        "architecture": architecture_name(trunk),
        "backbone": {**weights.metadata.get("backbone", {}), **trunk},
    }
    if any("fpn.extra_blocks.p7." in key for key in weights.state):
        metadata["backbone"].setdefault("relu_before_p7", weights.assumed.get("relu_before_p7", True))
    if "fc.weight" in weights.state:
        metadata["num_classes"] = len(weights.state["fc.weight"])
    if format == OURS:
        if path.suffix != ".safetensors":
            raise UserError(f"{path}: unknown suffix {path.suffix!r} for resbackbone; choose .safetensors")
        write_weights(path, weights.state, metadata)
        return
    _check_network(metadata["backbone"], format)
    if metadata["backbone"].get("dilate_c5"):
        _check_dilation(path, format, metadata["backbone"], detector=any(k.startswith(HEADS) for k in weights.state))
    if any(metadata.get("detector", {}).get(name) for name in ("image_mean", "image_std")):
        raise UserError(
            f"image_mean and image_std: {format}'s files hold none; keep the detector in a file of this package"
        )
    state, given = dict(weights.state), FORMATS[format].input
    if format == "torchvision" and "roi_heads.box_predictor.0.cls_score.weight" in state:
        raise UserError("torchvision has no Cascade R-CNN; write a file of this package or of detectron2")
    if given != INPUT:
        key = conv1_of(state)
        state[key] = for_given_input(state[key], given)
    state = apart(from_ours(state, format, eps=trunk["eps"]))
    notes = json.dumps({**metadata, "backbone": {**metadata["backbone"], "eps": 1e-5}, "input": given})
    if format == "transformers":
        _write_transformers_folder(path, state, trunk, metadata, notes)
    else:
        _write_file(path, state, format, notes)


def architecture_name(trunk: Mapping[str, Any]) -> str:
    """torchvision's or timm's name for a trunk: resnet50, resnet50d, resnext101_32x8d, wide_resnet50_2, plain34."""
    depth, groups, width = trunk["depth"], trunk["groups"], trunk["width_per_group"]
    depth = f"{depth}{TIMM_LETTERS.get((trunk.get('stem', '7x7'), trunk['shortcut']), '')}"
    if groups > 1:
        return f"resnext{depth}_{groups}x{width}d"
    if width > 64:
        return f"wide_resnet{depth}_{width // 64}"
    return f"{'plain' if trunk['shortcut'] == 'none' else 'resnet'}{depth}"


def largest_difference(a: Weights, b: Weights) -> tuple[float, str]:
    """The largest relative difference between two networks, and the tensor that has it.

    Each difference is relative to the tensor's largest value. Norms are compared as scale and shift, with each side's
    eps. The background's box, which nothing reads, is not compared. Raises ValueError if names or shapes differ.
    """
    first, second = (_comparable(weights) for weights in (a, b))
    if first.keys() != second.keys():
        raise UserError(f"different tensors: {', '.join(sorted(first.keys() ^ second.keys()))}")
    worst = (0.0, "")
    for key, tensor in first.items():
        if tensor.shape != second[key].shape:
            raise UserError(f"{key} is {list(tensor.shape)} and {list(second[key].shape)}")
        if tensor.numel():
            difference = (tensor.double() - second[key].double()).abs().max() / tensor.double().abs().max().clamp(1e-30)
            worst = max(worst, (float(difference), key), key=lambda pair: pair[0])
    return worst


def _comparable(weights: Weights) -> dict[str, Tensor]:
    state = merged_norms(weights.state, eps=resolve_architecture(weights)["eps"])
    for key in [key for key in state if ".box_predictor.bbox_pred." in key]:
        state[key] = state[key][4:]
    return {key: tensor for key, tensor in state.items() if not key.endswith("num_batches_tracked")}


def _check_network(backbone: Mapping[str, Any], format: str) -> None:
    known = FORMATS[format]
    kind = backbone["stem"], backbone["shortcut"]
    if kind != ("7x7", "B") and not (format == "timm" and kind in TIMM_LETTERS):
        also = ", and with stem='deep' and shortcut B or D (ResNet-C and -D)" if format == "timm" else ""
        raise UserError(
            f"stem={kind[0]!r} with shortcut={kind[1]!r}: {format} only has networks with stem 7x7 and shortcut B{also}"
        )
    if backbone["stride_in_1x1"] and DEPTHS[backbone["depth"]][0] is Bottleneck and known.only_3x3_stride:
        raise UserError(f"stride_in_1x1=True: {format}'s networks have the stride in the 3x3")
    if backbone.get("relu_before_p7") is False and known.relu_before_p7:
        raise UserError(f"relu_before_p7=False: {format}'s pyramids have a ReLU between p6 and p7")
    if format == "transformers" and (backbone["groups"], backbone["width_per_group"]) != (1, 64):
        raise UserError("transformers' ResNet has neither groups nor other widths")
    if backbone["norm"] == "GN" and backbone["eps"] != EPS:  # a batch norm's goes into its scales
        raise UserError(f"norm='GN' with eps={backbone['eps']:g}: {format}'s group norms have {EPS:g}")
    if format in ("transformers", "msra") and backbone["norm"] == "GN":
        raise UserError(f"norm='GN': {format} only has networks with batch norms")
    if known.input != INPUT and backbone["in_channels"] != 3:
        raise UserError(f"in_channels={backbone['in_channels']}: {format}'s networks take three colours")


def holds_notes(path: Path, format: str) -> bool:
    """Whether a file of this format holds our metadata, from which this package reads what names do not show."""
    return format != "transformers" and (
        path.suffix == ".safetensors" or format in ("detectron2", "mmdetection", "msra")
    )


def _check_dilation(path: Path, format: str, backbone: Mapping[str, Any], *, detector: bool) -> None:
    """Raise ValueError if readers would take a dilated c5 for another; of a detector on c5, this package asks."""
    if not holds_notes(path, format) and (not detector or format == "transformers"):
        raise UserError(
            f"dilate_c5=True: {path.name} of {format} would not state it, and reads as an undilated network; write a "
            "file of this package, or for torchvision and timm a .safetensors file"
        )
    caffe = DEPTHS[backbone["depth"]][0] is Bottleneck and backbone["stride_in_1x1"]
    if format in ("detectron2", "mmdetection", "msra") and not caffe:
        raise UserError(
            f"dilate_c5=True without bottlenecks that stride in the 1x1: {format} dilates other convolutions of stage "
            "5; write a file of this package, torchvision or timm"
        )


def _write_file(path: Path, state: dict[str, Tensor], format: str, notes: str) -> None:
    suffixes = [".safetensors", ".pth", ".pt", ".bin", *([".pkl"] if format in ("detectron2", "msra") else [])]
    if path.suffix not in suffixes:
        raise UserError(f"{path}: unknown suffix {path.suffix!r} for {format}; choose from {', '.join(suffixes)}")
    if path.suffix == ".safetensors":
        write_atomically(path, save(state, {"format": "pt", NOTES: notes}))
        return
    arrays = path.suffix == ".pkl"
    tensors: dict[str, Any] = {name: tensor.numpy() for name, tensor in state.items()} if arrays else state
    content = {  # torchvision and timm load a bare state dict
        # detectron2's checkpointer then matches names by their ends, which trunks need
        "detectron2": {"model": tensors, "__author__": OURS, "matching_heuristics": True, NOTES: notes},
        "mmdetection": {"meta": {"author": OURS}, "state_dict": tensors, NOTES: notes},
        "msra": {"blobs": tensors, NOTES: notes},
    }.get(format, tensors)
    with open_atomically(path) as file:
        if arrays:
            pickle.dump(content, file)
        else:
            torch.save(content, file)


def _write_transformers_folder(
    path: Path, state: dict[str, Tensor], trunk: Mapping[str, Any], metadata: Mapping[str, Any], notes: str
) -> None:
    if path.suffix:
        raise UserError(f"{path}: transformers reads a folder; give a name without a suffix")
    block, counts = DEPTHS[trunk["depth"]]
    config: dict[str, Any] = {  # where its ResNetConfig has other defaults
        "model_type": "resnet",
        "architectures": ["ResNetForImageClassification" if "classifier.1.weight" in state else "ResNetModel"],
        "num_channels": trunk["in_channels"],
        "hidden_sizes": [width * block.expansion for width in (64, 128, 256, 512)],
        "depths": list(counts),
        "layer_type": "bottleneck" if block is Bottleneck else "basic",
        "downsample_in_bottleneck": trunk["stride_in_1x1"] and block is Bottleneck,
    }
    if names := metadata.get("classes") or [f"LABEL_{i}" for i in range(int(metadata.get("num_classes", 0)))]:
        config["id2label"] = {str(i): name for i, name in enumerate(names)}
        config["label2id"] = {name: i for i, name in enumerate(names)}
    preprocessor = {
        "image_processor_type": "ConvNextImageProcessor",
        "image_mean": INPUT["mean"],
        "image_std": INPUT["std"],
        "size": {"shortest_edge": 224},
        "crop_pct": 0.875,
    }
    with folder_atomically(path) as folder:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
        (folder / "model.safetensors").write_bytes(save(state, {"format": "pt", NOTES: notes}))


def only_part(weights: Weights, part: str) -> Weights:
    """The weights without a detector's heads ("backbone"), or without pyramid and classifier as well ("trunk")."""
    one_of("part", part, ("backbone", "trunk"))
    state = backbone_part(weights.state)
    if part == "trunk":
        state = {key: tensor for key, tensor in state.items() if not key.startswith(("fpn.", "neck.", "fc."))}
    else:
        check_pyramid(weights)
    metadata = {key: value for key, value in weights.metadata.items() if key not in ("detector", "num_classes")}
    return replace(weights, state=state, metadata=metadata, unknown=())
