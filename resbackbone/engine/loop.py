"""The training loop: updates from batches, with metrics, checkpoints and evaluations."""

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from resbackbone.atomic import write_atomically
from resbackbone.checks import UserError
from resbackbone.engine.device import autocast
from resbackbone.engine.distributed import gather
from resbackbone.engine.run import Run
from resbackbone.engine.schedule import Schedule
from resbackbone.engine.state import NonFinite, TrainState, mean_of, seed_step
from resbackbone.engine.task import Task
from resbackbone.engine.termination import Terminated, termination


@dataclass(frozen=True)
class Plan:
    """How long to train, and how often to log, save and evaluate.

    Periods are in updates; with an `eval_period` of 0 the loop does not evaluate. `batch_size` is over all ranks.
    """

    schedule: Schedule
    steps: int
    batch_size: int
    seed: int
    precision: str
    log_period: int
    checkpoint_period: int
    eval_period: int

    def evaluates(self, step: int) -> bool:
        """Whether `train` evaluates at this step; the last one is for the final evaluation."""
        return bool(self.eval_period) and step % self.eval_period == 0 and step not in (0, self.steps)


def train(
    task: Task,
    state: TrainState,
    plan: Plan,
    run: Run,
    progress: Callable[[int, str | None], None],
    info: Callable[[str], None],
) -> None:
    """Update `state` from its step to the plan's last, with one batch of the task for each update.

    `progress` gets every step, with a line of metrics or None, and `info` each evaluation's result.

    Randomness depends on the seed, the step and the rank alone, so resumed runs repeat it. If a loss or gradient is not
    finite, raises UserError on every rank before any weight changes. After SIGTERM on any rank, all save a checkpoint
    after the same update and raise Terminated.
    """
    rank, result = state.rank, None

    def checkpoint() -> None:
        run.save(state, task.save)
        if rank.is_main and not plan.eval_period:  # otherwise evaluations write it
            task.write_report(run.folder)
        termination.saved = True

    def evaluate_if_due() -> None:
        nonlocal result
        if not plan.evaluates(state.step):
            return
        try:
            with termination.deferred(False):
                result = task.summary(evaluate(task, state, run))
        except Terminated:
            checkpoint()
            termination.stop()
        info(f"step {state.step}: {result}")

    batches = task.batches(state.step)
    with termination.deferred():
        evaluate_if_due()  # of a resumed run, which was saved before it was evaluated
        recent, began = [], time.monotonic()
        while state.step < plan.steps:
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
                raise UserError(f"step {error.step} is not finite: {'; '.join(filter(None, clauses))}") from None
            values = {"loss": sum(values.values()), **values, "gradient_norm": state.gradient_norm}
            values |= task.after_update(batch, state.step)
            now = time.monotonic()
            recent.append({**values, "seconds": now - began, "data_seconds": loaded - asked})
            began, line = now, None
            if state.step % plan.log_period == 0 or state.step == plan.steps:
                parts = state.stopwatch.take(len(recent))
                record = {**mean_of(recent), **parts, "lr": rate, **memory(rank.device)}
                record["images_per_second"] = plan.batch_size / record["seconds"]
                run.record(state.step, record)
                line, recent = describe(record, result), []
            progress(state.step, line)
            stopping = state.stopping or (rank.ranks == 1 and termination.requested)  # several ranks agree in an update
            if state.step % plan.checkpoint_period == 0 or state.step == plan.steps or stopping:
                checkpoint()
            if stopping:
                termination.stop(together=True)
            evaluated = time.monotonic()
            evaluate_if_due()
            began += time.monotonic() - evaluated


def evaluate(task: Task, state: TrainState, run: Run, *, final: bool = False) -> Mapping[str, Any]:
    """Evaluate the task, add the result to the metrics and rewrite the report."""
    began = time.monotonic()
    result = task.evaluate(final=final)
    run.record(state.step, {**result, "seconds": time.monotonic() - began}, kind="eval")
    if state.rank.is_main:
        task.write_report(run.folder)
    return result


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
