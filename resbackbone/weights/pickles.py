"""PyTorch and pickle files, read without running anything that they name.

One unpickler reads the pickles of all of them. A name of torch or numpy in NAMES stands for a function or class of this
file, which takes plain numbers and nothing else. Any other name is not looked up: a `Foreign` keeps it and ignores what
the file would do with it, so that the tensors beside it can be read.
"""

import io
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from resbackbone.checks import LFS_POINTER, UserError

OTHER_KINDS = {  # how files begin that others save weights in
    b"\x89HDF": "an HDF5 file; load it where its code is, and save a state_dict() with torch.save",
    b"\x1f\x8b": "a file compressed with gzip; unpack it",
    b"BZh": "a file compressed with bzip2; unpack it",
    b"\xfd7zXZ": "a file compressed with xz; unpack it",
    b"\xff\xd8\xff": "a JPEG image; give a file with weights",
    b"\x89PNG": "a PNG image; give a file with weights",
    b"\x08": "an ONNX file; run it with ONNX Runtime, or give the run or the weights that it was exported from",
    LFS_POINTER: "a Git LFS pointer, not the file itself; run git lfs pull",
    b"\x93NUMPY": "a single array of numpy; save a dict of tensors by name with torch.save",
}
LEGACY_STARTS = tuple(pickle.dumps(0x1950A86A20F9469CFC6C, protocol) for protocol in range(1, 6))  # of torch < 1.6


def read_pickle(path: str | os.PathLike) -> object:
    """Read what a PyTorch file (zip, or the format of torch < 1.6) or a pickle of numpy arrays holds, on the CPU.

    The content decides which kind of file it is. Python 2's pickles are read too. In dicts, numpy's arrays become
    tensors and its scalars numbers. What is neither a tensor nor an array, a number, a text or a plain container is a
    `Foreign`. Raises ValueError if the file is unreadable or damaged, or if it is one such object as a whole.
    """
    name = os.fspath(path)
    try:
        with open(name, "rb") as file:
            content = _read(file)
        if isinstance(content, Foreign):
            raise UserError(f"it is {content.whole}")
        return content
    except OSError as error:
        raise UserError(f"weights {name!r}: cannot be read ({error.strerror or error})") from None
    except UserError as error:
        raise UserError(f"weights {name!r}: {error}") from None


def _read(file: BinaryIO) -> object:
    start = file.read(64)
    file.seek(0)
    if not start:
        raise UserError("an empty file; download or save it again")
    if start.lstrip().startswith(b"<"):
        raise UserError("a web page, not the file itself; download it again")
    if kind := next((kind for begin, kind in OTHER_KINDS.items() if start.startswith(begin)), None):
        raise UserError(kind)
    try:
        if start.startswith(b"PK\x03\x04"):
            content = _read_archive(file)
        elif start.startswith(LEGACY_STARTS):
            content = _read_legacy(io.BytesIO(file.read()))
        else:
            content = Unpickler(io.BytesIO(file.read())).load()
        return _plain(content, {})
    except (UserError, OSError, MemoryError):
        raise
    except Exception:  # zipfile, torch and pickle raise some twenty kinds for damaged bytes
        raise UserError(
            "a damaged file, or not a PyTorch or pickle file; download it again, or save it with torch.save"
        ) from None


def _read_archive(file: BinaryIO) -> object:
    """A zip archive: the pickle data.pkl, and a record with the numbers of each storage."""
    with zipfile.ZipFile(file) as archive:
        _check_archive(archive, os.fstat(file.fileno()).st_size)
        names = archive.namelist()
        (program,) = (name for name in names if re.fullmatch(r"[^/]+/data\.pkl", name))
        folder = program.removesuffix("data.pkl")
        order = archive.read(f"{folder}byteorder").decode() if f"{folder}byteorder" in names else "little"
        storages: dict[str, Tensor] = {}

        def storage(dtype: torch.dtype, key: str, count: int) -> Tensor:
            if key not in storages:
                storages[key] = _bytes(archive.read(f"{folder}data/{key}"))
                if order != sys.byteorder:
                    storages[key].untyped_storage().byteswap(dtype)
            return _numbers(storages[key], dtype, count)

        return Unpickler(io.BytesIO(archive.read(program)), storage).load()


def _check_archive(archive: zipfile.ZipFile, size: int) -> None:
    """Refuse zip archives that `torch.save` does not write, and damaged ones."""
    records = archive.infolist()
    if len({record.filename for record in records}) < len(records):
        raise UserError("a zip archive with two records of one name")
    files = [record.filename for record in records if not record.is_dir()]
    if not any(re.fullmatch(r"[^/]+/data\.pkl", name) for name in files):
        if all(name.endswith(".npy") for name in files):
            raise UserError("an archive of numpy's arrays (.npz); save a dict of them as tensors with torch.save")
        if any(name.endswith("archive_format") or "/models/" in name for name in files):
            raise UserError("a program of torch.export (.pt2); save the module's state_dict() with torch.save")
        if inner := next((n for n in files if n.endswith((".pth", ".pt", ".pkl", ".bin", ".safetensors", ".th"))), ""):
            raise UserError(f"a zip archive with {short(inner)} in it; unpack it and give that file")
    if any(record.filename.endswith("/constants.pkl") for record in records):
        raise UserError("a TorchScript archive, which holds code; save the module's state_dict() instead")
    if any(r.compress_type != zipfile.ZIP_STORED or r.file_size != r.compress_size for r in records):
        raise UserError("a compressed zip archive; save it again with torch.save, which does not compress")
    if sum(record.file_size for record in records) > size:
        raise UserError("a damaged file: its records are larger than the file")


def _read_legacy(file: io.BytesIO) -> object:
    """The format of torch < 1.6: pickles of three constants, the content and the storages' keys; then the numbers."""
    for _ in ("magic number", "protocol", "machine"):
        Unpickler(file).load()
    storages: dict[str, tuple[Tensor, int]] = {}

    def storage(dtype: torch.dtype, key: str, count: int, view: tuple[str, int, int] | None = None) -> Tensor:
        if key not in storages:
            left = len(file.getbuffer()) - sum(len(room) for room, _ in storages.values())
            if not 0 <= count * dtype.itemsize <= left:
                raise UserError("a damaged file: its tensors are larger than the file")
            storages[key] = _bytes(bytes(count * dtype.itemsize)), dtype.itemsize
        numbers = _numbers(storages[key][0], dtype, count)
        return numbers if view is None else numbers.narrow(0, *view[1:])

    content = Unpickler(file, storage).load()
    keys: Any = Unpickler(file).load()
    if sorted(keys) != sorted(storages):
        raise UserError("a damaged file: it does not hold the tensors that it names")
    for key in keys:
        room, size = storages[key]
        count = int.from_bytes(file.read(8), "little")
        if count * size != len(room) or file.readinto(room.numpy().data) != len(room):
            raise UserError("a damaged file: a tensor has another size than it states")
    return content


def _bytes(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(bytearray(data), np.uint8))  # a copy, which may be written to


def _numbers(data: Tensor, dtype: torch.dtype, count: int) -> Tensor:
    """The first `count` numbers in `data` [bytes]."""
    if type(count) is not int or not 0 <= count * dtype.itemsize <= len(data):
        raise UserError("a damaged file: a tensor has another size than it states")
    return data[: count * dtype.itemsize].view(dtype)


def short(text: str) -> str:
    """`text`, which a file holds, on one line of a message."""
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= 120 else f"{text[:120]}..."


class Foreign:
    """In place of what a file names and this package does not read: an object of another class, a call.

    It ignores whatever the file would do with it: to call it, to set its state, to add items to it.
    """

    attributes: Any = {}  # of an argparse.Namespace, as far as they are plain

    def __init__(self, name: str):
        self.name = short(name)

    def ignore(self, *_: object) -> "Foreign":
        return self

    def __call__(self, *_: object) -> "Foreign":
        return Foreign(self.name)  # each namespace has attributes of its own

    __setitem__ = append = extend = add = ignore

    @property
    def whole(self) -> str:
        """What to say where one is instead of tensors."""
        return f"a whole {self.name}, which is not run; where its code is, save its state_dict() with torch.save"


class Dtype:
    """In place of numpy.dtype: plain numbers only."""

    def __new__(cls, code: str, *_: object) -> Any:
        return super().__new__(cls) if code in DTYPES else Foreign(f"array of dtype {code}")

    def __init__(self, code: str, *_: object):
        self.numpy = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        _, order, subarray, names, fields, *_ = state
        if (subarray, names, fields) != (None, None, None) or order not in ("<", ">", "|", "="):
            raise UserError("an array of records; weights are plain arrays")
        self.numpy = self.numpy.newbyteorder(order)


class Array:
    """In place of numpy.ndarray. Its content comes with its state."""

    value: Tensor | Foreign | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        self.value = _tensor(data, dtype, shape, "F" if fortran else "C")


def _tensor(data: Any, dtype: Any, shape: tuple[int, ...], order: str) -> Any:
    if isinstance(dtype, Foreign):
        return dtype
    data = data.encode("latin1") if type(data) is str else data  # Python 2 wrote the bytes as a string
    if type(data) not in (bytes, bytearray) or type(dtype) is not Dtype:
        raise UserError("an array whose content is not the bytes of plain numbers")
    if any(length < 0 for length in shape):
        raise UserError(f"an array of shape {short(str(shape))}")
    array = np.frombuffer(data, dtype.numpy).reshape(shape, order="F" if order == "F" else "C")
    return from_array(array)


def from_array(array: np.ndarray) -> Tensor:
    """A copy of an array of plain numbers, in this machine's byte order."""
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))


def _reconstruct(kind: object, shape: object, code: object) -> Array | Foreign:
    if isinstance(kind, Foreign):
        return kind
    if kind is not Array:
        raise UserError("an array of another type than numpy.ndarray")
    return Array()


def _from_buffer(data: Any, dtype: Any, shape: Any, order: str, axes: tuple[int, ...] | None = None) -> Array:
    array = Array()
    array.value = _tensor(data, dtype, shape, order)
    if axes is not None and isinstance(array.value, Tensor):
        array.value = array.value.permute(axes)
    return array


def _scalar(dtype: Any, data: Any) -> int | float | bool | Foreign:
    value = _tensor(data, dtype, (), "C")
    return value if isinstance(value, Foreign) else value.item()


def _latin1(text: str, encoding: str = "latin1") -> bytes:  # protocols 0 to 2 write bytes as encoded text
    if encoding != "latin1":
        raise UserError(f"bytes in the encoding {short(str(encoding))!r} instead of latin1")
    return text.encode("latin1")


def _rebuild(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Any:
    """torch._utils._rebuild_tensor and _v2: a tensor in `storage` [numbers]."""
    if isinstance(storage, Foreign):
        return storage
    if any(type(number) is not int or number < 0 for number in (offset, *size, *stride)):
        raise UserError("a damaged file: a tensor whose shape is not of numbers")
    return storage.as_strided(size, stride, storage.storage_offset() + offset)


def _rebuild_v3(
    storage: Any, offset: int, size: Any, stride: Any, _grad: bool, _hooks: Any, dtype: Any, *_: Any
) -> Any:
    """torch._utils._rebuild_tensor_v3: `storage` holds bytes."""
    return dtype if isinstance(dtype, Foreign) else _rebuild(storage.view(dtype), offset, size, stride)


def _rebuild_from_type(rebuild: Callable, kind: Foreign, arguments: tuple, state: object) -> Any:
    """torch._tensor._rebuild_from_type_v2: a tensor with attributes, or of a subclass, which is not read."""
    return rebuild(*arguments) if kind.name == "torch.Tensor" else kind


def _on_device(data: Any, dtype: torch.dtype, *_: object) -> Any:
    """torch._utils._rebuild_device_tensor_from_numpy and _from_cpu_tensor: of devices without storages, as TPUs."""
    tensor: Any = data.value if isinstance(data, Array) else data
    return tensor.to(dtype)


def _first(data: Any, *_: object) -> Any:  # a parameter is its tensor
    return data


def _plain(value: object, done: dict[int, dict]) -> object:
    """Dicts as plain ones, without attributes that a file gives them; arrays and parameters in them as tensors."""
    if isinstance(value, dict):
        if id(value) not in done:
            plain: dict = {}
            done[id(value)] = plain
            plain.update((key, _plain(item, done)) for key, item in dict.items(value))
        return done[id(value)]
    return value.value if isinstance(value, Array) else value


DTYPES = ("f2", "f4", "f8", "b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")
STORAGES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128, "Untyped": torch.uint8,
}  # fmt: skip
# For _rebuild_tensor_v3, which has the kinds of numbers that no storage is named after.
DTYPE_NAMES = ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
NAMES: dict[str, Any] = {
    "collections.OrderedDict": dict,
    "collections.defaultdict": lambda factory=None: {},
    "_codecs.encode": _latin1,
    "numpy.ndarray": Array,
    "numpy.dtype": Dtype,
    "torch._utils._rebuild_tensor": _rebuild,
    "torch._utils._rebuild_tensor_v2": _rebuild,
    "torch._utils._rebuild_tensor_v3": _rebuild_v3,
    "torch._utils._rebuild_device_tensor_from_numpy": _on_device,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _on_device,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch.nn.parameter.Parameter": _first,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch.storage.UntypedStorage": torch.uint8,
    **{f"torch.{name}Storage": dtype for name, dtype in STORAGES.items()},
    **{f"torch.{name}": getattr(torch, name) for name in DTYPE_NAMES},
}
for _core in ("numpy.core", "numpy._core"):  # numpy 1 and 2
    NAMES[f"{_core}.multiarray._reconstruct"] = _reconstruct
    NAMES[f"{_core}.multiarray.scalar"] = _scalar
    NAMES[f"{_core}.numeric._frombuffer"] = _from_buffer
for _module in ("builtins", "__builtin__"):  # Python 3 and 2
    NAMES[f"{_module}.bytes"] = lambda: b""  # protocols 0 to 2 write empty bytes as a call


_Unpickler: Any = pickle._Unpickler  # in Python; the one in C has no dispatch table


class Unpickler(_Unpickler):
    """Calls what is in NAMES and nothing else, and sets the state of nothing but their instances.

    `storage` gives the numbers of a PyTorch file: (dtype, key, count, ..) -> [count].
    Python's own implementation, as that in C allocates memory for whatever index a damaged PUT states.
    """

    def __init__(self, file: BinaryIO, storage: Callable[..., Tensor] | None = None):
        super().__init__(file, encoding="latin1")  # which numpy asks for of Python 2's pickles
        self.storage = storage

    def find_class(self, module: str, name: str) -> Any:
        return NAMES.get(f"{module}.{name}") or Foreign(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        match pid:
            case ("module", Foreign() as kind, *_):  # a class whose source torch < 1.6 saved with a whole module
                return kind
            case ("storage", torch.dtype() as dtype, str(key), _, int(count), *view) if self.storage is not None:
                return self.storage(dtype, key, count, *view)
            case ("storage", Foreign() as kind, *_):
                raise UserError(f"tensors of {kind.name}, which no weights have; save them as floating point numbers")
        raise UserError("a damaged file: a tensor that is in no storage")

    def load_reduce(self) -> None:
        if type(self.stack[-1]) is not tuple:  # Python's message would quote the object, a tensor's numbers say
            raise UserError("a damaged file: a call without arguments")
        super().load_reduce()

    def load_newobj_ex(self) -> None:
        self.stack.pop()  # keyword arguments, which nothing in NAMES takes
        self.load_reduce()

    def load_build(self) -> None:
        target = self.stack[-2]
        if type(target) in (Array, Dtype):
            super().load_build()
        elif type(target) in (dict, Foreign):  # attributes of an OrderedDict
            state = self.stack.pop()
            if isinstance(target, Foreign) and target.name == "argparse.Namespace" and type(state) is dict:
                target.attributes = _plain(state, {})  # the arguments of the training
        else:
            raise UserError(f"it would set attributes of {short(str(type(target).__name__))}")

    dispatch = {
        **_Unpickler.dispatch,
        pickle.BUILD[0]: load_build,
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_reduce,  # a Foreign has no __new__, and for the others it is the same
        pickle.NEWOBJ_EX[0]: load_newobj_ex,
        pickle.BYTEARRAY8[0]: _Unpickler.load_binbytes8,  # allocates what the file has, not what it states
    }
    for _code in (pickle.EXT1, pickle.EXT2, pickle.EXT4):  # their cache goes round find_class
        del dispatch[_code[0]]
