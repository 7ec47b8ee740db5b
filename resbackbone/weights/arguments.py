"""Settings that change a network: tables of what this package computes, and what a training's arguments say.

The latter lie in a checkpoint, in safetensors metadata or in a config.json of its own.
Nobody fixes their layout, so every table in them is looked at, except those of other parts (ELSEWHERE).
"""

import argparse
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from resbackbone.checks import UserError
from resbackbone.weights.containers import MAX_DEPTH, OPTIMIZER
from resbackbone.weights.inputs import describe_input, input_of, numbers_of, same_input, statistics_in
from resbackbone.weights.pickles import Foreign

ANY = ()  # of the accepted values: the tensors' shapes, or code below, check the value


def harmless(names: str) -> dict[str, Sequence]:
    """Keys whose values do not matter, for a table."""
    return dict.fromkeys(names.split(), ANY)


TIMM_ARGUMENTS: dict[str, Sequence] = {
    "output_stride": (32, 16),
    "act_layer": ("relu",),
    "norm_layer": ("batchnorm", "batchnorm2d", "frozenbatchnorm2d", "groupnorm"),
    "aa_layer": ("",),
    "stem_type": ("", "deep"),
    "replace_stem_pool": (False,),
    "block_reduce_first": (1,),
    "down_kernel_size": (1,),
    "channels": ([64, 128, 256, 512],),
    "block_args": ({},),
    "global_pool": ("avg", "fast", ""),
    # Shapes show them, or only training uses them
    **harmless(
        "in_chans num_classes layers cardinality base_width stem_width avg_down drop_rate drop_path_rate "
        "drop_block_rate zero_init_last device dtype"
    ),
}
# Tables about something else than the trunk and its input: other modules, and what a training measured or initialised.
ELSEWHERE = re.compile(
    r"(.*_)?(heads?|neck|decoder|transformer|projector|projection|predictor|mlp|discriminator|generator|classifier|text|"
    r"metrics?|results?|history|scores?|loss(es)?|accuracy|targets?|labels?|bbox|boxes|features|noise)"
    r"(_(config|cfg|kwargs|args))?|(.*_)?init(ialization)?|" + OPTIMIZER.pattern,
    re.IGNORECASE,
)
# Keys that name the network. Those of segmentation have trunks with dilated stages.
NETWORK_NAMES = ("arch", "architecture", "model", "model_name", "name", "backbone", "backbone_name", "encoder_name")
DILATING_NAMES = re.compile(r"(.*[/:._-])?(deeplab.*|(fcn|pspnet|danet|encnet)([^a-z].*)?)", re.IGNORECASE)
# {key: {value in lower case: the facts that it states}}. Another value is refused.
DC5, USUAL_C5, BGR = {"dilate_c5": True}, {"dilate_c5": False}, {"channel_order": "BGR"}
SETTINGS: dict[str, dict[str, dict]] = {
    **dict.fromkeys(("act_layer", "hidden_act", "act_fn", "activation_fn"), {"relu": {}}),
    # A network's output has the others.
    "activation": dict.fromkeys(("relu", "sigmoid", "softmax", "softmax2d", "logsoftmax", "identity", "none"), {}),
    **dict.fromkeys(("output_stride", "encoder_output_stride"), {"32": USUAL_C5, "16": DC5}),
    "dilation": {"false": USUAL_C5, "1": USUAL_C5, "true": DC5},  # DETR's
    "replace_stride_with_dilation": {"[false, false, false]": USUAL_C5, "[false, false, true]": DC5},
    "bgr": {"false": {}, "true": BGR},
    **dict.fromkeys(("input_space", "channel_order"), {"rgb": {}, "bgr": BGR}),
    **dict.fromkeys(("aa_layer", "replace_stem_pool"), {"": {}, "none": {}, "false": {}}),
    "stem_type": {"": {}, "none": {}, "deep": {"stem": "deep"}},
    "avg_down": {"false": {}, "true": {"shortcut": "D"}},
}
# Of timm's `model_kwargs`: besides what changes the network, create_model's own arguments
MODEL_KWARGS = TIMM_ARGUMENTS | harmless(
    "pretrained pretrained_cfg pretrained_cfg_overlay checkpoint_path cache_dir scriptable exportable features_only "
    "out_indices bn_eps replace_stride_with_dilation"
)
ALONE = "give its state dict alone (torch.load, safetensors.torch.load_file) to read_weights"


def stated_by_arguments(where: str, values: Mapping) -> dict[str, Any]:
    """The input and the settings of a backbone that a training's arguments state, in the layout of our metadata.

    `where` names them in messages; it is "" in a checkpoint. Raises ValueError, with the place, for a mean or std that
    cannot be read, for a network or setting that this package does not compute, and for places that contradict.
    """
    found: dict[str, tuple[Any, str]] = {}
    for at, table in _tables(values):
        place = " in ".join(filter(None, (".".join(filter(None, at)), where))) or "checkpoint"
        _refuse_networks(place, table)
        if at[-1:] == ("model_kwargs",):
            layers = {key: _text(x) if key.endswith("_layer") else x for key, x in table.items()}
            check_known(place, layers, MODEL_KWARGS)
        for key, facts in _facts(place, table):
            for name, value in facts.items():
                known, there = found.setdefault(name, (value, f"{place} ({key})"))
                if not same_input(known, value) if name == "input" else known != value:
                    one, other = (describe_input(x) if name == "input" else f"{name}={x}" for x in (known, value))
                    raise UserError(f"its {there} and {place} ({key}) contradict: {one}; and {other}; {ALONE}")
    stated = {name: value for name, (value, _) in found.items()}
    given, order = stated.pop("input", None), stated.pop("channel_order", None)
    if order and (given is None or given["channel_order"] != order):
        raise UserError(
            f"its {found['channel_order'][1]} states BGR but no mean and std of it; {ALONE}, with given_input="
        )
    return ({"input": given} if given else {}) | ({"backbone": stated} if stated else {})


def _tables(values: Any, at: tuple[str, ...] = (), seen: dict[int, Any] | None = None) -> Iterator[tuple[tuple, dict]]:
    """Each table in nested ones, with the keys that lead to it: dicts, namespaces, and JSON in text."""
    seen = {} if seen is None else seen
    if isinstance(values, Foreign | argparse.Namespace):
        values = values.attributes if isinstance(values, Foreign) else vars(values)
    elif isinstance(values, str) and values.lstrip().startswith("{"):
        try:
            values = json.loads(values)
        except (ValueError, RecursionError):
            return
    if not isinstance(values, Mapping | list | tuple) or id(values) in seen or len(at) > MAX_DEPTH:
        return
    seen[id(values)] = values
    if not isinstance(values, Mapping):
        for item in values:
            yield from _tables(item, (*at, ""), seen)
        return
    is_state = any(isinstance(x, Tensor) and "." in str(key) for key, x in values.items())
    table = {str(key): x for key, x in values.items() if not (is_state and isinstance(x, Tensor))}
    yield at, table
    for key, value in table.items():
        if not ELSEWHERE.fullmatch(key):
            yield from _tables(value, (*at, key), seen)


def _facts(place: str, table: Mapping) -> Iterator[tuple[str, dict[str, Any]]]:
    """{fact: value} of each key of a table, and of each mean with its std."""
    for key, value in table.items():
        if value is not None and (known := SETTINGS.get(key.lower())) is not None:
            if (text := _text(value)) not in known:
                usual = " or ".join(map(repr, known))
                raise UserError(
                    f"its {place} has {key} {text!r}; trunks here have {usual}; if it is of another part, {ALONE}"
                )
            yield key, known[text]
        elif key.lower() == "bn_eps" and value is not None:
            if not (numbers := numbers_of(value)) or not 0 <= numbers[0] < 1 or len(numbers) > 1:
                raise UserError(f"its {place} has bn_eps {value!r:.80}, not a number from 0 to 1")
            yield key, {"eps": numbers[0]}
    for pair in statistics_in(table):
        mean, std = (table.get(pair.get(name, "")) for name in ("mean", "std"))
        if mean is not None and std is not None:
            yield " and ".join(pair.values()), {"input": _input(place, mean, std)}
        elif len(numbers_of(mean if std is None else std) or []) == 3:
            raise UserError(f"its {place} has one of mean and std alone: mean {mean!r:.80}, std {std!r:.80}; give both")


def _text(value: Any) -> str:
    """A setting in lower case; of a class or layer, its name alone: "torch.nn.ReLU()" is "relu"."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(str(x).lower() if isinstance(x, int) else '..' for x in value[:9])}]"
    if isinstance(value, type | Foreign):
        value = value.name if isinstance(value, Foreign) else value.__name__
    if isinstance(value, str):
        value = value.partition("(")[0].rpartition(".")[2]
    return str(value).lower()[:80] if isinstance(value, str | int | float) else type(value).__name__


def _input(place: str, mean: Any, std: Any) -> dict[str, Any]:
    """The input with this mean and std; a single number is of every channel."""
    mean, std = (numbers * (3 // len(numbers)) if (numbers := numbers_of(x)) else x for x in (mean, std))
    given = stated_input(place, mean, std)
    if known := input_of(mean, std):
        return known
    if max(mean) > 1:
        raise UserError(
            f"its {place} has mean {mean!r:.80}: of 0..255, only ImageNet's tells whether it is RGB or BGR; {ALONE}, "
            "with given_input="
        )
    return given


def _refuse_networks(place: str, table: Mapping) -> None:
    for key in table.keys() & {*NETWORK_NAMES, *map(str.upper, NETWORK_NAMES)}:
        refuse_blurring_names(name := table[key])
        if isinstance(name, str) and DILATING_NAMES.fullmatch(name):
            raise UserError(
                f"its {place} has {key} {name[:80]!r}, a segmentation network whose trunk may dilate its last stages; "
                f"to take it as a trunk without dilation, {ALONE}"
            )


# timm's networks that blur before they subsample. Their tensors have the names and shapes of a ResNet's.
TIMM_ANTI_ALIASED = ("resnetaa", "resnetblur")


def refuse_blurring_names(*names: object) -> None:
    """Raise ValueError if a source, a file or a training's network has the name of such a network."""
    for name in names:
        if not isinstance(name, str | Path):
            continue
        if found := re.search(rf"(?<![a-z])((?:{'|'.join(TIMM_ANTI_ALIASED)})\d\w*)[^/\\]*$", str(name)):
            raise UserError(
                f"by its name this is timm's {found[1]}, which blurs its maps before it subsamples them; no network "
                "here does"
            )


def check_known(where: str, values: Mapping, accepted: Mapping[str, Sequence]) -> None:
    """Raise ValueError for a key of `values` that is not in the table, or a value that it does not accept."""
    for key, value in values.items():
        said = f"its {where} has {key} {str(value)[:80] if isinstance(value, Mapping) else repr(value)[:80]}"
        if value is None:  # as good as absent
            continue
        if key not in accepted:
            raise UserError(f"{said}, which this package does not know; remove it if it does not change the network")
        if accepted[key] and value not in accepted[key]:
            known = " or ".join(repr(choice) for choice in accepted[key])
            raise UserError(f"{said}; networks of this package have {known}")


def stated_input(where: str, mean: Any, std: Any, *, order: str = "RGB", top: float = 1.0) -> dict[str, Any]:
    """An input in the layout of `inputs.INPUT`, for values in 0..`top`. Raises ValueError if it is unreadable."""
    for name, numbers in (("mean", mean), ("std", std)):
        readable = isinstance(numbers, list | tuple) and len(numbers) == 3
        readable = readable and all(type(x) in (int, float) and math.isfinite(x) for x in numbers)
        if not readable or (name == "std" and min(numbers) <= 0):
            positive = " above 0" if name == "std" else ""
            said = " ".join(str(numbers)[:80].split())
            raise UserError(f"its {where} has {name} {said}, not three numbers{positive}, one a colour")
    numbers = {"mean": [float(x) for x in mean], "std": [float(x) for x in std]}
    return {"channel_order": order, "range": [0.0, float(top)], **numbers}
