"""What the parts of an update take, without making the host wait for a GPU."""

import time

import torch


class Stopwatch:
    """Adds up the seconds of named parts that follow each other; on a GPU by its own clock.

    A host that asked for the time after every part would wait for the GPU there. So marks are put between the
    kernels of the current stream, and `take` reads those that the GPU has come to by itself; what it has not come to
    is among the next.
    """

    def __init__(self, device: torch.device):
        self._device, self._on_gpu = device, device.type == "cuda"
        self._spans: list[tuple] = []  # name, its two marks

    def start(self) -> None:
        self._last = self._mark()

    def lap(self, name: str) -> None:
        """What passed since the last `start` or `lap` is of this part."""
        mark = self._mark()
        self._spans.append((name, self._last, mark))
        self._last = mark

    def take(self, updates: int) -> dict[str, float]:
        """{"PART_seconds": mean of an update} over the laps since they were last taken, of so many updates."""
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
