"""Read weights from anywhere; rename their tensors to our names, and convert them to our input."""

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resbackbone.checks import UserError, one_of
from resbackbone.weights.arguments import DILATING_NAMES, stated_by_arguments
from resbackbone.weights.cifar import is_for_cifar
from resbackbone.weights.containers import HEADS, dicts_in, find_trunk, module_of
from resbackbone.weights.detectron2_config import stated_by_detectron2
from resbackbone.weights.file import NOTES, is_index, is_safetensors, read_notes, read_safetensors, read_shards
from resbackbone.weights.formats import EPS, FORMATS, STAGE5
from resbackbone.weights.inputs import (
    BGR_255_WITH_STD,
    INPUT,
    INPUTS,
    STATISTICS,
    check_input,
    describe_input,
    for_canonical_input,
    input_of,
    numbers_of,
    same_input,
    statistics_in,
)
from resbackbone.weights.mmengine import stated_by_meta
from resbackbone.weights.pickles import read_pickle
from resbackbone.weights.sources import locate, recognised
from resbackbone.weights.translate import FIRST, Translated, to_ours
from resbackbone.weights.translate import HEADS as DETECTOR_HEADS

_log = logging.getLogger("resbackbone")  # without a handler, warnings go to stderr, a line each
GIVEN = "the given state dict"
HEAD_NORMS = ("roi_heads.box_head.0.1.weight", "roi_heads.box_head.0.0.1.weight")  # the latter in a cascade
MOST_NAMES = 12  # in one line
DC5_NAME = re.compile(r"(?<![a-z\d])dc5(?![a-z\d])", re.IGNORECASE)  # of detr-r50-dc5-f0fb7ef5.pth
AUTHORS = (None, "Detectron2 Model Zoo", "Caffe2", "torchvision")  # of files of detectron2's ImageNetPretrained


@dataclass(frozen=True)
class Weights:
    """Tensors under our names (a detector's trunk and pyramid start with `backbone.`), and what is known about them.

    metadata: what the file or its publisher states, in the layout of `file.write_weights`.
    source: names the weights in messages. is_file: False for a state dict that the caller passed.
    assumed: what neither the file nor its publisher states.
    format: the one whose names the tensors had ("resbackbone" for ours), or None if no format knows them.
    unknown: keys that the format does not know; they keep their names.
    left_out: tensors that the network implies or only training needs.
    entry, prefix: the part of the file that held the tensors, and how their names began there.
    beside: what else the file holds, by name: other entries, a projection head.
    origins: where each fact is from, by its name in `metadata` or its "backbone", and each assumption:
        {"input": "config.json", "stride_in_1x1": "assumed, as usual for torchvision / timm names"}.
    undecided: settings that the caller has to give, as networks with other values have the same names and shapes.
    """

    state: dict[str, Tensor]
    metadata: dict[str, Any]
    source: str
    is_file: bool = True
    assumed: dict[str, Any] = field(default_factory=dict)
    format: str | None = None
    unknown: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    entry: str = ""
    prefix: str = ""
    beside: tuple[str, ...] = ()
    origins: dict[str, str] = field(default_factory=dict)
    undecided: tuple[str, ...] = ()

    def announce_assumptions(self, **asked: object) -> None:
        """Log, in one line, what is assumed and was not asked for."""
        assumed = {key: value for key, value in self.assumed.items() if asked.get(key) is None}
        said = []
        if "input" in assumed and (self.is_file or assumed["input"] != INPUT):
            said.append(f"an input of {describe_input(assumed['input'])}")
        if "stride_in_1x1" in assumed and self.is_file and has_bottlenecks(self.state):
            said.append(f"the stride in the {'1x1' if assumed['stride_in_1x1'] else '3x3'}")
        if "relu_before_p7" in assumed:
            said.append("no ReLU between p6 and p7")
        if "eps" in assumed:
            said.append(
                f"eps {assumed['eps']:g} (0 if it was trained from torchvision's published detector: then give eps=0.0 "
                "to load_detector or build_resnet_backbone, or convert the file with convert_weights.py --eps 0)"
            )
        if "fpn_norm" in assumed:
            said.append(f"group norms of 32 groups and eps {EPS:g} in the pyramid or box head")
        if "dilate_c5" in assumed:
            said.append("a dilated c5 of stride 16")
        if said:
            title = FORMATS[self.format].title if self.format in FORMATS else "names like ours"
            _log.warning(
                "weights from %s do not state all settings; assuming %s, as usual for %s; if that is not so, give "
                "given_input= or stride_in_1x1= to read_weights, or --input or --stride-in-1x1 to convert_weights.py",
                self.source,
                ", ".join(said),
                title,
            )


WeightSource = str | os.PathLike | Mapping[str, Tensor] | Weights  # what `read_weights` takes


def read_weights(
    source: WeightSource,
    *,
    entry: str | None = None,
    prefix: str | None = None,
    given_input: Mapping | str | None = None,
    stride_in_1x1: bool | None = None,
    dilate_c5: bool | None = None,
    norm: str | None = None,
) -> Weights:
    """Read weights of any known format (`formats.FORMATS`) and convert them to our names and our input.

    source: a file (safetensors, PyTorch, or a pickle of arrays), a folder that transformers or timm wrote, a named
        source or a URL (`sources.locate`), a state dict or checkpoint, or what this function returned before.
    entry, prefix: which trunk to take if a checkpoint holds several: its entry ("teacher", "ema.module"), or how its
        names begin ("module.encoder_q."). By default the only one, or the averaged one (model_ema, state_dict_ema,
        ema); what is left out is named in one line.
    given_input: the input that the weights were trained with, if the file does not state it: "rgb" (0..1,
        ImageNet's mean and std, which is ours), "rgb-255", "bgr-255" (std 1, as MSRA's), "bgr-255-std", or a table in
        the layout of `inputs.INPUT`.
    stride_in_1x1, dilate_c5: as in `build_resnet_backbone`, for weights that do not state them.
    norm: "BN" or "GN" (32 groups), likewise: without running_mean and running_var, GN has to be given or stated.

    No file can run code (`pickles`). Raises ValueError if the source does not exist or is unreadable, if it holds
    several trunks, if a tensor does not hold floating point numbers, and if the input cannot be converted exactly.
    """
    if norm is not None:
        one_of("norm", norm, ("BN", "GN"))
    if isinstance(source, Weights):
        options = {"entry": entry, "prefix": prefix, "given_input": given_input}
        if late := [name for name, value in options.items() if value is not None]:
            raise UserError(
                f"weights from {source.source} are read already: give {', '.join(late)} to the read_weights that reads "
                "the file"
            )
        return _with_given(source, stride_in_1x1=stride_in_1x1, dilate_c5=dilate_c5, norm=norm)
    if isinstance(given_input, str):
        given_input = INPUTS[one_of("input", given_input, INPUTS)]
    content: object
    if isinstance(source, Mapping):
        content, weights = dict(source), Weights({}, _notes_in(source, GIVEN), GIVEN, is_file=False)
    elif isinstance(source, str | os.PathLike):
        content, weights = _read_file(os.fspath(source))
    else:
        named = f'"torchvision:{source}"' if hasattr(source, "url") else "a named source"  # an enum of torchvision
        raise UserError(f"weights of type {type(source).__name__}; give a file, {named} or a state_dict()")
    weights = _with_given(weights, stride_in_1x1=stride_in_1x1, dilate_c5=dilate_c5, norm=norm)
    if weights.format == "resbackbone":
        if (entry, prefix) != (None, None):
            raise UserError(
                f"weights {weights.source!r}: a file of this package holds one network; leave out entry and prefix"
            )
        if given_input not in (None, weights.metadata.get("input", INPUT)):
            raise UserError(f"{weights.source} is a file of this package, which states its input; leave out yours")
        return weights
    part = find_trunk(content, weights.source, entry=entry, prefix=prefix)
    if prefix is None and weights.is_file and DILATING_NAMES.fullmatch(Path(weights.source).stem):
        raise UserError(
            f"weights {weights.source!r}: by its name this is of a segmentation network, whose trunk may dilate its "
            f"last stages; prefix={part.prefix + (part.root or '')!r} takes it as a trunk without dilation"
        )
    beside = part.beside
    try:
        translated = to_ours(part.state)
        if heads := _heads_of_others(translated, part.root):
            beside += dict.fromkeys(part.prefix + module_of(key, part.root or "") for key in heads)
            translated = to_ours({key: tensor for key, tensor in part.state.items() if key not in heads})
    except UserError as error:
        raise UserError(f"weights from {weights.source}: {error}") from None
    outside = part.outside | {part.prefix + key: part.state[key] for key in heads}
    if given_input is None and "input" not in weights.metadata:
        weights = _with_input_of_buffers(weights, {key: x for key, x in outside.items() if _may_normalise(key, x)})
    if beside:
        _log.warning(
            "weights from %s: left out %s%s",
            weights.source,
            ", ".join(beside[:MOST_NAMES]),
            f" and {len(beside) - MOST_NAMES} more" if len(beside) > MOST_NAMES else "",
        )
    weights = replace(
        weights,
        state=translated.state,
        format=translated.format,
        unknown=tuple(translated.unknown),
        left_out=(*part.training, *translated.constants),
        entry=part.entry,
        prefix=part.prefix,
        beside=tuple(beside),
    )
    return weights if weights.format is None else _for_our_input(_in_fp32(weights), given_input, translated.constants)


def _may_normalise(key: str, tensor: Tensor) -> bool:
    """Whether a tensor beside a trunk may be of its input: three numbers of no layer, a convolution to three."""
    layers = ("weight", "weights", "bias")
    adapts = tensor.dim() == 4 and len(tensor) == 3 and tensor.shape[1] <= 4
    return bool(STATISTICS.fullmatch(key)) or adapts or (tensor.numel() == 3 and not key.endswith(layers))


def _with_input_of_buffers(weights: Weights, buffers: dict[str, Tensor]) -> Weights:
    """The weights with the input that buffers state. Raises ValueError if these do not tell it."""
    stated = []
    for pair in statistics_in(buffers):
        mean, std = (numbers_of(buffers[pair[name]]) if name in pair else None for name in ("mean", "std"))
        if mean and std and len(mean) == len(std) == 3 and (given := input_of(mean, std)):
            stated += [given] * 2
    if len(stated) != len(buffers) or any(given != stated[0] for given in stated):
        raise UserError(
            f"weights from {weights.source}: {', '.join([*buffers][:MOST_NAMES])} may state an input that the network "
            "normalises itself; state it: weights=read_weights(FILE, given_input=..), or convert_weights.py --input"
        )
    if not buffers:
        return weights
    names = " and ".join([*buffers][:2])
    metadata = {**weights.metadata, "input": stated[0]}
    return replace(weights, metadata=metadata, origins={**weights.origins, "input": f"{names} in the file"})


def _with_given(weights: Weights, **given: bool | str | None) -> Weights:
    """The weights with what the caller gives in their metadata. Raises ValueError if they state the opposite."""
    stated, metadata = weights.metadata.get("backbone", {}), dict(weights.metadata)
    known = {name: value for name, value in given.items() if value is not None}
    for name, value in known.items():
        if stated.get(name, value) != value:
            raise UserError(
                f"weights from {weights.source} are for {name}={stated[name]} by "
                f"{weights.origins.get(name, 'their metadata')}, but you asked for {name}={value}; leave it out"
            )
    if known:
        metadata["backbone"] = {**stated, **known}
    return replace(weights, metadata=metadata, origins=weights.origins | dict.fromkeys(known, "the caller"))


def backbone_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The backbone's tensors of a detector's state dict (those under `backbone.`), or all of any other."""
    part = {key.removeprefix("backbone."): tensor for key, tensor in state.items() if key.startswith("backbone.")}
    return part or dict(state)


def has_bottlenecks(state: Mapping[str, Tensor]) -> bool:
    """Whether the blocks in `state` are bottlenecks; only these have two places for the stride."""
    return any(key.endswith("layer1.0.conv3.weight") for key in state)


def _heads_of_others(translated: Translated, root: str | None) -> list[str]:
    """The unknown names beside a trunk at `root` that are not a part of it: a projection head, a loss, a decoder.

    There are none in a detector or a pyramid, which keep what they do not know.
    """
    detector = (*DETECTOR_HEADS, "fpn.", "backbone.fpn.")
    if root is None or any(key.startswith(detector) or ".lateral_convs." in key for key in translated.state):
        return []
    return [
        key
        for key in translated.unknown
        if not key.startswith(root)
        or HEADS.fullmatch(key.removeprefix(root).split(".")[0])
        or (STATISTICS.fullmatch(key) and translated.state[key].numel() == 3)
    ]


def _read_file(name: str) -> tuple[object, Weights]:
    """What a file holds, and what is known about it; its weights, if this package wrote it."""
    path, stated = locate(name)
    content: object
    known: dict[str, Any] = {}
    notes: dict[str, Any] | None = None
    try:
        if is_safetensors(path):
            content, notes = state, _ = read_safetensors(path)
            if notes.get("format") == "resbackbone":
                return content, Weights(state, notes, name, format="resbackbone", origins=_origins(notes, "the file"))
        else:
            content, known = read_shards(path) if is_index(path) else read_pickle(path), recognised(path)
    except UserError:
        # Without a published hash, a cut-off download is noticed only here.
        if name.lower().startswith(("http:", "https:", "detectron2:")):
            path.unlink(missing_ok=True)  # another process may have been faster
        raise
    if isinstance(content, dict) and content.get("__author__") not in AUTHORS:
        stated.pop("publisher", None)  # MoCo and SwAV write files named R-50.pkl too
    beside = _stated_beside_detectron2s(content, path, name)
    facts = [
        (beside, ""),
        (_notes_in(content, name) if notes is None else notes, "the file"),
        (stated, ""),
        (known, ""),
    ]
    metadata: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for said, by in facts:  # the later ones count more
        places = _origins(said, by) if by else _origins(said)
        if said is not known:  # whose content shows whose file it is
            _refuse_contradictions(name, (metadata, origins), (said, places))
        backbone = {**metadata.get("backbone", {}), **said.get("backbone", {})}
        metadata |= {**said, "backbone": backbone} if backbone else said
        origins |= places
    return content, Weights({}, metadata, name, origins=origins)


def _refuse_contradictions(name: str, *stated: tuple[Mapping[str, Any], Mapping[str, str]]) -> None:
    """Raise ValueError if two (facts, the place of each) have different values of one fact."""
    (one, one_places), (other, other_places) = stated
    if "input" in one and "input" in other and not same_input(one["input"], other["input"]):
        fact, values = "input", [describe_input(said["input"]) for said in (one, other)]
    else:
        parts = [said.get("backbone", {}) for said in (one, other)]
        kinds = [{**part, "norm": part["norm"] == "GN"} if "norm" in part else part for part in parts]
        differing = (key for key in kinds[0].keys() & kinds[1].keys() if kinds[0][key] != kinds[1][key])
        if (fact := next(differing, "")) == "":
            return
        values = [str(part[fact]) for part in parts]
    raise UserError(
        f"weights {name!r}: {fact} is {values[0]} by {one_places[fact]}, but {values[1]} by {other_places[fact]}; "
        "remove the one that is not of these weights"
    )


def _stated_beside_detectron2s(content: object, path: Path, name: str) -> dict[str, Any]:
    """What detectron2's config.yaml says beside a file with its names."""
    names = (key for _, part in dicts_in(content) for key in part)
    if not any(isinstance(key, str) and key.endswith("stem.conv1.weight") for key in names):
        return {}
    try:
        stated = stated_by_detectron2(path.with_name("config.yaml"))
    except UserError as error:
        raise UserError(f"weights {name!r}: {error}") from None
    if stated:
        _log.warning(
            "weights from %s: input, stride, anchors and thresholds are from detectron2's config.yaml beside it", name
        )
    return stated


def _origins(stated: dict[str, Any], by: str = "its publisher") -> dict[str, str]:
    """{name: who states it} of the facts in `stated`, those of its "backbone" by their own names.

    "stated_by" names who does, and leaves `stated`.
    """
    by = stated.pop("stated_by", by)
    return dict.fromkeys([*stated, *stated.get("backbone", {})], by)


def _notes_in(content: object, source: str) -> dict[str, Any]:
    """What a checkpoint says about its tensors: this package's notes, detectron2's author, mmdetection's config."""
    if not isinstance(content, Mapping):
        return {}
    if isinstance(content.get(NOTES), str):
        return read_notes(content[NOTES])
    if content.get("__author__") == "Detectron2 Model Zoo":
        return {"publisher": "Detectron2 Model Zoo"}
    if content.get("__author__") == "torchvision":  # detectron2's own conversion keeps torchvision's input and stride
        return {"input": INPUT, "backbone": {"stride_in_1x1": False}}
    meta = content["meta"] if isinstance(content.get("meta"), dict) else {}
    arguments = {**content, "meta": {key: x for key, x in meta.items() if key not in ("cfg", "config")}}
    try:
        return {**stated_by_arguments("", arguments), **stated_by_meta(meta)}
    except UserError as error:
        raise UserError(f"weights from {source}: {error}") from None
    except RecursionError:
        raise UserError(f"weights from {source}: a setting in it nests without end") from None


def _in_fp32(weights: Weights) -> Weights:
    state = dict(weights.state)
    for key, tensor in state.items():
        if key.endswith("num_batches_tracked"):
            continue
        plain = tensor.layout == torch.strided and not tensor.is_meta
        if not plain or not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.") if plain else "a sparse or meta tensor"
            raise UserError(f"weights from {weights.source}: {key} holds {kind}, not floating point numbers")
        state[key] = tensor.float()
    return replace(weights, state=state)


def _for_our_input(weights: Weights, given_input: Mapping | None, constants: Mapping[str, Tensor]) -> Weights:
    """Convert the first convolution to `inputs.INPUT`, and record what was known and what is assumed."""
    state, stated = dict(weights.state), weights.metadata.get("backbone", {})
    known, published = FORMATS[weights.format or ""], "publisher" in weights.metadata
    assumed: dict[str, Any] = {}
    undecided: list[str] = []
    stem = state[conv1 := conv1_of(state)]  # no format is known by other names alone
    usual_input, stride_in_1x1 = _usual(weights)
    origins = dict(weights.origins)
    given = weights.metadata.get("input") or _input_of_detectron2(constants, weights.source)
    if given is not None:
        check_input(given)
        origins.setdefault("input", "pixel_mean and pixel_std in the file")
    if given_input is not None:
        check_input(given_input)
        if given is not None and describe_input(given) != describe_input(given_input):
            raise UserError(
                f"weights from {weights.source} are for an input of {describe_input(given)} by {origins['input']}, but "
                f"you gave {describe_input(given_input)}; leave it out to use theirs"
            )
        given, origins["input"] = given_input, "the caller"
    if is_for_cifar(state):  # these keep the input that they were trained with, and nothing is usual for them
        return replace(weights, metadata={**weights.metadata, **({"input": given} if given else {})}, origins=origins)
    mean, std = ({*(given or INPUT)[name]} for name in ("mean", "std"))
    if len(mean) == len(std) == 1 and given_input is None and stem.dim() == 4 and stem.shape[1] != 3:
        _log.warning(
            "weights from %s are for %s channels: give them images normalised with the mean %s and std %s",
            *(weights.source, stem.shape[1], *mean, *std),
        )
        given = INPUT  # no conversion
    if given is None:
        if known.ambiguous and not published:
            raise UserError(
                f"weights from {weights.source} do not state their input, and networks with {known.title} have "
                f"several: read them with read_weights(.., given_input=) {', '.join(INPUTS)} or a table like "
                "weights.INPUT, or convert them once with convert_weights.py --input; the config that trained them "
                "has the order of the channels, mean and std"
            )
        given = usual_input
        if stem.dim() != 4 or stem.shape[1] == 3:  # of other channels, nothing is usual
            assumed["input"] = usual_input
    if weights.format == "detectron2" and "input" not in assumed:  # MSRA's networks; its other ones take torchvision's
        stride_in_1x1 = stride_in_1x1 and list(given["std"]) == [1.0] * 3
    if "stride_in_1x1" not in stated:
        if known.ambiguous and not published and has_bottlenecks(state):
            undecided.append("stride_in_1x1")
        else:
            assumed["stride_in_1x1"] = stride_in_1x1
    if "dilate_c5" not in stated and (_is_detector_on_c5(state) or DC5_NAME.search(Path(weights.source).name)):
        if published:  # all that detectron2's zoo has
            assumed["dilate_c5"] = True
        else:
            undecided.append("dilate_c5")
    if weights.format == "mmdetection" and "relu_before_p7" not in stated and any(".p7." in key for key in state):
        assumed["relu_before_p7"] = False  # mmdetection's default
    norms = [key.removesuffix(".weight") for key in state if key.endswith((".inner_blocks.0.1.weight", *HEAD_NORMS))]
    bare = any(f"{norm}.running_var" not in state for norm in norms)
    if bare and "GN" not in (stated.get("norm"), stated.get("fpn_norm")):
        assumed |= {} if published else {"fpn_norm": "GN"}
    if weights.format == "torchvision" and "eps" not in stated and _has_frozen_norms(state):
        assumed["eps"] = 1e-5  # torchvision's FrozenBatchNorm2d; it sets 0 where it loads its published detectors
    if given != INPUT:
        if stem.dim() != 4 or stem.shape[1] != 3:
            raise UserError(f"weights from {weights.source}: {conv1} is {list(stem.shape)}, not for three colours")
        try:
            state[conv1] = for_canonical_input(stem, given)
        except UserError as error:
            raise UserError(f"weights from {weights.source}: {error}") from None
    facts: dict[str, Any] = {"input": INPUT, "converted_from": {"format": weights.format, "input": given}}
    if cells := [
        tensor.reshape(len(tensor), -1).tolist() for key, tensor in sorted(constants.items()) if ".cell_anchors." in key
    ]:
        facts["anchors"] = cells if all(len(box) == 4 for boxes in cells for box in boxes) else None
        origins["anchors"] = "cell_anchors in the file"
    return replace(
        weights,
        state=state,
        metadata={**weights.metadata, **facts},
        assumed=assumed,
        origins=origins | dict.fromkeys(assumed, f"assumed, as usual for {known.title}"),
        undecided=tuple(undecided),
    )


def _is_detector_on_c5(state: Mapping[str, Tensor]) -> bool:
    """Whether this is a Faster R-CNN on one map of c5, whose stride tensors do not show."""
    fpn_or_c4 = ("backbone.fpn.", f"{STAGE5}layer4.")
    heads = {f"{STAGE5}fc6.weight", f"{STAGE5}0.fc6.weight"}
    return not heads.isdisjoint(state) and not any(key.startswith(fpn_or_c4) for key in state)


def _has_frozen_norms(state: Mapping[str, Tensor]) -> bool:
    """Whether these are a detector's or backbone's tensors and none of its batch norms counts its batches."""
    keys = {key.rpartition(".")[2] for key in state}
    return "running_var" in keys and "num_batches_tracked" not in keys and "fc.weight" not in state


def conv1_of(state: Mapping[str, Tensor]) -> str:
    """The name of the first convolution, which in a detector starts with `backbone.`."""
    return next(name for name in (*FIRST, *(f"backbone.{name}" for name in FIRST)) if name in state)


def _usual(weights: Weights) -> tuple[Mapping, bool]:
    """The input of published networks with these names, and whether they stride in the 1x1.

    Detectron's networks with groups or group norm stride in the 3x3 (FAIR's X-101-32x8d.pkl and R-50-GN.pkl, and what
    detectron2's zoo trained from them). Only X-101-32x8d divides by a standard deviation.
    """
    known, state = FORMATS[weights.format or ""], backbone_part(weights.state)
    if weights.format not in ("detectron2", "msra"):
        return known.input, known.stride_in_1x1
    conv2 = state.get("layer1.0.conv2.weight")
    groups = conv2.shape[0] // max(1, conv2.shape[1]) if conv2 is not None and conv2.dim() == 4 else 1
    divides = groups == 32 and "layer3.35.conv1.weight" not in state  # X-152-32x8d has no deviation
    return BGR_255_WITH_STD if divides else known.input, groups <= 1 and "bn1.running_var" in state


def _input_of_detectron2(constants: Mapping[str, Tensor], source: str) -> dict | None:
    """The input of a detectron2 checkpoint, from its pixel statistics."""
    if not {"pixel_mean", "pixel_std"} <= constants.keys():
        return None
    mean, std = (numbers_of(constants[key]) or [] for key in ("pixel_mean", "pixel_std"))
    if len(mean) == len(std) == 3 and (given := input_of(mean, std)):
        return given
    raise UserError(
        f"weights from {source} have pixel_mean {mean} and pixel_std {std}: only ImageNet's mean, in the order RGB or "
        "BGR, tells the order of the channels and can be converted exactly"
    )
