"""What a figure depends on besides the code: hardware, versions, commit and date."""

import importlib.metadata
import os
import platform
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

import torch

from resbackbone.engine.provenance import commit

VERSIONS = ("torch", "torchvision", "timm", "detectron2", "pycocotools", "hotcoco", "msgspec", "numpy", "simplejpeg")
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")  # as /proc/cpuinfo names them
CPUINFO = Path("/proc/cpuinfo")


def describe(device: str, threads: int) -> dict:
    """Date, commit, versions and hardware, for JSON."""
    versions = {"python": platform.python_version()}
    for name in VERSIONS:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    gpu = {}
    if torch.device(device).type == "cuda":
        gpu = {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
        gpu["cudnn"] = torch.backends.cudnn.version()
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "versions": versions,
        "hardware": {**processor(), "threads": threads, **gpu},
    }


def processor() -> dict:
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = (fields.get("flags") or fields.get("features") or "").split()
    names = getattr(os, "sysconf_names", {})
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if "SC_PHYS_PAGES" in names else None
    return {
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "cores": usable_cores(),
        "instructions": [name for name in INSTRUCTIONS if name in flags],
        "memory_gib": memory and round(memory / 2**30),
        "system": platform.platform(terse=True),
    }


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
