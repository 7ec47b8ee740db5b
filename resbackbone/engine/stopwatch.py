"""Seconds of the parts of an update, measured without waiting for the GPU."""

import time

import torch


class Stopwatch:
    """Adds up the seconds of consecutive named parts: `start`, then a `lap` at the end of each.

    On a GPU it records CUDA events and `take` reads those that the GPU has passed; later ones count in the next `take`.
    """

    def __init__(self, device: torch.device):
        self._device, self._on_gpu = device, device.type == "cuda"
        self._spans: list[tuple] = []  # name, begin, end

    def start(self) -> None:
        self._last = self._mark()

    def lap(self, name: str) -> None:
        """Count the time since the last `start` or `lap` as this part's."""
        mark = self._mark()
        self._spans.append((name, self._last, mark))
        self._last = mark

    def take(self, updates: int) -> dict[str, float]:
        """{"PART_seconds": mean for an update} of the laps since the last `take`, which were of this many updates."""
        seconds: dict[str, float] = {}
        pending = []
        for name, begin, end in self._spans:
            if self._on_gpu and not end.query():
                pending.append((name, begin, end))
                continue
            took = begin.elapsed_time(end) / 1000 if self._on_gpu else end - begin
            seconds[name] = seconds.get(name, 0.0) + took
        self._spans = pending
        return {f"{name}_seconds": total / updates for name, total in seconds.items()}

    def _mark(self):
        if not self._on_gpu:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
