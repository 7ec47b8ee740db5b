"""Convert weights from any known format to any other, and check that what was written is the same network.

python tools/convert_weights.py --list                                             every named source
python tools/convert_weights.py detectron2:ImageNetPretrained/MSRA/R-50.pkl r50.safetensors
python tools/convert_weights.py fasterrcnn_resnet50_fpn_coco.pth detector.safetensors
python tools/convert_weights.py runs/mine/model.safetensors mine.pkl --to detectron2
python tools/convert_weights.py --explain r50.pth             what is known of it and from where; nothing is written
python tools/convert_weights.py resnet20.th r20.safetensors --shortcut A --shortcut-padding both    a CIFAR network
"""

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from resbackbone.cli.command import Auto, console, main_of, parse

import torch
import tyro
from torch import nn

from detection.config import SHAPE, DetectorConfig
from detection.foreign import add_description, describe_detector
from detection.saved import detector_for
from resbackbone import BackboneConfig, ResNetBackbone
from resbackbone.checks import UserError, one_of
from resbackbone.cifar import (
    CHOICES,
    build_cifar_resnet,
    cifar_facts,
    describe_fact,
    save_cifar_resnet,
    save_for_akamaster,
)
from resbackbone.classifier import ResNetClassifier
from resbackbone.resnet import STAGES
from resbackbone.weights import Weights, list_sources, read_weights
from resbackbone.weights.cifar import is_for_cifar
from resbackbone.weights.fit import architecture_of, fitting, pyramid_of, resolve_architecture
from resbackbone.weights.formats import FORMATS, NAMES
from resbackbone.weights.inputs import INPUT, INPUTS, check_input, describe_input
from resbackbone.weights.names import rename
from resbackbone.weights.read import backbone_part, has_bottlenecks
from resbackbone.weights.write import (
    OURS,
    TARGETS,
    architecture_name,
    holds_notes,
    largest_difference,
    only_part,
    write_as,
)

CIFAR_TARGETS: dict[str, Callable] = {OURS: save_cifar_resnet, "akamaster": save_for_akamaster}
DILATED_IN = {
    "torchvision": "replace_stride_with_dilation=[False, False, True]",
    "timm": "output_stride=16",
    "detectron2": "MODEL.RESNETS.RES5_DILATION 2",
    "msra": "MODEL.RESNETS.RES5_DILATION 2",
    "mmdetection": "strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2)",
}
BOX_CODER = (10.0, 10.0, 5.0, 5.0)  # the weights where bbox_reg_weights is None
TRANSFORMERS_FILES = {"config.json", "preprocessor_config.json", "model.safetensors"}


@dataclass(frozen=True)
class Options:
    """Convert weights between this package, torchvision, timm, detectron2, MSRA, mmdetection and transformers."""

    source: tyro.conf.Positional[Auto[str]] = None
    """A weight file, a folder of transformers, or a named source (torchvision:, timm:, hf:, detectron2:, a URL)."""
    destination: tyro.conf.Positional[Auto[Path]] = None
    """The file to write (.safetensors; for other formats .pth or .pkl too), or a folder for transformers."""
    to: str = OURS
    """resbackbone, torchvision, timm, detectron2, msra, mmdetection or transformers; of CIFAR networks, resbackbone or
    akamaster."""
    part: Auto[str] = None
    """backbone (drops a detector's heads) or trunk (drops the pyramid and classifier too). Default: everything."""
    entry: Auto[str] = None
    """Which entry of a checkpoint to read if it has several trunks: model, ema.module, .. Default: the averaged one."""
    prefix: Auto[str] = None
    """How the names of the trunk begin, if there are several: module.encoder_q., teacher.backbone., .."""
    input: Auto[str] = None
    """Input of the weights: rgb (0..1, ImageNet mean and std), rgb-255, bgr-255 (std 1, as MSRA's) or bgr-255-std.
    Default: what the file says, or what is usual for its names. A CIFAR network keeps its input."""
    mean: Auto[tuple[float, float, float]] = None
    """Mean of each channel, in the order and range of --input (default: rgb). CIFAR networks have various ones."""
    std: Auto[tuple[float, float, float]] = None
    """Standard deviation of each channel, likewise."""
    stride_in_1x1: Auto[bool] = None
    """Whether the bottlenecks stride in the 1x1. Default: what the file says, or what is usual for its names."""
    dilate_c5: Auto[bool] = None
    """Whether a detector on c5 alone has it dilated, at stride 16 (DC5). Default: what the file says."""
    eps: Auto[float] = None
    """eps of the norms. Default: what the file says, else 1e-5 (detectors trained from torchvision's published: 0)."""
    norm: Auto[str] = None
    """BN or GN (32 groups). Needed only for a file with group norms that does not state them."""
    depth: Auto[int] = None
    """Depth of the network. Needed only for a trunk whose tensors fit several depths."""
    shortcut: Auto[str] = None
    """A, B, C, D or none. Default: what the file says. Tensors show B, C and D."""
    shortcut_padding: Auto[str] = None
    """Where shortcut A of a CIFAR network has its zero channels: end, or both (half of them on each side)."""
    explain: bool = False
    """Print what is known of SRC, where each fact comes from and what is assumed, and stop. DST is not needed."""
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
    if not options.source or (options.destination is None and not options.explain):
        raise UserError(
            "give SRC and DST: python tools/convert_weights.py SRC DST [--to FORMAT], or --explain SRC, or --list"
        )
    one_of("format", options.to, dict.fromkeys((*TARGETS, *CIFAR_TARGETS)))
    given = input_of(options)
    if not options.explain:
        check_destination(options)

    weights = read_weights(
        options.source,
        entry=options.entry,
        prefix=options.prefix,
        given_input=given,
        dilate_c5=options.dilate_c5,
        norm=options.norm,
    )
    if options.explain:
        explain(weights, options)
        return
    if is_for_cifar(weights.state):
        convert_cifar(weights, options)
        return
    one_of(f"format for {options.source}", options.to, TARGETS)
    weights = described(weights, options)
    kind, network = network_of(weights)
    fitting(network, weights)
    print_found(weights, kind)
    difference, unstated = write_checked(options.destination, weights, options.to)
    console.print(
        f"wrote   {options.destination} ({options.to}), read back: {len(weights.state)} tensors, "
        f"largest relative difference {difference:.1g}"
    )
    print_advice(weights, options)
    if unstated:
        console.print(f"note    {options.to} has other settings: set there {', '.join(unstated)}")


def input_of(options: Options) -> dict | None:
    """The input that --input, --mean and --std give, or None."""
    given = None if options.input is None else INPUTS[one_of("input", options.input, INPUTS)]
    if options.mean is None and options.std is None:
        return given
    if options.mean is None or options.std is None:
        raise UserError("--mean and --std belong together: give three numbers for each")
    given = {**(given or INPUT), "mean": list(options.mean), "std": list(options.std)}
    check_input(given)
    return given


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
        names = [key for key in weights.state if all(rename(key, name, name) is None for name in NAMES)]
        some = ", ".join((names or list(weights.state))[:3])
        known = ", ".join(dict.fromkeys(known.title for known in FORMATS.values()))
        raise UserError(
            f"{weights.source}: unknown tensor names ({some}, ..); known formats: {known}; from_timm builds other "
            "networks of timm"
        )
    hollow = (k for k, x in weights.state.items() if not x.numel() or not (x.dim() or k.endswith("_tracked")))
    if (key := next(hollow, None)) is not None:
        raise UserError(f"{weights.source}: {key} is {list(weights.state[key].shape)}, which no layer has")
    if options.part is not None:
        weights = only_part(weights, options.part)
    metadata = {"source": weights.source, **weights.metadata}
    if options.shortcut_padding is not None:
        raise UserError(f"--shortcut-padding is for CIFAR networks, and {weights.source} has none")
    asked = {name: getattr(options, name) for name in ("depth", "stride_in_1x1", "eps", "shortcut")}
    trunk = resolve_architecture(weights, **asked)
    assumed = {name: value for name, value in weights.assumed.items() if getattr(options, name, None) is None}
    metadata["backbone"] = {**metadata.get("backbone", {}), **trunk}
    weights = replace(weights, metadata=metadata, assumed=assumed)
    if is_detector(weights) and "detector" not in metadata:
        try:
            add_description(weights)
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
    name = architecture_name(trunk) + (" with GN" if trunk["norm"] == "GN" else "")
    console.print(f"found   {title_of(weights)}: {name}, {kind}, {len(state)} tensors")
    if has_bottlenecks({key.removeprefix("backbone."): value for key, value in state.items()}):
        said = ", assumed" if "stride_in_1x1" in weights.assumed else ""
        console.print(f"stride  in the {'1x1' if trunk['stride_in_1x1'] else '3x3'}{said}")
    if "eps" in weights.assumed:
        console.print(
            f"eps     {trunk['eps']:g}, assumed (--eps 0 if it was trained from torchvision's published detector)"
        )
    given = weights.metadata.get("converted_from", {}).get("input", INPUT)
    said = ", assumed" if "input" in weights.assumed and trunk["in_channels"] == 3 else ""
    converted = "" if given == INPUT else f"; converted to {describe_input(INPUT)}"
    console.print(f"input   {input_in_words(weights)}{said}{converted}")
    print_left_out(weights)


def input_in_words(weights: Weights) -> str:
    """The input that the network was trained with."""
    if (channels := weights.metadata["backbone"]["in_channels"]) != 3:
        return f"{channels} channel{'s' * (channels > 1)}, as in its training"
    return describe_input(weights.metadata.get("converted_from", {}).get("input", INPUT))


def print_left_out(weights: Weights) -> None:
    if weights.left_out:
        some = ", ".join(weights.left_out[:3]) + (", .." if len(weights.left_out) > 3 else "")
        console.print(
            f"omitted {some} ({len(weights.left_out)} in all): the network implies them, or only training needs them"
        )


def write_checked(path: Path, weights: Weights, format: str) -> tuple[float, list[str]]:
    """Write the file, after a trial file read back as the same network.

    Returns their largest difference, and the settings of a detector that the format does not state.
    """
    network = resolve_architecture(weights)
    del network["eps"]  # it is in the scales then
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".", suffix=".tmp") as scratch:
        trial = Path(scratch) / path.name
        problem = ""
        try:
            write_as(trial, weights, format)
            problem = f"{path} is not written, as {format} does not hold all of this network: "
            back = read_weights(trial, norm="GN" if network["norm"] == "GN" else None)  # names do not show it
            resolve_architecture(back, **network)
            difference, tensor = largest_difference(weights, back)
            if difference > 1e-5:
                raise UserError(f"{tensor} differs by {difference:.1g}")
            unstated = unstated_settings(weights, back, format)
            lost = [unstated[name] for name in (*SHAPE, "bbox_reg_weights") if name in unstated]
            if lost and not holds_notes(path, format):
                raise UserError(
                    f"its files do not state {', '.join(lost)}; keep a file of {OURS}, or write a .safetensors file"
                )
        except UserError as error:
            raise UserError(problem + str(error).replace(str(trial), str(path))) from None
    write_as(path, weights, format)
    return difference, list(unstated.values())


def unstated_settings(weights: Weights, back: Weights, format: str) -> dict[str, str]:
    """{name: its value and the usual one} of a detector's settings in inference that files of `format` do not state."""
    if format == OURS or "detector" not in weights.metadata:
        return {}
    metadata = {"backbone": weights.metadata["backbone"]}
    usual = describe_detector(replace(back, metadata=metadata, undecided=()))["detector"]
    ours, theirs = (
        DetectorConfig.from_json(settings, weights.source).to_json()
        for settings in (weights.metadata["detector"], usual)
    )
    for settings in (ours, theirs):
        settings["bbox_reg_weights"] = tuple(settings["bbox_reg_weights"] or BOX_CODER)
    training = re.compile(
        r".*(_train|_fg_iou_thresh|_bg_iou_thresh|_per_image|_positive_fraction)|resize_in_training|box_norm"
    )
    return {
        name: "its categories" if name == "categories" else f"{name} {ours[name]} (usual: {theirs[name]})"
        for name in ours
        if ours[name] != theirs[name] and name != "geometry" and not training.fullmatch(name)  # `print_advice` has it
    }


def convert_cifar(weights: Weights, options: Options) -> None:
    """Write a CIFAR network, after a trial file read back as the same network."""
    for name in ("part", "stride_in_1x1", "dilate_c5", "eps", "norm"):
        if getattr(options, name) is not None:
            raise UserError(
                f"--{name.replace('_', '-')} is for ImageNet's networks; {weights.source} has one for CIFAR"
            )
    write = CIFAR_TARGETS[one_of("format of a CIFAR network", options.to, CIFAR_TARGETS)]
    path, suffixes = options.destination, (".safetensors",) if options.to == OURS else (".th", ".pth", ".pt")
    if path.suffix not in suffixes:
        raise UserError(f"{path}: unknown suffix {path.suffix!r} for {options.to}; choose from {', '.join(suffixes)}")
    asked = {name: getattr(options, name) for name in ("depth", "shortcut", "shortcut_padding")}
    model = build_cifar_resnet(weights=replace(weights, is_file=False), **asked)
    if model.input is None:
        raise UserError(f"{weights.source} does not state its input; give --mean and --std of its training, for 0..1")
    print_facts({**format_of(weights), **cifar_facts(weights, **asked)})
    print_left_out(weights)
    said = {"source": weights.source, **weights.metadata}
    said = {name: said[name] for name in ("source", "licence", "classes", "recipe") if name in said}
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".", suffix=".tmp") as scratch:
        trial = Path(scratch) / path.name
        write(model, trial, **said)
        back = build_cifar_resnet(weights=replace(read_weights(trial), is_file=False))
        ours, theirs = model.state_dict(), back.state_dict()
        if back.config != model.config or any(not torch.equal(ours[key], theirs[key]) for key in ours):
            raise UserError(f"{path} is not written: it does not read back as the same network")
    write(model, path, **said)
    console.print(f"wrote   {path} ({options.to}), read back: {len(ours)} tensors, the same")


def explain(weights: Weights, options: Options) -> None:
    """Print the facts about weights and where each is from. Then raises ValueError if they do not fit their network."""
    if is_for_cifar(weights.state):
        asked = {name: getattr(options, name) for name in ("depth", "shortcut", "shortcut_padding")}
        facts = cifar_facts(weights, **asked)
        unknown = f"not known; needed to convert or build it: {CHOICES}"
        facts.setdefault("shortcut", ("?", unknown))
        if facts["shortcut"][0] == "A":
            facts.setdefault("shortcut_padding", ("?", unknown))
        facts.setdefault("input", ("?", "not known; needed to convert it: --mean and --std"))
        print_facts({**format_of(weights), **facts})
        print_left_out(weights)
        return
    backbone = backbone_part(weights.state)
    shown = architecture_of(backbone) | pyramid_of(backbone)
    weights = described(weights, options)
    kind, network = network_of(weights)
    print_found(weights, kind)
    trunk = weights.metadata["backbone"]
    origins = dict.fromkeys(trunk, "default") | weights.origins | dict.fromkeys(shown, "the tensors")
    if trunk["norm"] != shown.get("norm"):
        origins["norm"] = weights.origins.get("norm", "default for a BN with weights")
    for name in origins.keys() & vars(options).keys() - {"source", "norm"}:
        if getattr(options, name) is not None:
            origins[name] = "the caller"
        elif origins[name].startswith(("assumed", "default")) and name not in shown:
            origins[name] += f"; --{name.replace('_', '-')} changes it"
    facts = {name: (value, origins[name]) for name, value in trunk.items() if name != "version"}
    facts["input"] = input_in_words(weights), origins.get("input", "the file")
    if "detector" in weights.metadata:
        detector, foreign = weights.metadata["detector"], weights.format != OURS
        by = f"the tensors, and what is usual for {FORMATS[weights.format or ''].title}" if foreign else "the file"
        config = DetectorConfig.from_json(detector, weights.source).to_json()
        facts |= {name: (config[name], by if name in detector else "default") for name in config if name != "version"}
    for name in ("classes", "source", "licence", "recipe"):
        if name in weights.metadata:
            facts[name] = weights.metadata[name], origins.get(name, "the file" if name != "source" else "the caller")
    print_facts(facts)
    fitting(network, weights)


def format_of(weights: Weights) -> dict[str, tuple[str, str]]:
    """The fact of which format the weights have."""
    return {"format": (title_of(weights), "the names of the tensors" if weights.format in FORMATS else "the file")}


def title_of(weights: Weights) -> str:
    """The format of weights in words, and where in the file they are."""
    title = FORMATS[weights.format].title if weights.format in FORMATS else "a file of this package"
    part = f", in its part {weights.entry}" if weights.entry else ""
    return title + part + (f", under {weights.prefix}" if weights.prefix else "")


def print_facts(facts: Mapping[str, tuple[Any, str]]) -> None:
    """A line for each fact: its name, its value, and where it is from."""
    rows = []
    for name, (value, origin) in facts.items():
        if name in ("classes", "categories"):
            value = f"{len(value)} names"
        rows.append((name, describe_fact(name, value) if isinstance(value, Mapping) else str(value), origin))
    print_table(rows)


def print_table(rows: Sequence[tuple[str, ...]]) -> None:
    """Print each row on one line, however wide the terminal is: names are there to be copied."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        console.print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_advice(weights: Weights, options: Options) -> None:
    """Print what another framework must be told to compute the same with what was written."""
    trunk = weights.metadata["backbone"]
    if trunk.get("dilate_c5") and options.to in DILATED_IN:
        console.print(f"use     {DILATED_IN[options.to]}, for the dilated c5")
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
    print_table(rows)


def run() -> None:
    main_of(main)


if __name__ == "__main__":
    run()
