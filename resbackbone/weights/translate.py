"""Rename tensors of a foreign format to our names, and ours to a foreign format's, with one table."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from resbackbone.checks import UserError, one_of
from resbackbone.weights.formats import ANCHOR_RATIOS, EPS, FORMATS, NAMES, RESNET_D, STAGE5, Format
from resbackbone.weights.names import rename

FIRST = ("conv1.weight", "conv1.0.weight")  # the first convolution, of a 7x7 stem or a deep one
HEADS = ("rpn.", "roi_heads.")  # how our names of a detector's heads begin
Convert = Callable[[Tensor], Tensor]


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
    best: tuple[str, str, dict[str, tuple[str, Convert]]] | None = None
    for format, known in FORMATS.items():
        for place in dict.fromkeys(known.places):
            found = _renamed(state, _rules(known, place, _laterals(state), reading=True))
            first = next((theirs for theirs, (ours, _) in found.items() if ours in FIRST), None)
            # Whole names that are ours, which are torchvision's, are nobody else's: it comes first.
            if first and (best is None or (first not in FIRST and len(found) > len(best[2]))):
                best = format, place[0], found
    if best is None:
        return Translated(dict(state), None, [], {})
    format, trunk, found = best
    if {"layer1.0.downsample.0.weight", "layer2.0.downsample.2.weight"} <= {ours for ours, _ in found.values()}:
        # Where nothing strides, mmpretrain's ResNet-D has no pool, and its names have another place.
        block = "layer1.0.downsample."
        places = f"{block}{{k}}.{{leaf}}", f"{block}{{k+1}}.{{leaf}}"
        found = {theirs: (rename(ours, *places) or ours, convert) for theirs, (ours, convert) in found.items()}
    templates = FORMATS[format].constants
    constants = {key: state[key] for key in state if any(rename(key, template, template) for template in templates)}
    unknown = [key for key in state if key not in found and key not in constants]
    detector = any(ours.startswith(HEADS) for ours, _ in found.values()) or (
        trunk.startswith("backbone.") and any(not key.startswith("backbone.") for key in unknown)
    )
    renamed: dict[str, Tensor] = {}
    giver: dict[str, str] = {}
    for theirs, (ours, convert) in found.items():
        ours = f"backbone.{ours}" if detector and not ours.startswith(HEADS) else ours
        if ours in giver and torch.equal(state[giver[ours]], state[theirs]):
            continue  # a tensor with two names
        if ours in renamed or ours in unknown:
            raise UserError(f"{giver.get(ours, ours)} and {theirs} both mean {ours}")
        try:
            renamed[ours] = convert(state[theirs])
            giver[ours] = theirs
        except UserError:  # of another detector's head, beside a trunk that can be read
            unknown.append(theirs)
    for ours, theirs in giver.items():
        mean, variance = (ours.removesuffix("weight") + leaf for leaf in ("running_mean", "running_var"))
        if theirs.endswith("_bn_s") and not {mean, variance} & renamed.keys():
            # MSRA's are merged, so 0 and 1, as detectron2 reads them. It adds eps to the 1: scales fall by 5e-6.
            renamed[mean], renamed[variance] = torch.zeros_like(renamed[ours]), torch.ones_like(renamed[ours])
    renamed |= {f"backbone.{key}" if key.startswith("neck.") else key: state[key] for key in unknown}
    return Translated(renamed, format, unknown, constants)


def from_ours(state: Mapping[str, Tensor], format: str, *, eps: float = EPS) -> dict[str, Tensor]:
    """Rename `state`, with our names and norms of `eps`, to the names of `format`.

    Other packages' norms have an eps of 1e-5. If ours differs, their scales change so that the outputs stay. The
    batch counters are dropped if the format has none. Raises ValueError that names every tensor for which the format
    has no name.
    """
    known = FORMATS[one_of("format", format, FORMATS)]
    state = _with_usual_eps(state, eps)
    if format == "msra":  # scale and shift; readers add the statistics 0 and 1, and eps
        norms, state = _norms(state), merged_norms(state)
        for norm in norms:
            state[f"{norm}.weight"] = (state[f"{norm}.weight"].double() * (1 + EPS) ** 0.5).float()
    network = {
        key.removeprefix("backbone."): tensor
        for key, tensor in state.items()
        if known.counts_batches or not key.endswith("num_batches_tracked")
    }
    pyramid, detector = (any(key.startswith(part) for key in network) for part in ("fpn.", HEADS))
    rules = _rules(known, known.places[2 * detector + pyramid], _laterals(network), reading=False)
    found = _renamed(network, rules)
    if nameless := [key for key in network if key not in found]:
        names = ", ".join(nameless)
        count = f"{len(nameless)} tensors, which a file of resbackbone can hold"
        raise UserError(f"the format {format} has no name for {count}: {names}")
    return {theirs: convert(network[key]) for key, (theirs, convert) in found.items()}


def _renamed(keys: Iterable[str], rules: list[tuple[str, str, Convert]]) -> dict[str, tuple[str, Convert]]:
    """{key: (its new name, how to convert the tensor)} for the keys that a rule (template, new template, ..) knows."""
    found = {}
    for key in keys:
        for source, target, convert in rules:
            if (name := rename(key, source, target)) is not None:
                found[key] = name, convert
                break
    return found


def _rules(known: Format, place: tuple[str, str], laterals: int, *, reading: bool) -> list[tuple[str, str, Convert]]:
    """A format's table in one direction. Its pyramid merges `laterals` trunk levels: 4 from c2, 3 from c3."""
    pairs = [*zip(NAMES, known.names, strict=False), *zip(RESNET_D, known.resnet_d, strict=False)]
    if known.stage5:
        pairs += [(STAGE5 + ours, known.stage5 + theirs) for ours, theirs in pairs if ours.startswith("layer")]
    rules = []
    for ours, theirs in [*pairs, *known.aliases] if reading else pairs:
        in_trunk = ours.startswith(("conv1.", "bn1.", "layer"))
        theirs = (place[0] if in_trunk else place[1] if ours.startswith("fpn.") else "") + theirs
        theirs = theirs.replace("{level+first}", f"{{level+{6 - laterals}}}")
        theirs = theirs.replace("{count}", str(laterals)).replace("{count+1}", str(laterals + 1))
        take, give = _conversions(ours, known)
        rules.append((theirs, ours, take) if reading else (ours, theirs, give))
    return rules


def _conversions(ours: str, known: Format) -> tuple[Convert, Convert]:
    """How to convert a tensor on reading and on writing."""
    if known.background_last and ".cls_score." in ours:
        return (lambda x: x.roll(1, 0)), (lambda x: x.roll(-1, 0))
    if known.background_last and ".box_predictor.bbox_pred." in ours:
        # Ours has a box for the background, which nothing reads; theirs has none.
        return (lambda x: torch.cat((torch.zeros_like(x[:4]), x))), (lambda x: x[4:])
    if known.sizes_first and (".cls_logits." in ours or "rpn.head.bbox_pred." in ours):
        numbers = 1 if ".cls_logits." in ours else 4
        return (
            lambda x: _swap_anchors(x, numbers, sizes_first=True),
            lambda x: _swap_anchors(x, numbers, sizes_first=False),
        )
    return (lambda x: x), (lambda x: x)


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


def _laterals(state: Mapping[str, Tensor]) -> int:
    """How many trunk levels a pyramid of any format merges, counted by its 1x1 convolutions; 4 if it has none."""
    marks = ("inner_blocks.", "fpn_lateral", "lateral_convs.")
    levels = {key.split(mark)[1].split(".")[0] for key in state for mark in marks if mark in key}
    return len(levels) or 4
