import pytest
import torch

from resbackbone.engine import stopwatch
from resbackbone.engine.stopwatch import Stopwatch


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets: clock["now"], in seconds."""
    clock = {"now": 100.0}
    monkeypatch.setattr(stopwatch.time, "monotonic", lambda: clock["now"])
    return clock


@pytest.fixture
def gpu(monkeypatch, clock):
    """A GPU that is at clock["done"] seconds of its work while the host is at clock["now"]; it cannot be waited for."""

    class Event:
        def __init__(self, *, enable_timing):
            assert enable_timing

        def record(self, stream):
            assert stream == "stream of cuda:1"
            self.at = clock["now"]

        def query(self):
            return self.at <= clock["done"]

        def elapsed_time(self, end):
            assert self.query() and end.query()
            return 1000 * (end.at - self.at)  # milliseconds, as torch's

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    return Stopwatch(torch.device("cuda:1"))


def laps(watch, clock, *parts):
    watch.start()
    for name, seconds in parts:
        clock["now"] += seconds
        watch.lap(name)


def test_the_laps_of_a_part_add_up_until_they_are_taken(clock):
    watch = Stopwatch(torch.device("cpu"))
    laps(watch, clock, ("forward", 2), ("backward", 3), ("forward", 4))
    clock["now"] += 50  # between two updates
    laps(watch, clock, ("forward", 1))
    assert watch.take(2) == {"forward_seconds": 3.5, "backward_seconds": 1.5}
    assert watch.take(1) == {}


def test_on_a_gpu_its_own_clock_counts_and_what_it_has_not_come_to_is_taken_later(gpu, clock):
    laps(gpu, clock, ("forward", 2), ("backward", 3), ("optimizer", 1))
    clock["done"] = 105
    assert gpu.take(1) == {"forward_seconds": 2, "backward_seconds": 3}
    laps(gpu, clock, ("forward", 4))
    clock["done"] = clock["now"]
    assert gpu.take(1) == {"optimizer_seconds": 1, "forward_seconds": 4}
    assert gpu.take(1) == {}
