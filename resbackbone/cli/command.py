"""What every command shares: options from a dataclass, one line for a user's mistake, progress on the terminal."""

import dataclasses
import math
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, TypeVar

import rich.progress
import tyro
import yaml
from rich.console import Console

from resbackbone.checks import UserError, one_of
from resbackbone.cli.errors import from_option, one_line_errors, readers_may_leave
from resbackbone.cli.words import read, texts
from resbackbone.engine.provenance import in_shell, program, tool_of
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
COMPLETION = {"--tyro-print-completion": "SHELL", "--tyro-write-completion": "SHELL FILE"}  # options of tyro
SECONDS_BETWEEN_LINES = 20  # of progress in a log
# The lowest values of options that are numbers; 1 of other whole numbers.
LEAST = dict.fromkeys(("early_stop", "eval_period", "gpus", "pictures", "seed", "shorter_side", "workers"), 0)
LEAST |= dict.fromkeys(("warmup_steps", "weight_decay", "eps", "threshold", "score_thresh"), 0)
LEAST |= {"size": 32, "image_size": 32, "budget": 1}
MOST = {"threshold": 1, "score_thresh": 1}


def parse(options: type[T], argv: list[str] | None, *, default: T | None = None) -> T:
    """Parse the command line: flags override --config FILE or `default`, which override the dataclass's defaults.

    --help shows the docstring of the command's module, and each dataclass that `options` inherits from as a group.
    Options with `recipe_values` take --recipe.NAME VALUE too (see `cli.recipes`). --quiet silences `progress_console`.
    Raises ValueError, in one line, for an unknown flag or a value that does not fit, such as a whole number below LEAST
    or a file as --output.
    """
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv) or COMPLETION.keys() & set(argv[:1]):
        _help(options, argv)
    parsed = read(options, argv, default)
    if getattr(parsed, "config", None) is not None:
        with from_option("--config"):
            saved = from_config(options, parsed.config)
        parsed = read(options, argv, saved)
    be_quiet(parsed)
    for name, value in vars(parsed).items():
        if type(value) in (int, float):
            least, most = LEAST.get(name, 1 if type(value) is int else -math.inf), MOST.get(name, math.inf)
            if not least <= value <= most:
                accepted = f"at least {least}" if most == math.inf else f"from {least} to {most}"
                raise UserError(f"--{name.replace('_', '-')} {value:g}: must be {accepted}")
    output = getattr(parsed, "output", None)
    for path in () if output is None else (output, *output.parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"--output {output}: {'' if path == output else f'{path} '}is a file; give a folder")
    return parsed


def _help(options: type, argv: Sequence[str]) -> None:
    """Print the help, or what completes the options in a shell, and exit."""
    groups = {group.__name__.removesuffix("Options"): group for group in _groups(options)}
    for group in groups.values() or [options]:
        described = texts(group)  # as one line each, because tyro would keep the breaks of indented text
        for field in dataclasses.fields(group):
            if text := described.get(field.name):
                field.metadata = MappingProxyType({"help": text})
    doc = sys.modules[options.__module__].__doc__ or ""
    doc = re.sub("\n\n(?=(python|pip) )", "\n\nExamples:\n", doc, count=1)
    description = re.sub("^(?=(python|pip) )", "  ", doc, flags=re.M)  # tyro does not wrap indented lines
    nested: Any = dataclasses.make_dataclass("Options", groups.items()) if groups else options
    if needed := COMPLETION.get(argv[0]):
        if len(argv) != 1 + len(needed.split()):
            raise UserError(f"{argv[0]}: give {needed} after it, and nothing else")
        one_of("shell", argv[1], ("bash", "zsh", "fish"))
    words = argv if needed else ["--help"]
    tyro.cli(nested, prog=Path(sys.argv[0]).stem, args=words, description=description, config=MARKERS)


def _groups(options: type) -> list[type]:
    return [base for base in options.__bases__ if dataclasses.is_dataclass(base)]


def option_names(options: type) -> list[str]:
    """The names of a dataclass's options, in the order of --help."""
    return [field.name for group in _groups(options) or [options] for field in dataclasses.fields(group)]


def _values(options, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(options, name) for name in names}


def be_quiet(options) -> None:
    """Silence `progress_console` in this process if the options have --quiet."""
    progress_console.quiet = getattr(options, "quiet", False)


def main_of(command: Callable[[], object]) -> None:
    """Run a command to its exit status: 0, or 1 with one line on stderr."""
    with quick_exit(), one_line_errors(), readers_may_leave():
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
    """The shell command that continues the run in `folder`."""
    started, words = program(), ["--output", str(folder), "--resume"]
    return in_shell([*started, *words]) if started else f"the same with {in_shell(words)}"


def config_of(options: type, path: str | Path) -> dict[str, Any]:
    """What a YAML file of options holds. Raises ValueError if it is of another command's run or of another program."""
    content, own = read_yaml(path), Path(getattr(sys.modules[options.__module__], "__file__", "")).stem
    effective = content.get("effective")
    made = tool_of(str(effective.get("command"))) if isinstance(effective, dict) else None
    if made not in (None, own):
        raise UserError(f"{path}: belongs to a run of {made}.py; give one of {own}.py")
    if {"_BASE_", "MODEL"} & content.keys():
        raise UserError(f"{path}: is detectron2's; adapters.detectron2 builds its backbone (docs/frameworks.md)")
    if "names" in content and {"train", "val", "path"} & content.keys():
        raise UserError(f"{path}: is YOLO's data.yaml, which train_coco.py takes as --data")
    return content


def from_config(options: type[T], path: str | Path) -> T:
    """Read options from a YAML file, such as a run's config.yaml; its section `effective` is ignored.

    Raises ValueError as `config_of` does, if an option is unknown, unless it is off, or if its value does not fit.
    """
    flags, content = [], config_of(options, path)
    for name, value in content.items():
        flag = f"--{name}".replace("_", "-")
        if str(name).startswith("recipe."):
            continue
        if isinstance(value, list) and value:
            flags += [flag, *map(str, value)]
        elif value is False and name not in option_names(options):
            continue  # a run of an earlier version without an option that is removed
        elif isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        elif value not in (None, []) and name != "effective":
            flags.append(f"{flag}={value}")
    try:
        parsed = read(options, flags)
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
