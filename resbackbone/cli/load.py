"""Cores that other processes hold. A thread that shares its core makes all the others wait, at every operation."""

import os
import time

MEASURED = 0.2  # seconds at least


def _computed() -> tuple[float, float] | None:
    """Seconds that all processes have computed on this one's cores, and those of this one; None outside of Linux."""
    try:
        with open("/proc/stat") as file:
            lines = [line.split() for line in file if line.startswith("cpu")]
        cores = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    except (OSError, AttributeError):
        return None
    ticks = 0
    for name, *counts in lines:
        if name in cores:
            user, nice, system, _, _, *interrupts_and_steal = map(int, counts[:8])  # without idle and iowait
            ticks += user + nice + system + sum(interrupts_and_steal)
    own = os.times()
    return ticks / os.sysconf("SC_CLK_TCK"), own.user + own.system


class Load:
    """What other processes compute from the time when this is made."""

    def __init__(self):
        self.since, self.before = time.monotonic(), _computed()

    def cores_of_others(self) -> float:
        """The number of cores that other processes held on average; 0 where the system does not tell."""
        time.sleep(max(0.0, self.since + MEASURED - time.monotonic()))
        seconds, now = time.monotonic() - self.since, _computed()
        if self.before is None or now is None:
            return 0.0
        everyone, own = (after - before for after, before in zip(now, self.before, strict=True))
        return max(0.0, everyone - own) / seconds


START = Load()  # commands import this before torch, so the imports are what is measured over
