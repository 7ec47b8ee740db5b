"""What every command shares: options from a dataclass, one line for a user's mistake, progress on the terminal."""

import argparse
import contextlib
import dataclasses
import io
import re
import sys
import time
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, TypeVar

import rich.progress
import tyro
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from resbackbone.checks import UserError
from resbackbone.cli.errors import one_line_errors
from resbackbone.engine.run import read_yaml
from resbackbone.engine.termination import quick_exit
from resbackbone.report.numbers import duration

T = TypeVar("T", bound=Any)  # a dataclass of options
# An option whose default is chosen later. Its help says how, so tyro must not add "(default: None)".
Auto = Annotated[T | None, tyro.conf.arg(help_behavior_hint="")]
# Markup is off because paths and class names may contain [brackets].
PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "soft_wrap": True}
console = Console(**PLAIN)  # for warnings and results
progress_console = Console(**PLAIN)  # for what --quiet leaves out: progress messages and paths
# Flags without their group's name; no "None" among the values; RUN, not STR, for a positional argument `run`.
MARKERS = (tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone, tyro.conf.PositionalMetavarFromFieldName)
SECONDS_BETWEEN_LINES = 20  # of progress in a log
# The lowest values of options that are whole numbers; 1 of the others.
LEAST = {"eval_period": 0, "gpus": 0, "pictures": 0, "seed": 0, "shorter_side": 0, "size": 32, "workers": 0}


def parse(options: type[T], argv: list[str] | None, *, default: T | None = None) -> T:
    """Parse the command line: flags override --config FILE or `default`, which override the dataclass's defaults.

    --help shows the docstring of the command's module, and each dataclass that `options` inherits from as a group.
    --quiet silences `progress_console`. Raises ValueError, in one line, for an unknown flag or a value that does not
    fit, such as a whole number below LEAST or a file as --output.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if "config" in option_names(options) and (path := _value_of("--config", argv)) is not None:
        default = from_config(options, path, argv)
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
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            parsed = tyro.cli(
                nested, prog=Path(sys.argv[0]).stem, args=argv, default=default, description=description, config=MARKERS
            )
    except SystemExit as exit:
        if exit.code in (0, None):  # of --help and --tyro-print-completion
            raise
        raise UserError(f"{_message_in(stderr.getvalue())} (--help lists the options)") from None
    if groups:
        parsed = options(**{name: value for group in vars(parsed).values() for name, value in vars(group).items()})
    be_quiet(parsed)
    for name, value in vars(parsed).items():
        if type(value) is int and value < (least := LEAST.get(name, 1)):
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    output = getattr(parsed, "output", None)
    if output is not None and output.is_file():
        raise UserError(f"--output {output}: is a file; give a folder")
    return parsed


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
    return re.sub(r"^Error parsing (\S+): no type matching (\S+) .* from \['(.*?)'\].*", r"\1 \3: must be \2", message)


def be_quiet(options) -> None:
    """Silence `progress_console` in this process if the options have --quiet."""
    progress_console.quiet = getattr(options, "quiet", False)


def _value_of(flag: str, argv: Sequence[str]) -> str | None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(flag, nargs="?", dest="value")
    return parser.parse_known_args(argv)[0].value


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
    """A bar on a terminal; in a log, a line every 20 seconds and for every `note`. `total` is None if unknown."""

    def __init__(self, label: str, total: int | None, *, start: int = 0, shown: bool = True):
        self.label, self.total, self.start, self.shown = label, total, start, shown and not progress_console.quiet
        self.on_terminal = self.shown and progress_console.is_terminal
        self.began = self.printed = time.monotonic()

    def __enter__(self) -> "Progress":
        if self.on_terminal:
            left = rich.progress.TextColumn("left"), rich.progress.TimeRemainingColumn()
            self.bar = rich.progress.Progress(
                rich.progress.TextColumn("{task.description}"),
                rich.progress.BarColumn(bar_width=20),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TimeElapsedColumn(),
                *([] if self.total is None else left),
                console=progress_console,
            )
            self.note = Text(no_wrap=False, overflow="fold")  # on its own line, because it would squeeze the bar
            self.live = Live(Group(self.bar, self.note), console=progress_console, refresh_per_second=5)
            self.task = self.bar.add_task(self.label, total=self.total, completed=self.start)
            self.live.start()
        return self

    def __exit__(self, *_) -> None:
        if self.on_terminal:
            self.live.stop()

    def update(self, done: int, note: str | None = None) -> None:
        """Show that `done` of the total are done; `note` describes the latest."""
        if self.on_terminal:
            self.bar.update(self.task, completed=done)
            if note is not None:
                self.note.plain = note
        elif self.shown and (note is not None or time.monotonic() - self.printed > SECONDS_BETWEEN_LINES):
            self.printed = time.monotonic()
            of = ""
            if self.total is not None:
                left = (self.printed - self.began) / max(done - self.start, 1) * (self.total - done)
                of = f"/{self.total}, {duration(left)} left"
            progress_console.print(f"{self.label} {done}{of}{'' if note is None else ', ' + note}")


def from_config(options: type[T], path: str | Path, argv: Sequence[str] = ()) -> T:
    """Read options from a YAML file, such as a run's config.yaml; its section `effective` is ignored.

    Raises ValueError if an option is unknown or has the wrong type, and if its value is a `pipe:` command, unless
    `argv` has that option too.
    """
    types = typing.get_type_hints(options)
    values = read_yaml(path)
    values.pop("effective", None)
    for name, value in values.items():
        if name not in types:
            raise UserError(f"{path}: unknown option {name!r}; choose from {', '.join(option_names(options))}")
        if _value_of(f"--{name.replace('_', '-')}", argv) is None:
            refuse_command(name, value, path)
        kinds = typing.get_args(types[name]) or (types[name],)
        if typing.get_origin(types[name]) is tuple:
            if not isinstance(value, list) or any(type(item) is not kinds[0] for item in value):
                raise UserError(f"{path}: {name} is {value!r}; it must be a list of {kinds[0].__name__}")
            values[name] = tuple(value)
        elif Path in kinds and isinstance(value, str):
            values[name] = Path(value)
        elif float in kinds and type(value) is int:
            values[name] = float(value)
        elif type(value) not in kinds:
            wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            raise UserError(f"{path}: {name} is {value!r}; it must be {wanted}")
    return options(**values)


def refuse_command(name: str, value, path: str | Path) -> None:
    """Raise ValueError if an option in the file `path` is a command, because a stranger may have written the file."""
    if isinstance(value, str) and value.startswith("pipe:"):
        raise UserError(f"{path}: {name} is a command, {value!r}; if you mean to run it, give it as --{name}")


def to_config(options) -> dict:
    """The options as values for YAML, without empty lists and without --quiet, which does not belong to a run."""
    values = _values(options, option_names(type(options)))
    values.pop("quiet", None)
    return {name: str(v) if isinstance(v, Path) else v for name, v in values.items() if v != ()}
