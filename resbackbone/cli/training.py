"""What every training command does around its own data and network: folder, checkpoint to resume, messages, loop."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from resbackbone.checks import UserError
from resbackbone.cli.command import Progress, be_quiet, console, progress_console, to_config, track
from resbackbone.cli.errors import from_option
from resbackbone.engine import loop
from resbackbone.engine.checkpoints import resume_point
from resbackbone.engine.device import arithmetic, use_deterministic
from resbackbone.engine.distributed import Rank, from_main
from resbackbone.engine.run import Run, claim_folder, read_yaml
from resbackbone.engine.schedule import Schedule
from resbackbone.engine.state import TrainState
from resbackbone.engine.task import Task
from resbackbone.report.summary import summary


@dataclass
class Session:
    """A training command in one process. `checkpoint` is what it resumes from; only rank 0 prints and writes."""

    options: Any
    rank: Rank
    folder: Path = Path()
    checkpoint: Path | None = None

    def info(self, message: str) -> None:
        """Print a progress message; --quiet omits it."""
        if self.rank.is_main:
            progress_console.print(message)

    def warn(self, message: str) -> None:
        console.print(message)

    def track(self, items: Iterable, total: int) -> Iterator:
        """Yield the items of an evaluation under a progress bar."""
        return track(items, total, "evaluate", shown=self.rank.is_main)

    def progress(self, steps: int, start: int) -> Progress:
        return Progress("train", steps, start=start, shown=self.rank.is_main)

    def open_run(self, step: int, effective: Mapping[str, Any]) -> Run:
        """Start to write the run's folder: `effective` is added to the options in config.yaml.

        Raises ValueError if the run was trained on other data, which the checksum in `effective` shows.
        """
        if step and self.rank.is_main:
            recorded = read_yaml(self.folder / "config.yaml").get("effective", {})
            if any(recorded.get(name) != effective[name] for name in effective if name.endswith("sha256")):
                raise UserError(f"--data {self.options.data}: the run in {self.folder} was trained on other data")
        # A run that starts from this file is a new one.
        config = to_config(replace(self.options, output=None, resume=False, config=None))
        return Run(self.folder, {**config, "effective": effective}, resumed_step=step, writes=self.rank.is_main)

    def train(self, task: Task, state: TrainState, schedule: Schedule, *, parts: int = 1, **effective) -> Run:
        """Load the checkpoint, open the run, and update until the schedule or --max-steps ends."""
        options, ranks, start = self.options, self.rank.ranks, "from step 0"
        if self.checkpoint is not None:
            state.load(self.checkpoint)
            start = f"resumed at step {state.step}"
        if options.batch_size % ranks:
            raise UserError(f"--batch-size {options.batch_size} does not divide evenly over {ranks} processes")
        plan = loop.Plan(
            schedule,
            steps=schedule.steps if options.max_steps is None else options.max_steps,
            batch_size=options.batch_size,
            seed=options.seed,
            precision=options.precision,
            log_period=options.log_period,
            checkpoint_period=options.checkpoint_period,
            eval_period=options.eval_period,
        )
        self.info(
            f"{start} to {plan.steps}: {plan.batch_size} images an update{f' in {parts} parts' if parts > 1 else ''} "
            f"on {ranks} {self.rank.device.type}, {plan.precision}, learning rate {schedule.rate:g}"
        )
        effective = {**asdict(schedule), "milestones": list(schedule.milestones), **effective}
        run = self.open_run(state.step, effective | arithmetic(self.rank.device))
        with self.progress(plan.steps, state.step) as progress:
            loop.train(task, state, plan, run, loop.Observer(progress.update, self.info, self.warn))
        return run

    def finish(self, results: Mapping[str, str], files: Mapping[str, str]) -> None:
        """Print what the run did, its results and the files it wrote."""
        self.info(summary(self.folder, results, files))


def prepare_run(rank: Rank, options, *, default: Path, first_line: str | None = None) -> Session:
    """Lock the run's folder, --output or a new one named `default`, and find the checkpoint to resume from."""
    be_quiet(options)
    use_deterministic(options.deterministic)
    session = Session(options, rank)
    if first_line is not None:
        session.info(first_line)
    with from_option("--output"):
        session.folder = from_main(partial(claim_folder, options.output, default=default, resume=options.resume), rank)
        if options.resume:
            session.checkpoint = from_main(partial(resume_point, session.folder, session.warn), rank)
    session.info(f"run:   {session.folder}")
    return session
