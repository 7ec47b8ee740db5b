"""What every command shares: options from a dataclass, one line for a user's mistake, progress on the terminal."""

import contextlib
import dataclasses
import io
import math
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, TypeVar

import rich.progress
import tyro
import yaml
from rich.console import Console

from resbackbone.checks import UserError
from resbackbone.cli.errors import from_option, one_line_errors
from resbackbone.engine.provenance import program
from resbackbone.engine.run import read_yaml
from resbackbone.engine.termination import quick_exit

T = TypeVar("T", bound=Any)  # a dataclass of options
# Options whose defaults are chosen later. Their help says how, so tyro must not add "(default: None)" or "(default: )".
Auto = Annotated[T | None, tyro.conf.arg(help_behavior_hint="")]
Several = Annotated[tuple[T, ...], tyro.conf.arg(help_behavior_hint="")]
Hidden = tyro.conf.Suppress[tuple[T, ...]]  # not in --help
# Markup is off because paths and class names may contain [brackets].
PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "soft_wrap": True}
console = Console(**PLAIN)  # for warnings and results
progress_console = Console(**PLAIN)  # for what --quiet leaves out: progress messages and paths
# Flags without their group's name; no "None" among the values; RUN, not STR, for a positional argument `run`.
MARKERS = (tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone, tyro.conf.PositionalMetavarFromFieldName)
QUOTED = "'(.*?)'"
SECONDS_BETWEEN_LINES = 20  # of progress in a log
# The lowest values of options that are whole numbers; 1 of the others.
LEAST = dict.fromkeys(("early_stop", "eval_period", "gpus", "pictures", "seed", "shorter_side", "workers"), 0)
LEAST |= {"warmup_steps": 0, "size": 32}


def parse(options: type[T], argv: list[str] | None, *, default: T | None = None) -> T:
    """Parse the command line: flags override --config FILE or `default`, which override the dataclass's defaults.

    --help shows the docstring of the command's module, and each dataclass that `options` inherits from as a group.
    Options with `recipe_values` take --recipe.NAME VALUE too (see `cli.recipes`). --quiet silences `progress_console`.
    Raises ValueError, in one line, for an unknown flag or a value that does not fit, such as a whole number below LEAST
    or a file as --output.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    values: dict[str, str] = {}
    if "recipe_values" in option_names(options):
        argv, values = _take_values(argv)
    parsed = _parse(options, argv, default)
    if getattr(parsed, "config", None) is not None:
        with from_option("--config"):
            saved = from_config(options, parsed.config)
        parsed = _parse(options, argv, saved)
    if values:
        values = dict(item.split("=", 1) for item in parsed.recipe_values) | values
        parsed = dataclasses.replace(parsed, recipe_values=tuple(f"{name}={text}" for name, text in values.items()))
    be_quiet(parsed)
    for name, value in vars(parsed).items():
        if type(value) is int and value < (least := LEAST.get(name, 1)):
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    output = getattr(parsed, "output", None)
    if output is not None and output.is_file():
        raise UserError(f"--output {output}: is a file; give a folder")
    return parsed


def _parse(options: type[T], argv: list[str], default: T | None = None) -> T:
    groups = {group.__name__.removesuffix("Options"): group for group in _groups(options)}
    nested: Any = dataclasses.make_dataclass("Options", groups.items()) if groups else options
    if groups and default is not None:
        default = nested(*(group(**_values(default, option_names(group))) for group in groups.values()))
    if {"-h", "--help"} & set(argv):
        for group in groups.values() or [options]:
            _unwrap_texts(group)
    doc = sys.modules[options.__module__].__doc__ or ""
    doc = re.sub("\n\n(?=(python|pip) )", "\n\nExamples:\n", doc, count=1)
    description = re.sub("^(?=(python|pip) )", "  ", doc, flags=re.M)  # tyro does not wrap indented lines
    with one_line_of_tyro("--help lists the options"):
        parsed = tyro.cli(
            nested, prog=Path(sys.argv[0]).stem, args=argv, default=default, description=description, config=MARKERS
        )
    if groups:
        parsed = options(**{name: value for group in vars(parsed).values() for name, value in vars(group).items()})
    return parsed


@contextlib.contextmanager
def one_line_of_tyro(hint: str) -> Iterator[None]:
    """Raise what tyro prints about a mistake as UserError, with a hint."""
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            yield
    except SystemExit as exit:
        if exit.code in (0, None):  # of --help and --tyro-print-completion
            raise
        raise UserError(f"{_message_in(stderr.getvalue())} ({hint})") from None


def _take_values(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """The command line without --recipe.NAME VALUE .., and {NAME: its values as text}."""
    others: list[str] = []
    taken: dict[str, list[str]] = {}
    words = others
    for word in argv:
        if word.startswith("--recipe."):
            flag, equals, value = word.partition("=")
            words = taken[flag.removeprefix("--recipe.").replace("-", "_")] = [value] if equals else []
        elif word.startswith("--"):
            words = others
            words.append(word)
        else:
            words.append(word)
    return others, {name: shlex.join(words) for name, words in taken.items()}


def _unwrap_texts(options: type) -> None:
    """Give tyro the text below each option as one line, because it would keep the line breaks of indented text."""
    import docstring_parser  # tyro's, which imports it for --help alone too

    texts = {option.arg_name: option.description for option in docstring_parser.parse_from_object(options).params}
    for field in dataclasses.fields(options):
        if text := texts.get(field.name):
            field.metadata = MappingProxyType({"help": " ".join(text.split())})


def _groups(options: type) -> list[type]:
    return [base for base in options.__bases__ if dataclasses.is_dataclass(base)]


def option_names(options: type) -> list[str]:
    """The names of a dataclass's options, in the order of --help."""
    return [field.name for group in _groups(options) or [options] for field in dataclasses.fields(group)]


def _values(options, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(options, name) for name in names}


def _message_in(box: str) -> str:
    """The message in the box that tyro prints for an error. tyro has no public way to get it without the box."""
    title, *sections = re.split("[─-]{3,}", box)
    message = " ".join(word for word in (sections or [title])[0].split() if word not in "╮│|+")
    message = re.sub(r"^Missing from \S+: (\S+) (.*?)\.? \(required\).*", r"\1 is missing: \2", message)
    message = re.sub(r"^Unrecognized options: (--recipe\.[^,]+).*", r"unknown value \1", message)
    message = re.sub(r"^Error parsing (recipe\S*): ", r"--\1: ", message)
    for said, kind in (("could not convert string to float", "FLOAT"), ("invalid literal for int.*", "INT")):
        message = re.sub(rf"^Error parsing (\S+): {said}: ('.*?').*", rf"\1 [\2] {kind}", message)
    message = re.sub(r"^Error parsing (\S+): no type matching (.*?) could be .* from (\[.*?\]).*", r"\1 \3 \2", message)
    if several := re.match(r"Error parsing (\S+): Could not find valid parse for arguments: (\[.*\])", message):
        kinds = re.search(rf"{several[1]} (\[\w+)", " ".join(box.split()))
        message = f"{several[1]} {several[2]} {kinds[1] if kinds else 'values of another kind'}"
    if wrong := re.match(r"(--\S+) (\['.*'\]) (.+)", message):
        words = " or ".join(map(_in_words, wrong[3].split("|")))
        message = f"{wrong[1]} {' '.join(re.findall(QUOTED, wrong[2]))}: must be {words}"
    return message


def _in_words(kind: str) -> str:
    """tyro's INT, {INT INT} or [INT [INT ...]] in words."""
    nouns = {"INT": "whole number", "FLOAT": "number", "STR": "word"}
    names = re.findall("[A-Z]+", kind)
    if not names or names[0] not in nouns:
        return kind.strip("{}")
    noun = nouns[names[0]]
    return f"{noun}s" if "[" in kind else f"a {noun}" if len(names) == 1 else f"{len(names)} {noun}s"


def be_quiet(options) -> None:
    """Silence `progress_console` in this process if the options have --quiet."""
    progress_console.quiet = getattr(options, "quiet", False)


def main_of(command: Callable[[], object]) -> None:
    """Run a command to its exit status: 0, or 1 with one line on stderr."""
    with quick_exit(), one_line_errors():
        command()


def track(items: Iterable, total: int | None, label: str, *, shown: bool = True) -> Iterator:
    """Yield the items under a progress bar; in a log, print a line every 20 seconds instead."""
    with Progress(label, total, shown=shown) as progress:
        for done, item in enumerate(items, 1):
            yield item
            progress.update(done)


class Progress:
    """A bar on a terminal; in a log, a line every 20 seconds. `total` is None if unknown.

    Both get a line for every `note`; on a terminal it is above the bar.
    """

    def __init__(self, label: str, total: int | None, *, start: int = 0, shown: bool = True):
        self.label, self.shown, self.printed = label, shown and not progress_console.quiet, time.monotonic()
        self.bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(bar_width=20),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TextColumn("{task.fields[left]}"),
            console=progress_console,
            speed_estimate_period=600,
            disable=not (self.shown and progress_console.is_terminal),
        )
        self.bar.add_task(label, total=total, completed=start, left="")
        [self.task] = self.bar.tasks

    def __enter__(self) -> "Progress":
        self.bar.start()
        return self

    def __exit__(self, *_) -> None:
        self.bar.stop()

    def update(self, done: int, note: str | None = None, seconds_left: float | None = None) -> None:
        """Show that `done` of the total are done; `note` describes the latest.

        Without `seconds_left`, which is infinite if unknown, the mean speed so far gives the time that is left.
        """
        self.bar.update(self.task.id, completed=done)
        seconds = self.task.time_remaining if seconds_left is None else seconds_left
        left = "" if seconds in (None, math.inf) else f"{timedelta(seconds=round(seconds))} left"
        self.bar.update(self.task.id, left=left)
        due = self.bar.disable and time.monotonic() - self.printed > SECONDS_BETWEEN_LINES
        if self.shown and (note is not None or due):
            self.printed = time.monotonic()
            parts = [f"{self.label} {done}" if self.task.total is None else f"{self.label} {done}/{self.task.total}"]
            progress_console.print(", ".join([*parts, *filter(None, (left, note))]))


def resume_command(folder: Path) -> str:
    """The shell command that continues the run in `folder` from any directory."""
    return shlex.join([*program(), "--output", str(folder.absolute()), "--resume"])


def from_config(options: type[T], path: str | Path) -> T:
    """Read options from a YAML file, such as a run's config.yaml; its section `effective` is ignored.

    Raises ValueError if an option is unknown, unless it is off, or if its value does not fit.
    """
    flags, content = [], read_yaml(path)
    for name, value in content.items():
        flag = f"--{name}".replace("_", "-")
        if str(name).startswith("recipe."):
            continue
        if isinstance(value, list):
            flags += [flag, *map(str, value)]
        elif value is False and name not in option_names(options):
            continue  # a run of an earlier version without an option that is removed
        elif isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        elif value is not None and name != "effective":
            flags.append(f"{flag}={value}")
    try:
        parsed = _parse(options, flags)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    values = values_in(content)
    if values and "recipe_values" not in option_names(options):
        raise UserError(f"{path}: recipe.{values[0].partition('=')[0]} is an option of another command; remove it")
    return dataclasses.replace(parsed, recipe_values=values) if values else parsed


def values_in(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The lines "recipe.NAME: value" of a file of options, as `recipe_values`."""
    lines = {str(key): value for key, value in config.items() if str(key).startswith("recipe.")}
    values: list[str] = []
    for name, value in lines.items():
        if isinstance(value, Mapping):
            values += values_in({f"{name}.{inner}": v for inner, v in value.items()})
        else:
            words = shlex.join(map(str, value if isinstance(value, list) else [value]))
            values.append(f"{name.removeprefix('recipe.')}={words}")
    return tuple(values)


def to_config(options) -> dict:
    """The options as values for YAML, without empty lists and what does not belong to a run (--quiet).

    Paths of files and folders that exist are absolute, so that a run can be used from any directory.

    Each of `recipe_values` is a line: "recipe.schedule.milestones: [60000, 80000]".
    """
    values = _values(options, option_names(type(options)))
    for name in ("quiet", "print_recipe"):
        values.pop(name, None)
    for item in values.pop("recipe_values", ()):
        name, _, text = item.partition("=")
        words = [yaml.safe_load(word) for word in shlex.split(text)]
        values[f"recipe.{name}"] = words[0] if len(words) == 1 else words
    for name, value in values.items():
        if isinstance(value, Path) or (name in ("data", "weights") and value is not None):
            is_path = Path(value).exists() and str(value) != "synthetic"  # which is no folder
            values[name] = str(Path(value).absolute() if is_path else value)
    return {name: value for name, value in values.items() if value != ()}
