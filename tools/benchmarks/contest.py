"""A contest between packages: their outputs are compared first, then times are taken in rounds of shuffled order."""

import gc
import math
import random
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.benchmark import timer

from resbackbone.memory import keep_freed_memory
from resbackbone.tools.benchmarks.machine import peak_in_fresh_process

OWN = "resbackbone"
FUSED = "resbackbone, fused"
TURN = 0.2  # seconds of a contender's runs in a round, in 1 to 50 runs


class Mode(NamedTuple):
    layout: torch.memory_format
    tolerance: float  # how far outputs may differ (`relative_difference`): packages round in different places
    tf32: bool = False  # for products and convolutions in fp32 on a GPU
    bf16: bool = False  # autocast over fp32 weights
    compiled: bool = False


TF32, BF16, COMPILED = "tf32-channels-last", "bf16-channels-last", "bf16-compiled"
MODES = {
    "fp32": Mode(torch.contiguous_format, 1e-4),
    "fp32-channels-last": Mode(torch.channels_last, 1e-4),
    TF32: Mode(torch.channels_last, 1e-2, tf32=True),  # TF32 keeps 11 bits, bf16 8
    BF16: Mode(torch.channels_last, 3e-2, tf32=True, bf16=True),
    COMPILED: Mode(torch.channels_last, 3e-2, tf32=True, bf16=True, compiled=True),
    "fp64": Mode(torch.contiguous_format, 1e-9),  # of scoring alone
}
GPU_MODES = (TF32, COMPILED)


@dataclass(frozen=True)
class Workload:
    """The settings of a contest. Height and width in pixels."""

    mode: str
    device: str
    depth: int
    height: int
    width: int
    batch_size: int

    @property
    def on_gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"

    @property
    def bf16(self) -> bool:
        return MODES[self.mode].bf16

    def place(self, what: Any) -> Any:
        """A module or batch of images on the device, in the mode's memory format."""
        return what.to(device=self.device, memory_format=MODES[self.mode].layout)

    def compiled(self, network: nn.Module) -> tuple[Callable, nn.Module | None]:
        """The network to call, and that to count in: none if it is compiled, which it would not be under counters."""
        return (torch.compile(network), None) if MODES[self.mode].compiled else (network, network)

    def autocast(self) -> torch.autocast:
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.bf16)


class Contender(NamedTuple):
    """One package ready for one job."""

    run: Callable[[], Any]  # what is timed
    module: nn.Module | None = None  # if given, count the bytes saved for backward, its own excluded
    check: Callable[[], Any] | None = None  # returns the outputs to compare, if `run` does not
    keeps_memory: bool = False  # whether `keep_freed_memory` is on while it runs, as after `fuse`


def relative_difference(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The largest ||got - wanted|| / ||wanted|| of the tensors; infinite if shapes differ or a value is not finite."""
    assert got.keys() == wanted.keys(), f"{sorted(got)} against {sorted(wanted)}"
    differences = [0.0]
    for name, expected in wanted.items():
        expected, found = (tensor.detach().double().cpu() for tensor in (expected, got[name]))
        if found.shape != expected.shape:
            return math.inf
        difference, scale = (found - expected).norm().item(), expected.norm().item()
        differences.append(difference / scale if scale else difference)
    return max(differences) if all(map(math.isfinite, differences)) else math.inf


@dataclass(frozen=True)
class Job:
    """What packages are compared in."""

    heading: str  # of its table; an option's name in braces stands for its value
    names: tuple[str, ...]  # of the contenders, this package's first
    build: Callable[[Workload, str], Contender]  # takes a name; picklable, because a fresh process calls it too
    modes: tuple[str, ...]
    batch_size: int = 1
    tolerance: float | None = None  # default: the mode's
    difference: Callable[[Any, Any], float] = relative_difference


class OutputsDiffer(Exception):
    """A contender computes something else than the first one."""


def package_of(name: str) -> str:
    return name.split(",")[0]


def empty_result(job: str, work: Workload, names: Sequence[str]) -> dict:
    """A contest's JSON before anything is measured. Bytes are those of one run; `failed` gives reasons by contender."""
    settings = {"job": job, "mode": work.mode, "batch_size": work.batch_size, "names": list(names)}
    figures = ("difference", "seconds", "saved_bytes", "peak_bytes", "failed", "tracebacks")
    return {**settings, **{kind: {} for kind in figures}}


def measure(job: Job, work: Workload, result: dict, *, rounds: int, deadline: float = math.inf) -> None:
    """Measure a contest into its `empty_result`, round by round, so that an interrupted one keeps its rounds.

    A contender that fails, or whose outputs differ from the first one's, is recorded and left out. If no other
    package agrees with ours, nothing is timed, because nobody can say which is right. No further round starts after
    `deadline`, in time.monotonic().
    """
    result["tolerance"] = job.tolerance or MODES[work.mode].tolerance
    first: dict[str, Any] = {}  # {name: outputs} of the first contender
    turns: dict[str, Callable[[], float]] = {}
    with tf32(work.on_gpu and MODES[work.mode].tf32):
        for name in result["names"]:
            with recorded(result, name):
                turns[name] = ready(job, work, name, first, result)
        if {OWN} == {*map(package_of, turns)} and max(result["difference"].values()) > result["tolerance"]:
            result["failed"] |= dict.fromkeys(turns, "no other package agrees with it")
            return
        for done in range(rounds):
            if done and time.monotonic() > deadline:
                break
            seconds = {}
            for name in random.sample(list(turns), len(turns)):
                with recorded(result, name):
                    seconds[name] = turns[name]()
            for name in turns.keys() - seconds:  # it failed, so its earlier rounds do not count either
                del turns[name]
                result["seconds"].pop(name, None)
            for name, taken in seconds.items():
                result["seconds"].setdefault(name, []).append(taken)


def ready(job: Job, work: Workload, name: str, first: dict[str, Any], result: dict) -> Callable[[], float]:
    """Build a contender and measure its memory; return its `timed` runs. Raises OutputsDiffer."""
    gc.collect()  # a contender that failed may have left its memory in cycles
    if not work.on_gpu:
        result["peak_bytes"][name] = peak_in_fresh_process(partial(job.build, work, name))
    contender = job.build(work, name)
    outputs = inspect(contender, name, result, on_gpu=work.on_gpu)
    outputs = contender.check() if contender.check else outputs
    if not first:
        first[name] = outputs
    ((reference, expected),) = first.items()
    difference = result["difference"][name] = job.difference(outputs, expected)
    if not difference <= result["tolerance"]:
        raise OutputsDiffer(f"from {reference}'s by {difference:.2g}; at most {result['tolerance']:g} is accepted")
    return timed(contender)


@contextmanager
def recorded(result: dict, name: str) -> Iterator[None]:
    """Record an exception in the block as the reason why `name` has no times."""
    try:
        yield
    except Exception as error:
        result["failed"][name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200].rstrip('.')}"
        result["tracebacks"][name] = traceback.format_exc()


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    """In the block, compute fp32 products and convolutions in TF32 or not."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if on else "highest")
    torch.backends.cudnn.allow_tf32 = on
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def inspect(contender: Contender, name: str, result: dict, *, on_gpu: bool) -> Any:
    """Run a contender once; its outputs. Record the bytes that its module saves for backward, and a GPU's peak memory.

    Every storage saved for backward counts once. Peak memory is that above the memory allocated before.
    """
    if contender.module is None:
        return contender.run()
    # By the storage, not its address: a fused network counts weights whose address was given away as changed.
    kept = {t.untyped_storage()._cdata for t in (*contender.module.parameters(), *contender.module.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in kept:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = contender.run()
    result["saved_bytes"][name] = sum(saved.values())
    if on_gpu:
        result["peak_bytes"][name] = torch.cuda.max_memory_allocated() - before
    return outputs


def timed(contender: Contender) -> Callable[[], float]:
    """A function that makes as many runs as take a TURN, and returns the seconds of one.

    A run before them is not timed: caches and memory hold what the contender before has left.
    torch.utils.benchmark.Timer would make two, which take minutes for detectors on a CPU.
    """

    def seconds(repeats: int) -> float:
        began = timer()  # synchronizes a GPU
        for _ in range(repeats):
            contender.run()
        return (timer() - began) / repeats

    def turn(repeats: int) -> float:
        keep_freed_memory(contender.keeps_memory)
        contender.run()
        return seconds(repeats)

    return partial(turn, min(50, max(1, round(TURN / max(seconds(1), 1e-6)))))
