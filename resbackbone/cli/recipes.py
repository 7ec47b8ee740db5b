"""The values of a recipe, a dataclass of values and dataclasses: set, compared and printed by their names.

A name is the path to a value: "schedule.milestones". Commands keep "name=text" for --recipe.NAME TEXT.
"""

import dataclasses
import math
import shlex
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, get_type_hints

import yaml

from resbackbone.checks import UserError, nearest
from resbackbone.cli.words import RECIPE, value_of

T = TypeVar("T", bound=Any)  # a dataclass
LENGTHS = ("epochs", "image_size")  # options that set several values
SCALED = ("batch_size", "checkpoint_period")  # options that every command has chosen
ABOUT = ("version", "source", "published", "resize_in_training")  # values that are not for users to set


def values_of(recipe: Any) -> dict[str, Any]:
    """Every value by its name: {"schedule.rate": 0.02, ..}."""
    values: dict[str, Any] = {}
    for name, value in dataclasses.asdict(recipe).items():
        values |= {f"{name}.{n}": v for n, v in value.items()} if isinstance(value, Mapping) else {name: value}
    return values


def with_values(recipe: T, values: Iterable[str], option_of: Mapping[str, str]) -> T:
    """The recipe with these values changed: "detector.min_size=600".

    `option_of` are values that an option of the command sets. Raises ValueError for those, for a name that the recipe
    does not have, and for a value that does not fit.
    """
    kinds = _kinds_of(recipe)
    changed: dict[str, dict[str, Any]] = {}  # of the recipe itself, "", and of the dataclasses in it
    for item in values:
        name, _, text = item.partition("=")
        flag = f"{RECIPE}{name}".replace("_", "-")
        if name in option_of:
            raise UserError(f"{flag}: give --{option_of[name].replace('_', '-')} instead")
        if name.rpartition(".")[2] in ABOUT:
            raise UserError(f"{flag}: cannot be set")
        outer, _, inner = name.rpartition(".")
        if name not in kinds:
            whole = {kind.rpartition(".")[2]: kind for kind in sorted(kinds, key=lambda kind: kind.startswith(outer))}
            near = whole.get(nearest(inner, whole) or "")
            instead = f"; did you mean {RECIPE}{near.replace('_', '-')}?" if near else " nor one like it"
            raise UserError(f"no option {flag}{instead}{'' if near else '; --print-recipe lists the values'}")
        changed.setdefault(outer, {})[inner] = value_of(kinds[name], shlex.split(text), flag)
    parts = {outer: dataclasses.replace(getattr(recipe, outer), **those) for outer, those in changed.items() if outer}
    return dataclasses.replace(recipe, **changed.get("", {}), **parts)


def _kinds_of(recipe: Any) -> dict[str, Any]:
    """The type of every value by its name."""
    kinds: dict[str, Any] = {}
    for name in values_of(recipe):
        outer, _, inner = name.rpartition(".")
        kinds[name] = get_type_hints(type(getattr(recipe, outer) if outer else recipe))[inner]
    return kinds


def check_rate(named: Any, used: Any, name: str, lr: float | None) -> None:
    """Raise ValueError if the optimizer is not the recipe's, whose learning rate does not suit it, or `lr` is none."""
    if lr is not None and not 0 < lr < math.inf:
        raise UserError(f"--lr {lr:g}: must be a finite number above 0")
    if used.optimizer != named.optimizer and lr is None:
        raise UserError(
            f"optimizer {used.optimizer}: the learning rate of recipe {name} is for {named.optimizer}; give --lr too"
        )


def difference(named: Any, used: Any, options: Any, option_of: Mapping[str, str]) -> str:
    """How `used` and the options differ from the recipe `named`: "weight_decay 0.05 (0.0001), epochs 6.0"."""
    changes = []
    for (name, before), after in zip(values_of(named).items(), values_of(used).values(), strict=True):
        option = option_of.get(name)
        given = getattr(options, option) if option and option not in SCALED else None
        value = after if given is None else given
        if value not in (before, "none" if before is None else before):
            changes.append(f"{option or name} {value} ({before})")
    return ", ".join([*changes, *(f"{name} {value}" for name, value in _lengths(options, option_of).items())])


def as_config(options: Any, used: Any, option_of: Mapping[str, str]) -> str:
    """The recipe as a file for --config. Lines of what is not set by `options` are comments, to uncomment and edit."""
    lines = [
        f"recipe: {options.recipe}",
        "# Lines with # are the recipe's own values. To change one, remove the #. The learning rate and the numbers of",
        "# updates among them are for its own batch size; once they are set, they are used as they are.",
        *(_line(name, value) for name, value in _lengths(options, option_of).items()),
    ]
    changed = {item.partition("=")[0] for item in options.recipe_values}
    for name, value in values_of(used).items():
        if name.rpartition(".")[2] in ABOUT:
            continue
        option = option_of.get(name)
        given = getattr(options, option) if option else None
        line = _line(option or f"recipe.{name}", value if given is None else given)
        lines.append(line if given is not None or name in changed else f"# {line}")
    return "\n".join(lines)


def _line(name: str, value: Any) -> str:
    text = yaml.safe_dump(list(value) if isinstance(value, tuple) else value, default_flow_style=True, width=1000)
    return f"{name}: {text.splitlines()[0]}"  # without the end of a document, which YAML writes behind a number


def _lengths(options: Any, option_of: Mapping[str, str]) -> dict[str, Any]:
    """Options that stand for several values of a recipe, if they are given."""
    names = [name for name in LENGTHS if name not in option_of.values()]
    return {name: value for name in names if (value := getattr(options, name, None)) is not None}
