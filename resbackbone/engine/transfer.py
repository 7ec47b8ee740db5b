"""Batches moved to the device; on a GPU the next one is copied during computation."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Moved = TypeVar("Moved")


def moved(batches: Iterable[T], move: Callable[[T], Moved], device: torch.device) -> Iterator[Moved]:
    """move(batch) for each batch, in order; `move` starts copying the batch's tensors to `device`.

    On a GPU `move` runs one batch ahead on its own stream, so that copies from pinned memory overlap computation.
    Its exceptions are raised when the batch is due.
    """
    if device.type != "cuda":
        yield from map(move, batches)
        return
    source, stream = iter(batches), torch.cuda.Stream(device)

    def fetch() -> Moved | Exception:
        try:
            with torch.cuda.stream(stream):
                return move(next(source))
        except Exception as error:  # noqa: BLE001 - raised below
            return error

    following = fetch()
    while not isinstance(following, StopIteration):
        if isinstance(following, Exception):
            raise following
        current, computing = following, torch.cuda.current_stream(device)
        computing.wait_stream(stream)
        for tensor in _tensors(current):
            tensor.record_stream(computing)  # else its memory may be reused while it is read
        following = fetch()
        yield current


def _tensors(value: object) -> Iterator[Tensor]:
    """The tensors in a structure of tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)
