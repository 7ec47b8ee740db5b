"""Convert weights from any known format to any other, and check that what was written is the same network.

python tools/convert_weights.py --list                                             every named source
python tools/convert_weights.py detectron2:ImageNetPretrained/MSRA/R-50.pkl r50.safetensors
python tools/convert_weights.py fasterrcnn_resnet50_fpn_coco.pth detector.safetensors
python tools/convert_weights.py runs/mine/model.safetensors mine.pkl --to detectron2
"""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from resbackbone.cli.command import Auto, console, main_of, parse

import torch
import tyro
from torch import nn

from detection.faster_rcnn import detector_for
from detection.foreign import describe_detector
from resbackbone import BackboneConfig, ResNetBackbone
from resbackbone.checks import UserError, one_of
from resbackbone.classifier import ResNetClassifier
from resbackbone.resnet import STAGES
from resbackbone.weights import Weights, list_sources, read_weights
from resbackbone.weights.fit import fitting, pyramid_of, resolve_architecture
from resbackbone.weights.formats import FORMATS
from resbackbone.weights.inputs import BGR_255, BGR_255_WITH_STD, INPUT, describe_input
from resbackbone.weights.read import has_bottlenecks
from resbackbone.weights.write import OURS, TARGETS, architecture_name, largest_difference, only_part, write_as

INPUTS = {"rgb": INPUT, "bgr-255": BGR_255, "bgr-255-std": BGR_255_WITH_STD}
TRANSFORMERS_FILES = {"config.json", "preprocessor_config.json", "model.safetensors"}


@dataclass(frozen=True)
class Options:
    """Convert weights between this package, torchvision, timm, detectron2, MSRA, mmdetection and transformers."""

    source: tyro.conf.Positional[Auto[str]] = None
    """A weight file, a folder of transformers, or a named source (torchvision:, timm:, hf:, detectron2:, a URL)."""
    destination: tyro.conf.Positional[Auto[Path]] = None
    """The file to write (.safetensors; for other formats .pth or .pkl too), or a folder for transformers."""
    to: str = OURS
    """resbackbone, torchvision, timm, detectron2, msra, mmdetection or transformers."""
    part: Auto[str] = None
    """backbone (drops a detector's heads) or trunk (drops the pyramid and classifier too). Default: everything."""
    entry: Auto[str] = None
    """Part of a checkpoint to read if it holds several: model, model_ema, .. Default: the averaged weights."""
    input: Auto[str] = None
    """Input of the weights: rgb (0..1, ImageNet mean and std), bgr-255 (std 1, as MSRA's) or bgr-255-std. Default:
    what the file says, or what is usual for its names."""
    stride_in_1x1: Auto[bool] = None
    """Whether the bottlenecks stride in the 1x1. Default: what the file says, or what is usual for its names."""
    depth: Auto[int] = None
    """Depth of the network. Needed only for a trunk whose tensors fit several depths."""
    overwrite: bool = False
    """Replace an existing file or transformers folder."""
    list: bool = False
    """List all named weights with depth, published accuracy and licence, and stop."""


def main(argv: list[str] | None = None) -> None:
    """Read weights, write them in another format, read that back and compare."""
    options = parse(Options, argv)
    if options.list:
        print_sources()
        return
    if not options.source or options.destination is None:
        raise UserError("give SRC and DST: python tools/convert_weights.py SRC DST [--to FORMAT], or --list")
    one_of("format", options.to, TARGETS)
    given = None if options.input is None else INPUTS[one_of("input", options.input, INPUTS)]
    check_destination(options)

    weights = read_weights(options.source, entry=options.entry, given_input=given)
    if weights.format == OURS and given not in (None, INPUT):
        raise UserError(f"{options.source} is a file of this package, for {describe_input(INPUT)}; leave out --input")
    weights = described(weights, options)
    kind, network = network_of(weights)
    fitting(network, weights)
    print_found(weights, kind)
    difference = write_checked(options.destination, weights, options.to)
    console.print(
        f"wrote   {options.destination} ({options.to}), read back: {len(weights.state)} tensors, "
        f"largest relative difference {difference:.1g}"
    )
    print_advice(weights, options)


def check_destination(options: Options) -> None:
    """Raise ValueError unless the destination can be written, before anything is downloaded or read."""
    path = options.destination
    if not path.name:
        raise UserError(f"{path}: give a name to write to")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: no such folder to write into")
    if path.is_dir() and options.to != "transformers":
        raise UserError(f"{path} is a folder; {options.to} needs the name of a file")
    if path.exists() and not options.overwrite:
        raise UserError(f"{path} exists already; --overwrite replaces it")
    if path.is_dir() and (others := sorted({file.name for file in path.iterdir()} - TRANSFORMERS_FILES)):
        raise UserError(f"{path} holds more than transformers' files and is not replaced: {', '.join(others[:3])}")


def described(weights: Weights, options: Options) -> Weights:
    """The requested part of the weights, with everything that was given or assumed in its metadata."""
    if weights.format is None:
        names = ", ".join(list(weights.state)[:3])
        known = ", ".join(dict.fromkeys(known.title for known in FORMATS.values()))
        raise UserError(f"{weights.source}: unknown tensor names ({names}, ..); known formats: {known}")
    hollow = (k for k, x in weights.state.items() if not x.numel() or not (x.dim() or k.endswith("_tracked")))
    if (key := next(hollow, None)) is not None:
        raise UserError(f"{weights.source}: {key} is {list(weights.state[key].shape)}, which no layer has")
    if options.part is not None:
        weights = only_part(weights, options.part)
    metadata = {"source": weights.source, **weights.metadata}
    trunk = resolve_architecture(weights, depth=options.depth, stride_in_1x1=options.stride_in_1x1)
    assumed = {name: value for name, value in weights.assumed.items() if getattr(options, name, None) is None}
    metadata["backbone"] = {**metadata.get("backbone", {}), **trunk}
    weights = replace(weights, metadata=metadata, assumed=assumed)
    if is_detector(weights) and "detector" not in metadata:
        try:
            weights.metadata.update(describe_detector(weights))
        except UserError as error:
            raise UserError(f"{error}; --part backbone converts these") from None
    return weights


def is_detector(weights: Weights) -> bool:
    return any(key.startswith("backbone.") for key in weights.state)


def network_of(weights: Weights) -> tuple[str, nn.Module]:
    """What the weights are of, in words, and that network, without data."""
    state, trunk = weights.state, resolve_architecture(weights)
    with torch.device("meta"):
        if is_detector(weights):
            detector = detector_for(weights)
            return f"Faster R-CNN ({detector.config.variant}, {detector.num_classes} classes)", detector
        if "fc.weight" in state:
            classes = len(state["fc.weight"])
            return f"classifier of {classes} classes", ResNetClassifier(BackboneConfig(**trunk), classes)
        if pyramid := pyramid_of(state):
            return "backbone with pyramid", ResNetBackbone(BackboneConfig(**trunk, **pyramid, fpn=True))
        levels = tuple(level for level, stage in STAGES.items() if any(key.startswith(f"{stage}.") for key in state))
        return "trunk", ResNetBackbone(BackboneConfig(**trunk, levels=levels[-1:]))


def print_found(weights: Weights, kind: str) -> None:
    """Print what the source holds, what it says and what is assumed."""
    trunk, state = weights.metadata["backbone"], weights.state
    title = FORMATS[weights.format].title if weights.format in FORMATS else "a file of this package"
    where = f", in its part {weights.entry}" if weights.entry else ""
    name = architecture_name(trunk) + (" with GN" if trunk["norm"] == "GN" else "")
    console.print(f"found   {title}{where}: {name}, {kind}, {len(state)} tensors")
    if has_bottlenecks({key.removeprefix("backbone."): value for key, value in state.items()}):
        said = ", assumed" if "stride_in_1x1" in weights.assumed else ""
        console.print(f"stride  in the {'1x1' if trunk['stride_in_1x1'] else '3x3'}{said}")
    given = weights.metadata.get("converted_from", {}).get("input", INPUT)
    said = ", assumed" if "input" in weights.assumed else ""
    converted = "" if given == INPUT else f"; converted to {describe_input(INPUT)}"
    console.print(f"input   {describe_input(given)}{said}{converted}")
    if weights.left_out:
        some = ", ".join(weights.left_out[:3]) + (", .." if len(weights.left_out) > 3 else "")
        console.print(
            f"omitted {some} ({len(weights.left_out)} in all): the network implies them, or only training needs them"
        )


def write_checked(path: Path, weights: Weights, format: str) -> float:
    """Write the file, after a trial file read back as the same network. Returns their largest difference."""
    network = resolve_architecture(weights)
    del network["eps"]  # it is in the scales then
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".", suffix=".tmp") as scratch:
        trial = Path(scratch) / path.name
        problem = ""
        try:
            write_as(trial, weights, format)
            problem = f"{path} is not written, as {format} does not hold all of this network: "
            back = read_weights(trial)
            resolve_architecture(back, **network)
            difference, tensor = largest_difference(weights, back)
            if difference > 1e-5:
                raise UserError(f"{tensor} differs by {difference:.1g}")
        except UserError as error:
            raise UserError(problem + str(error).replace(str(trial), str(path))) from None
    write_as(path, weights, format)
    return difference


def print_advice(weights: Weights, options: Options) -> None:
    """Print what another framework must be told to compute the same with what was written."""
    trunk = weights.metadata["backbone"]
    if options.to in ("detectron2", "msra"):
        console.print(
            f"use     MODEL.WEIGHTS {options.destination}, MODEL.RESNETS.DEPTH {trunk['depth']}, "
            f"MODEL.RESNETS.STRIDE_IN_1X1 {trunk['stride_in_1x1']}, and detectron2's default input (BGR, PIXEL_STD 1)"
        )
    elif options.to == "mmdetection":
        style = "caffe" if trunk["stride_in_1x1"] else "pytorch"
        relu = trunk.get("relu_before_p7", True) and any(".extra_blocks.p7." in key for key in weights.state)
        more = ", relu_before_extra_convs=True" if relu else ""
        console.print(f"use     style='{style}', to_rgb=True, mean and std of ImageNet{more}")
    geometry = weights.metadata.get("detector", {}).get("geometry")
    if geometry is not None and options.to != OURS and geometry != FORMATS[options.to].geometry:
        console.print(f"note    made with {geometry}'s RoIAlign and anchors: boxes differ a little in {options.to}")


def print_sources() -> None:
    """All named weights with depth, published accuracy and licence."""
    rows = [("weights", "depth", "what", "accuracy", "licence", "published in")]
    for named in list_sources():
        metric = {"classifier": "top-1", "detector": "box AP"}[named.kind]
        accuracy = "" if named.accuracy is None else f"{named.accuracy:.1f} {metric}"
        rows.append((named.name, str(named.depth), named.kind, accuracy, named.licence, named.published))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:  # a line each, however wide the terminal is: names are there to be copied
        console.print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def run() -> None:
    main_of(main)


if __name__ == "__main__":
    run()
