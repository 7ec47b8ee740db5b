"""The processes of one training: started by torchrun or srun, spawned here for each GPU, or this one alone."""

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.nn.parallel import DistributedDataParallel

from resbackbone.checks import UserError
from resbackbone.engine.device import choose_device, use
from resbackbone.engine.lock import release_all_folders
from resbackbone.engine.rendezvous import store_of_this_start
from resbackbone.engine.termination import EXIT_STATUS, INTERRUPTED, Terminated, quick_exit, termination

T = TypeVar("T")
Guard = Callable[[], AbstractContextManager]  # wraps the work of a process and turns errors into messages
TIMEOUT = timedelta(minutes=60)  # ranks wait for rank 0 while it scores


class Rank(NamedTuple):
    """The place of this process among those that train together, and its device."""

    rank: int
    ranks: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> range:
        """The indices of this rank's images; together the ranks have each image once, so scores are exact."""
        return range(self.rank, count, self.ranks)


def count_processes(device: str, gpus: int | None) -> int:
    """The number of processes: torchrun's, or one for each of `gpus` GPUs (None: all of them), or 1.

    Raises ValueError if this machine lacks the device or has fewer GPUs.
    """
    place = torch.device(choose_device(device))
    if place.type == "cuda":
        available = torch.cuda.device_count()
        if gpus is not None and not 1 <= gpus <= available:
            raise UserError(f"{gpus}: this machine has {available} GPUs")
    elif gpus not in (None, 0, 1):
        raise UserError(f"{gpus}: the device is {device}; leave it out, or start several CPU processes with torchrun")
    together = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if "RANK" in os.environ and (missing := [name for name in together if name not in os.environ]):
        raise UserError(f"RANK is set without {', '.join(missing)}: start with torchrun, which sets all, or unset RANK")
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    if place.type != "cuda" or place.index is not None:
        return 1
    return gpus or available


def launch(
    function: Callable[..., None], arguments: tuple, *, device: str, processes: int, guard: Guard = nullcontext
) -> None:
    """Call function(rank: Rank, *arguments) in each of `processes` (see `count_processes`) and wait for all of them.

    Under torchrun this process is one of them. Otherwise several are spawned, so `function` must be importable; `guard`
    wraps each of them. If one fails, the others are stopped and this process exits with status 1.
    """
    if "RANK" not in os.environ and processes > 1:
        _spawn(function, arguments, device=device, processes=processes, guard=guard)
        return
    number, joined = int(os.environ.get("RANK", "0")), "RANK" in os.environ
    place = _place(number, processes, device) if joined else torch.device(device)
    rank = Rank(number, processes, place)
    use(place)
    with _process_group(rank) if joined else nullcontext(), termination.handled():
        try:
            function(rank, *arguments)
        finally:
            release_all_folders()


def _place(rank: int, ranks: int, device: str) -> torch.device:
    """The device of a process that torchrun or srun started (srun sets no LOCAL_RANK)."""
    place = torch.device(device)
    if place.type != "cuda" or (place.index is not None and ranks == 1):
        return place
    if place.index is not None:
        raise UserError(f"{device}: each of the {ranks} processes takes a GPU of its own; use cuda")
    visible = torch.cuda.device_count()
    name = next((name for name in ("LOCAL_RANK", "SLURM_LOCALID") if name in os.environ), None)
    if visible == 1 and (name != "LOCAL_RANK" or "CUDA_VISIBLE_DEVICES" in os.environ):
        return torch.device("cuda", 0)  # the launcher shows each process its own GPU only
    index = rank % visible if name is None else int(os.environ[name])
    if index >= visible:
        gpus, most = ("1 GPU", "1 process") if visible == 1 else (f"{visible} GPUs", f"{visible} processes")
        raise UserError(f"{name}={index}, but this machine has {gpus}: start no more than {most}")
    return torch.device("cuda", index)


def _spawn(function: Callable[..., None], arguments: tuple, *, device: str, processes: int, guard: Guard) -> None:
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # else it logs every process it stops
    call = partial(launch, function, arguments, device=device, processes=processes)
    started = mp.spawn(_spawned, (get_free_port(), guard, call), nprocs=processes, join=False)
    signals: list[int] = []

    def forward(number: int, _) -> None:
        again = signal.SIGINT in signals and number == signal.SIGINT
        signals.append(number)
        for process in started.processes:
            process.kill() if again else process.terminate()

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        while not started.join():
            pass
    except mp.ProcessExitedException as error:  # the guard has reported it
        status = error.exit_code if error.exit_code in (EXIT_STATUS, INTERRUPTED) else 1
        sys.exit(INTERRUPTED if signal.SIGINT in signals else status)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if signal.SIGINT in signals:
        sys.exit(INTERRUPTED)


def _spawned(rank: int, port: int, guard: Guard, call: Callable[[], None]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank))
    with quick_exit(), guard():
        call()


@contextmanager
def _process_group(rank: Rank) -> Iterator[None]:
    """Join the other ranks for the block, and wait for them at its end unless the block fails."""
    backend = "cpu:gloo,cuda:nccl" if rank.device.type == "cuda" else "gloo"
    store = store_of_this_start(rank.rank, rank.ranks, TIMEOUT)
    dist.init_process_group(backend, store=store, rank=rank.rank, world_size=rank.ranks, timeout=TIMEOUT)
    together = None
    try:
        yield
    except Terminated as stop:
        if not stop.together:
            raise
        together = stop
    # Ranks leave together, because gloo sometimes aborts a rank whose peer leaves during an exchange. After an error
    # there is no barrier: the other ranks may never reach it.
    dist.barrier()
    dist.destroy_process_group()
    if together is not None:
        raise together


def gather(value, rank: Rank) -> list | None:
    """Every rank's `value` (any picklable object) at rank 0, in rank order; None elsewhere."""
    if rank.ranks == 1:
        return [value]
    values = [None] * rank.ranks if rank.is_main else None
    dist.gather_object(value, values)
    return values


def broadcast(value, rank: Rank):
    """Rank 0's `value` (any picklable object) at every rank."""
    if rank.ranks == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def from_main(make: Callable[[], T], rank: Rank) -> T:
    """Call `make` on rank 0 only, as for claiming a folder; every rank returns its result, or raises its error.

    The error is sent because gloo sometimes aborts a rank whose peer leaves while the rank waits for it.
    """
    made = error = None
    if rank.is_main:
        try:
            made = make()
        except (UserError, OSError) as raised:
            error = raised
    made, error = broadcast((made, error), rank)
    if error is not None:
        raise error
    return made


def any_rank(flags: Tensor, rank: Rank) -> Tensor:
    """[n] booleans on `rank.device`, true where any rank's are; does not wait for a GPU."""
    if rank.ranks > 1:
        votes = flags.int()
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        flags = votes.bool()
    return flags


def share_buffers(module: nn.Module, rank: Rank) -> None:
    """Copy rank 0's buffers to every rank, in place: each rank's batch norms keep their own statistics in training."""
    if rank.ranks > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def distributed(model: nn.Module, rank: Rank) -> nn.Module:
    """The model, wrapped in DDP if there are several ranks. DDP leaves buffers alone; see `share_buffers`."""
    if rank.ranks == 1:
        return model
    for parameter in model.parameters():
        if parameter.requires_grad and 1 in parameter.shape:
            parameter.register_hook(partial(_laid_out_as, parameter))
    devices = [rank.device.index] if rank.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True)


def _laid_out_as(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The gradient with the parameter's strides, so that DDP need not copy it.

    They can differ in dimensions of size 1, such as those of a 1x1 kernel, although the memory order is the same.
    """
    both = zip(parameter.shape, parameter.stride(), gradient.stride(), strict=True)
    if gradient.stride() == parameter.stride() or any(side != 1 and own != got for side, own, got in both):
        return gradient
    return gradient.as_strided(parameter.shape, parameter.stride())
