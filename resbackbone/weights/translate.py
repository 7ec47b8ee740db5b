"""Rename tensors of a foreign format to our names, and ours to a foreign format's, with one table."""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from resbackbone.checks import UserError, one_of
from resbackbone.weights.formats import (
    ANCHOR_RATIOS,
    CLASSIFIER,
    EPS,
    FORMATS,
    HEADS,
    PYRAMID,
    STAGE5,
    TRUNK,
    Format,
    Place,
)
from resbackbone.weights.names import read_name, write_name


class Rule(NamedTuple):
    """One line of a table: our name, theirs, and how to convert a tensor on reading and on writing."""

    ours: str
    theirs: str
    take: Callable[[Tensor], Tensor] | None = None
    give: Callable[[Tensor], Tensor] | None = None


class Translated(NamedTuple):
    """Tensors under our names; the trunk and pyramid of a detector start with `backbone.`.

    `format` is the format that knows most of the keys, or None if none has a trunk's. `unknown` are the keys that it
    does not know (a mask head's, say); they keep their names. `constants` are tensors that the network implies.
    """

    state: dict[str, Tensor]
    format: str | None
    unknown: list[str]
    constants: dict[str, Tensor]


def to_ours(state: Mapping[str, Tensor]) -> Translated:
    """Find the format of `state` by its names, and rename. Raises ValueError if two names mean one tensor."""
    best: tuple[dict, str, Place, list[str], list[str]] | None = None
    for name, known in FORMATS.items():
        for place in dict.fromkeys((known.bare, known.pyramidal, known.detecting, known.single, *known.elsewhere)):
            found, constants, unknown = _match(state, known, place)
            if any(ours == "conv1.weight" for ours, _ in found.values()) and (
                best is None or len(unknown) < len(best[-1])
            ):
                best = found, name, place, constants, unknown
    if best is None:
        return Translated(dict(state), None, list(state), {})
    found, name, place, constants, unknown = best
    heads = any(not _of_network(ours) for ours, _ in found.values())
    detector = heads or (
        place.trunk.startswith("backbone.") and any(not key.startswith("backbone.") for key in unknown)
    )
    renamed: dict[str, Tensor] = {}
    giver: dict[str, str] = {}
    for theirs, (ours, rule) in found.items():
        ours = f"backbone.{ours}" if detector and _of_network(ours) else ours
        if ours in renamed:
            raise UserError(f"{giver[ours]} and {theirs} both mean {ours}")
        renamed[ours] = state[theirs] if rule.take is None else rule.take(state[theirs])
        giver[ours] = theirs
    if name == "msra":
        _add_merged_statistics(renamed, giver)
    renamed |= {f"backbone.{key}" if key.startswith("neck.") else key: state[key] for key in unknown}
    return Translated(renamed, name, unknown, {key: state[key] for key in constants})


def from_ours(state: Mapping[str, Tensor], format: str, *, eps: float = EPS) -> dict[str, Tensor]:
    """Rename `state`, with our names and norms of `eps`, to the names of `format`.

    Other packages' norms have an eps of 1e-5. If ours differs, their scales change so that the outputs stay. The
    batch counters are dropped if the format has none. Raises ValueError that names every tensor for which the format
    has no name.
    """
    known = FORMATS[one_of("format", format, FORMATS)]
    state = _with_usual_eps(state, eps)
    if format == "msra":
        state = _with_msras_norms(state)
    network = {key.removeprefix("backbone."): tensor for key, tensor in state.items()}
    pyramid = any(key.startswith("fpn.") for key in network)
    if all(_of_network(key) for key in network):
        place = known.pyramidal if pyramid else known.bare
    else:
        place = known.detecting if pyramid else known.single
    rules = list(_rules(known, place, _laterals(network), reading=False))
    renamed, nameless = {}, []
    for key, tensor in network.items():
        if key.endswith("num_batches_tracked") and not known.counts_batches:
            continue
        for rule in rules:
            values = read_name(rule.ours, key)
            if values is not None:
                renamed[write_name(rule.theirs, values)] = tensor if rule.give is None else rule.give(tensor)
                break
        else:
            nameless.append(key)
    if nameless:
        raise UserError(f"the format {format} has no name for {len(nameless)} tensors: {', '.join(nameless)}")
    return renamed


def _match(state: Mapping[str, Tensor], known: Format, place: Place):
    """({their key: (our key, rule)}, constants, unknown keys) of `state` as a file of this format."""
    rules = list(_rules(known, place, _laterals(state), reading=True))
    found: dict[str, tuple[str, Rule]] = {}
    constants: list[str] = []
    unknown: list[str] = []
    for key in state:
        for rule in rules:
            values = read_name(rule.theirs, key)
            if values is not None:
                found[key] = write_name(rule.ours, values), rule
                break
        else:
            (constants if any(read_name(text, key) is not None for text in known.constants) else unknown).append(key)
    return found, constants, unknown


def _rules(known: Format, place: Place, laterals: int, *, reading: bool) -> Iterator[Rule]:
    """The lines of a format's table. Its pyramid merges `laterals` trunk levels: 4 from c2, 3 from c3."""

    def rule(ours: str, theirs: str, *changes) -> Rule:
        theirs = theirs.replace("{level+first}", f"{{level+{6 - laterals}}}")
        return Rule(ours, write_name(theirs, {"count": laterals}), *changes)

    trunk = list(zip(TRUNK, known.trunk, strict=True)) if known.trunk else []
    for ours, theirs in trunk:
        yield rule(ours, place.trunk + theirs)
    if known.classifier:
        yield rule(CLASSIFIER, known.classifier)
    pyramid = list(zip(PYRAMID, known.pyramid, strict=True)) if known.pyramid else []
    for ours, theirs in sorted(pyramid, key=lambda pair: "{count" not in pair[1]):  # a fixed number before any
        yield rule(ours, place.pyramid + theirs)
    for ours, theirs in zip(HEADS, known.heads, strict=True) if known.heads else ():
        yield rule(ours, theirs, *_changes(ours, known))
    for ours, theirs in trunk if known.stage5 else ():
        if ours.startswith("layer"):
            yield rule(STAGE5 + write_name(ours, {"i": 4}), known.stage5 + write_name(theirs, {"i": 4}))
    if reading or not known.trunk:
        for ours, theirs in known.aliases:
            yield rule(ours, (place.pyramid if ours.startswith("fpn.") else "") + theirs)


def _changes(ours: str, known: Format) -> tuple:
    """How to convert a tensor of the heads on reading and on writing."""
    if known.background_last and ".cls_score." in ours:
        return (lambda x: x.roll(1, 0)), (lambda x: x.roll(-1, 0))
    if known.background_last and ".box_predictor.bbox_pred." in ours:
        # Ours has a box for the background, which nothing reads; theirs has none.
        return (lambda x: torch.cat((torch.zeros_like(x[:4]), x))), (lambda x: x[4:])
    if known.sizes_first and ".cls_logits." in ours:
        return (lambda x: _swap_anchors(x, 1, sizes_first=True)), (lambda x: _swap_anchors(x, 1, sizes_first=False))
    if known.sizes_first and "rpn.head.bbox_pred." in ours:
        return (lambda x: _swap_anchors(x, 4, sizes_first=True)), (lambda x: _swap_anchors(x, 4, sizes_first=False))
    return ()


def _swap_anchors(x: Tensor, numbers: int, *, sizes_first: bool) -> Tensor:
    """[anchors * numbers, ...]: reorder a location's anchors from by size to by ratio, or back."""
    sizes = len(x) // numbers // ANCHOR_RATIOS
    if sizes * ANCHOR_RATIOS * numbers != len(x):
        raise UserError(f"a box head for {len(x) // numbers} anchors a location; each size must have three ratios")
    order = (sizes, ANCHOR_RATIOS) if sizes_first else (ANCHOR_RATIOS, sizes)
    return x.unflatten(0, (*order, numbers)).transpose(0, 1).flatten(0, 2)


def _norms(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the batch norms in `state`."""
    return [key.removesuffix(".running_var") for key in state if key.endswith(".running_var")]


def _with_usual_eps(state: Mapping[str, Tensor], eps: float) -> dict[str, Tensor]:
    state = dict(state)
    for norm in _norms(state) if eps != EPS else ():
        variance = state[f"{norm}.running_var"].double()
        scale = state[f"{norm}.weight"].double() * ((variance + EPS) / (variance + eps)).sqrt()
        state[f"{norm}.weight"] = scale.float()
    return state


def _add_merged_statistics(state: dict[str, Tensor], giver: Mapping[str, str]) -> None:
    """Give norms that have only scale and shift the statistics 0 and 1, as detectron2 does when it reads them.

    Its eps is added to that 1, so its scales are smaller by 5e-6 than Caffe2's.
    """
    for key, theirs in giver.items():
        norm = key.removesuffix(".weight")
        if theirs.endswith("_bn_s") and f"{norm}.running_var" not in state:
            state[f"{norm}.running_mean"] = torch.zeros_like(state[key])
            state[f"{norm}.running_var"] = torch.ones_like(state[key])


def _with_msras_norms(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Norms as scale and shift that are right for readers with the statistics 0 and 1 (and eps)."""
    merged = merged_norms(state)
    for norm in _norms(state):
        merged[f"{norm}.weight"] = (merged[f"{norm}.weight"].double() * (1 + EPS) ** 0.5).float()
    return merged


def merged_norms(state: Mapping[str, Tensor], *, eps: float = EPS) -> dict[str, Tensor]:
    """The tensors of `state` with batch norms merged into scale (weight) and shift (bias), computed in fp64."""
    state = dict(state)
    for norm in _norms(state):
        weight, bias, mean, variance = (
            state.pop(f"{norm}.{leaf}").double() for leaf in ("weight", "bias", "running_mean", "running_var")
        )
        scale = weight / (variance + eps).sqrt()
        state[f"{norm}.weight"], state[f"{norm}.bias"] = scale.float(), (bias - mean * scale).float()
    return state


def _of_network(key: str) -> bool:
    """Whether a name of ours belongs to a trunk, its classifier or its pyramid, not to a detector's heads."""
    return not key.startswith(("rpn.", "roi_heads."))


def _laterals(state: Mapping[str, Tensor]) -> int:
    """How many trunk levels a pyramid of any format merges, counted by its 1x1 convolutions; 4 if it has none."""
    marks = ("inner_blocks.", "fpn_lateral", "lateral_convs.")
    levels = {key.split(mark)[1].split(".")[0] for key in state for mark in marks if mark in key}
    return len(levels) or 4
