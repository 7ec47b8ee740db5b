"""The resident memory that a contender's run takes, measured in a fresh process."""

import gc
import importlib.util
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
PRELOADED = ("torch", "torchvision", "timm", "detection", "pycocotools")  # once, by the server that forks the others


def peak_in_fresh_process(build: Callable, name: str, threads: int) -> tuple[int | None, int | None]:
    """(peak, held): bytes of resident memory that a run of build(name) adds at its peak, and that its outputs hold.

    In a fresh process nothing has been freed or cached before. None except on Linux, and if the system kills the
    process.
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
    CLEAR.write_text("5")  # resets the peak
    outputs = contender.run()
    peak = _resident("VmHWM") - before
    gc.collect()
    held = _resident("VmRSS") - before
    del outputs
    return peak, held


def _resident(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
