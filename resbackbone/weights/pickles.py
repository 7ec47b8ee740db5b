"""PyTorch and pickle files, read without letting them run code.

A pickle is a program for a small stack machine, and `_Machine` is such a machine that knows only the instructions
which weights are made of. The names that a program calls are looked up in ADMITTED, a table of functions of this
file: nothing a file names is imported or called. Those functions describe tensors; `_Plain` turns what they describe
into tensors and plain containers afterwards, once it is known to fit the file.
"""

import codecs
import io
import math
import os
import pickletools
import struct
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

import torch
from torch import Tensor

MAX_DEPTH = 64  # containers within containers
MAX_KEY = 1024  # characters
MAX_DIMS = 8
EXPANSION = 8  # what a file describes may be this many times its size: tied weights, several names for one state
SLACK = 1_000_000  # and this much more, so that small files may be wordy: bytes, containers or instructions

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # torch.serialization: what torch < 1.6 wrote first
LEGACY_PROTOCOL = 1001

# What the standard library raises on damaged bytes, and what our functions raise on arguments they do not take.
DAMAGED = (
    ValueError, LookupError, TypeError, AttributeError, OverflowError, RuntimeError, EOFError, struct.error,
    zipfile.BadZipFile,
)  # fmt: skip


def read_pickle(path: str | os.PathLike) -> object:
    """Read the plain content of a PyTorch or pickle file, as a tensor, number, string or nested dict, list, tuple, set.

    The kind of file is told by its content: what `torch.save` writes (a zip archive, or the format of torch < 1.6), or
    a pickle of numpy arrays of any protocol, Python 2's as well. Tensors, parameters and arrays become tensors on the
    CPU without gradient, numpy's scalars numbers, every kind of dict and `argparse.Namespace` a dict. No more than a
    small multiple of the file's size is allocated. Raises ValueError, with a sentence, for a file that is not
    readable, damaged, refers to anything but tensors and plain containers, or has a key twice.
    """
    name = os.fspath(path)
    try:
        with open(name, "rb") as file:
            return _read(file, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise ValueError(f"weights {name!r}: cannot be read ({error.strerror})") from None
    except _Refused as error:
        raise ValueError(f"weights {name!r}: {error}") from None
    except DAMAGED as error:
        reason = _shown(f"{type(error).__name__}: {error}")
        raise ValueError(f"weights {name!r}: a damaged file, or not a PyTorch or pickle file ({reason})") from None


class _Refused(ValueError):
    """A reason that reads well after `weights 'PATH': `."""


def _shown(value: object) -> str:
    """What a file has, short and on one line of a message; a container as its kind, for it may never end."""
    if type(value) not in (str, bytes, int, float, bool, type(None)):
        return _kind(value)
    text = repr(value[:120]) if type(value) is bytes else str(value)
    short = text[:120] if text[:120].isprintable() else ascii(text[:120])[1:-1]
    return short if len(text) <= 120 else f"{short}..."


# --- The three kinds of file


def _read(file: BinaryIO, size: int) -> object:
    if not size:
        raise _Refused("an empty file")
    start = file.read(262)
    file.seek(0)
    if start.startswith(b"PK\x03\x04"):
        return _read_zip(file, size)
    if start[257:] == b"ustar":
        raise _Refused("a tar archive, as the first PyTorch wrote; load it with that and save it with a newer one")
    source = _Source(file, size)
    value = _Machine(source).run()
    if type(value) is int and value == LEGACY_MAGIC:
        return _read_legacy(source)
    return _Plain(size).convert(value)


def _read_zip(file: BinaryIO, size: int) -> object:
    """What torch >= 1.6 writes: under one root, data.pkl, and data/KEY for every storage that it refers to."""
    with zipfile.ZipFile(file) as archive:
        records = {info.filename: info for info in archive.infolist()}
        if len(records) != len(archive.infolist()):
            raise _Refused("a zip archive with two records of one name")
        root = next(iter(records), "").partition("/")[0]
        if f"{root}/constants.pkl" in records or any(name.startswith(f"{root}/code/") for name in records):
            raise _Refused("a TorchScript archive, which holds code; save the module's state_dict() instead")
        if any(info.flag_bits & 1 for info in records.values()):
            raise _Refused("an encrypted zip archive")
        stored = all(info.compress_type == zipfile.ZIP_STORED for info in records.values())
        if not stored or any(info.file_size != info.compress_size for info in records.values()):
            raise _Refused("a compressed zip archive, and PyTorch writes no such files")
        if sum(info.file_size for info in records.values()) > size:
            raise _Refused("a zip archive whose records are larger than the file")
        if not all(name.startswith(f"{root}/") for name in records) or f"{root}/data.pkl" not in records:
            raise _Refused("a zip archive, but not of torch.save (one folder with data.pkl in it)")
        if f"{root}/byteorder" in records:
            order = archive.read(f"{root}/byteorder")
            if order != sys.byteorder.encode():
                raise _Refused(f"of byte order {_shown(order)}, and this machine's is {sys.byteorder}")

        def storage(key: object, dtype: torch.dtype, count: int) -> _Storage:
            if type(key) is not str or f"{root}/data/{key}" not in records:
                raise _Refused(f"tensor data {_shown(key)!r} is missing")
            nbytes = records[f"{root}/data/{key}"].file_size
            if count * dtype.itemsize != nbytes:
                raise _Refused(f"tensor data {_shown(key)!r} should be {count} x {dtype}, and has {nbytes} bytes")
            return _Storage(key, dtype, 0, nbytes)

        def load(key: str) -> Tensor:
            data = bytearray(records[f"{root}/data/{key}"].file_size)
            with archive.open(f"{root}/data/{key}") as record:
                if record.readinto(data) != len(data):
                    raise _Refused(f"tensor data {key!r} is cut off")
            return _bytes_tensor(data)

        program = archive.read(f"{root}/data.pkl")
        value = _Machine(_Source(io.BytesIO(program), len(program)), storage).run()
        return _Plain(size, load).convert(value)


def _read_legacy(source: "_Source") -> object:
    """What torch < 1.6 writes after its magic number: version, machine, content, storage keys, storages."""
    if _Machine(source).run() != LEGACY_PROTOCOL:
        raise _Refused("of an unknown version of PyTorch's old format")
    machine = _Machine(source).run()
    if type(machine) is not dict or machine.get("little_endian") is not (sys.byteorder == "little"):
        raise _Refused("written on a machine of another byte order")
    announced: dict[object, _Storage] = {}

    def storage(key: object, dtype: torch.dtype, count: int, view: object = None) -> _Storage:
        whole = _Storage(key, dtype, 0, count * dtype.itemsize)
        known = announced.setdefault(_key(key), whole)
        if (known.dtype, known.nbytes) != (dtype, whole.nbytes):
            raise _Refused(f"tensor data {_shown(key)!r} is used as {known.dtype} and as {dtype}, or of two sizes")
        if view is None:
            return whole
        _, *part = view  # of a storage, as the first versions could share it
        start, length = _lengths(part, "place in a storage")
        if start + length > count:
            raise _Refused("a storage reaches beyond the one it is part of")
        return _Storage(key, dtype, start * dtype.itemsize, length * dtype.itemsize)

    value = _Machine(source, storage).run()
    keys = _Machine(source).run()
    if type(keys) is not list or len({_key(key) for key in keys}) != len(keys) or set(keys) != set(announced):
        raise _Refused("the list of its tensor data is not that of its tensors")
    loaded = {}
    for key in keys:
        dtype, nbytes = announced[key].dtype, announced[key].nbytes
        if int.from_bytes(source.read(8), sys.byteorder) * dtype.itemsize != nbytes:
            raise _Refused(f"tensor data {_shown(key)!r} is not of the size that its tensors state")
        loaded[key] = _bytes_tensor(bytearray(source.read(nbytes)))
    return _Plain(source.size, loaded.__getitem__).convert(value)


class _Source:
    """A file that refuses to be asked for more than it has left, before anything is allocated for it."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size, self.left = file, size, size

    def read(self, count: int) -> bytes:
        if not 0 <= count <= self.left:
            raise _Refused(f"cut off or damaged: it should go on for {count} bytes, and {self.left} are left")
        self.left -= count
        return self.file.read(count)

    def readline(self) -> bytes:
        line = self.file.readline()
        self.left -= len(line)
        return line


# --- What a program may refer to, and the descriptions that it makes


class _Global:
    """A name in a file. `make`, if any, is what a call of it does here."""

    def __init__(self, name: str, make: Callable | None = None):
        self.name, self.make = name, make


@dataclass(eq=False)
class _StorageType:
    dtype: torch.dtype


@dataclass(eq=False)
class _Storage:
    """`nbytes` bytes from byte `start` of the tensor data called `key`, as elements of `dtype`."""

    key: object
    dtype: torch.dtype
    start: int
    nbytes: int


@dataclass(eq=False)
class _TensorOfStorage:
    storage: _Storage
    dtype: torch.dtype
    offset: int  # this and the strides in elements
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(eq=False)
class _Dtype:
    """A numpy dtype; its byte order comes with its state."""

    dtype: torch.dtype
    swapped: bool = False


@dataclass(eq=False)
class _Array:
    """A numpy array, whose content comes with its state."""

    tensor: Tensor | None = None


@dataclass(eq=False)
class _Namespace:
    fields: dict


def _key(key: object) -> object:
    """`key` if a dict may have it: hashing a file's nested tuples could take forever, or overflow the stack."""
    if type(key) not in (str, bytes, int, float, bool, type(None)):
        raise _Refused(f"a key or set member of type {_kind(key)}; strings and numbers are read")
    if type(key) in (str, bytes) and len(key) > MAX_KEY:
        raise _Refused(f"a key of {len(key)} characters; up to {MAX_KEY} are read")
    return key


def _put(target: dict, key: object, value: object) -> None:
    if _key(key) in target:
        raise _Refused(f"the key {_shown(key)!r} is there twice")
    target[key] = value


def _kind(value: object) -> str:
    return value.name if type(value) is _Global else type(value).__name__.lstrip("_")


def _lengths(values: object, what: str) -> tuple[int, ...]:
    if type(values) not in (tuple, list) or any(type(n) is not int or not 0 <= n < 2**63 for n in values):
        raise _Refused(f"a tensor with a {what} that is not of whole numbers from 0 up")
    if len(values) > MAX_DIMS:
        raise _Refused(f"a tensor of {len(values)} dimensions; up to {MAX_DIMS} are read")
    return tuple(values)


def _numel(size: tuple[int, ...]) -> int:
    if math.prod(max(n, 1) for n in size) >= 2**60:  # also where another length is 0: torch multiplies them all
        raise _Refused(f"a tensor of size {list(size)}")
    return math.prod(size)


def _bytes_tensor(data: bytearray) -> Tensor:
    return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8, device="cpu")


# Each of the following stands for the function or class of that name in ADMITTED, and takes what a file passes to it.


def _dict(items: object = ()) -> dict:
    made: dict = {}
    for key, value in items.items() if type(items) is dict else items:  # Python 2 passes an OrderedDict's pairs
        _put(made, key, value)
    return made


def _default_dict(factory: object = None) -> dict:
    return {}


def _set(items: object = ()) -> set:
    return {_key(item) for item in items}


def _no_bytes() -> bytes:  # protocols 0 to 2 have no other way to say it
    return b""


def _bytearray(data: object = b"", encoding: str = "latin1") -> bytearray:
    return bytearray(data if type(data) is bytes else _encode(data, encoding))


def _encode(text: object, encoding: object = "latin1") -> bytes:
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise _Refused(f"encodes {_kind(text)} as {_shown(encoding)}; bytes are written as latin1")
    return text.encode("latin1")


def _size(size: object = ()) -> tuple[int, ...]:
    return _lengths(size, "size")


def _device(kind: object, index: int | None = None) -> torch.device:
    kind = _string(kind)
    return torch.device(kind) if index is None else torch.device(kind, index)


def _string(text: object) -> str:
    if type(text) is not str:
        raise _Refused(f"a version or device that is of type {_kind(text)}, not a string")
    return text


def _namespace() -> _Namespace:
    return _Namespace({})


def _rebuild_tensor(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None) -> _TensorOfStorage:
    return _rebuild_tensor_v3(storage, offset, size, stride, requires_grad, hooks, None, metadata)


def _rebuild_tensor_v3(storage, offset, size, stride, requires_grad, hooks, dtype, metadata=None) -> _TensorOfStorage:
    if type(storage) is not _Storage:
        raise _Refused(f"a tensor over {_kind(storage)} instead of a storage")
    dtype = storage.dtype if dtype is None else dtype
    if type(dtype) is not torch.dtype or metadata:
        raise _Refused("a tensor with a dtype or with metadata that weights do not have")
    (offset,), size, stride = _lengths([offset], "offset"), _lengths(size, "size"), _lengths(stride, "stride")
    if len(size) != len(stride):
        raise _Refused(f"a tensor of {len(size)} dimensions with {len(stride)} strides")
    there, numel = storage.nbytes // dtype.itemsize, _numel(size)
    end = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1 if numel else offset
    if end > there:
        raise _Refused(f"a tensor of size {list(size)} and strides {list(stride)} reaches beyond its {there} numbers")
    if numel > there:
        raise _Refused(f"a tensor of size {list(size)} repeats its {there} numbers; save it contiguous")
    return _TensorOfStorage(storage, dtype, offset, size, stride)


def _rebuild_parameter(data: object, requires_grad: object, hooks: object, state: object = None) -> _TensorOfStorage:
    if type(data) is not _TensorOfStorage:
        raise _Refused(f"a parameter that is of type {_kind(data)}, not a tensor")
    return data


def _rebuild_from_type(function: object, kind: object, arguments: object, state: object) -> _TensorOfStorage:
    """A tensor with attributes set by somebody, which are left out."""
    if getattr(function, "make", None) not in (_rebuild_tensor, _rebuild_tensor_v3):
        raise _Refused(f"a tensor that is made by {_kind(function)}")
    if _kind(kind) not in ("torch.Tensor", "torch.nn.parameter.Parameter"):
        raise _Refused(f"a tensor of type {_kind(kind)}")
    return function.make(*arguments)


def _dtype(code: object, align: object = False, copy: object = True) -> _Dtype:
    if type(code) is not str or code not in NUMPY_DTYPES:
        raise _Refused(f"an array of dtype {_shown(code)!r}; numpy dtypes {', '.join(NUMPY_DTYPES)} are read")
    return _Dtype(NUMPY_DTYPES[code])


def _reconstruct(kind: object, shape: object, code: object) -> _Array:
    if type(kind) is not _Global or kind.name != "numpy.ndarray":
        raise _Refused(f"an array that is of type {_kind(kind)}, not numpy.ndarray")
    return _Array()


def _scalar(dtype: object, data: object) -> int | float | bool:
    return _array(data, dtype, ()).item()


def _frombuffer(data: object, dtype: object, shape: object, order: object, axes: object = None) -> Tensor:
    if order not in ("C", "F", "K"):
        raise _Refused(f"an array of order {_shown(order)}")
    array = _array(data, dtype, shape, order == "F")
    return array if axes is None else array.permute(_lengths(axes, "order of dimensions"))


def _array(data: object, dtype: object, shape: object, fortran: object = False) -> Tensor:
    data = _encode(data) if type(data) is str else data  # Python 2 wrote the bytes as a string
    if type(data) not in (bytes, bytearray) or type(dtype) is not _Dtype:
        raise _Refused(f"an array of {_kind(data)} and {_kind(dtype)} instead of bytes and a numpy dtype")
    shape = _lengths(shape, "shape")
    itemsize = dtype.dtype.itemsize
    if _numel(shape) * itemsize != len(data):
        raise _Refused(f"an array of shape {list(shape)} and {dtype.dtype} with {len(data)} bytes")
    flat = _bytes_tensor(bytearray(data))
    if dtype.swapped:
        flat = flat.view(-1, itemsize).flip(1).view(-1)
    flat = flat.view(dtype.dtype)
    return flat.view(shape[::-1]).permute(*range(len(shape))[::-1]) if fortran else flat.view(shape)


def _add(modules: str, names: str, value: object) -> dict[tuple[str, str], object]:
    """Table rows: `value` (of a function: a call of it) under each of the names in each of the modules."""
    pairs = [(module, name) for module in modules.split() for name in names.split()]
    called = callable(value) or value is None
    return {(module, name): _Global(f"{module}.{name}", value) if called else value for module, name in pairs}


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

ADMITTED: dict[tuple[str, str], object] = {
    **_add("collections", "OrderedDict Counter", _dict),
    **_add("collections", "defaultdict", _default_dict),
    **_add("__builtin__ builtins", "dict list int float", None),  # what a defaultdict would make
    **_add("__builtin__ builtins", "set", _set),
    **_add("__builtin__ builtins", "bytes", _no_bytes),
    **_add("__builtin__ builtins", "bytearray", _bytearray),
    **_add("_codecs", "encode", _encode),
    **_add("argparse", "Namespace", _namespace),
    **_add("torch", "Size", _size),
    **_add("torch", "device", _device),
    **_add("torch.torch_version", "TorchVersion", _string),
    **_add("torch._utils", "_rebuild_tensor _rebuild_tensor_v2", _rebuild_tensor),
    **_add("torch._utils", "_rebuild_tensor_v3", _rebuild_tensor_v3),
    **_add("torch._utils", "_rebuild_parameter _rebuild_parameter_with_state", _rebuild_parameter),
    **_add("torch._tensor", "_rebuild_from_type_v2", _rebuild_from_type),
    **_add("torch", "Tensor", None),
    **_add("torch.nn.parameter", "Parameter", None),
    **_add("torch torch.storage", "UntypedStorage", _StorageType(torch.uint8)),
    **_add("numpy", "ndarray", None),
    **_add("numpy", "dtype", _dtype),
    **_add("numpy.core.multiarray numpy._core.multiarray", "_reconstruct", _reconstruct),
    **_add("numpy.core.multiarray numpy._core.multiarray", "scalar", _scalar),
    **_add("numpy.core.numeric numpy._core.numeric", "_frombuffer", _frombuffer),
}
for _name, _type in STORAGES.items():
    ADMITTED.update(_add("torch torch.cuda", f"{_name}Storage", _StorageType(_type)))
for _type in DTYPES:
    ADMITTED["torch", str(_type).removeprefix("torch.")] = _type


# --- The machine

INSTRUCTIONS = {op.code.encode("latin1"): op for op in pickletools.opcodes}  # the library decodes their arguments


class _Machine:
    """Runs one pickle of `source`. `storage` describes the tensor data that a key outside of the pickle refers to."""

    def __init__(self, source: _Source, storage: Callable[..., _Storage] | None = None):
        self.source, self.storage = source, storage
        self.stack: list = []
        self.marked: list[list] = []  # the stacks below each mark
        self.memo: dict[int, object] = {}
        self.unpacked = 0

    def run(self) -> object:
        for _ in range(SLACK + self.source.size // 16):
            code = self.source.read(1)
            op = INSTRUCTIONS.get(code)
            if op is None:
                raise _Refused(f"a damaged file, or not a weight file: byte {code!r} is no instruction of a pickle")
            if op.name == "STOP":
                return self.stack.pop()
            if op.name == "STRING":  # Python 2's bytes, where pickletools would have ASCII
                line = pickletools.read_stringnl(self.source, decode=False)
                argument = codecs.escape_decode(line)[0].decode("latin1")
            else:
                argument = op.arg.reader(self.source) if op.arg else None
            self._step(op.name, argument)
        raise _Refused("it has more instructions than weights of its size need")

    def _step(self, name: str, argument) -> None:
        stack = self.stack
        match name:
            case "INT" | "BININT" | "BININT1" | "BININT2" | "LONG" | "LONG1" | "FLOAT" | "BINFLOAT":
                stack.append(argument)
            case "STRING" | "BINSTRING" | "SHORT_BINSTRING" | "UNICODE" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "BINUNICODE8" | "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8" | "BYTEARRAY8":
                stack.append(argument)
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "MARK":
                self.marked.append(stack)
                self.stack = []
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(name == "NEWTRUE")
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [stack.pop() for _ in range(int(name[-1]))]
                stack.append(tuple(reversed(items)))
            case "TUPLE":
                items = self._pop_marked()
                self.stack.append(tuple(items))
            case "EMPTY_LIST":
                stack.append([])
            case "LIST":
                items = self._pop_marked()
                self.stack.append(items)
            case "APPEND" | "APPENDS":
                items = [stack.pop()] if name == "APPEND" else self._pop_marked()
                self._top(list).extend(items)
            case "EMPTY_DICT":
                stack.append({})
            case "DICT" | "SETITEM" | "SETITEMS":
                items = [stack.pop(), stack.pop()][::-1] if name == "SETITEM" else self._pop_marked()
                if name == "DICT":
                    self.stack.append({})
                target = self._top(dict)
                for key, value in zip(items[::2], items[1::2], strict=True):
                    _put(target, key, value)
            case "EMPTY_SET":
                stack.append(set())
            case "ADDITEMS":
                items = self._pop_marked()
                self._top(set).update(_set(items))
            case "GLOBAL":
                stack.append(_admitted(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(_admitted(module, attribute))
            case "REDUCE" | "NEWOBJ":
                arguments, called = stack.pop(), stack.pop()
                stack.append(self._call(called, arguments))
            case "BUILD":
                state = stack.pop()
                self._set_state(stack[-1], state)
            case "BINPERSID":
                stack.append(self._find_storage(stack.pop()))
            case "PROTO" | "FRAME":  # what is known from the instructions themselves
                pass
            case _:  # extension codes, INST, OBJ and others that only hostile files have; or data outside of the file
                raise _Refused(f"a pickle instruction, {name}, that no weight file needs")

    def _pop_marked(self) -> list:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def _top(self, kind: type):
        if type(self.stack[-1]) is not kind:
            raise _Refused(f"it fills {_kind(self.stack[-1])} as if it were a {kind.__name__}")
        return self.stack[-1]

    def _call(self, called: object, arguments: object) -> object:
        if type(called) is not _Global or called.make is None:
            raise _Refused(f"it would call {_kind(called)}, which no weight file needs")
        if type(arguments) is not tuple:
            raise _Refused(f"it calls {called.name} with {_kind(arguments)}")
        made = called.make(*arguments)
        self._count(made)
        return made

    def _set_state(self, target: object, state: object) -> None:
        if type(target) is _Dtype and type(state) is tuple and len(state) >= 5 and state[1] in ("<", ">", "|", "="):
            if any(part is not None for part in state[2:5]):
                raise _Refused("an array of records, and weights are plain arrays")
            target.swapped = state[1] in ("<", ">") and (state[1] == "<") != (sys.byteorder == "little")
        elif type(target) is _Array and type(state) is tuple and len(state) == 5:
            _, shape, dtype, fortran, data = state
            target.tensor = _array(data, dtype, shape, fortran)
            self._count(target.tensor)
        elif type(target) is _Namespace and type(state) is dict:
            self._count(state)
            for key, value in state.items():
                _put(target.fields, key, value)
        elif type(target) is not dict:  # an OrderedDict's attributes, as state dicts have them, are left out
            raise _Refused(f"it would set attributes of {_kind(target)}, which no weight file needs")

    def _find_storage(self, key: object) -> _Storage:
        if self.storage is None or type(key) is not tuple or len(key) not in (5, 6) or key[0] != "storage":
            raise _Refused("it refers to data outside of it that is no tensor's")
        _, kind, name, _device_there, count, *view = key
        if type(kind) is not _StorageType:
            raise _Refused(f"tensor data of type {_kind(kind)}")
        return self.storage(name, kind.dtype, *_lengths([count], "storage size"), *view)

    def _count(self, made: object) -> None:
        """Calls are short and can copy much: all they make is held against the size of the file."""
        if type(made) in (Tensor, bytes, bytearray):
            self.unpacked += made.nbytes if type(made) is Tensor else len(made)
        elif type(made) in (dict, set):
            self.unpacked += 64 * len(made)
        if self.unpacked > EXPANSION * self.source.size + SLACK:
            raise _Refused("it unpacks to many times its size, which no weight file needs")


def _admitted(module: object, name: object) -> object:
    if type(module) is not str or type(name) is not str:
        raise _Refused("it refers to a name that is no string")
    if (module, name) not in ADMITTED:
        what = _shown(f"{module}.{name}")
        raise _Refused(f"it would run {what}, which no weight file needs; only tensors and plain containers are read")
    return ADMITTED[module, name]


# --- From descriptions to tensors


class _Plain:
    """Converts what a machine has made. `load` gives the bytes of tensor data as a tensor [nbytes] of uint8."""

    def __init__(self, size: int, load: Callable[[object], Tensor] | None = None):
        self.limit, self.load = EXPANSION * size + SLACK, load
        self.storages: dict[object, Tensor] = {}
        self.done: dict[int, tuple[object, int, int]] = {}

    def convert(self, value: object) -> object:
        return self._visit(value, MAX_DEPTH)[0]

    def _visit(self, value: object, levels: int) -> tuple[object, int, int]:
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
                raise _Refused(f"it is nested more than {MAX_DEPTH} levels deep, or within itself")
            self.done[id(value)] = self._compute(value, levels)
        plain, cost, height = self.done[id(value)]
        if height > levels:
            raise _Refused(f"it is nested more than {MAX_DEPTH} levels deep")
        return plain, cost, height

    def _compute(self, value: object, levels: int) -> tuple[object, int, int]:
        kind = type(value)
        if kind in (Tensor, _Array, _TensorOfStorage):
            tensor = value if kind is Tensor else value.tensor if kind is _Array else self._tensor(value)
            if tensor is None:
                raise _Refused("an array without content")
            return tensor, tensor.nbytes + 1, 0
        if kind is set:
            return value, len(value) + 1, 1
        if kind is _Dtype:
            return value.dtype, 1, 0
        if kind in (dict, _Namespace):
            items = value if kind is dict else value.fields
            parts = [self._visit(item, levels - 1) for item in items.values()]
            plain: object = {key: part[0] for key, part in zip(items, parts, strict=True)}
        elif kind in (list, tuple):
            parts = [self._visit(item, levels - 1) for item in value]
            plain = kind(part[0] for part in parts)
        else:
            raise _Refused(f"a value of type {_kind(value)}, which no weight file needs")
        cost = 1 + sum(part[1] for part in parts)
        if cost > self.limit:  # a few bytes can say "ten times the list before", again and again
            raise _Refused("it describes many times its size, which no weight file needs")
        return plain, cost, 1 + max((part[2] for part in parts), default=0)

    def _tensor(self, described: _TensorOfStorage) -> Tensor:
        storage = described.storage
        if storage.key not in self.storages:
            self.storages[storage.key] = self.load(storage.key)
        start = storage.start // described.dtype.itemsize + described.offset
        tensor = torch.empty(0, dtype=described.dtype, device="cpu")
        return tensor.set_(self.storages[storage.key].untyped_storage(), start, described.size, described.stride)
