"""What needs fresh processes: the memory of a run, the time of an import, training in two processes beside one."""

import gc
import importlib.util
import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
import torch.distributed as dist

from resbackbone.engine.distributed import Rank, distributed, launch
from resbackbone.tools.benchmarks.contest import OWN, Contender
from resbackbone.tools.benchmarks.networks import Setting, backbone_weights, ours, training_step

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
PRELOADED = ("torch", "torchvision", "timm", "detection", "pycocotools")  # once, in the process that fresh ones fork
ROOT = Path(__file__).parents[2]
WITH_DETECTION = f"{OWN}, with detection"
IMPORTED = {  # detectron2's top level is empty
    OWN: "resbackbone",
    WITH_DETECTION: "detection",
    "torchvision": "torchvision",
    "timm": "timm",
    "detectron2": "detectron2.modeling",
}
ONE, TWO = f"{OWN}, 1 process", f"{OWN}, 2 processes"


def peak_in_fresh_process(build: Callable, name: str, threads: int) -> tuple[int | None, int | None]:
    """(peak, held): bytes of resident memory that a run of build(name) adds at its peak, and that its results hold.

    In a fresh process nothing was freed or cached before. None where the system does not count (anywhere but Linux),
    or killed the process.
    """
    if not CLEAR.exists():
        return None, None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([name for name in PRELOADED if importlib.util.find_spec(name)])
    with ProcessPoolExecutor(1, context) as pool:
        try:
            return pool.submit(_peak, build, name, threads).result()
        except BrokenProcessPool:
            return None, None


def _peak(build: Callable, name: str, threads: int) -> tuple[int, int]:
    torch.set_num_threads(threads)
    contender = build(name)
    gc.collect()
    before = _resident("VmRSS")
    CLEAR.write_text("5")  # the peak starts again
    returned = contender.run()
    peak = _resident("VmHWM") - before
    gc.collect()
    held = _resident("VmRSS") - before
    del returned
    return peak, held


def _resident(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def importing(name: str) -> Contender:
    """The import of a package in a fresh interpreter that has imported torch, which all of them need."""
    code = (
        f"import time, torch; began = time.perf_counter(); import {IMPORTED[name]}; print(time.perf_counter() - began)"
    )

    def clock() -> float:
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            kind, _, reason = done.stderr.strip().splitlines()[-1].partition(": ")
            raise (ModuleNotFoundError if kind == "ModuleNotFoundError" else RuntimeError)(reason or kind)
        return float(done.stdout.split()[-1])

    def run() -> dict:
        clock()  # reads the files from disk
        return {}

    return Contender(run, clock=clock)


def scaling(setting: Setting, scratch: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of a training step in one process of one thread, and in two that average their gradients (gloo).

    The same two processes take all rounds; one of them waits while the other trains alone.
    """
    path = scratch / "scaling.json"
    try:
        launch(_steps, (setting, rounds, str(path)), device="cpu", processes=2)
    except SystemExit as exit:  # here it is no wish to stop
        raise RuntimeError(f"a process that trains ended with exit status {exit.code}") from None
    return json.loads(path.read_text())


def _steps(rank: Rank, setting: Setting, rounds: int, path: str) -> None:
    torch.set_num_threads(1)
    networks = [setting.place(ours(setting.depth, backbone_weights(setting.depth))).train() for _ in range(2)]
    alone = training_step(networks[0], networks[0], setting)
    together = training_step(distributed(networks[1], rank), networks[1], setting)
    seconds = {TWO: [], ONE: []}
    for _ in range(rounds + 1):
        dist.barrier()
        began = time.perf_counter()
        if rank.is_main:
            alone()
        seconds[ONE].append(time.perf_counter() - began)
        dist.barrier()
        began = time.perf_counter()
        together()
        dist.barrier()
        seconds[TWO].append(time.perf_counter() - began)
    if rank.is_main:
        Path(path).write_text(json.dumps({name: times[1:] for name, times in seconds.items()}))
