"""Batches to the device that computes: on a GPU the next one is copied while the last one is computed with."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Moved = TypeVar("Moved")


def moved(batches: Iterable[T], move: Callable[[T], Moved], device: torch.device) -> Iterator[Moved]:
    """move(batch) for each batch, in order; `move` copies its tensors to `device`, without waiting for that.

    On a GPU it is called one batch ahead, on a stream of its own: copies from pinned memory overlap with computing. An
    exception that a batch ahead raises is raised when that batch's turn comes.
    """
    if device.type != "cuda":
        yield from map(move, batches)
        return
    source, stream = iter(batches), torch.cuda.Stream(device)

    def fetch() -> Moved | Exception:
        try:
            with torch.cuda.stream(stream):
                return move(next(source))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is raised below
            return error

    following = fetch()
    while not isinstance(following, StopIteration):
        if isinstance(following, Exception):
            raise following
        current, computing = following, torch.cuda.current_stream(device)
        computing.wait_stream(stream)
        for tensor in _tensors(current):
            tensor.record_stream(computing)  # else its memory may be given away while it is still read there
        following = fetch()
        yield current


def _tensors(value: object) -> Iterator[Tensor]:
    """The tensors in a structure of tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)
