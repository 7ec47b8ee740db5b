"""PyTorch and pickle files, read without letting them run code.

PyTorch files go through `torch.load(weights_only=True)`, pickles of numpy arrays through `ArrayUnpickler`. In both, a
name of numpy stands for a function or class of this file, which takes plain numbers and nothing else.
"""

import argparse
import io
import os
import pickle
import re
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from resbackbone.checks import UserError
from resbackbone.compat import forget_sparse_tensors

LEGACY_START = pickle.dumps(0x1950A86A20F9469CFC6C, 2)  # the magic number that torch < 1.6 wrote first


def read_pickle(path: str | os.PathLike) -> object:
    """Read what a PyTorch file (zip, or the format of torch < 1.6) or a pickle of numpy arrays holds, on the CPU.

    The content decides which kind of file it is. Python 2's pickles are read too. In dicts, numpy's arrays become
    tensors and its scalars numbers. Raises ValueError if the file is unreadable or damaged, or if it refers to anything
    but tensors, arrays and plain containers.
    """
    name = os.fspath(path)
    try:
        with open(name, "rb") as file:
            return _read(file)
    except OSError as error:
        raise UserError(f"weights {name!r}: cannot be read ({error.strerror or error})") from None
    except UserError as error:
        raise UserError(f"weights {name!r}: {error}") from None


def _read(file: BinaryIO) -> object:
    start = file.read(64)
    file.seek(0)
    if not start:
        raise UserError("an empty file; download or save it again")
    if start.lstrip().startswith((b"<", b"version https://git-lfs")):
        raise UserError("a web page or a Git LFS pointer, not the file itself; download it again")
    try:
        if start.startswith(b"PK\x03\x04"):
            _check_archive(file)
        if start.startswith((b"PK\x03\x04", LEGACY_START)):
            file.seek(0)
            with _only_these_names():
                content = torch.load(file, map_location="cpu", weights_only=True)
        else:
            content = ArrayUnpickler(io.BytesIO(file.read())).load()
        return _plain(content, {})
    except (UserError, OSError, MemoryError):
        raise
    except Exception as error:  # zipfile, torch and pickle raise some twenty kinds for damaged bytes
        raise UserError(_reason(error)) from None


def _check_archive(file: BinaryIO) -> None:
    """Refuse zip archives that `torch.save` does not write, and damaged ones: torch does not look at checksums."""
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        if len({record.filename for record in records}) < len(records):
            raise UserError("a zip archive with two records of one name")
        if any(record.filename.endswith("/constants.pkl") for record in records):
            raise UserError("a TorchScript archive, which holds code; save the module's state_dict() instead")
        if any(r.compress_type != zipfile.ZIP_STORED or r.file_size != r.compress_size for r in records):
            raise UserError("a compressed zip archive; save it again with torch.save, which does not compress")
        if sum(record.file_size for record in records) > os.fstat(file.fileno()).st_size:
            raise UserError("a damaged file: its records are larger than the file")
        if damaged := archive.testzip():
            raise UserError(f"a damaged file: the checksum of {_short(damaged)} is wrong")


def _reason(error: Exception) -> str:
    if found := re.search(r"GLOBAL (\S+) (was not|whose)", str(error)):
        return _would_run(found[1])
    if "Unsupported operand" in str(error):  # as of pickle_protocol=4
        return "PyTorch's safe loader does not know its kind of pickle; save the state_dict() again with torch.save"
    return "a damaged file, or not a PyTorch or pickle file; download it again, or save it with torch.save"


def _would_run(name: str) -> str:
    return f"it would run {_short(name)}: only tensors and plain containers are read; save the state_dict() alone"


def _short(text: str) -> str:
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= 120 else f"{text[:120]}..."


class Dtype:
    """In place of numpy.dtype: plain numbers only."""

    def __init__(self, code: str, align: object = False, copy: object = True):
        if code not in DTYPES:
            raise UserError(f"an array of dtype {_short(str(code))!r}; numpy dtypes {', '.join(DTYPES)} are read")
        self.numpy = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        _, order, subarray, names, fields, *_ = state
        if (subarray, names, fields) != (None, None, None) or order not in ("<", ">", "|", "="):
            raise UserError("an array of records; weights are plain arrays")
        self.numpy = self.numpy.newbyteorder(order)


class Array:
    """In place of numpy.ndarray. Its content comes with its state."""

    value: Tensor | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        self.value = _tensor(data, dtype, shape, "F" if fortran else "C")


def _tensor(data: Any, dtype: Any, shape: tuple[int, ...], order: str) -> Tensor:
    data = data.encode("latin1") if type(data) is str else data  # Python 2 wrote the bytes as a string
    if type(data) not in (bytes, bytearray) or type(dtype) is not Dtype:
        raise UserError("an array whose content is not the bytes of plain numbers")
    if any(length < 0 for length in shape):
        raise UserError(f"an array of shape {_short(str(shape))}")
    array = np.frombuffer(data, dtype.numpy).reshape(shape, order="F" if order == "F" else "C")
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))  # a copy, in this machine's byte order


def _reconstruct(kind: object, shape: object, code: object) -> Array:
    if kind is not Array:
        raise UserError("an array of another type than numpy.ndarray")
    return Array()


def _from_buffer(data: Any, dtype: Any, shape: Any, order: str, axes: tuple[int, ...] | None = None) -> Array:
    array = Array()
    array.value = _tensor(data, dtype, shape, order)
    if axes is not None:
        array.value = array.value.permute(axes)
    return array


def _scalar(dtype: Any, data: Any) -> int | float | bool:
    return _tensor(data, dtype, (), "C").item()


def _latin1(text: str, encoding: str = "latin1") -> bytes:  # protocols 0 to 2 write bytes as encoded text
    if encoding != "latin1":
        raise UserError(f"bytes in the encoding {_short(str(encoding))!r} instead of latin1")
    return text.encode("latin1")


def _plain(value: object, done: dict[int, dict]) -> object:
    """Dicts as plain ones, without attributes that a file gives them; arrays and parameters in them as tensors."""
    if isinstance(value, dict):
        if id(value) not in done:
            plain: dict = {}
            done[id(value)] = plain
            plain.update((key, _plain(item, done)) for key, item in dict.items(value))
        return done[id(value)]
    if isinstance(value, Array):
        return value.value
    return Tensor.detach(value) if isinstance(value, Tensor) else value


DTYPES = ("f2", "f4", "f8", "b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")
NAMES: dict[str, Any] = {
    "collections.OrderedDict": dict,
    "collections.defaultdict": lambda factory=None: {},
    "_codecs.encode": _latin1,
    "numpy.ndarray": Array,
    "numpy.dtype": Dtype,
}
for _core in ("numpy.core", "numpy._core"):  # numpy 1 and 2
    NAMES[f"{_core}.multiarray._reconstruct"] = _reconstruct
    NAMES[f"{_core}.multiarray.scalar"] = _scalar
    NAMES[f"{_core}.numeric._frombuffer"] = _from_buffer
for _module in ("builtins", "__builtin__"):  # Python 3 and 2
    NAMES[f"{_module}.bytes"] = lambda: b""  # protocols 0 to 2 write empty bytes as a call
    NAMES |= {f"{_module}.{kind.__name__}": kind for kind in (dict, list, int, float)}  # what a defaultdict would make
# In checkpoints of PyTorch only, beside what torch.load itself takes.
TORCH_NAMES = {**NAMES, "argparse.Namespace": argparse.Namespace, "torch.torch_version.TorchVersion": str}


_ONE_AT_A_TIME = threading.Lock()  # torch has one list of names for all threads


@contextmanager
def _only_these_names() -> Iterator[None]:
    """Let torch.load take TORCH_NAMES beside its own list, and nothing that this process has added to that."""
    with _ONE_AT_A_TIME:
        others = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals([(value, name) for name, value in TORCH_NAMES.items()])
        try:
            yield
        except Exception:
            forget_sparse_tensors()
            raise
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(others)


_Unpickler: Any = pickle._Unpickler  # in Python; the one in C has no dispatch table


class ArrayUnpickler(_Unpickler):
    """Knows the names in NAMES only, and sets the state of nothing but their instances.

    Python's own implementation, as that in C allocates memory for whatever index a damaged PUT states.
    """

    def __init__(self, file: BinaryIO):
        super().__init__(file, encoding="latin1")  # which numpy asks for of Python 2's pickles

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in NAMES:
            raise UserError(_would_run(f"{module}.{name}"))
        return NAMES[f"{module}.{name}"]

    def load_build(self) -> None:
        target = self.stack[-2]
        if type(target) in (Array, Dtype):
            super().load_build()
        elif type(target) is dict:  # attributes of an OrderedDict
            self.stack.pop()
        else:
            raise UserError(f"it would set attributes of {_short(str(type(target).__name__))}")

    dispatch = {
        **_Unpickler.dispatch,
        pickle.BUILD[0]: load_build,
        pickle.BYTEARRAY8[0]: _Unpickler.load_binbytes8,  # allocates what the file has, not what it states
    }
    for _code in (pickle.EXT1, pickle.EXT2, pickle.EXT4):  # their cache goes round find_class
        del dispatch[_code[0]]
