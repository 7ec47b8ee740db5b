"""The loop that every training here goes through: batches to updates, with metrics, checkpoints and evaluations."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from resbackbone.atomic import write_atomically
from resbackbone.checks import UserError
from resbackbone.cli.command import Progress, console, progress_console
from resbackbone.engine.device import autocast
from resbackbone.engine.distributed import Rank, broadcast, gather
from resbackbone.engine.run import Run
from resbackbone.engine.schedule import Schedule
from resbackbone.engine.state import NonFinite, TrainState, mean_of, seed_step
from resbackbone.engine.termination import Terminated, termination


@dataclass(frozen=True)
class Periods:
    """How often, in updates: a line of metrics, a checkpoint, an evaluation (0: only at the end)."""

    log: int
    checkpoint: int
    evaluation: int = 0


def train(
    state: TrainState,
    batches: Iterator[Any],
    losses_of: Callable[[Any], Mapping[str, Tensor]],
    *,
    schedule: Schedule,
    steps: int,
    images_per_update: int,
    seed: int,
    precision: str,
    rank: Rank,
    run: Run,
    periods: Periods,
    checkpoint: Callable[[], None],
    evaluate: Callable[[], str],
    bad_batch: Callable[[Any, NonFinite], str],
    parts_of: Callable[[Any], Sequence[Any]] = lambda batch: [batch],
    after_update: Callable[[Any], Mapping[str, float] | None] = lambda batch: None,
) -> None:
    """Update `state` from its step to `steps`, one batch an update.

    losses_of: a batch, or a part of one, to its loss terms, under autocast to `precision`.
    parts_of: the parts of a batch whose gradients are accumulated, all of the same size (default: the whole).
    images_per_update: over all ranks, for the images a second that are recorded.
    checkpoint, evaluate: called at their periods; a checkpoint also at the end. An evaluation gives its result in a few
        words, which the lines about the updates that follow have too.
    after_update: called with every batch; numbers that it returns, the same ones each time, are metrics too.
    bad_batch: for a batch with a loss that is not finite, on the rank that has it: keeps what is wanted of it and
        returns a clause that names it.

    Everything random in a step follows from `seed`, the step and the rank, so that a resumed run draws alike. Metrics
    are the mean loss terms, seconds an update and of these the seconds spent waiting for data, in forward, backward
    and optimizer, memory and images a second. Raises ValueError, on every rank and before any weight has changed, for
    a loss or gradient that is not finite. After SIGTERM on any rank all stop behind the same update, with a
    checkpoint, by raising Terminated.
    """

    result = None

    def evaluate_if_due() -> None:
        nonlocal result
        if not periods.evaluation or state.step % periods.evaluation or state.step in (0, steps):
            return
        try:
            with termination.deferred(False):
                result = evaluate()
        except Terminated:
            checkpoint()
            termination.saved = True
            _say_terminated(state, rank)
            termination.stop()
        if rank.is_main:
            progress_console.print(f"step {state.step}: {result}")

    with Progress("train", steps, start=state.step, shown=rank.is_main) as progress, termination.deferred():
        if not broadcast(run.evaluated, rank):  # killed in the middle of it
            evaluate_if_due()
        recent, began = [], time.monotonic()
        while state.step < steps:
            asked = time.monotonic()  # later than `began` by what a checkpoint took
            batch = next(batches)
            loaded = time.monotonic()
            seed_step(seed, state.step, rank.rank)
            rate = schedule.learning_rate(state.step)

            def losses(part: Any) -> Mapping[str, Tensor]:
                with autocast(rank.device, precision):
                    return losses_of(part)

            try:
                values = state.update(losses, parts_of(batch), learning_rate=rate, stop=termination.requested)
            except NonFinite as error:
                clause = bad_batch(batch, error) if error.terms else None
                said = "; ".join(filter(None, gather(clause, rank) or [clause or "on another rank"]))
                raise UserError(f"step {error.step} is not finite: {said}") from None
            values = {"loss": sum(values.values()), **values, "gradient_norm": state.gradient_norm}
            values |= after_update(batch) or {}
            now = time.monotonic()
            seconds = {"seconds": now - began, "data_seconds": loaded - asked}
            recent.append({**values, **seconds})
            began = now
            if state.step % periods.log == 0 or state.step == steps:
                parts = state.stopwatch.take(len(recent))
                record = {**mean_of(recent), **parts, "lr": rate, **memory(rank.device)}
                record["images_per_second"] = images_per_update / record["seconds"]
                run.record(state.step, record)
                progress.update(state.step, describe(record, result))
                recent = []
            else:
                progress.update(state.step)
            stopping = state.stopping or (rank.ranks == 1 and termination.requested)  # several ranks: after the next
            if state.step % periods.checkpoint == 0 or state.step == steps or stopping:
                checkpoint()
                termination.saved = True
            if stopping:
                _say_terminated(state, rank)
                termination.stop(together=True)
            evaluated = time.monotonic()
            evaluate_if_due()
            began += time.monotonic() - evaluated


def _say_terminated(state: TrainState, rank: Rank) -> None:
    if rank.is_main:
        console.print(f"terminated at step {state.step} and saved; continue with --resume")


def keep_bad_batch(tensors: Mapping[str, Tensor], folder: Path, error: NonFinite, rank: Rank) -> Path:
    """Write what a batch held that went wrong into the run's folder; returns the file, for the clause that names it."""
    path = folder / f"bad_batch_step_{error.step}_rank_{rank.rank}.safetensors"
    write_atomically(path, save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}))
    return path


def memory(device: torch.device) -> dict[str, float]:
    """{"memory_mib": peak memory so far of the GPU, or of this process}; on an Apple GPU what is held now.

    Empty where the system does not tell (Windows).
    """
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
    """One line on a stretch of updates, and what the last evaluation gave, if there has been one."""
    used = f", {record['memory_mib']:,.0f} MiB" if "memory_mib" in record else ""
    parts = " ".join(f"{name.removeprefix('loss_')} {value:.3f}" for name, value in record.items() if "loss_" in name)
    return (
        f"loss {record['loss']:.3f}{f' ({parts})' if parts else ''}, lr {record['lr']:.2g}, "
        f"{record['images_per_second']:.1f} images/s, data {100 * record['data_seconds'] / record['seconds']:.0f}%"
        f"{used}{f', {result}' if result else ''}"
    )
