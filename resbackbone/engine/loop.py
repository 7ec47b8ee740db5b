"""The training loop: updates from batches, with metrics, checkpoints and evaluations."""

import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from resbackbone.atomic import write_atomically
from resbackbone.checks import UserError
from resbackbone.engine.best import keep_if_best, read_best
from resbackbone.engine.device import autocast
from resbackbone.engine.distributed import from_main, gather
from resbackbone.engine.metrics import read_metrics
from resbackbone.engine.run import Run
from resbackbone.engine.schedule import Schedule
from resbackbone.engine.state import NonFinite, TrainState, mean_of, seed_step
from resbackbone.engine.task import Task
from resbackbone.engine.termination import Terminated, termination


@dataclass(frozen=True)
class Plan:
    """How long to train, and how often to log, save and evaluate.

    Periods are in updates; with an `eval_period` of 0 the loop does not evaluate. `batch_size` is over all ranks. After
    `early_stop` evaluations in a row that are not better than the best, training ends (0: it does not).
    """

    schedule: Schedule
    steps: int
    batch_size: int
    seed: int
    precision: str
    log_period: int
    checkpoint_period: int
    eval_period: int
    early_stop: int = 0

    def evaluates(self, step: int) -> bool:
        """Whether `train` evaluates at this step; the last one is for the final evaluation."""
        return step not in (0, self.steps) and self._is_due(step)

    def evaluations_from(self, step: int) -> int:
        """How many evaluations `train` makes from this step, which is above 0, to the last one before the end."""
        return max(0, (self.steps - 1) // self.eval_period - (step - 1) // self.eval_period) if self.eval_period else 0

    def logs(self, step: int) -> bool:
        """Whether `train` records a line of metrics at this step; before an evaluation too, as that may end it."""
        return step % self.log_period == 0 or step == self.steps or self.evaluates(step)

    def cuts(self, step: int) -> bool:
        """Whether training that ends at this step is cut short where one left alone would not evaluate."""
        return step < self.schedule.steps and not self._is_due(step)

    def _is_due(self, step: int) -> bool:
        return bool(self.eval_period) and step % self.eval_period == 0


class Pace:
    """How fast a training is, for the time that is left: seconds of the latest updates, and of the last evaluation."""

    LEAST, MOST = 5, 200  # updates to judge by

    def __init__(self, plan: Plan):
        self.plan, self.evaluation = plan, 0.0
        self.updates: deque[float] = deque(maxlen=self.MOST)

    def seconds_left(self, step: int) -> float:
        """Of the updates after `step`, and of the evaluations from it on; infinity until there were LEAST updates.

        The first updates take much longer than the rest, so the median counts until there are MOST for a mean.
        """
        if len(self.updates) < self.LEAST:
            return math.inf
        update = statistics.fmean(self.updates) if len(self.updates) == self.MOST else statistics.median(self.updates)
        return (self.plan.steps - step) * update + (self.plan.evaluations_from(step) + 1) * self.evaluation


def train(
    task: Task,
    state: TrainState,
    plan: Plan,
    run: Run,
    progress: Callable[[int, str | None, float], None],
    info: Callable[[str], None],
) -> None:
    """Update `state` from its step to the plan's last, with one batch of the task for each update, or stop early.

    `progress` gets every step, a line of metrics or None, and the seconds that are left, infinity if unknown; `info`
    gets each evaluation's result.

    Randomness depends on the seed, the step and the rank alone, so resumed runs repeat it. If a loss or gradient is not
    finite, raises UserError on every rank before any weight changes. After SIGTERM or Ctrl-C on any rank, all save a
    checkpoint after the same update and raise Terminated.
    """
    rank, result, saved = state.rank, None, state.step
    run.keeps_best = bool(plan.eval_period) or read_best(run.folder) is not None

    def checkpoint() -> None:
        nonlocal saved
        run.save(state, partial(task.save, state.network))
        saved = state.step
        if rank.is_main and not plan.eval_period:  # otherwise evaluations write it
            task.write_report(run.folder)
        termination.saved = state.step

    def evaluate_if_due() -> bool:
        """Evaluate if the plan says so; whether training ends with it."""
        nonlocal result
        if not plan.evaluates(state.step):
            return False
        try:
            with termination.deferred(False):
                result = task.summary(evaluate(task, state, run))
        except Terminated:
            checkpoint()
            termination.stop()
        info(f"step {state.step}: {result}")
        return stops_early()

    def stops_early() -> bool:
        if not plan.early_stop or state.step >= plan.steps:
            return False
        waited, best = from_main(lambda: (evaluations_since_best(run.folder), read_best(run.folder)), rank)
        if waited < plan.early_stop:
            return False
        than = f"that of step {best['step']}, {best['summary']}" if best else "those before"
        some = "1 evaluation was" if waited == 1 else f"{waited} evaluations in a row were"
        info(f"stopped early at step {state.step}: {some} no better than {than}")
        if saved != state.step:
            checkpoint()
        return True

    batches, pace = task.batches(state.step), Pace(plan)
    with termination.deferred():
        ended = evaluate_if_due() or stops_early()  # a resumed run: it was saved before it was evaluated, or had ended
        recent, began = [], time.monotonic()
        while state.step < plan.steps and not ended:
            asked = time.monotonic()  # `began` is earlier: a checkpoint may lie between
            batch = next(batches)
            loaded = time.monotonic()
            seed_step(plan.seed, state.step, rank.rank)
            rate = plan.schedule.learning_rate(state.step)

            def losses(part: Any) -> Mapping[str, Tensor]:
                with autocast(rank.device, plan.precision):
                    return task.losses(state.model, part)

            try:
                values = state.update(losses, task.parts(batch), learning_rate=rate, stop=termination.requested)
            except NonFinite as error:
                clause = _keep_bad_batch(task, batch, run.folder, error, state) if error.terms else None
                clauses = gather(clause, rank) or [clause or "on another rank"]
                says = "; ".join([*filter(None, clauses), "if they are fine, lower the learning rate"])
                raise UserError(f"step {error.step} is not finite: {says}") from None
            values = {"loss": sum(values.values()), **values, "gradient_norm": state.gradient_norm}
            values |= task.after_update(batch, state.step)
            now = time.monotonic()
            recent.append({**values, "seconds": now - began, "data_seconds": loaded - asked})
            pace.updates.append(now - began)
            began, line = now, None
            if plan.logs(state.step):
                parts = state.stopwatch.take(len(recent))
                record = {**mean_of(recent), **parts, "lr": rate, **memory(rank.device)}
                record["images_per_second"] = plan.batch_size / record["seconds"]
                run.record(state.step, record)
                line, recent = describe(record, result), []
            if not termination.requested:  # what reads it may have been interrupted too, and a save comes first
                try:
                    progress(state.step, line, pace.seconds_left(state.step))
                except SystemExit:  # what reads it has left, such as `| head`
                    checkpoint()
                    if termination.requested:  # by Ctrl-C, which has ended that first
                        termination.stop()
                    raise
            stopping = state.stopping or (rank.ranks == 1 and termination.requested)  # several ranks agree in an update
            if state.step % plan.checkpoint_period == 0 or state.step == plan.steps or stopping:
                checkpoint()
            if stopping:
                termination.stop(together=True)
            asked = time.monotonic()
            ended = evaluate_if_due()
            if plan.evaluates(state.step):
                pace.evaluation = time.monotonic() - asked
                began += pace.evaluation
    run.is_cut = plan.cuts(state.step)


def evaluate(task: Task, state: TrainState, run: Run, *, final: bool = False) -> Mapping[str, Any]:
    """Evaluate the task, add the result to the metrics, keep the weights if they are the best, rewrite the report.

    After an early stop the last evaluation is the final one already, unless the task's final one differs. A final
    evaluation that differs, or that a longer run would not make, counts neither for best/ nor for an early stop of the
    resumed run: its line has `"compared": false`.
    """
    comparable = not (final and (task.final_differs or run.is_cut))
    if final and comparable and run.evaluated is not None and run.evaluated[0] == state.step:
        return run.evaluated[1]
    began = time.monotonic()
    result = task.evaluate(state.evaluated, final=final)
    line = {**result, "seconds": time.monotonic() - began}
    run.record(state.step, line if comparable else {**line, "compared": False}, kind="eval")
    run.evaluated = state.step, result
    if state.rank.is_main:
        if comparable and run.keeps_best:
            write = partial(task.save, state.evaluated)
            keep_if_best(run.folder, state.step, task.score(result), task.summary(result), result, write)
        task.write_report(run.folder)
    return result


def evaluations_since_best(folder: Path) -> int:
    """How many evaluations of a run that are compared came after its best."""
    best = read_best(folder) or {"step": -1}
    compared = [line["step"] for line in read_metrics(folder, "eval") if line.get("compared", True)]
    return len({step for step in compared if step > best["step"]})


def _keep_bad_batch(task: Task, batch: Any, folder: Path, error: NonFinite, state: TrainState) -> str:
    """Save the batch in the run's folder; returns a clause that names the loss terms, the images and the file."""
    tensors, images = task.bad_batch(batch)
    path = folder / f"bad_batch_step_{error.step}_rank_{state.rank.rank}.safetensors"
    write_atomically(path, save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}))
    return f"{error.terms} on rank {state.rank.rank}, {images} are saved in {path}"


def memory(device: torch.device) -> dict[str, float]:
    """{"memory_mib": peak so far of the GPU or of this process}; an Apple GPU's current memory; {} on Windows."""
    if device.type == "cuda":
        return {"memory_mib": torch.cuda.max_memory_allocated(device) / 2**20}
    if device.type == "mps":
        return {"memory_mib": torch.mps.driver_allocated_memory() / 2**20}
    try:
        import resource
    except ModuleNotFoundError:
        return {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"memory_mib": peak / (2**20 if sys.platform == "darwin" else 2**10)}  # macOS counts bytes


def describe(record: Mapping[str, float], result: str | None = None) -> str:
    """One line about the last updates, followed by the last evaluation's result, if any."""
    used = f", {record['memory_mib']:,.0f} MiB" if "memory_mib" in record else ""
    parts = " ".join(f"{name.removeprefix('loss_')} {value:.3f}" for name, value in record.items() if "loss_" in name)
    return (
        f"loss {record['loss']:.3f}{f' ({parts})' if parts else ''}, lr {record['lr']:.2g}, "
        f"{record['images_per_second']:.1f} images/s, data {100 * record['data_seconds'] / record['seconds']:.0f}%"
        f"{used}{f', {result}' if result else ''}"
    )
