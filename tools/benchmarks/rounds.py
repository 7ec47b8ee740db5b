"""How a contest is held: outputs compared first, then rounds of times in shuffled order. Failures are recorded."""

import gc
import math
import random
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from resbackbone.tools.benchmarks.contest import COMPILED, MODES, Contender, Contest, is_own, package_of
from resbackbone.tools.benchmarks.machine import Others
from resbackbone.tools.benchmarks.processes import peak_in_fresh_process

MATRIX_PRODUCT = "torch.mm"
MATRIX_SIDE = 4096
EVERYTHING = "all of it"  # whose failure it is when it is not one contender's
OTHERS_LIMIT = 0.06  # of all processor time: two threads on one and a half free cores are unevenly slower


class OutputsDiffer(ValueError):
    """Two contenders did not compute the same, so their times cannot be compared."""


def record(result: dict, name: str, error: Exception) -> None:
    """Write down why `name` has no times."""
    reason = " ".join(str(error).split())[:200].rstrip(".")
    if isinstance(error, ModuleNotFoundError):
        result["left_out"][name] = reason
        return
    result["failed"][name] = reason if isinstance(error, OutputsDiffer) else f"{type(error).__name__}: {reason}"
    if not isinstance(error, OutputsDiffer | torch.OutOfMemoryError):
        result["tracebacks"][name] = traceback.format_exc()


@contextmanager
def recorded(result: dict, name: str) -> Iterator[None]:
    """Record what goes wrong in the block, and go on without contender `name`.

    Raises ModuleNotFoundError if this package lacks a module: its peers alone are no contest.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and is_own(name):
            raise
        record(result, name, error)


class Session:
    """What the contests of a run share: the device and its clock, the number of rounds, the deadline."""

    def __init__(self, device: str, *, rounds: int, deadline: float = math.inf):
        self.device, self.rounds, self.deadline = device, rounds, deadline
        self.on_gpu = torch.device(device).type == "cuda"
        self.compile_seconds = 45.0  # an estimate, until a contender was compiled: then what that took

    def is_over(self, seconds: float = 0.0) -> bool:
        """Whether something that takes so long would end after the deadline."""
        return time.monotonic() + seconds > self.deadline

    def seconds(self, run: Callable[[], object], repeats: int = 1) -> float:
        """The mean time of so many runs, by the device's own events on a GPU."""
        if not self.on_gpu:
            began = time.perf_counter()
            for _ in range(repeats):
                run()
            return (time.perf_counter() - began) / repeats
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            run()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1000 / repeats

    def repeats(self, run: Callable[[], object]) -> int:
        """How many runs take 0.05 seconds, on a GPU 0.2, where the first of two is warm-up; 50 at most."""
        for _ in range(2 if self.on_gpu else 1):
            seconds = self.seconds(run)
        return min(50, max(1, round((0.2 if self.on_gpu else 0.05) / max(seconds, 1e-6))))

    def release_memory(self) -> None:
        """Free what nothing refers to any more."""
        gc.collect()
        if self.on_gpu:
            with suppress(RuntimeError):  # a kernel that failed before is reported here again
                torch.cuda.empty_cache()


def hold(contest: Contest, result: dict, session: Session) -> None:
    """Measure a contest into its `empty_result`, step by step: an interrupted one keeps the rounds it has.

    A contender that fails is recorded and left out. So is one whose outputs differ, and without another package
    that agrees nothing is timed, as nobody can say which one is right.
    """
    rounds = min(session.rounds, contest.most_rounds or session.rounds)
    with recorded(result, EVERYTHING), tf32(session.on_gpu and contest.network and MODES[contest.mode].tf32):
        if contest.measure is not None:
            result["seconds"] = contest.measure(rounds)
            return
        contenders = _prepare(contest, result, session)
        if (
            max(result["difference"].values(), default=0) > contest.tolerance
            and len({*map(package_of, contenders)}) < 2
        ):
            result["left_out"].update(dict.fromkeys(contenders, "no other package agrees with it"))
            return
        _take_turns(contest, contenders, result, rounds, session)


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Matrix products and convolutions of fp32 in TF32 or not, and after the block as before."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if on else "highest")
    torch.backends.cudnn.allow_tf32 = on
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def _prepare(contest: Contest, result: dict, session: Session) -> dict[str, Contender]:
    # Builds the contenders, compares what they compute, counts their operations and bytes.
    contenders, agreed = {}, None
    for name in contest.names:
        if session.is_over(session.compile_seconds if name.endswith(COMPILED) else 0.0):
            result["left_out"][name] = "the budget is spent"
            continue
        with recorded(result, name):
            contenders[name], outputs = _prepare_one(contest, name, agreed, result, session)
            agreed = agreed or (name, outputs)
        if name not in contenders:
            session.release_memory()
    return contenders


def _prepare_one(
    contest: Contest, name: str, agreed: tuple | None, result: dict, session: Session
) -> tuple[Contender, object]:
    if contest.memory and not (contest.network and session.on_gpu):
        peak, held = peak_in_fresh_process(contest.build, name, torch.get_num_threads())
        result["peak_bytes"][name], result["held_bytes"][name] = peak, held
    began = time.monotonic()
    contender = contest.build(name)
    built = time.monotonic()
    outputs, figures = inspect(contender, on_gpu=session.on_gpu)
    for kind, value in {**figures, "first": time.monotonic() - built}.items():
        result[kind][name] = value
    if name.endswith(COMPILED):
        session.compile_seconds = time.monotonic() - began
    if contender.check is not None:
        outputs = contender.check()
    if outputs:
        first, wanted = agreed or (name, outputs)
        result["difference"][name] = difference = contest.difference(outputs, wanted)
        if not difference <= contest.tolerance:
            accepted = f"at most {contest.tolerance:g} is accepted"
            raise OutputsDiffer(f"its outputs differ from {first}'s by {difference:.2g} ({accepted})")
    return contender, outputs


def inspect(contender: Contender, *, on_gpu: bool) -> tuple[object, dict[str, int]]:
    """A first run: what it returns and, if it is counted, {"flops", "saved_bytes"} and on a GPU {"peak_bytes"}.

    Saved for backward counts every storage once; peak memory is what was allocated above what was before.
    """
    if not contender.counted:
        return contender.run(), {}
    kept = {t.untyped_storage().data_ptr() for t in (*contender.module.parameters(), *contender.module.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in kept:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        returned = contender.run()
    figures = {"saved_bytes": sum(saved.values())}
    if on_gpu:
        torch.cuda.synchronize()
        figures["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    with FlopCounterMode(display=False) as counter:  # a run of its own: under it ours saves as ordinary operations do
        contender.run()
    return returned, {**figures, "flops": counter.get_total_flops()}


def _take_turns(contest: Contest, contenders: dict, result: dict, rounds: int, session: Session) -> None:
    timers: dict[str, Callable[[], float]] = {}  # each makes the runs of one round: seconds a run
    for name, contender in contenders.items():
        with recorded(result, name):
            is_slow = result["first"][name] > 1 and not session.on_gpu
            repeats = 1 if is_slow or contender.clock else session.repeats(contender.run)
            timers[name] = contender.clock or partial(session.seconds, contender.run, repeats)
    if contest.network and timers:
        a, b = torch.randn(2, MATRIX_SIDE, MATRIX_SIDE).to(session.device, MODES[contest.mode].dtype)
        product = partial(torch.mm, a, b)
        timers[MATRIX_PRODUCT] = partial(session.seconds, product, session.repeats(product))
        result["matrix_product_flops"] = 2 * MATRIX_SIDE**3
    result["seconds"] = {name: [] for name in timers}
    expected = 0.0 if contest.network else sum(result["first"].values())  # a network's first run may compile
    while timers.keys() - {MATRIX_PRODUCT} and len(result["others"]) < rounds:
        if result["others"] and session.is_over(expected):  # what is prepared gets one round in any case
            result["left_out"][f"{rounds - len(result['others'])} of {rounds} rounds"] = "the budget is spent"
            return
        began, others, times = time.monotonic(), Others(), {}
        for name in random.sample(list(timers), len(timers)):
            with recorded(result, name):
                times[name] = timers[name]()
        for name in timers.keys() - times.keys():  # it failed: its earlier rounds do not count either
            contenders.pop(name, None)
            del timers[name], result["seconds"][name]
            session.release_memory()
        expected, share = time.monotonic() - began, others.share()
        if share > OTHERS_LIMIT and result["thrown_away"] < rounds:
            result["thrown_away"] += 1
            continue
        for name, seconds in times.items():
            result["seconds"][name].append(seconds)
        result["others"].append(round(share, 4))
