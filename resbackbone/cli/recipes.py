"""The values of a recipe, a dataclass of values and dataclasses: set, compared and printed by their names.

A name is the path to a value: "schedule.milestones". Commands keep "name=text" for --recipe.NAME TEXT.
"""

import dataclasses
import shlex
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import tyro
import yaml

from resbackbone.checks import UserError
from resbackbone.cli.command import one_line_of_tyro

T = TypeVar("T", bound=Any)  # a dataclass
ABOUT = ("version", "source", "published")  # values that describe a recipe and change nothing


def values_of(recipe: Any) -> dict[str, Any]:
    """Every value by its name: {"schedule.rate": 0.02, ..}."""
    values: dict[str, Any] = {}
    for name, value in dataclasses.asdict(recipe).items():
        values |= {f"{name}.{n}": v for n, v in value.items()} if isinstance(value, Mapping) else {name: value}
    return values


def with_values(recipe: T, values: Iterable[str], option_of: Mapping[str, str]) -> T:
    """The recipe with other values, "schedule.milestones=60000 80000".

    `option_of` are values that an option of the command sets. Raises ValueError for those, for a name that the recipe
    does not have, and for a value that does not fit.
    """
    flags = []
    for item in values:
        name, _, text = item.partition("=")
        if name in option_of:
            raise UserError(f"--recipe.{name}: give --{option_of[name].replace('_', '-')} instead")
        flags += [f"--recipe.{name}".replace("_", "-"), *shlex.split(text)]
    field = ("recipe", type(recipe), dataclasses.field(default_factory=lambda: recipe))
    with one_line_of_tyro("--print-recipe lists the values"):
        holder = dataclasses.make_dataclass("Recipe", [field])
        return tyro.cli(holder, args=flags, config=(tyro.conf.FlagConversionOff,)).recipe


def difference(named: Any, used: Any, options: Any, given: Iterable[str]) -> str:
    """What `used` has otherwise than the recipe `named`, "weight_decay 0.05 (0.0001)", and options among `given`."""
    before, after = values_of(named), values_of(used)
    changes = [f"{name} {after[name]} ({before[name]})" for name in after if after[name] != before[name]]
    return ", ".join([*changes, *(f"{name} {value:g}" for name, value in _given(options, given).items())])


def as_config(name: str, recipe: Any, option_of: Mapping[str, str], options: Any, given: Iterable[str]) -> str:
    """The recipe as a file for --config: a line for each value, at the batch size that it is stated for.

    Options among `given` stand in place of the recipe's values.
    """
    lines: dict[str, Any] = {"recipe": name}
    for path, value in values_of(recipe).items():
        if path.rpartition(".")[2] in ABOUT:
            continue
        if path not in option_of:
            lines[f"recipe.{path}"] = list(value) if isinstance(value, tuple) else value
        elif value is not None:
            lines[option_of[path]] = value
    lines |= _given(options, given)
    if "epochs" in lines and "steps" in lines:
        del lines["steps"]
    return yaml.safe_dump(lines, sort_keys=False, default_flow_style=None, width=1000).rstrip()


def _given(options: Any, names: Iterable[str]) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(options, name)) is not None}
