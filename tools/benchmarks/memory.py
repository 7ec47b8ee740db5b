"""Memory that one run of a contender takes, in a fresh process: there nothing else was freed or cached before."""

import gc
import importlib.util
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
PRELOADED = ("torch", "torchvision", "timm", "detection", "pycocotools")  # once, in the process that fresh ones fork


def peak_in_fresh_process(build: Callable, name: str, threads: int) -> tuple[int | None, int | None]:
    """(peak, held): bytes that run() of build(name) adds at most and, with what it returned, in the end.

    Resident memory over what the process held once the contender was built; None where the system does not tell
    (anywhere but Linux), or the process failed.
    """
    if not CLEAR.exists():
        return None, None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([name for name in PRELOADED if importlib.util.find_spec(name)])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(build, name, threads, sender), daemon=True)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return None, None
    finally:
        receiver.close()
        process.join()


def _measure(build: Callable, name: str, threads: int, sender: Connection) -> None:
    torch.set_num_threads(threads)
    contender = build(name)
    gc.collect()
    before = _resident("VmRSS")
    CLEAR.write_text("5")  # the peak starts anew
    returned = contender.run()
    peak = _resident("VmHWM") - before
    gc.collect()
    sender.send((peak, _resident("VmRSS") - before))
    del returned


def _resident(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
