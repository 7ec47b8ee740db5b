"""PyTorch and pickle files, read without letting them run code: their three containers, and the door to them.

A pickle in a container is a program, which `unpickle` runs on a machine that knows only what weights need. What it
says of tensors are descriptions (`admitted`); `rebuild` makes tensors of them once they are known to fit the file.
"""

import io
import os
import struct
import sys
import zipfile
from typing import Any, BinaryIO

import torch
from torch import Tensor

from resbackbone.checks import UserError
from resbackbone.weights.admitted import Refused, Storage, bytes_tensor, checked_key, lengths, shown
from resbackbone.weights.rebuild import Plain
from resbackbone.weights.unpickle import Machine, Source

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # torch.serialization: what torch < 1.6 wrote first
LEGACY_PROTOCOL = 1001

ZIP_PART = 8 * 2**20  # bytes read of a zip archive at once, its directory among them: that of 100,000 records

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
        raise UserError(f"weights {name!r}: cannot be read ({error.strerror})") from None
    except Refused as error:
        raise UserError(f"weights {name!r}: {error}") from None
    except DAMAGED as error:
        reason = shown(f"{type(error).__name__}: {error}")
        raise UserError(f"weights {name!r}: a damaged file, or not a PyTorch or pickle file ({reason})") from None


def _read(file: BinaryIO, size: int) -> object:
    if not size:
        raise Refused("an empty file")
    start = file.read(262)
    file.seek(0)
    if start.startswith(b"PK\x03\x04"):
        return _read_zip(file, size)
    if start[257:] == b"ustar":
        raise Refused("a tar archive, as the first PyTorch wrote; load it with that and save it with a newer one")
    source = Source(file, size)
    value = Machine(source).run()
    if type(value) is int and value == LEGACY_MAGIC:
        return _read_legacy(source)
    return Plain(size).convert(value)


def _read_zip(file: BinaryIO, size: int) -> object:
    """What torch >= 1.6 writes: under one root, data.pkl, and data/KEY for every storage that it refers to."""
    with zipfile.ZipFile(_InParts(file)) as archive:
        records = {info.filename: info for info in archive.infolist()}
        if len(records) != len(archive.infolist()):
            raise Refused("a zip archive with two records of one name")
        root = next(iter(records), "").partition("/")[0]
        if f"{root}/constants.pkl" in records or any(name.startswith(f"{root}/code/") for name in records):
            raise Refused("a TorchScript archive, which holds code; save the module's state_dict() instead")
        if any(info.flag_bits & 1 for info in records.values()):
            raise Refused("an encrypted zip archive")
        stored = all(info.compress_type == zipfile.ZIP_STORED for info in records.values())
        if not stored or any(info.file_size != info.compress_size for info in records.values()):
            raise Refused("a compressed zip archive, and PyTorch writes no such files")
        if sum(info.file_size for info in records.values()) > size:
            raise Refused("a zip archive whose records are larger than the file")
        if not all(name.startswith(f"{root}/") for name in records) or f"{root}/data.pkl" not in records:
            raise Refused("a zip archive, but not of torch.save (one folder with data.pkl in it)")
        if f"{root}/byteorder" in records:
            order = bytes(_read_record(archive, records[f"{root}/byteorder"]))
            if order != sys.byteorder.encode():
                raise Refused(f"of byte order {shown(order)}, and this machine's is {sys.byteorder}")

        def storage(key: Any, dtype: torch.dtype, count: int) -> Storage:
            if type(key) is not str or f"{root}/data/{key}" not in records:
                raise Refused(f"tensor data {shown(key)!r} is missing")
            nbytes = records[f"{root}/data/{key}"].file_size
            if count * dtype.itemsize != nbytes:
                raise Refused(f"tensor data {shown(key)!r} should be {count} x {dtype}, and has {nbytes} bytes")
            return Storage(key, dtype, 0, nbytes)

        def load(key: str) -> Tensor:
            return bytes_tensor(_read_record(archive, records[f"{root}/data/{key}"]))

        program = _read_record(archive, records[f"{root}/data.pkl"])
        value = Machine(Source(io.BytesIO(program), len(program)), storage).run()
        return Plain(size, load).convert(value)


class _InParts:
    """A file for zipfile, which reads a whole directory at once and makes some 15 times as much of it: not of any size.

    What a directory says of its size is for zipfile to find and understand; here is only what it then asks for.
    """

    def __init__(self, file: BinaryIO):
        self.file, self.seek, self.tell, self.seekable = file, file.seek, file.tell, file.seekable

    def read(self, count: int = -1) -> bytes:  # to the end: the last 64 KiB, where the directory's place is written
        if count > ZIP_PART:
            raise Refused(f"a zip archive with a directory of {count} bytes; up to {ZIP_PART} are read")
        return self.file.read(count)


def _read_record(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> bytearray:
    data = bytearray(record.file_size)
    with archive.open(record) as file, memoryview(data) as view:
        for start in range(0, len(data), ZIP_PART):
            file.readinto(view[start : start + ZIP_PART])  # type: ignore[attr-defined]  # whole: zipfile raises at the end of the file
    return data


def _read_legacy(source: "Source") -> object:
    """What torch < 1.6 writes after its magic number: version, machine, content, storage keys, storages."""
    if Machine(source).run() != LEGACY_PROTOCOL:
        raise Refused("of an unknown version of PyTorch's old format")
    machine = Machine(source).run()
    if type(machine) is not dict or machine.get("little_endian") is not (sys.byteorder == "little"):
        raise Refused("written on a machine of another byte order")
    announced: dict[object, Storage] = {}

    def storage(key: Any, dtype: torch.dtype, count: int, view: Any = None) -> Storage:
        whole = Storage(key, dtype, 0, count * dtype.itemsize)
        known = announced.setdefault(checked_key(key), whole)
        if (known.dtype, known.nbytes) != (dtype, whole.nbytes):
            raise Refused(f"tensor data {shown(key)!r} is used as {known.dtype} and as {dtype}, or of two sizes")
        if view is None:
            return whole
        _, *part = view  # of a storage, as the first versions could share it
        start, length = lengths(part, "place in a storage")
        if start + length > count:
            raise Refused("a storage reaches beyond the one it is part of")
        return Storage(key, dtype, start * dtype.itemsize, length * dtype.itemsize)

    value = Machine(source, storage).run()
    keys = Machine(source).run()
    if type(keys) is not list or len({checked_key(key) for key in keys}) != len(keys) or set(keys) != set(announced):
        raise Refused("the list of its tensor data is not that of its tensors")
    loaded = {}
    for key in keys:
        dtype, nbytes = announced[key].dtype, announced[key].nbytes
        if int.from_bytes(source.read(8), sys.byteorder) * dtype.itemsize != nbytes:
            raise Refused(f"tensor data {shown(key)!r} is not of the size that its tensors state")
        loaded[key] = bytes_tensor(bytearray(source.read(nbytes)))
    return Plain(source.size, loaded.__getitem__).convert(value)
