"""Builders of weight files out of pickle instructions, for tests of what must not be read."""

import io
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch

from resbackbone.weights.pickles import read_pickle


def saved(value, **options) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def torch_zip(program: bytes, storages: dict[str, bytes] | None = None, **records: bytes) -> bytes:
    """A file as torch.save writes it, with any program as its data.pkl."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/version", "3\n")
        for name, data in {**{f"data/{key}": data for key, data in (storages or {}).items()}, **records}.items():
            archive.writestr(f"archive/{name}", data)
    return file.getvalue()


def torch_legacy(program: bytes, keys: list | None = None, storages: bytes = b"") -> bytes:
    """A file as torch < 1.6 wrote it. `storages`: of each key the number of elements in 8 bytes, and the elements."""
    head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    return b"".join(pickle.dumps(part, 2) for part in head) + program + pickle.dumps(keys or [], 2) + storages


CONTAINERS = {"pickle": bytes, "zip": torch_zip, "legacy": torch_legacy}


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def inner(value) -> bytes:
    """The instructions that push `value`."""
    return pickle.dumps(value, 2)[2:-1]


def refusal(folder: Path, data: bytes) -> str:
    (folder / "hostile.pth").write_bytes(data)
    with pytest.raises(ValueError) as caught:
        read_pickle(folder / "hostile.pth")
    message = str(caught.value)
    assert message.startswith(f"weights {str(folder / 'hostile.pth')!r}: ") and "\n" not in message
    assert len(message) < 400 + len(str(folder))
    return message


def repacked(data: bytes, compression: int = zipfile.ZIP_STORED, **more: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
        for name, content in more.items():
            new.writestr(name, content)
    return file.getvalue()


ORDERED_DICT = b"ccollections\nOrderedDict\n"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def storage_of(key: str = "0", count: bytes = b"K\x04", kind: str = "Float") -> bytes:
    return b"(" + text("storage") + f"ctorch\n{kind}Storage\n".encode() + text(key) + text("cpu") + count + b"tQ"


def tensor(offset=0, size=(4,), stride=(1,), storage: bytes = storage_of()) -> bytes:
    return REBUILD + b"(" + storage + inner(offset) + inner(size) + inner(stride) + b"\x89" + ORDERED_DICT + b")RtR"


ARRAY_OF = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
DTYPE = (
    b"cnumpy\ndtype\n"
    + text("%s")
    + b"\x89\x88\x87R(K\x03"
    + text("<")
    + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
)


def dtype(code: str) -> bytes:
    return DTYPE.replace(text("%s"), text(code))


def array(shape=(2,), code="f4", data=b"\0" * 8) -> bytes:
    return ARRAY_OF + b"(K\x01" + inner(shape) + dtype(code) + b"\x89B" + struct.pack("<I", len(data)) + data + b"tb"
