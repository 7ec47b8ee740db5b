"""Whether weights fit a network: every missing, unexpected or mis-shaped tensor is an error that names it."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from resbackbone.checks import UserError, one_of
from resbackbone.config import ARCHITECTURE, BackboneConfig
from resbackbone.layers import SHORTCUTS, STEMS
from resbackbone.resnet import DEPTHS, BasicBlock, Bottleneck
from resbackbone.weights.read import Weights, backbone_part


def architecture_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of `build_resnet_backbone` that a trunk's names and shapes show.

    These are depth, stem, shortcut, groups, width_per_group, in_channels and norm. A depth outside of DEPTHS is left
    out, and so are shortcuts without parameters (A and none look the same).
    """
    blocks = _blocks(state)
    if not blocks:
        return {}
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    bottleneck = "layer1.0.conv3.weight" in shapes
    found: dict[str, Any] = {}
    if len(depths := _depths(state)) == 1:
        found["depth"] = depths[0]
    projected = {block for block in blocks if f"{block}downsample.0.weight" in shapes}
    if projected:
        found["shortcut"] = "C" if projected == blocks else "B"
    if any(len(shapes.get(f"{block}downsample.1.weight", ())) == 4 for block in blocks):  # behind a pool
        found["shortcut"] = "D"
    for name, stem in (("conv1.weight", "7x7"), ("conv1.0.weight", "deep")):
        if len(shape := shapes.get(name, ())) == 4:
            found |= {"stem": stem, "in_channels": shape[1]}
    if bottleneck and len(conv2 := shapes.get("layer1.0.conv2.weight", ())) == 4 and conv2[1]:
        found |= {"groups": conv2[0] // conv2[1], "width_per_group": conv2[1]}
    if "bn1.weight" in shapes:
        found["norm"] = "BN" if "bn1.running_var" in shapes else "GN"
    return found


def _blocks(trunk: Mapping[str, Tensor]) -> set[str]:
    """How the names of each block begin: `layer1.0.`."""
    return {match[0] for key in trunk if (match := re.match(r"layer[1-4]\.\d+\.", key))}


def _counts(trunk: Mapping[str, Tensor]) -> tuple[int, ...]:
    """The number of blocks in each stage."""
    return tuple(sum(block.startswith(f"layer{i}.") for block in _blocks(trunk)) for i in (1, 2, 3, 4))


def _depths(trunk: Mapping[str, Tensor]) -> list[int]:
    """The depths whose trunk this is, or its first stages."""
    kind, counts = Bottleneck if "layer1.0.conv3.weight" in trunk else BasicBlock, _counts(trunk)
    return [
        depth
        for depth, (block, layers) in DEPTHS.items()
        if block is kind and counts in [(*layers[:n], *[0] * (4 - n)) for n in (1, 2, 3, 4)]
    ]


def pyramid_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of `build_resnet_backbone` that a pyramid's names and shapes show; {} without a pyramid.

    These are levels, fpn_channels, fpn_norm ("FrozenBN" for any batch norm) and p6_from. A p6 that is subsampled p5 has
    no tensors, so the levels include it unless p6 and p7 are convolutions.
    """
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items() if key.startswith("fpn.")}
    laterals = {key.split(".")[2] for key in shapes if key.startswith("fpn.inner_blocks.")}
    outputs = {int(key.split(".")[2]) for key in shapes if key.startswith("fpn.layer_blocks.")}
    convolved = shapes.get("fpn.extra_blocks.p6.weight", ())
    channels = next((shape[0] for key, shape in shapes.items() if key.endswith(".0.weight") and shape), None)
    if channels is None:
        return {}
    levels = {f"p{6 - len(laterals) + i}" for i in outputs}
    norm = "FrozenBN" if "fpn.inner_blocks.0.1.running_var" in shapes else "GN"
    return {
        "levels": sorted(levels | ({"p6", "p7"} if convolved else {"p6"})),
        "fpn_channels": channels,
        "fpn_norm": norm if "fpn.inner_blocks.0.1.weight" in shapes else None,
        "p6_from": "p5" if len(convolved) == 4 and convolved[1] == channels else "c5",
    }


QUESTIONS = {  # what weights of several networks with the same names may leave undecided
    "stride_in_1x1": "bottlenecks stride in the first 1x1 (MSRA's, caffe style, detectron2's default) or in the 3x3 "
    "(torchvision's)",
    "dilate_c5": "c5 is dilated at stride 16 (DC5) or has stride 32",
}
DEFAULTS = {name: getattr(BackboneConfig, name) for name in ARCHITECTURE if name != "depth"}


def resolve_architecture(weights: Weights | None, **asked: Any) -> dict[str, Any]:
    """The ARCHITECTURE of a network for `weights`: what is asked, else what they state, else what is assumed of them.

    Without weights it is what is asked, else DEFAULTS, and `depth` is required. None asks for nothing. Raises
    ValueError if the weights contradict what is asked, and if nothing shows the depth.
    """
    asked = {name: value for name, value in asked.items() if value is not None}
    for name, choices in (("stem", STEMS), ("shortcut", SHORTCUTS)):
        if name in asked:
            one_of(name, asked[name], choices)
    if weights is None:
        one_of("depth", asked.get("depth"), DEPTHS)
        return {name: {**DEFAULTS, **asked}[name] for name in ARCHITECTURE}
    trunk = backbone_part(weights.state)
    if trunk.get("conv1.weight", Tensor()).shape[2:] == (3, 3):
        raise UserError(
            f"weights from {weights.source} are of a network for small images or with a deep stem: conv1 is 3 x 3, and "
            "networks built here have 7 x 7, or three of 3 x 3 under timm's names (conv1.0); build_cifar_resnet builds "
            "the paper's for CIFAR-10, and none of others, such as kuangliu's"
        )
    widths = [trunk[key].shape[0] for k in (0, 3, 6) if (key := f"conv1.{k}.weight") in trunk and trunk[key].dim()]
    if len(widths) == 3 and widths != [32, 32, 64]:
        raise UserError(
            f"weights from {weights.source} have a deep stem of {widths} channels; networks built here have "
            "[32, 32, 64], as timm's resnet50d; from_timm builds its others"
        )
    stated = weights.metadata.get("backbone", {})
    if "timm" in stated:
        raise UserError(
            f"weights from {weights.source} are of a detector on timm's {stated['timm']}, and a ResNet's are needed: "
            "load_detector and --weights of train_coco.py take them"
        )
    stated = {name: stated[name] for name in ARCHITECTURE if name in stated}
    BackboneConfig.from_json({"depth": 50, **stated}, weights.source)
    shown = architecture_of(trunk)
    if shown.get("norm") == "GN" and "GN" not in (stated.get("norm"), asked.get("norm")) and not _publishes_gn(weights):
        said = f" and are said to be for norm={stated['norm']}" if "norm" in stated else ""
        raise UserError(
            f"weights from {weights.source} lack bn1.running_mean and bn1.running_var{said}: if only parameters were "
            "saved, save the network's state_dict(), which has the buffers too; if it has group norms of 32 groups, "
            "give norm='GN' to read_weights or the builder, or --norm GN to convert_weights.py; no other norm without "
            "statistics is supported"
        )
    for name in stated.keys() & shown.keys():
        if not _agree(name, stated[name], shown[name]):
            raise UserError(
                f"weights from {weights.source} are said to be for {name}={stated[name]} by "
                f"{weights.origins.get(name, 'their metadata')}, but their tensors are for {name}={shown[name]}"
            )
    known = {**stated, **shown}
    _ask_undecided(weights, {**known, **asked}, ARCHITECTURE)
    if (known.get("stem"), known.get("shortcut")) == ("7x7", "D") and "shortcut" not in {**stated, **asked}:
        raise UserError(
            f"weights from {weights.source} have something without tensors in front of a shortcut's convolution, and "
            "no deep stem that tells what: give shortcut='D' if it averages 2x2 pixels, as in timm's resnet50d"
        )
    for name, value in asked.items():
        if name in known and not _agree(name, known[name], value):
            raise UserError(
                f"weights from {weights.source} are for {name}={known[name]}, but you asked for {name}={value}; "
                f"leave {name} out to use theirs"
            )
    resolved = {**DEFAULTS, **weights.assumed, **known, **asked}
    if not known and ("depth" not in resolved or not any(key.startswith("layer1.") for key in trunk)):
        names = ", ".join([*list(weights.state)[:3], ".."])
        raise UserError(
            f"weights from {weights.source} hold no ResNet under known names ({names}); if they are of one of timm's "
            "networks, name it too: from_timm(NAME, weights=..), or train_coco.py --backbone timm:NAME"
        )
    if "depth" not in resolved:
        if fits := _depths(trunk):
            raise UserError(
                f"weights from {weights.source} do not show their depth; give it, one of {', '.join(map(str, fits))}"
            )
        kind, block = ("bottleneck", Bottleneck) if "layer1.0.conv3.weight" in trunk else ("basic", BasicBlock)
        listed = ", ".join(f"{d} ({'-'.join(map(str, layers))})" for d, (of, layers) in DEPTHS.items() if of is block)
        raise UserError(
            f"weights from {weights.source} have {'-'.join(map(str, _counts(trunk)))} {kind} blocks in their stages, "
            f"which no depth here has: {listed}; from_timm builds the ResNets of timm"
        )
    return {name: resolved[name] for name in ARCHITECTURE}


def _publishes_gn(weights: Weights) -> bool:
    """Whether names or publisher say that norms without statistics are group norms of 32 groups, as Detectron's."""
    return weights.format == "msra" or weights.metadata.get("publisher") not in (None, "timm", "transformers")


def resolve_dilation(weights: Weights | None, asked: bool | None) -> bool:
    """`dilate_c5`: what is asked, else what the weights state. No tensor shows it."""
    if asked is not None or weights is None:
        return bool(asked)
    known = {**weights.assumed, **weights.metadata.get("backbone", {})}
    _ask_undecided(weights, known, ("dilate_c5",))
    return known.get("dilate_c5", False)


def _ask_undecided(weights: Weights, known: Mapping[str, Any], names: Iterable[str]) -> None:
    for name in names:
        if name in weights.undecided and name not in known:
            option = name.replace("_", "-")
            raise UserError(
                f"weights from {weights.source} do not state whether {QUESTIONS[name]}: give {name}=True or False to "
                f"read_weights or the builder, or convert them once with convert_weights.py --{option} or --no-{option}"
            )


def with_eps(weights: Weights, eps: float) -> Weights:
    """The weights, stating this eps of their norms. Raises ValueError if they state another."""
    stated = weights.metadata.get("backbone", {})
    if weights.format == "resbackbone" and stated.get("eps") != eps or stated.get("eps", eps) != eps:
        raise UserError(
            f"weights from {weights.source} are for eps={stated.get('eps')}, but you asked for eps={eps}; "
            "leave eps out to use theirs"
        )
    metadata = {**weights.metadata, "backbone": {**stated, "eps": eps}}
    assumed = {name: value for name, value in weights.assumed.items() if name != "eps"}
    return replace(weights, metadata=metadata, assumed=assumed, origins={**weights.origins, "eps": "the caller"})


def resolve_pyramid(weights: Weights | None, **asked: Any) -> dict[str, Any]:
    """The pyramid's fields of a BackboneConfig: what is asked (not None), else what the weights state or show."""
    asked = {name: value for name, value in asked.items() if value is not None}
    if weights is None:
        return asked
    check_pyramid(weights)
    stated = weights.metadata.get("backbone", {})
    known = {name: stated.get(name, value) for name, value in pyramid_of(backbone_part(weights.state)).items()}
    relu = stated.get("relu_before_p7", weights.assumed.get("relu_before_p7", True))
    return {"relu_before_p7": relu, **known, **asked}


def check_pyramid(weights: Weights) -> None:
    """Raise ValueError if what the weights state of their pyramid is none that is built here."""
    if stated := weights.metadata.get("no_pyramid"):
        raise UserError(
            f"weights from {weights.source}: {stated}; their trunk can be read alone: leave out fpn=True, or convert "
            "it with convert_weights.py --part trunk"
        )


def _agree(name: str, one: object, other: object) -> bool:
    if name == "norm":  # frozen and synchronised batch norms hold the same tensors
        return (one == "GN") == (other == "GN")
    return one == other


def fit(module: nn.Module, weights: Weights, *, fresh: tuple[str, ...] = ()) -> None:
    """Load `weights` into `module`, all of them into all of it.

    `fresh` are prefixes that the weights may lack altogether (a pyramid on a classifier's trunk); these tensors keep
    their initial values. Raises ValueError and leaves `module` unchanged if the weights do not fit; the message names
    every missing and unexpected key, both shapes of every mis-shaped one, and every tensor with a NaN or an infinity.
    """
    module.load_state_dict(fitting(module, weights, fresh=fresh), strict=False)


def fitting(module: nn.Module, weights: Weights, *, fresh: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The tensors that `fit` would load. Raises its ValueError. `module` may be on the meta device."""
    given = dict(weights.state)
    if callable(adapt := getattr(module, "adapt_state_dict", None)):
        adapt(given)
    wanted = dict(module.state_dict())
    for key in [key for key in {*given, *wanted} if key.endswith("num_batches_tracked")]:
        if key not in given or key not in wanted:  # a counter that nothing reads; frozen norms and many files have none
            given.pop(key, None), wanted.pop(key, None)
    for prefix in fresh:
        if not any(key.startswith(prefix) for key in given):
            wanted = {key: tensor for key, tensor in wanted.items() if not key.startswith(prefix)}

    missing = [key for key in wanted if key not in given]
    folded = [key for key in given if key not in wanted and key.endswith("conv1.bias")]
    if folded and any(key.endswith("bn1.weight") for key in missing):
        raise UserError(
            f"weights from {weights.source} are fused: {folded[0]} holds a norm that was folded into its convolution; "
            "save the weights before fuse() and load those"
        )
    shapes = {key: (list(given[key].shape), list(wanted[key].shape)) for key in wanted if key in given}
    problems = {
        "missing": missing,
        "unexpected": [key for key in given if key not in wanted],
        "of another shape": [f"{key} is {has}, not {needs}" for key, (has, needs) in shapes.items() if has != needs],
        # A network would not always show them: on a CPU a ReLU that is fused to its convolution makes 0 of NaN.
        "with values that are not finite": [key for key in shapes if not given[key].isfinite().all()],
    }
    if found := [f"{len(names)} {kind}: {', '.join(names)}" for kind, names in problems.items() if names]:
        raise UserError(f"weights from {weights.source} do not fit: {'; '.join(found)}")
    return given
