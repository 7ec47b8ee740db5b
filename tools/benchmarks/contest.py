"""One job done by several packages in turns: outputs compared first, then rounds of times in shuffled order."""

import math
import os
import random
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.memory import peak_in_fresh_process
from resbackbone.training.command import notes

OWN = "resbackbone"  # names of contenders: the package, and after a comma how it was run
MATRIX_PRODUCT = "torch.mm"
OTHERS_LIMIT = 0.06  # of all processor time: two threads on one and a half free cores are unevenly slower
SHORTEST_JUDGED = 0.5  # seconds of a round; the system counts processor time in hundredths of a second
STAT = Path("/proc/stat")


class Mode(NamedTuple):
    """Precision and memory layout of a network job."""

    dtype: torch.dtype
    layout: torch.memory_format

    def autocast(self, device: str) -> torch.autocast:
        return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)


MODES = {
    "fp32": Mode(torch.float32, torch.contiguous_format),
    "fp32-channels-last": Mode(torch.float32, torch.channels_last),
    "bf16-channels-last": Mode(torch.bfloat16, torch.channels_last),  # autocast over fp32 weights
}


class Contender(NamedTuple):
    """One package ready for one job."""

    run: Callable[[], Mapping[str, Tensor]]  # what is timed; what it returns has to agree with the others'
    module: nn.Module | None = None  # whose parameters are not counted as saved for backward
    check: Callable[[], Mapping[str, Tensor]] | None = None  # what has to agree, where it is not what a run returns
    clock: Callable[[], float] | None = None  # makes a run and measures its seconds itself
    counted: bool = True  # False where counting operations would change what runs (compiled, graphs)


def relative_difference(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The largest ||got - wanted|| / ||wanted|| of the tensors; infinite for other shapes and what is not a number."""
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
    """What is compared, and how its times are to be read.

    `names` are the contenders, this package's first; each is measured against the fastest of the others, or against
    `reference`. `items` is what one run of each works off (images), 1 where it does not matter.
    """

    job: str
    names: tuple[str, ...]
    build: Callable[[str], Contender] | None = None  # in a fresh process too, so it is made of what pickle takes
    measure: Callable[[int], dict[str, list[float]]] | None = None  # in place of `build`: rounds -> seconds by name
    mode: str = ""
    tolerance: float = 0.0
    difference: Callable[[Mapping, Mapping], float] = relative_difference
    reference: str | None = None
    items: tuple[int, ...] = ()
    network: bool = False  # count operations and saved bytes, and run a matrix product in the rounds
    memory: bool = False
    most_rounds: int | None = None
    seconds_to_build: float = 0.0  # a contender; one that would not be ready by the deadline is left out


class Clock:
    """Seconds of a run on a device: the wall's on a CPU, the device's own events on a GPU."""

    def __init__(self, device: str):
        self.device = device
        self.on_gpu = torch.device(device).type == "cuda"
        self.shortest = 0.2 if self.on_gpu else 0.05  # seconds that are timed at once; quicker runs are repeated

    def seconds(self, run: Callable[[], object], repeats: int = 1) -> float:
        """Of one run, the mean over `repeats` of them."""
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
        """How many runs take `shortest` seconds, 50 at most."""
        return min(50, max(1, round(self.shortest / max(self.seconds(run), 1e-6))))


def hold(contest: Contest, result: dict, *, rounds: int, threads: int, clock: Clock, side: int, deadline: float):
    """Fill `result` (see `empty_result`) while it goes, so that a run that is interrupted has what it measured.

    side: of the square matrices whose product is timed in the rounds of network jobs. ValueError where outputs differ.
    """
    rounds = min(rounds, contest.most_rounds or rounds)
    if contest.measure is not None:
        result["seconds"] = contest.measure(rounds)
        return
    contenders = _prepare(contest, result, threads=threads, clock=clock, deadline=deadline)
    if not contenders:
        return
    runs = {name: contender.clock or contender.run for name, contender in contenders.items()}
    if contest.network:
        runs[MATRIX_PRODUCT] = matrix_product(MODES[contest.mode].dtype, clock.device, side)
        result["matrix_product_flops"] = 2 * side**3
    own_clocks = {name for name, contender in contenders.items() if contender.clock is not None}
    slow = {name for name, seconds in result["first"].items() if seconds > 1}
    repeats = {name: clock.repeats(run) for name, run in runs.items() if name not in own_clocks | slow}
    result["seconds"] = {name: [] for name in runs}
    expected = 0.0 if contest.network else sum(result["first"].values())  # a network's first run may compile
    while len(result["others"]) < rounds:
        if time.monotonic() + expected > deadline:
            result["skipped"] = f"{len(result['others'])} of {rounds} rounds: the budget is spent"
            break
        order = list(runs)
        random.shuffle(order)
        began, others, times = time.monotonic(), Others(), {}
        for name in order:
            if name in own_clocks:
                times[name] = runs[name]()
            else:
                times[name] = clock.seconds(runs[name], repeats.get(name, 1))
        expected, share = time.monotonic() - began, others.share()
        if share > OTHERS_LIMIT and result["thrown_away"] < rounds:
            result["thrown_away"] += 1
            continue
        for name, seconds in times.items():
            result["seconds"][name].append(seconds)
        result["others"].append(round(share, 4))


def empty_result(contest: Contest) -> dict:
    """The JSON of a contest before anything is measured. Bytes and FLOP are of one run; `others` is of each round."""
    return {
        "job": contest.job,
        "mode": contest.mode,
        "names": list(contest.names),
        "reference": contest.reference,
        "items": dict(zip(contest.names, contest.items, strict=bool(contest.items))),
        "tolerance": contest.tolerance,
        "difference": {},  # to this package's outputs
        "seconds": {},
        "others": [],  # share of the machine that other processes had
        "thrown_away": 0,  # rounds in which that was too much
        "first": {},  # seconds of the first run, which is not counted
        "flops": {},
        "saved_bytes": {},  # for backward, without parameters
        "peak_bytes": {},  # over what the process held before
        "held_bytes": {},  # by what a run returned
        "skipped": "",
    }


def _prepare(contest: Contest, result: dict, *, threads: int, clock: Clock, deadline: float) -> dict[str, Contender]:
    # Builds the contenders; compares what they compute; counts their operations and bytes.
    contenders, wanted = {}, None
    for name in contest.names:
        if time.monotonic() + contest.seconds_to_build > deadline:
            result["skipped"] = (
                f"without {', '.join(n for n in contest.names if n not in contenders)}: the budget is spent"
            )
            break
        if contest.memory and not clock.on_gpu:
            peak, held = peak_in_fresh_process(contest.build, name, threads)
            result["peak_bytes"][name], result["held_bytes"][name] = peak, held
        contender = contest.build(name)
        began = time.monotonic()
        returned, figures = inspect(contender, network=contest.network, on_gpu=clock.on_gpu)
        result["first"][name] = time.monotonic() - began
        for kind, value in figures.items():
            result[kind][name] = value
        outputs = returned if contender.check is None else contender.check()
        if outputs:
            wanted = wanted or outputs
            result["difference"][name] = difference = contest.difference(outputs, wanted)
            if not difference <= contest.tolerance:
                what = f"{contest.job}, {contest.mode}" if contest.mode else contest.job
                raise ValueError(
                    f"{what}: {name}'s outputs differ from {contest.names[0]}'s by {difference:.2g} (at most "
                    f"{contest.tolerance:g} is accepted), so their times cannot be compared"
                )
        contenders[name] = contender
    return contenders


def inspect(contender: Contender, *, network: bool, on_gpu: bool) -> tuple[Mapping[str, Tensor], dict[str, int]]:
    """First runs: what they return, and its {"flops", "saved_bytes", "peak_bytes"} as far as they can be counted.

    Saved for backward counts every storage once; peak memory is the GPU's, over what was allocated before.
    """
    if not network:
        return contender.run(), {}
    kept = {tensor.untyped_storage().data_ptr() for tensor in _tensors(contender.module)}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in kept:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with hooks if contender.counted else nullcontext():
        returned = contender.run()
    figures = {"saved_bytes": sum(saved.values())} if contender.counted else {}
    if on_gpu:
        torch.cuda.synchronize()
        figures["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    if contender.counted:  # by itself: under a dispatch mode ours takes a path that saves as ordinary operations do
        with FlopCounterMode(display=False) as counter:
            contender.run()
        figures["flops"] = counter.get_total_flops()
    return returned, figures


def _tensors(module: nn.Module | None) -> list[Tensor]:
    return [] if module is None else [*module.parameters(), *module.buffers()]


def matrix_product(dtype: torch.dtype, device: str, side: int) -> Callable[[], Tensor]:
    """What the machine can do: the product of two square matrices."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return lambda: torch.mm(a, b)


class Others:
    """The share of the machine's processor time that other processes take from its making to `share()`."""

    def __init__(self):
        self.began, self.busy, self.own = time.monotonic(), _busy_seconds(), _own_seconds()

    def share(self) -> float:
        """0 where the system does not tell, and for less than half a second."""
        elapsed, busy = time.monotonic() - self.began, _busy_seconds()
        if busy is None or self.busy is None or elapsed < SHORTEST_JUDGED:
            return 0.0
        others = (busy - self.busy) - (_own_seconds() - self.own)
        return max(0.0, others / (elapsed * (os.cpu_count() or 1)))


def _busy_seconds() -> float | None:
    """Processor seconds of all processes since the machine started; None where there is no /proc/stat."""
    if not STAT.exists():
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, STAT.read_text().split("\n", 1)[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def say(line: str) -> None:
    """A line on how it goes."""
    notes.print(line)
