"""From what a pickle describes to tensors and plain containers, once it is known to fit the file."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from resbackbone.weights.admitted import Array, Namespace, NumpyDtype, Refused, StorageView, kind_of
from resbackbone.weights.unpickle import EXPANSION, SLACK

MAX_DEPTH = 64  # containers within containers


class Plain:
    """Converts what a machine has made. `load` gives the bytes of tensor data as a tensor [nbytes] of uint8."""

    def __init__(self, size: int, load: Callable[[Any], Tensor] | None = None):
        self.limit, self.load = EXPANSION * size + SLACK, load
        self.storages: dict[object, Tensor] = {}
        self.done: dict[int, tuple[object, int, int]] = {}

    def convert(self, value: Any) -> object:
        return self._visit(value, MAX_DEPTH)[0]

    def _visit(self, value: Any, levels: int) -> tuple[object, int, int]:
        """The plain value; how many bytes and items it has, written out; and how many levels of containers."""
        kind = type(value)
        if kind in (str, bytes, bytearray):
            return value, len(value) + 1, 0
        if value is None or kind in (bool, float, torch.dtype, torch.device):
            return value, 1, 0
        if kind is int and value.bit_length() <= 2048:
            return value, 1, 0
        if id(value) not in self.done:
            if levels < 0:
                raise Refused(f"it is nested more than {MAX_DEPTH} levels deep, or within itself")
            self.done[id(value)] = self._compute(value, levels)
        plain, cost, height = self.done[id(value)]
        if height > levels:
            raise Refused(f"it is nested more than {MAX_DEPTH} levels deep")
        return plain, cost, height

    def _compute(self, value: Any, levels: int) -> tuple[object, int, int]:
        kind = type(value)
        if kind in (Array, StorageView):
            tensor = value.tensor() if kind is Array else self._tensor(value)
            return tensor, tensor.nbytes + 1, 0
        if kind is set:
            return value, len(value) + 1, 1
        if kind is NumpyDtype:
            return value.dtype, 1, 0
        if kind in (dict, Namespace):
            items = value if kind is dict else value.fields
            parts = [self._visit(item, levels - 1) for item in items.values()]
            plain: Any = {key: part[0] for key, part in zip(items, parts, strict=True)}
        elif kind in (list, tuple):
            parts = [self._visit(item, levels - 1) for item in value]
            plain = kind(part[0] for part in parts)
        else:
            raise Refused(f"a value of type {kind_of(value)}, which no weight file needs")
        cost = 1 + sum(part[1] for part in parts)
        if cost > self.limit:  # a few bytes can say "ten times the list before", again and again
            raise Refused("it describes many times its size, which no weight file needs")
        return plain, cost, 1 + max((part[2] for part in parts), default=0)

    def _tensor(self, described: StorageView) -> Tensor:
        storage = described.storage
        if storage.key not in self.storages:
            assert self.load is not None  # whoever admits storages gives it
            self.storages[storage.key] = self.load(storage.key)
        start = storage.start // described.dtype.itemsize + described.offset
        tensor = torch.empty(0, dtype=described.dtype, device="cpu")
        return tensor.set_(self.storages[storage.key].untyped_storage(), start, described.size, described.stride)
