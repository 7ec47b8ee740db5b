"""What a figure depends on beside the code: hardware, versions, commit, date, and what else the machine does."""

import importlib.metadata
import os
import platform
import time
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

import torch

from resbackbone.engine.provenance import commit

VERSIONS = ("torch", "torchvision", "timm", "detectron2", "pycocotools", "hotcoco", "msgspec", "numpy", "simplejpeg")
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")  # as /proc/cpuinfo names them
STAT = Path("/proc/stat")
SHORTEST_JUDGED = 0.5  # seconds; the system counts processor time in hundredths of a second


def describe(device: str, threads: int) -> dict:
    """JSON: date, commit, versions, hardware."""
    versions = {"python": platform.python_version()}
    for name in VERSIONS:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "versions": versions,
        "hardware": {**processor(), "threads": threads, **gpu(device)},
    }


def processor() -> dict:
    """{"cpu", "cores", "instructions", "memory_gib", "system"}; cores are those this process may use."""
    fields = {}
    if os.path.exists("/proc/cpuinfo"):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip().lower(), value.strip())
    flags = (fields.get("flags") or fields.get("features") or "").split()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    names = getattr(os, "sysconf_names", {})
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if "SC_PHYS_PAGES" in names else None
    return {
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "cores": cores,
        "instructions": [name for name in INSTRUCTIONS if name in flags],
        "memory_gib": pages and round(pages / 2**30),
        "system": platform.platform(terse=True),
    }


def gpu(device: str) -> dict:
    """{"gpu", "cuda", "cudnn"} where the device is one."""
    if torch.device(device).type != "cuda":
        return {}
    name, cudnn = torch.cuda.get_device_name(device), torch.backends.cudnn.version()
    return {"gpu": name, "cuda": torch.version.cuda, "cudnn": cudnn}


class Others:
    """Measures the share of the machine's processor time that other processes take, from here on."""

    def __init__(self):
        self.began, self.busy, self.own = time.monotonic(), busy_seconds(), own_seconds()

    def share(self) -> float:
        """0 where the system does not count it, and over less than half a second."""
        elapsed, busy = time.monotonic() - self.began, busy_seconds()
        if busy is None or self.busy is None or elapsed < SHORTEST_JUDGED:
            return 0.0
        others = (busy - self.busy) - (own_seconds() - self.own)
        return max(0.0, others / (elapsed * (os.cpu_count() or 1)))


def busy_seconds() -> float | None:
    """Processor seconds of all processes since the machine started; None without /proc/stat."""
    if not STAT.exists():
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, STAT.read_text().split("\n", 1)[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """Processor seconds of this process and of its children that have ended."""
    return sum(os.times()[:4])
