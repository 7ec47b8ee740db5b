"""What a figure depends on besides the code: hardware, versions, commit and date; and the memory that a run takes."""

import gc
import multiprocessing
import os
import platform
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

import torch

from resbackbone.engine.provenance import commit, cpu, fields_of, versions
from resbackbone.memory import keep_freed_memory

VERSIONS = (
    *("torch", "torchvision", "timm", "detectron2", "onnxruntime", "openvino"),
    *("pycocotools", "hotcoco", "msgspec", "numpy", "simplejpeg"),
)
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")  # as /proc/cpuinfo names them
CPUINFO, STATUS, CLEAR = Path("/proc/cpuinfo"), Path("/proc/self/status"), Path("/proc/self/clear_refs")


def describe(device: str, threads: int) -> dict:
    """Date, commit, versions and hardware, for JSON."""
    fields = fields_of(CPUINFO)
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    name, cores = cpu()
    hardware = {
        "cpu": name,
        "cores": cores,
        "instructions": [name for name in INSTRUCTIONS if name in flags],
        "memory_gib": None,
        "system": platform.platform(terse=True),
        "threads": threads,
    }
    with suppress(AttributeError, ValueError):  # Windows has no sysconf
        hardware["memory_gib"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30)
    if torch.device(device).type == "cuda":
        hardware |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
        hardware["cudnn"] = torch.backends.cudnn.version()
    packages = {"python": platform.python_version(), **versions(VERSIONS)}
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return {"date": date, "commit": commit(), "versions": packages, "hardware": hardware}


def peak_in_fresh_process(build: Callable) -> int | None:
    """Bytes of resident memory that a run of build() adds at its peak; None except on Linux.

    In a fresh process nothing has been freed or cached before.
    """
    if not CLEAR.exists():
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchvision", "timm", "detection"])  # once, by the server that forks the others
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(_peak, build).result()


def _peak(build: Callable) -> int:
    contender = build()
    gc.collect()
    keep_freed_memory(False)  # gives back what building it has left
    keep_freed_memory(contender.keeps_memory)
    before = _resident("VmRSS")
    CLEAR.write_text("5")  # resets the peak
    contender.run()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    return int(fields_of(STATUS)[field].split()[0]) * 1024
