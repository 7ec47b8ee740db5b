"""Options that several commands share, the checks on them, and which options a resumed run takes."""

import dataclasses
import os
import sys
from collections.abc import Collection
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

from resbackbone.checks import UserError, one_of
from resbackbone.cli.command import console, from_config, option_names, parse
from resbackbone.cli.errors import from_option
from resbackbone.engine.device import PRECISIONS, choose_device, choose_precision
from resbackbone.engine.distributed import count_processes
from resbackbone.engine.run import latest_folder

T = TypeVar("T", bound=Any)  # a dataclass of options
# What may change when a run is resumed, in every command: where it runs and how long, and what it writes how often.
MAY_DIFFER = frozenset(
    ("data", "output", "max_steps", "device", "gpus", "workers", "skip_bad_images", "resume", "config")
    + ("checkpoint_period", "eval_period", "log_period")
)


@dataclasses.dataclass(frozen=True)
class RunOptions:
    output: Path | None = None
    """The run's folder. Default: a new one under runs/."""
    resume: bool = False
    """Continue the run in --output (default: the latest of this name) from its last checkpoint."""
    config: Path | None = None
    """YAML file with options, such as another run's config.yaml; flags override it."""
    max_steps: int | None = None
    """Stop after this many updates, whatever the schedule's length."""
    log_period: int = 20
    """Updates between lines of metrics."""
    quiet: bool = False
    """Print only warnings, errors and the result."""


@dataclasses.dataclass(frozen=True)
class MachineOptions:
    device: str | None = None
    """cuda, cuda:N, cpu or mps. Default: all GPUs if there are any."""
    gpus: int | None = None
    """How many of this machine's GPUs to use. Default: all."""
    precision: str | None = None
    """fp32, bf16, or fp16 for GPUs without bf16 such as V100 and T4 (both autocast). Default: bf16 where the device
    computes in it."""
    seed: int = 0
    """Seed of weights, order, augmentation and sampling."""
    deterministic: bool = False
    """Use only deterministic algorithms, so that a GPU repeats a run bit for bit (slower). A CPU always does."""


def check_counts(options, *, least: int, names: Collection[str]) -> None:
    """Raise ValueError for the first of these options that is below `least`; None is accepted."""
    for name in names:
        if getattr(options, name) is not None and getattr(options, name) < least:
            raise UserError(f"{_flag(name)} {getattr(options, name)}: must be at least {least}")


def check_shortcut(options) -> None:
    """Raise ValueError for a --shortcut that is not the paper's, or that contradicts --plain."""
    if options.shortcut is not None:
        one_of("shortcut", options.shortcut, ("A", "B", "C"), " (or --plain)")
        if options.plain:
            raise UserError(f"--plain has no shortcuts, --shortcut {options.shortcut} asks for them; leave one out")


def choose_machine(options, precisions: Collection[str] = tuple(PRECISIONS)) -> tuple[str, int, str]:
    """(device, number of processes, precision): those in the options, or what suits the machine."""
    with from_option("--device"):
        device = choose_device(options.device)
    with from_option("--gpus") if options.gpus is not None else nullcontext():
        processes = count_processes(device, options.gpus)
    with from_option("--precision"):
        return device, processes, choose_precision(options.precision, device, precisions)


def wants_resume(options) -> bool:
    """Whether to resume a run: --resume, or torchrun has restarted this process (--max-restarts)."""
    return options.resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def resumed(options: T, argv: list[str] | None, *, default: Path, may_differ: Collection[str] = MAY_DIFFER) -> T:
    """The options of the run to resume, the one in --output or the latest named `default`; without one, those given.

    Raises ValueError if a flag contradicts the run's options, except those named in `may_differ`.
    """
    folder = options.output or latest_folder(default)
    if not (folder / "config.yaml").is_file():
        console.print(f"nothing to resume in {folder}: starting at step 0")
        return dataclasses.replace(options, output=folder, resume=True)
    saved = from_config(type(options), folder / "config.yaml", sys.argv[1:] if argv is None else argv)
    options = parse(type(options), argv, default=saved)
    for name in sorted(set(option_names(type(options))) - {*may_differ, "quiet"}):
        if (given := getattr(options, name)) != (recorded := getattr(saved, name)):
            raise UserError(
                f"{_flag(name)} {given}: the run in {folder} was made with {recorded}; leave the option out to resume "
                "that run, or give another --output to start a new one"
            )
    return dataclasses.replace(options, output=folder, resume=True)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
