"""The names that a pickle of weights may refer to, and what a call of each describes; no other name means anything.

A file's program (`unpickle`) looks names up in ADMITTED: nothing that a file names is imported or called, but functions
of this file stand for it. They check what the file passes to them, and allocate nothing of a size that it only states.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MAX_KEY = 1024  # characters
MAX_DIMS = 8


class Refused(ValueError):
    """A reason that reads well after `weights 'PATH': `."""


def shown(value: Any) -> str:
    """What a file has, short and on one line of a message; a container as its kind, for it may never end."""
    if type(value) not in (str, bytes, int, float, bool, type(None)):
        return kind_of(value)
    text = repr(value[:120]) if type(value) is bytes else str(value)
    short = text[:120] if text[:120].isprintable() else ascii(text[:120])[1:-1]
    return short if len(text) <= 120 else f"{short}..."


def kind_of(value: Any) -> str:
    return value.name if type(value) is Global else type(value).__name__


# --- Descriptions: what is on a program's stack instead of the objects that it speaks of


class Global:
    """A name in a file. `make`, if any, is what a call of it does here."""

    def __init__(self, name: str, make: Callable | None = None):
        self.name, self.make = name, make


@dataclass(eq=False)
class StorageType:
    dtype: torch.dtype


@dataclass(eq=False)
class Storage:
    """`nbytes` bytes from byte `start` of the tensor data called `key`, as elements of `dtype`."""

    key: Any
    dtype: torch.dtype
    start: int
    nbytes: int


@dataclass(eq=False)
class StorageView:
    """A tensor: part of a storage."""

    storage: Storage
    dtype: torch.dtype
    offset: int  # this and the strides in elements
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(eq=False)
class NumpyDtype:
    """Its byte order comes with its state."""

    dtype: torch.dtype
    swapped: bool = False


@dataclass(eq=False)
class Array:
    """A numpy array. Its content comes with its state: `data`, which lies as `shape`, and is seen through `axes`."""

    data: bytes | bytearray | None = None
    dtype: torch.dtype = torch.uint8
    swapped: bool = False
    shape: tuple[int, ...] = ()
    axes: tuple[int, ...] = ()

    def tensor(self) -> Tensor:
        if self.data is None:
            raise Refused("an array without content")
        flat = bytes_tensor(bytearray(self.data))
        if self.swapped:
            flat = flat.view(-1, self.dtype.itemsize).flip(1).view(-1)
        return flat.view(self.dtype).view(self.shape).permute(self.axes)


@dataclass(eq=False)
class Namespace:
    fields: dict


def bytes_tensor(data: bytearray) -> Tensor:
    return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8, device="cpu")


# --- Checks


def checked_key(key: Any) -> object:
    """`key` if a dict may have it. Hashing nested tuples could take forever, and large ints can all have one hash."""
    if type(key) not in (str, bytes, int, float, bool, type(None)):
        raise Refused(f"a key or set member of type {kind_of(key)}; strings and numbers are read")
    if type(key) in (str, bytes) and len(key) > MAX_KEY:
        raise Refused(f"a key of {len(key)} characters; up to {MAX_KEY} are read")
    if type(key) is int and key.bit_length() > 64:
        raise Refused(f"a key that is a number of {key.bit_length()} bits; up to 64 are read")
    return key


def put(target: dict, key: Any, value: Any) -> None:
    if checked_key(key) in target:
        raise Refused(f"the key {shown(key)!r} is there twice")
    target[key] = value


def add(target: set, items: Any) -> None:
    """A set that names its members once has as many as a file has of them, and cannot be much work to make."""
    if type(items) not in (list, tuple):
        raise Refused(f"a set of the members of {kind_of(items)}")
    for item in items:
        if checked_key(item) in target:
            raise Refused(f"the set member {shown(item)!r} is there twice")
        target.add(item)


def lengths(values: Any, what: str) -> tuple[int, ...]:
    if type(values) in (tuple, list) and len(values) > MAX_DIMS:
        raise Refused(f"a tensor of {len(values)} dimensions; up to {MAX_DIMS} are read")
    if type(values) not in (tuple, list) or any(type(n) is not int or not 0 <= n < 2**63 for n in values):
        raise Refused(f"a tensor with a {what} that is not of whole numbers from 0 up")
    return tuple(values)


def _numel(size: tuple[int, ...]) -> int:
    if math.prod(max(n, 1) for n in size) >= 2**60:  # also where another length is 0: torch multiplies them all
        raise Refused(f"a tensor of size {list(size)}")
    return math.prod(size)


# --- Each of these stands for the function or class of that name in ADMITTED, and takes what a file passes to it


def _dict(items: Any = ()) -> dict:
    made: dict = {}
    for key, value in items.items() if type(items) is dict else items:  # Python 2 passes an OrderedDict's pairs
        put(made, key, value)
    return made


def _default_dict(factory: Any = None) -> dict:
    return {}


def _set(items: Any = ()) -> set:
    made: set = set()
    add(made, items)
    return made


def _no_bytes() -> bytes:  # protocols 0 to 2 have no other way to say it
    return b""


def _bytearray(data: Any = b"", encoding: str = "latin1") -> bytearray:
    return bytearray(data if type(data) is bytes else _encode(data, encoding))


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise Refused(f"encodes {kind_of(text)} as {shown(encoding)}; bytes are written as latin1")
    return text.encode("latin1")


def _size(size: Any = ()) -> tuple[int, ...]:
    return lengths(size, "size")


def _device(kind: Any, index: int | None = None) -> torch.device:
    kind = _string(kind)
    return torch.device(kind) if index is None else torch.device(kind, index)


def _string(text: Any) -> str:
    if type(text) is not str:
        raise Refused(f"a version or device that is of type {kind_of(text)}, not a string")
    return text


def _namespace() -> Namespace:
    return Namespace({})


def _rebuild_tensor(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None) -> StorageView:
    return _rebuild_tensor_v3(storage, offset, size, stride, requires_grad, hooks, None, metadata)


def _rebuild_tensor_v3(storage, offset, size, stride, requires_grad, hooks, dtype, metadata=None) -> StorageView:
    if type(storage) is not Storage:
        raise Refused(f"a tensor over {kind_of(storage)} instead of a storage")
    dtype = storage.dtype if dtype is None else dtype
    if type(dtype) is not torch.dtype or metadata:
        raise Refused("a tensor with a dtype or with metadata that weights do not have")
    (offset,), size, stride = lengths([offset], "offset"), lengths(size, "size"), lengths(stride, "stride")
    if len(size) != len(stride):
        raise Refused(f"a tensor of {len(size)} dimensions with {len(stride)} strides")
    there, numel = storage.nbytes // dtype.itemsize, _numel(size)
    end = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1 if numel else offset
    if end > there:
        raise Refused(f"a tensor of size {list(size)} and strides {list(stride)} reaches beyond its {there} numbers")
    if numel > there:
        raise Refused(f"a tensor of size {list(size)} repeats its {there} numbers; save it contiguous")
    return StorageView(storage, dtype, offset, size, stride)


def _rebuild_parameter(data: Any, requires_grad: Any, hooks: Any, state: Any = None) -> StorageView:
    if type(data) is not StorageView:
        raise Refused(f"a parameter that is of type {kind_of(data)}, not a tensor")
    return data


def _rebuild_from_type(function: Any, kind: Any, arguments: Any, state: Any) -> StorageView:
    """A tensor with attributes set by somebody, which are left out."""
    if getattr(function, "make", None) not in (_rebuild_tensor, _rebuild_tensor_v3):
        raise Refused(f"a tensor that is made by {kind_of(function)}")
    if kind_of(kind) not in ("torch.Tensor", "torch.nn.parameter.Parameter"):
        raise Refused(f"a tensor of type {kind_of(kind)}")
    return function.make(*arguments)


def _dtype(code: Any, align: Any = False, copy: Any = True) -> NumpyDtype:
    if type(code) is not str or code not in NUMPY_DTYPES:
        raise Refused(f"an array of dtype {shown(code)!r}; numpy dtypes {', '.join(NUMPY_DTYPES)} are read")
    return NumpyDtype(NUMPY_DTYPES[code])


def _reconstruct(kind: Any, shape: Any, code: Any) -> Array:
    if type(kind) is not Global or kind.name != "numpy.ndarray":
        raise Refused(f"an array that is of type {kind_of(kind)}, not numpy.ndarray")
    return Array()


def _scalar(dtype: Any, data: Any) -> int | float | bool:
    return array_of(data, dtype, ()).tensor().item()


def _frombuffer(data: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> Array:
    if order not in ("C", "F", "K"):
        raise Refused(f"an array of order {shown(order)}")
    array = array_of(data, dtype, shape, order == "F")
    if axes is not None:
        array.axes = lengths(axes, "order of dimensions")
    return array


def array_of(data: Any, dtype: Any, shape: Any, fortran: Any = False) -> Array:
    data = _encode(data) if type(data) is str else data  # Python 2 wrote the bytes as a string
    if type(data) not in (bytes, bytearray) or type(dtype) is not NumpyDtype:
        raise Refused(f"an array of {kind_of(data)} and {kind_of(dtype)} instead of bytes and a numpy dtype")
    shape = lengths(shape, "shape")
    if _numel(shape) * dtype.dtype.itemsize != len(data):
        raise Refused(f"an array of shape {list(shape)} and {dtype.dtype} with {len(data)} bytes")
    step = -1 if fortran else 1
    return Array(data, dtype.dtype, dtype.swapped, shape[::step], tuple(range(len(shape)))[::step])


# --- The table


def _rows(modules: str, names: str, value: Any) -> dict[tuple[str, str], Any]:
    """`value` (of a function: a call of it) under each of the names in each of the modules."""
    pairs = [(module, name) for module in modules.split() for name in names.split()]
    called = callable(value) or value is None
    return {(module, name): Global(f"{module}.{name}", value) if called else value for module, name in pairs}


NUMPY_DTYPES = {
    "f2": torch.float16, "f4": torch.float32, "f8": torch.float64, "b1": torch.bool,
    "i1": torch.int8, "i2": torch.int16, "i4": torch.int32, "i8": torch.int64,
    "u1": torch.uint8, "u2": torch.uint16, "u4": torch.uint32, "u8": torch.uint64,
}  # fmt: skip
STORAGES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool,
}  # fmt: skip
DTYPES = (*STORAGES.values(), torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2)

ADMITTED: dict[tuple[str, str], Any] = {
    **_rows("collections", "OrderedDict Counter", _dict),
    **_rows("collections", "defaultdict", _default_dict),
    **_rows("__builtin__ builtins", "dict list int float", None),  # what a defaultdict would make
    **_rows("__builtin__ builtins", "set", _set),
    **_rows("__builtin__ builtins", "bytes", _no_bytes),
    **_rows("__builtin__ builtins", "bytearray", _bytearray),
    **_rows("_codecs", "encode", _encode),
    **_rows("argparse", "Namespace", _namespace),
    **_rows("torch", "Size", _size),
    **_rows("torch", "device", _device),
    **_rows("torch.torch_version", "TorchVersion", _string),
    **_rows("torch._utils", "_rebuild_tensor _rebuild_tensor_v2", _rebuild_tensor),
    **_rows("torch._utils", "_rebuild_tensor_v3", _rebuild_tensor_v3),
    **_rows("torch._utils", "_rebuild_parameter _rebuild_parameter_with_state", _rebuild_parameter),
    **_rows("torch._tensor", "_rebuild_from_type_v2", _rebuild_from_type),
    **_rows("torch", "Tensor", None),
    **_rows("torch.nn.parameter", "Parameter", None),
    **_rows("torch torch.storage", "UntypedStorage", StorageType(torch.uint8)),
    **_rows("numpy", "ndarray", None),
    **_rows("numpy", "dtype", _dtype),
    **_rows("numpy.core.multiarray numpy._core.multiarray", "_reconstruct", _reconstruct),
    **_rows("numpy.core.multiarray numpy._core.multiarray", "scalar", _scalar),
    **_rows("numpy.core.numeric numpy._core.numeric", "_frombuffer", _frombuffer),
}
for _name, _type in STORAGES.items():
    ADMITTED.update(_rows("torch torch.cuda", f"{_name}Storage", StorageType(_type)))
for _type in DTYPES:
    ADMITTED["torch", str(_type).removeprefix("torch.")] = _type
