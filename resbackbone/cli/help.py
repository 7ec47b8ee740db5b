"""--help of a command: its options by what they are about, and the examples that its module begins with."""

import ast
import dataclasses
import inspect
import sys
import textwrap
import typing
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDTH = 110  # characters, on a wider terminal too
GROUPS = {  # by name: an option means the same in every command that has it
    "Data": ("data", "annotations", "recursive", "keep_empty", "skip_bad_images"),
    "Network": ("depth", "variant", "weights", "norm", "frozen_through", "shortcut", "plain", "stride_in_1x1", "ema"),
    "Training": ("recipe", "max_steps", "steps", "epochs", "batch_size", "accumulate", "size", "seed", "engine"),
    "Evaluation": ("eval", "eval_only", "eval_period", "validation", "coco_backend", "box_refinement", "scales"),
    "Run": ("output", "resume", "config", "checkpoint_period", "log_period", "pictures", "quiet"),
    "Machine": ("device", "gpus", "workers", "precision", "deterministic", "compile"),
}
METAVARS = {Path: "PATH", str: "NAME", int: "N", float: "X"}


class Option(typing.NamedTuple):
    """How one field of an options dataclass is called on the command line, and what it is for."""

    name: str
    positional: bool
    called: str
    text: str


def print_help(console: Console, options: type, description: str) -> None:
    """Print how the command with these options, a dataclass, is called. Examples are those of its module's docstring.

    An example is a line that begins with `python tools/`.
    """
    module = sys.modules[options.__module__]
    width = min(console.width, WIDTH)
    every = _options(options)
    words = [option.called for option in every if option.positional]
    command = Path(getattr(module, "__file__", None) or options.__name__).name
    console.print(" ".join(["usage: python", f"tools/{command}", *words, "[OPTIONS]"]))
    console.print(f"\n{textwrap.fill(description, width)}")
    for title, rows in _grouped(every).items():
        grid = Table.grid(padding=(0, 2))
        for called, text in rows:
            grid.add_row(Text(f"  {called}", style="cyan", no_wrap=True), Text(text))
        console.print(Text(f"\n{title}", style="bold"))
        console.print(grid, width=width, soft_wrap=False)
    examples = [line for line in (module.__doc__ or "").splitlines() if line.startswith("python tools/")]
    if examples:
        console.print(Text("\nExamples", style="bold"))
        console.print("\n".join(f"  {line}" for line in examples))


def _grouped(every: list[Option]) -> dict[str, list[tuple[str, str]]]:
    groups = {"Arguments": [option for option in every if option.positional]}
    for title, names in GROUPS.items():
        group = [option for name in names for option in every if option.name == name and not option.positional]
        groups[title] = group if len(group) > 1 else []
    named = {option.name for group in groups.values() for option in group}
    groups["Options"] = [option for option in every if option.name not in named]
    groups["Options"].append(Option("help", False, "-h, --help", "Show this and exit."))
    return {title: [(o.called, o.text) for o in group] for title, group in groups.items() if group}


def _options(options: type) -> list[Option]:
    texts, hints = _texts(options), typing.get_type_hints(options, include_extras=True)
    every = []
    for field in dataclasses.fields(options):
        hint, text = hints[field.name], texts.get(field.name, "")
        positional = typing.get_origin(hint) is typing.Annotated  # tyro.conf.Positional
        hint = typing.get_args(hint)[0] if positional else hint
        if field.default is True:
            text = f"{text} (default: yes)"
        elif not any(field.default is nothing for nothing in (None, False, (), dataclasses.MISSING)):
            words = field.default if isinstance(field.default, tuple) else [field.default]
            text = f"{text} (default: {' '.join(map(str, words))})" if field.default != "" else text
        flag = f"--{field.name.replace('_', '-')}"
        if positional:
            several = typing.get_origin(hint) is tuple
            called = field.name.upper().removesuffix("S" if several else "") + ("..." if several else "")
        elif hint is bool:
            called = f"--[no-]{flag.removeprefix('--')}" if field.default is True else flag
        else:
            called = f"{flag} {_metavar(hint)}"
        every.append(Option(field.name, positional, called, text))
    return every


def _metavar(hint) -> str:
    kinds = [kind for kind in typing.get_args(hint) or (hint,) if kind is not type(None)]
    if typing.get_origin(kinds[0]) is tuple:
        kinds = list(typing.get_args(kinds[0]))
    several = Ellipsis in kinds
    return METAVARS.get(kinds[0], "yes|no") + (" .." if several else "")


def _texts(options: type) -> Mapping[str, str]:
    """The string below each field, of the class and of those that it inherits from."""
    texts = {}
    for kind in reversed(options.__mro__):
        if not dataclasses.is_dataclass(kind):
            continue
        [definition] = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        assert isinstance(definition, ast.ClassDef)
        for statement, following in pairwise(definition.body):
            if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
                texts[ast.unparse(statement.target)] = " ".join(ast.literal_eval(following.value).split())
    return texts
