"""What all training commands share: the run's folder, the checkpoint to resume from, messages and the loop."""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from resbackbone.analysis import count_parameters
from resbackbone.checks import UserError
from resbackbone.cli.command import Progress, be_quiet, console, progress_console, resume_command, to_config, track
from resbackbone.cli.errors import from_option
from resbackbone.engine import loop
from resbackbone.engine.best import FOLDER as BEST
from resbackbone.engine.best import read_best
from resbackbone.engine.checkpoints import resume_point, step_of
from resbackbone.engine.device import arithmetic, use_deterministic
from resbackbone.engine.distributed import Rank, from_main
from resbackbone.engine.provenance import command
from resbackbone.engine.run import Run, claim_folder, read_yaml
from resbackbone.engine.schedule import Schedule
from resbackbone.engine.state import TrainState
from resbackbone.engine.task import Task
from resbackbone.engine.termination import termination
from resbackbone.engine.tracking import check_tracker
from resbackbone.report.run import summary

FILES = {  # that a training writes, as its summary names them
    "weights": "model.safetensors",
    "best": f"{BEST}/model.safetensors",
    "detectron2": "model_final.pth",
    "results": "results.json",
    "report": "report.html",
    "pictures": "pictures",
}


@dataclass
class Session:
    """A command in one process. `checkpoint` is what a training resumes from; only rank 0 prints and writes."""

    options: Any
    rank: Rank
    folder: Path = Path()
    checkpoint: Path | None = None
    skipped: set[str] = field(default_factory=set)
    began: float = field(default_factory=time.monotonic)

    def info(self, message: str) -> None:
        """Print a progress message; --quiet omits it."""
        if self.rank.is_main:
            progress_console.print(message)

    def warn(self, message: str) -> None:
        console.print(message)

    def warn_skipped(self, messages: set[str]) -> None:
        """Print each message about a skipped image once."""
        for message in sorted(messages - self.skipped):
            self.warn(f"skipped {message}")
        self.skipped |= messages

    def track(self, items: Iterable, total: int) -> Iterator:
        """Yield the items of an evaluation under a progress bar."""
        return track(items, total, "evaluate", shown=self.rank.is_main)

    def open_run(self, step: int, effective: Mapping[str, Any], *, evaluates_again: bool) -> Run:
        """Start writing the run's folder; config.yaml gets the options and `effective`.

        Raises ValueError if the checksum of the data in `effective` is not the one that the run was started with.
        """
        self.info(f"run:   {self.folder}")
        if self.rank.is_main:
            recorded = read_yaml(self.folder / "config.yaml").get("effective", {}) if step else None
            effective = {**effective, **self._origin(step, effective, recorded)}
            if recorded is not None and any(
                recorded.get(name) != effective[name] for name in effective if name.endswith("sha256")
            ):
                raise UserError(
                    f"the run in {self.folder} was trained on other data than {self.options.data or 'these'}; "
                    "give that data, or another --output"
                )
        # Without these options, --config with this file starts a new run.
        config = to_config(replace(self.options, output=None, resume=False, config=None))
        content, writes = {**config, "effective": effective}, self.rank.is_main
        more: dict[str, Any] = {"writes": writes, "tracker": self.options.track, "warn": self.warn}
        return Run(self.folder, content, resumed_step=step, evaluates_again=evaluates_again, **more)

    def _origin(self, step: int, effective: Mapping[str, Any], recorded: Mapping[str, Any] | None) -> dict[str, Any]:
        """The command, commit and hardware of the run's first start, and where it was resumed.

        `effective` is of this start, `recorded` of the first if it is resumed after `step` updates.
        """
        tool = Path(sys.modules[type(self.options).__module__].__file__ or "").stem
        if recorded is None:
            return {"command": command(tool), "processes": self.rank.ranks}
        changed = [effective[name] for name in ("commit", "hardware") if effective[name] != recorded.get(name)]
        resumed = ", ".join([f"after update {step}", *filter(None, changed)])
        first = {name: recorded[name] for name in ("command", "commit", "hardware", "processes") if name in recorded}
        return {**first, "resumed": [*recorded.get("resumed", []), resumed]}

    def train(self, task: Task, state: TrainState, schedule: Schedule, **effective: str | int) -> Run:
        """Load the checkpoint, open the run, and train to the end of the schedule, to --max-steps or to an early stop.

        `effective` is recorded in config.yaml.
        """
        options, ranks, start = self.options, self.rank.ranks, "from step 0"
        parts = getattr(options, "accumulate", 1)
        if self.checkpoint is not None:
            state.load(self.checkpoint)
            start = f"resumed from step {state.step}"
        if options.batch_size % ranks:
            raise UserError(
                f"--batch-size {options.batch_size}: must be a multiple of {ranks}, the number of processes"
            )
        if (options.max_steps or 0) > schedule.steps and self.rank.is_main:
            self.warn(
                f"warning: --max-steps {options.max_steps} is beyond the schedule, which ends after {schedule.steps} "
                f"updates at a learning rate of {schedule.learning_rate(schedule.steps):g}; --epochs or --steps of a "
                "new run lengthens it"
            )
        plan = loop.Plan(
            schedule,
            steps=schedule.steps if options.max_steps is None else options.max_steps,
            batch_size=options.batch_size,
            seed=options.seed,
            precision=options.precision,
            log_period=options.log_period,
            checkpoint_period=options.checkpoint_period,
            eval_period=options.eval_period,
            early_stop=getattr(options, "early_stop", 0),
        )
        recorded = {**asdict(schedule), "milestones": list(schedule.milestones), **effective}
        recorded["parameters"] = count_parameters(state.model)
        again = state.step >= plan.steps or plan.evaluates(state.step)
        run = self.open_run(state.step, recorded | arithmetic(self.rank.device), evaluates_again=again)
        self.info(
            f"{start} to {plan.steps}: {plan.batch_size} images per update{f' in {parts} parts' if parts > 1 else ''} "
            f"on {ranks} {self.rank.device.type}, {plan.precision}, learning rate {schedule.rate:g}; saved every "
            f"{plan.checkpoint_period} updates{f', evaluated every {plan.eval_period}' if plan.eval_period else ''}"
        )
        with Progress("train", plan.steps, start=state.step, shown=self.rank.is_main) as progress:
            loop.train(task, state, plan, run, progress.update, self.info)
        return run

    def finish(self, results: Mapping[str, str]) -> None:
        """Print a summary of the run, its results, its best evaluation and the files it wrote."""
        if best := read_best(self.folder):
            results = {**results, "best evaluation": f"{best['summary']} at step {best['step']}, in {BEST}/"}
        self.info(summary(self.folder, results, FILES))


def prepare_run(rank: Rank, options, *, default: Path) -> Session:
    """Lock the run's folder, --output or a new one named `default`, and find the checkpoint to resume from."""
    be_quiet(options)
    with from_option("--track"):
        check_tracker(options.track)
    use_deterministic(options.deterministic)
    session = Session(options, rank)

    def claim() -> Path:
        folder = claim_folder(options.output, default=default)
        if not options.resume and (folder / "config.yaml").exists():
            raise UserError(f"{folder} already holds a run; add --resume to continue it, or give another folder")
        return folder

    with from_option("--output"):
        session.folder = from_main(claim, rank)
        if options.resume:
            session.checkpoint = from_main(partial(resume_point, session.folder, session.warn), rank)
    termination.resume_command = resume_command(session.folder)
    if session.checkpoint is not None:
        termination.saved = step_of(session.checkpoint)
    if session.checkpoint is not None and rank.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        recorded = read_yaml(session.folder / "config.yaml").get("effective", {}).get("threads", 0)
        if 1 <= recorded <= (os.cpu_count() or 1) and recorded != torch.get_num_threads():
            torch.set_num_threads(recorded)
            session.info(f"cpu:   {recorded} threads, as before, so that results stay the same")
    return session


def about_built_in_data(folder: Path, layout: str) -> str:
    """The lines that a training on the built-in data set prints first."""
    drawing = "" if folder.exists() else "\ndrawing its images first"
    where = f"data:  the built-in data set in {folder}; to train on yours, give --data DIR"
    return f"{where}, which should hold {layout}{drawing}"
