"""What commands that train have in common in their options: counts, the run's folder, going on with a run."""

import dataclasses
import os
import shutil
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar

from resbackbone.checks import UserError
from resbackbone.cli.command import console, from_config, parse
from resbackbone.engine.checkpoints import last_whole_checkpoint
from resbackbone.engine.lock import lock_folder
from resbackbone.engine.run import latest_folder, new_folder

T = TypeVar("T", bound=Any)  # a dataclass of options


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Options of every command that trains: how far, where to, on what.

    They stand behind the command's own in `class Options(RunOptions, Own)`: fields come from the last base first.
    """

    max_steps: int | None = None
    """Stop after this many updates, wherever the schedule is then."""
    output: Path | None = None
    """The run's folder. Default: a new one under runs/."""
    log_period: int = 20
    """Updates between lines of metrics."""
    seed: int = 0
    """Weights, order and augmentation are functions of it."""
    device: str | None = None
    """cuda, cuda:N, cpu or mps. Default: all GPUs if there are any."""
    gpus: int | None = None
    """How many of this machine's GPUs. Default: all."""
    precision: str | None = None
    """fp32, bf16, or fp16 for GPUs without bf16 such as V100 and T4 (both autocast). Default: bf16 where the device
    computes in it."""
    deterministic: bool = False
    """Use only deterministic algorithms, so that a GPU repeats a run bit for bit (slower). A CPU always does."""
    resume: bool = False
    """Continue the run in --output (default: the latest of this name) from its last checkpoint."""
    config: Path | None = None
    """YAML file with options, such as another run's config.yaml; flags override it."""
    quiet: bool = False
    """Print only warnings, errors and the result."""


def check_counts(options, *, least: int, names: Collection[str]) -> None:
    """ValueError for the first of these options that is below `least`; None is not."""
    for name in names:
        if getattr(options, name) is not None and getattr(options, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least {least}")


def claim_folder(output: Path | None, *, default: Path, resume: bool) -> Path:
    """Where the run is written: --output, which may hold a run only if that is resumed, or a new `default`.

    It is this process's from here on (`lock.lock_folder`); ValueError if another one writes there.
    """
    folder = new_folder(default) if output is None else output
    lock_folder(folder)
    if not resume and (folder / "config.yaml").exists():
        raise UserError(f"--output {folder} already holds a run; add --resume to continue it")
    return folder


def wants_resume(options) -> bool:
    """Whether to go on with a run: asked for, or torchrun starts this process again (--max-restarts)."""
    return options.resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def resume_point(folder: Path) -> Path | None:
    """The checkpoint that the run in `folder` goes on from: the last that is whole; None if there are none yet.

    Newer ones that are damaged are said and set aside, as step_N.damaged. ValueError if none is whole.
    """
    last, damaged = last_whole_checkpoint(folder)
    for path, wrong in damaged.items():
        console.print(f"damaged: {path}: {wrong}; set aside as {path.name}.damaged")
    if last is None and damaged:
        raise UserError(f"{folder}: none of its {len(damaged)} checkpoints is whole; give another --output")
    for path in damaged:
        aside = path.with_name(f"{path.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    return last


def resumed(options: T, argv: list[str] | None, *, default: Path, may_differ: Collection[str]) -> T:
    """The options of the run that is resumed, which flags may not contradict; those given if there is no such run.

    The run is the one in --output, or the latest of the folder `default`. `may_differ` names the options that a flag
    may change; ValueError for any other. What the run left to be chosen is left so.
    """
    folder = options.output or latest_folder(default)
    if not (folder / "config.yaml").is_file():
        console.print(f"nothing to resume in {folder}: starting at step 0")
        return dataclasses.replace(options, output=folder, resume=True)
    saved = from_config(type(options), folder / "config.yaml", sys.argv[1:] if argv is None else argv)
    options = parse(type(options), argv, default=saved)
    for name in sorted({field.name for field in dataclasses.fields(options)} - {*may_differ, "quiet"}):
        if (asked := getattr(options, name)) != (had := getattr(saved, name)):
            raise UserError(
                f"--{name.replace('_', '-')} {asked}: the run in {folder} was made with {had}; leave the option out to "
                "resume that run, or give another --output to start anew"
            )
    return dataclasses.replace(options, output=folder, resume=True)
