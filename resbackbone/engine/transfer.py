"""Batches moved to the device; on a GPU the next one is copied during computation."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Moved = TypeVar("Moved")


def moved(batches: Iterable[T], move: Callable[[T], Moved], device: torch.device) -> Iterator[Moved]:
    """move(batch) for each of endless batches, in order; `move` starts copying the batch's tensors to `device`.

    On a GPU `move` runs one batch ahead on its own stream, so that copies from pinned memory overlap computation.
    """
    coming = map(move, batches)
    if device.type != "cuda":
        yield from coming
        return
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        current = next(coming)
    while True:
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(stream)
        for tensor in _tensors(current):
            tensor.record_stream(computing)  # else its memory may be reused while it is read
        with torch.cuda.stream(stream):
            following = next(coming)
        yield current
        current = following


def _tensors(value: object) -> Iterator[Tensor]:
    """The tensors in a structure of tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)
