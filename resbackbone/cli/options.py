"""Options that several commands share, their checks, and what may change when a run is resumed."""

import dataclasses
import math
import os
from collections.abc import Callable, Collection
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch

from resbackbone.checks import UserError, one_of
from resbackbone.cli import load
from resbackbone.cli.command import Auto, from_config, parse, progress_console, to_config
from resbackbone.cli.errors import from_option, one_line_errors
from resbackbone.engine.device import PRECISIONS, choose_device, choose_precision
from resbackbone.engine.distributed import count_processes, launch
from resbackbone.engine.run import latest_folder

T = TypeVar("T", bound=Any)  # a dataclass of options
# Options that may change when a run is resumed: where it runs, how long, and how often it logs, saves and evaluates.
MAY_DIFFER = frozenset(
    ("data", "output", "max_steps", "device", "gpus", "workers", "skip_bad_images", "resume", "config", "quiet")
    + ("checkpoint_period", "eval_period", "log_period", "early_stop", "val_loss", "track")
)


@dataclasses.dataclass(frozen=True)
class RunOptions:
    output: Auto[Path] = None
    """The run's folder. Default: a new one under runs/."""
    resume: bool = False
    """Continue the run in --output, or the latest run of this name, from its last checkpoint; without a run, stop."""
    config: Auto[Path] = None
    """YAML file with options, such as another run's config.yaml; flags override it."""
    max_steps: Auto[int] = None
    """Stop after this many updates; the schedule stays as long as it is. Default: the length of the schedule."""
    log_period: int = 20
    """Updates between lines of metrics."""
    track: Auto[str] = None
    """wandb or mlflow, if installed: an experiment tracker that gets the configuration and the metrics too."""
    quiet: bool = False
    """Print only warnings, errors and the result."""


@dataclasses.dataclass(frozen=True)
class MachineOptions:
    device: Auto[str] = None
    """cuda, cuda:N, cpu or mps. Default: all GPUs, or the CPU if there are none."""
    gpus: Auto[int] = None
    """Number of this machine's GPUs to use. Default: all."""
    precision: Auto[str] = None
    """fp32, bf16, or fp16 for GPUs without bf16 such as V100 and T4 (both autocast). Default: bf16 where the device
    computes in it."""
    seed: int = 0
    """Seed of initial weights, image order, augmentation and sampling."""
    deterministic: bool = False
    """Use only deterministic algorithms, so that a GPU repeats a run bit for bit: slower, by how much is not measured.
    A CPU always repeats, and the option costs nothing there."""


def check_shortcut(options, choices: str = "ABC") -> None:
    """Raise ValueError if --shortcut is unknown or contradicts --plain."""
    if options.shortcut is not None:
        one_of("shortcut", options.shortcut, tuple(choices), " (or --plain)")
        if options.plain:
            raise UserError(f"--plain has no shortcuts, --shortcut {options.shortcut} asks for them; leave one out")


def check_training(options) -> None:
    """Raise ValueError if --ema or --clip-grad is out of range, or if --early-stop has no evaluations to go by."""
    if options.ema is not None and not 0 <= options.ema < 1:
        raise UserError(f"--ema {options.ema:g}: must be from 0 (no average) to below 1, such as 0.9998")
    if options.clip_grad is not None and not 0 <= options.clip_grad < math.inf:
        raise UserError(f"--clip-grad {options.clip_grad:g}: must be a norm above 0, such as 10, or 0 for no limit")
    if options.early_stop and not options.eval_period:
        raise UserError(f"--early-stop {options.early_stop}: needs evaluations on the way; give --eval-period too")


def choose_machine(options, precisions: Collection[str] = tuple(PRECISIONS)) -> tuple[str, int, str]:
    """(device, number of processes, precision): those in the options, or what suits the machine."""
    with from_option("--device"):
        device = choose_device(options.device)
    with from_option("--gpus") if options.gpus is not None else nullcontext():
        processes = count_processes(device, options.gpus)
    with from_option("--precision"):
        return device, processes, choose_precision(options.precision, device, precisions)


def launch_command(function: Callable, options, precisions: Collection[str] = tuple(PRECISIONS)) -> None:
    """Call function(rank, options) in one process for each GPU, or in one on the CPU; a failure ends in one line."""
    device, processes, _ = choose_machine(options, precisions)
    if device == "cpu" and processes == 1:
        leave_busy_cores()
    launch(function, (options,), device=device, processes=processes, guard=one_line_errors)


def leave_busy_cores() -> None:
    """Compute with as many threads as there are cores that other processes leave free, and say so.

    OMP_NUM_THREADS in the environment decides where it is set. A training that is resumed uses its own number
    (`cli.training.prepare_run`), since sums differ in their last bits with another.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    taken, usual = load.START.cores_of_others(), torch.get_num_threads()
    free = max(1, round(len(os.sched_getaffinity(0)) - taken)) if taken else usual
    if free < usual:
        torch.set_num_threads(free)
        progress_console.print(
            f"cpu:   other processes use {taken:.1f} cores, so this one computes with {free} of {usual} threads "
            "(OMP_NUM_THREADS sets another number)"
        )


def training_options(
    options: T,
    argv: list[str] | None,
    complete: Callable[[T], T],
    default_folder: Callable[[T], Path],
    may_differ: Collection[str] = MAY_DIFFER,
) -> T:
    """Fill in every option with `complete`; when resuming, those that are not given come from the run.

    Raises ValueError if a flag other than those in `may_differ` contradicts the run.
    """
    # torchrun sets the variable when it has restarted this process (--max-restarts)
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if not options.resume and not restarted:
        return complete(options)
    folder = options.output or latest_folder(default_folder(complete(options)))
    if (folder / "config.yaml").is_file():
        saved = from_config(type(options), folder / "config.yaml")
        options = parse(type(options), argv, default=saved)
        check_same_run(options, saved, folder, may_differ)
    elif options.resume and not restarted:
        raise UserError(f"--resume: there is no run in {folder}; give its folder as --output, or leave --resume out")
    return complete(dataclasses.replace(options, output=folder, resume=True))


def check_same_run(options: T, saved: T, folder: Path, may_differ: Collection[str] = MAY_DIFFER) -> None:
    """Raise ValueError if an option other than those in `may_differ` is not the saved one."""
    given, recorded = to_config(options), to_config(saved)
    for name in sorted((given.keys() | recorded.keys()) - set(may_differ)):
        if (asked := given.get(name)) != (before := recorded.get(name)):
            made = "without it" if before is None else f"with {before}"
            raise UserError(
                f"--{name.replace('_', '-')} {asked}: the run in {folder} was made {made}; leave the option out to "
                "resume that run, or give another --output to start a new one"
            )
