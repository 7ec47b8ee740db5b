"""Files around the pickles: what PyTorch does not write is refused in a sentence, what it wrote anywhere is read."""

import io
import struct
import tarfile
import zipfile

import pytest
import torch
from pickle_programs import refusal, repacked, saved, storage_of, tensor, text, torch_legacy, torch_zip

from resbackbone.weights.pickles import read_pickle

pytestmark = pytest.mark.filterwarnings("ignore")  # torch and zipfile warn of what is then refused
CHECKPOINT = {"w": torch.arange(9.0)}
MEBIBYTE = 2**20


def zip_of_overlapping_records() -> bytes:
    """Many records that all are the same megabyte of the file."""
    data = bytearray(torch_zip(b"N.", {"0": bytes(MEBIBYTE)}))
    start = data.index(b"PK\x01\x02", data.index(b"archive/data/0") + MEBIBYTE)
    end = data.rindex(b"PK\x05\x06")
    entry = bytes(data[data.rindex(b"PK\x01\x02", start, end) : end])
    copies = b"".join(entry.replace(b"data/0", b"data/%c" % name) for name in b"123456789abcdefghijk")
    tail = bytearray(data[end:])
    tail[8:12] = struct.pack("<HH", 23, 23)
    tail[12:16] = struct.pack("<I", end - start + len(copies))
    return bytes(data[:end]) + copies + bytes(tail)


def with_stated_sizes(data: bytes, compressed: int, uncompressed: int) -> bytes:
    entry = data.rindex(b"PK\x01\x02")
    return data[: entry + 20] + struct.pack("<II", compressed, uncompressed) + data[entry + 28 :]


def with_flag_of_encryption(data: bytes) -> bytes:
    entry = data.index(b"PK\x01\x02")
    return data[: entry + 8] + bytes([data[entry + 8] | 1]) + data[entry + 9 :]


def script() -> bytes:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)
    return file.getvalue()


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    return file.getvalue()


def zip_of(name: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, b"x" * 99)
    return file.getvalue()


def damaged(data: bytes) -> bytes:
    data = bytearray(data)
    data[data.index(CHECKPOINT["w"].numpy().tobytes()) + 5] ^= 1
    return bytes(data)


STORED = torch_zip(b"N.", {"0": bytes(16)})
REFUSED = {
    "compressed": (lambda: repacked(saved(CHECKPOINT), zipfile.ZIP_DEFLATED), "a compressed zip archive"),
    "compressed size": (lambda: with_stated_sizes(STORED, 15, 16), "a compressed zip archive"),
    "uncompressed size": (lambda: with_stated_sizes(STORED, 16, 15), "a compressed zip archive"),
    "huge": (lambda: with_stated_sizes(STORED, 2**31, 2**31), "larger than the file"),
    "overlapping": (zip_of_overlapping_records, "larger than the file"),
    "duplicate": (lambda: repacked(torch_zip(b"N."), **{"archive/data.pkl": b"N."}), "two records of one name"),
    "damaged": (lambda: damaged(saved(CHECKPOINT)), "a damaged file"),
    "encrypted": (lambda: with_flag_of_encryption(STORED), "not a PyTorch or pickle file"),
    "TorchScript": (script, "a TorchScript archive"),
    "a zip of something else": (lambda: repacked(saved(CHECKPOINT)).replace(b"data.pkl", b"data.txt"), "not a PyTorch"),
    "tar": (tar, "not a PyTorch or pickle file"),
    "legacy of two sizes": (
        lambda: torch_legacy(
            b"\x80\x02" + tensor(size=(1,), storage=storage_of()[:-2] + b"NtQ") + b".", ["0"], bytes([5]) + bytes(27)
        ),
        "damaged",
    ),
    "legacy of unknown storages": (lambda: torch_legacy(b"\x80\x02" + text("x") + b".", ["0"]), "damaged"),
    "legacy cut off": (lambda: saved(CHECKPOINT, _use_new_zipfile_serialization=False)[:-1], "damaged"),
    ".npz": (lambda: zip_of("a.npy"), "an archive of numpy's arrays"),
    "a zipped checkpoint": (lambda: zip_of("best.pth"), "a zip archive with best.pth in it; unpack it"),
    "HDF5": (lambda: b"\x89HDF\r\n" + bytes(99), "an HDF5 file"),
    "JPEG": (lambda: b"\xff\xd8\xff\xe0" + bytes(99), "a JPEG image; give a file with weights"),
    "gzip": (lambda: b"\x1f\x8b\x08" + bytes(99), "gzip; unpack it"),
    ".npy": (lambda: b"\x93NUMPY" + bytes(99), "a single array of numpy"),
    "a page of HTML": (lambda: b"\n<!DOCTYPE html><p>404", "a web page"),
    "an LFS pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer, not the file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_torch_does_not_write_is_refused_in_a_sentence(tmp_path, name):
    build, why = REFUSED[name]
    assert why in refusal(tmp_path, build())


def test_an_archive_repacked_without_compression_is_read(tmp_path):
    (tmp_path / "good.pth").write_bytes(repacked(saved(CHECKPOINT)))
    assert torch.equal(read_pickle(tmp_path / "good.pth")["w"], CHECKPOINT["w"])


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_every_pickle_protocol_are_read(tmp_path, protocol, zipped):
    torch.save(CHECKPOINT, tmp_path / "w.pth", pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    assert torch.equal(read_pickle(tmp_path / "w.pth")["w"], CHECKPOINT["w"])


def test_a_file_of_a_big_endian_machine_is_read(tmp_path):
    torch.save(CHECKPOINT, tmp_path / "w.pth")
    with zipfile.ZipFile(tmp_path / "w.pth") as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
        for name, data in records.items():
            data = CHECKPOINT["w"].numpy().astype(">f4").tobytes() if name.endswith("/0") else data
            archive.writestr(name, b"big" if name.endswith("byteorder") else data)
    assert torch.equal(read_pickle(tmp_path / "w.pth")["w"], CHECKPOINT["w"])


def test_a_file_that_is_missing_or_a_folder_is_refused_in_a_sentence(tmp_path):
    for path in (tmp_path, tmp_path / "none.pth"):
        with pytest.raises(ValueError, match="cannot be read"):
            read_pickle(path)
