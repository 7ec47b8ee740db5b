"""A contest between packages: their outputs are compared first, then times are taken in rounds of shuffled order."""

import gc
import math
import random
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.benchmark import timer
from torch.utils.flop_counter import FlopCounterMode

from resbackbone.tools.benchmarks.machine import peak_in_fresh_process

OWN = "resbackbone"
FUSED = "fused"  # the second part of "resbackbone, fused"
MATRIX_PRODUCT = "torch.mm"
MATRIX_SIDE = 4096
ALL = "all of them"  # stands for a contender's name if a contest fails between its contenders


class Mode(NamedTuple):
    dtype: torch.dtype
    layout: torch.memory_format
    tf32: bool = False  # for products and convolutions in fp32 on a GPU
    compiled: bool = False


TF32, BF16, COMPILED = "tf32-channels-last", "bf16-channels-last", "bf16-compiled"
MODES = {
    "fp32": Mode(torch.float32, torch.contiguous_format),
    "fp32-channels-last": Mode(torch.float32, torch.channels_last),
    TF32: Mode(torch.float32, torch.channels_last, tf32=True),
    BF16: Mode(torch.bfloat16, torch.channels_last, tf32=True),  # autocast over fp32 weights
    COMPILED: Mode(torch.bfloat16, torch.channels_last, tf32=True, compiled=True),
}


class Contender(NamedTuple):
    """One package ready for one job."""

    run: Callable[[], Any]  # what is timed
    module: nn.Module | None = None  # if given, count operations and the bytes saved for backward, its own excluded
    check: Callable[[], Any] | None = None  # returns the outputs to compare, if `run` does not
    clock: Callable[[], float] | None = None  # returns the seconds of a run that it makes itself


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
class Contest:
    """What is compared, and how to read its times.

    `names` are the contenders, this package's first. Each is measured against `reference`, by default the fastest
    of the other packages. `items` holds the number of images in a run of each contender.
    """

    job: str
    heading: str = ""  # of the job's table
    names: tuple[str, ...] = ()
    build: Callable[..., Contender] = Contender  # takes a name; picklable, because a fresh process calls it too
    mode: str = ""
    batch_size: int | None = None  # of networks
    tolerance: float = 0.0
    difference: Callable[..., float] = relative_difference
    reference: str | None = None
    items: tuple[int, ...] = ()
    memory: bool = False
    most_rounds: int | None = None

    def empty_result(self) -> dict:
        """The contest's JSON before anything is measured.

        Bytes and operations are those of one run. `left_out` and `failed` give reasons by contender. A contender is
        left out where nothing is wrong: a package is missing, or the budget is spent.
        """
        figures = ("difference", "first", "seconds", "flops", "saved_bytes", "peak_bytes", "held_bytes")
        return {
            **{name: getattr(self, name) for name in ("job", "mode", "batch_size", "reference", "tolerance")},
            "names": list(self.names),
            "items": dict(zip(self.names, self.items, strict=bool(self.items))),
            **{kind: {} for kind in (*figures, "left_out", "failed", "tracebacks")},
        }


@dataclass(frozen=True)
class Limits:
    """How long to measure: the number of rounds, and a deadline in time.monotonic()."""

    device: str = "cpu"
    rounds: int = 5
    deadline: float = math.inf

    @property
    def on_gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"

    def is_over(self, seconds: float = 0.0) -> bool:
        """Whether something that takes this long would end after the deadline."""
        return time.monotonic() + seconds > self.deadline


def package_of(name: str) -> str:
    return name.split(",")[0]


def measure(contest: Contest, result: dict, limits: Limits) -> None:
    """Measure a contest into its `empty_result` step by step, so that an interrupted one keeps its rounds.

    A contender that fails, or whose outputs differ from the first one's, is recorded and left out. If no other
    package agrees with ours, nothing is timed, because nobody can say which is right.
    """
    with recorded(result, ALL), tf32(limits.on_gpu and contest.mode in MODES and MODES[contest.mode].tf32):
        contenders = compare(contest, result, limits)
        differs = max(result["difference"].values(), default=0) > contest.tolerance
        if differs and len({*map(package_of, contenders)}) < 2:
            result["left_out"].update(dict.fromkeys(contenders, "no other package agrees with it"))
        elif contenders:
            take_times(contest, contenders, result, limits)


@contextmanager
def recorded(result: dict, name: str) -> Iterator[None]:
    """Record an exception in the block as the reason why `name` has no times."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        if isinstance(error, ModuleNotFoundError):
            result["left_out"][name] = reason
        else:
            result["failed"][name] = f"{type(error).__name__}: {reason}"
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


def release_memory() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        with suppress(RuntimeError):  # a kernel that failed before reports its error here again
            torch.cuda.empty_cache()


def compare(contest: Contest, result: dict, limits: Limits) -> dict[str, Contender]:
    """Build and run all contenders; return those whose outputs agree with the first one's."""
    contenders: dict[str, Contender] = {}
    first: tuple[str, Any] | None = None
    for name in contest.names:
        if limits.is_over():
            result["left_out"][name] = "the budget is spent"
            continue
        with recorded(result, name):
            if contest.memory and not limits.on_gpu:
                peak = peak_in_fresh_process(contest.build, name, torch.get_num_threads())
                result["peak_bytes"][name], result["held_bytes"][name] = peak
            contender = contest.build(name)
            began = time.monotonic()
            outputs, figures = inspect(contender, on_gpu=limits.on_gpu)
            for kind, value in {**figures, "first": time.monotonic() - began}.items():
                result[kind][name] = value
            outputs = contender.check() if contender.check else outputs
            if outputs:
                wanted, expected = first or (name, outputs)
                difference = result["difference"][name] = contest.difference(outputs, expected)
                if not difference <= contest.tolerance:
                    reason = f"its outputs differ from {wanted}'s by {difference:.2g}"
                    result["failed"][name] = f"{reason} (at most {contest.tolerance:g} is accepted)"
                    continue
            contenders[name], first = contender, first or (name, outputs)
        if name not in contenders:
            release_memory()
    return contenders


def inspect(contender: Contender, *, on_gpu: bool) -> tuple[Any, dict[str, int]]:
    """Run a contender once; its outputs and, if it has a module, {"flops", "saved_bytes"} and on a GPU {"peak_bytes"}.

    Every storage saved for backward counts once. Peak memory is that above the memory allocated before.
    """
    if contender.module is None:
        return contender.run(), {}
    kept = {t.untyped_storage().data_ptr() for t in (*contender.module.parameters(), *contender.module.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in kept:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = contender.run()
    figures = {"saved_bytes": sum(saved.values())}
    if on_gpu:
        figures["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    with FlopCounterMode(display=False) as counter:  # a second run: the counter changes what ours saves for backward
        contender.run()
    return outputs, {**figures, "flops": counter.get_total_flops()}


def take_times(contest: Contest, contenders: dict[str, Contender], result: dict, limits: Limits) -> None:
    timers: dict[str, Callable[[], float]] = {}  # each makes the runs of one round and returns the seconds of one
    for name, contender in contenders.items():
        with recorded(result, name):
            timers[name] = contender.clock or timer_of(contender.run, limits, result["first"][name])
    if contest.batch_size and timers:
        a, b = torch.randn(2, MATRIX_SIDE, MATRIX_SIDE).to(limits.device, MODES[contest.mode].dtype)
        timers[MATRIX_PRODUCT] = timer_of(partial(torch.mm, a, b), limits)
        result["matrix_product_flops"] = 2 * MATRIX_SIDE**3
    result["seconds"] = {name: [] for name in timers}
    rounds, last_round = min(limits.rounds, contest.most_rounds or limits.rounds), 0.0
    for done in range(rounds):
        if done and limits.is_over(last_round):
            result["left_out"][f"{rounds - done} of {rounds} rounds"] = "the budget is spent"
            break
        began = time.monotonic()
        for name in random.sample(list(timers), len(timers)):
            with recorded(result, name):
                result["seconds"][name].append(timers[name]())
        for name in timers.keys() & result["failed"].keys():  # its earlier rounds do not count either
            contenders.pop(name, None)  # torch.mm is none
            del timers[name], result["seconds"][name]
            release_memory()
        last_round = time.monotonic() - began


def timer_of(run: Callable[[], object], limits: Limits, first: float = 0.0) -> Callable[[], float]:
    """Times as many runs as take 0.05 seconds, or 0.2 on a GPU: 1 to 50 of them.

    torch.utils.benchmark.Timer would make two more runs each time to warm up, which take minutes for detectors on a
    CPU; here the contenders' first runs, which took `first` seconds, have done that.
    """

    def seconds(repeats: int) -> float:
        began = timer()  # synchronizes a GPU
        for _ in range(repeats):
            run()
        return (timer() - began) / repeats

    one = first if first > 1 and not limits.on_gpu else seconds(1)
    return partial(seconds, min(50, max(1, round((0.2 if limits.on_gpu else 0.05) / max(one, 1e-6)))))
