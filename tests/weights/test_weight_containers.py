"""Zip, tar and legacy files that PyTorch does not write, or not so, are refused in a sentence."""

import io
import struct
import tarfile
import zipfile

import pytest
import torch
from pickle_programs import inner, refusal, repacked, saved, storage_of, tensor, torch_legacy, torch_zip

from resbackbone.weights.pickles import read_pickle

CHECKPOINT = {"w": torch.arange(9.0)}


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zip_archives_that_torch_does_not_write_are_refused(tmp_path):
    good = saved(CHECKPOINT)
    (tmp_path / "good.pth").write_bytes(repacked(good))
    assert torch.equal(read_pickle(tmp_path / "good.pth")["w"], CHECKPOINT["w"])
    root = zipfile.ZipFile(io.BytesIO(good)).namelist()[0].split("/")[0]
    assert "compressed" in refusal(tmp_path, repacked(good, zipfile.ZIP_DEFLATED))
    assert "two records" in refusal(tmp_path, repacked(good, **{f"{root}/data.pkl": b"N."}))
    assert "not of torch.save" in refusal(tmp_path, repacked(good, **{"../escape": b"x"}))
    assert "not of torch.save" in refusal(tmp_path, repacked(good, **{"/etc/passwd": b"x"}))
    assert "TorchScript" in refusal(tmp_path, repacked(good, **{f"{root}/code/__torch__.py": b"x"}))
    assert "byte order big" in refusal(tmp_path, torch_zip(b"N.", byteorder=b"big")).replace("b'big'", "big")
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("weights/a.npy", b"x")
    assert "not of torch.save" in refusal(tmp_path, file.getvalue())
    encrypted = bytearray(torch_zip(b"N."))
    encrypted[encrypted.index(b"PK\x01\x02") + 8] |= 1
    assert "an encrypted zip archive" in refusal(tmp_path, bytes(encrypted))
    damaged = bytearray(good)
    damaged[good.index(CHECKPOINT["w"].numpy().tobytes()) + 5] ^= 1
    assert "CRC" in refusal(tmp_path, bytes(damaged))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchscript_and_tar_archives_are_refused_in_a_sentence(tmp_path):
    script = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), script)
    assert "TorchScript" in refusal(tmp_path, script.getvalue())
    old = io.BytesIO()
    with tarfile.open(fileobj=old, mode="w:") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    assert "tar archive" in refusal(tmp_path, old.getvalue())


def legacy_tensor(key: str = "0", count: int = 4, kind: str = "Float", view: object = None) -> bytes:
    return tensor(size=(1,), storage=storage_of(key, inner(count), kind)[:-2] + inner(view) + b"tQ")


FOUR = (4).to_bytes(8, "little") + bytes(16)


@pytest.mark.parametrize(
    ("tensors", "keys", "storages", "why"),
    [
        (legacy_tensor() + legacy_tensor(count=5), ["0"], FOUR, "of two sizes"),
        (legacy_tensor() + legacy_tensor(kind="Int"), ["0"], FOUR, "torch.float32 and as torch.int32"),
        (legacy_tensor(view=("v", 3, 2)), ["0"], FOUR, "beyond the one it is part of"),
        (legacy_tensor(view=("v", 0, 5)), ["0"], FOUR, "beyond the one it is part of"),
        (tensor(size=(3,), storage=storage_of()[:-2] + inner(("v", 0, 2)) + b"tQ"), ["0"], FOUR, "its 2 numbers"),
        (legacy_tensor(view=("v", -1, 2)), ["0"], FOUR, "whole numbers"),
        (legacy_tensor(view=("v", 1)), ["0"], FOUR, "damaged"),
        (legacy_tensor(), [], b"", "not that of its tensors"),
        (legacy_tensor(), ["0", "1"], FOUR * 2, "not that of its tensors"),
        (legacy_tensor(), ["0", "0"], FOUR * 2, "not that of its tensors"),
        (legacy_tensor(), [("0",)], FOUR, "key or set member of type tuple"),
        (legacy_tensor(), ["0"], (3).to_bytes(8, "little") + bytes(16), "not of the size"),
        (legacy_tensor(), ["0"], FOUR[:-1], "15 are left"),
    ],
)
def test_a_legacy_file_whose_storages_disagree_is_refused(tmp_path, tensors, keys, storages, why):
    good = torch_legacy(b"\x80\x02(" + legacy_tensor() + legacy_tensor(view=("v", 1, 3)) + b"l.", ["0"], FOUR)
    (tmp_path / "good.pth").write_bytes(good)
    assert all(torch.equal(got, torch.zeros(1)) for got in read_pickle(tmp_path / "good.pth"))
    assert why in refusal(tmp_path, torch_legacy(b"\x80\x02(" + tensors + b"l.", keys, storages))


def test_legacy_files_of_other_versions_and_byte_orders_are_refused(tmp_path):
    good = torch_legacy(b"N.")
    assert "unknown version" in refusal(tmp_path, good.replace(inner(1001), inner(1002)))
    for machine in ({"little_endian": False}, {}, []):
        assert "byte order" in refusal(tmp_path, good.replace(inner({"little_endian": True}), inner(machine)))


def test_zip_records_of_sizes_that_disagree_are_refused(tmp_path):
    data = torch_zip(b"N.", {"0": bytes(16)})
    entry = data.rindex(b"PK\x01\x02")
    for stated in (struct.pack("<II", 15, 16), struct.pack("<II", 16, 15)):
        assert "compressed" in refusal(tmp_path, data[: entry + 20] + stated + data[entry + 28 :])
    size = struct.pack("<I", len(data) + 1)
    assert "larger than the file" in refusal(tmp_path, data[: entry + 20] + 2 * size + data[entry + 28 :])


def test_a_record_is_read_whole_in_as_many_parts_as_it_has(tmp_path, monkeypatch):
    monkeypatch.setattr("resbackbone.weights.pickles.ZIP_PART", 5000)
    weights = {"w": torch.arange(7001), "empty": torch.empty(0), "exact": torch.ones(1250)}
    torch.save(weights, tmp_path / "w.pth")
    got = read_pickle(tmp_path / "w.pth")
    assert all(torch.equal(got[name], weights[name]) for name in weights)


def test_a_file_that_is_missing_or_a_folder_is_refused_in_a_sentence(tmp_path):
    for path in (tmp_path, tmp_path / "none.pth"):
        with pytest.raises(ValueError, match="cannot be read"):
            read_pickle(path)
