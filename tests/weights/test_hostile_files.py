"""No weight file runs code, takes memory out of proportion, or ends in anything but a value or a ValueError."""

import io
import os
import pickle
import pickletools
import random
import struct
import subprocess
import sys
import tarfile
import zipfile
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resbackbone.weights.pickles import read_pickle

ROOT = Path(__file__).parents[2]
MEBIBYTE = 2**20
PLAIN = (type(None), bool, int, float, str, bytes, bytearray, torch.Tensor, torch.dtype, torch.device)


def saved(value, **options) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def torch_zip(program: bytes, storages: dict[str, bytes] | None = None, **records: bytes) -> bytes:
    """A file as torch.save writes it, with any program as its data.pkl."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        for name, data in {**{f"data/{key}": data for key, data in (storages or {}).items()}, **records}.items():
            archive.writestr(f"archive/{name}", data)
    return file.getvalue()


def torch_legacy(program: bytes) -> bytes:
    head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    return b"".join(pickle.dumps(part, 2) for part in head) + program + pickle.dumps([], 2)


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


# Names that would run something

CANARY = "canary_was_run"
COMMAND = f"touch {CANARY}"
CODE = f"open({CANARY!r}, 'w').close()"
CALLS = [
    ("os", "system", (COMMAND,)),
    ("posix", "system", (COMMAND,)),
    ("nt", "system", (COMMAND,)),
    ("os", "popen", (COMMAND,)),
    ("os", "execvp", ("touch", ["touch", CANARY])),
    ("subprocess", "Popen", (["touch", CANARY],)),
    ("subprocess", "check_output", (["touch", CANARY],)),
    ("pty", "spawn", (["touch", CANARY],)),
    ("builtins", "eval", (CODE,)),
    ("__builtin__", "eval", (CODE,)),
    ("builtins", "exec", (CODE,)),
    ("builtins", "compile", (CODE, "", "exec")),
    ("builtins", "open", (CANARY, "w")),
    ("builtins", "__import__", ("antigravity",)),
    ("builtins", "getattr", ("text", "join")),
    ("builtins", "map", (1, 2)),
    ("builtins", "type", ("T", (), {})),
    ("builtins", "object", ()),
    ("io", "FileIO", (CANARY, "w")),
    ("_io", "open", (CANARY, "w")),
    ("pickle", "loads", (pickle.dumps(1),)),
    ("_pickle", "loads", (pickle.dumps(1),)),
    ("marshal", "loads", (b"N",)),
    ("torch", "load", ("other.pth",)),
    ("torch.serialization", "load", ("other.pth",)),
    ("torch.storage", "_load_from_bytes", (b"",)),
    ("torch.hub", "load", ("owner/repo", "model")),
    ("torch.jit", "load", ("other.pt",)),
    ("torch.jit.unsupported_tensor_ops", "execWrapper", (CODE, {}, {})),
    ("torch._utils", "_import_dotted_name", ("os.system",)),
    ("torch._utils", "_rebuild_sparse_tensor", (1, 2)),
    ("torch._utils", "_rebuild_qtensor", (1, 2)),
    ("torch._utils", "_rebuild_wrapper_subclass", (1, 2)),
    ("torch.utils.collect_env", "run", (COMMAND,)),
    ("torch.nn.modules.linear", "Linear", (2, 2)),
    ("torch", "zeros", (2**40,)),
    ("torch", "empty", (2**40,)),
    ("numpy", "load", ("other.npy", "r", True)),
    ("numpy", "fromfile", ("/etc/passwd",)),
    ("numpy", "zeros", (2**40,)),
    ("numpy.testing._private.utils", "runstring", (CODE, {})),
    ("numpy.f2py.crackfortran", "getlincoef", (CODE, {})),
    ("functools", "partial", (1,)),
    ("functools", "reduce", (1, 2)),
    ("operator", "attrgetter", ("system",)),
    ("operator", "methodcaller", ("system", COMMAND)),
    ("runpy", "run_path", ("other.py",)),
    ("runpy", "_run_code", (CODE, {})),
    ("code", "interact", ()),
    ("timeit", "timeit", (CODE,)),
    ("cProfile", "run", (CODE,)),
    ("importlib", "import_module", ("antigravity",)),
    ("types", "FunctionType", (1, {})),
    ("types", "CodeType", (1,)),
    ("ctypes", "CDLL", ("libc.so.6",)),
    ("codecs", "decode", (b"x", "zip")),
    ("copyreg", "_reconstructor", (1, 2, None)),
    ("copyreg", "__newobj__", (1,)),
    ("shutil", "rmtree", ("/nonexistent",)),
    ("webbrowser", "open", ("file:///",)),
    ("pip", "main", (["--version"],)),
    ("site", "main", ()),
    ("pathlib", "Path", ("x",)),
    ("logging.config", "fileConfig", ("x",)),
    ("resbackbone.weights.pickles", "read_pickle", ("x",)),
    ("tests.conftest", "pytest", ()),
]


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize(("module", "name", "arguments"), CALLS, ids=[f"{module}.{name}" for module, name, _ in CALLS])
def test_a_file_that_would_call_something_is_refused_by_its_name(
    tmp_path, monkeypatch, container, module, name, arguments
):
    monkeypatch.chdir(tmp_path)
    by_line = f"c{module}\n{name}\n".encode()
    by_stack = text(module) + text(name) + b"\x93"
    programs = [
        b"\x80\x02" + by_line + inner(arguments) + b"R.",  # protocol 2 REDUCE
        b"\x80\x02}" + text("w") + by_line + inner(arguments) + b"\x81s.",  # NEWOBJ, as a dict's value
        b"\x80\x04" + by_stack + inner(arguments) + b"R.",  # protocol 4
        b"\x80\x04" + by_stack + inner(arguments) + b"}\x92.",  # NEWOBJ_EX
        b"\x80\x02" + by_line + b"0K\x01.",  # named, not called
        b"ccollections\nOrderedDict\n)R}" + text("hook") + by_line + inner(arguments) + b"Rsb.",  # in what BUILD drops
    ]
    for program in programs:
        assert f"would run {module}.{name}," in refusal(tmp_path, CONTAINERS[container](program))
    assert not (tmp_path / CANARY).exists()


def test_the_canary_sings_for_a_reader_that_does_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(b"\x80\x02cposix\nsystem\n" + inner((COMMAND,)) + b"R.")  # noqa: S301 - what the others must not do
    assert (tmp_path / CANARY).exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "path.join"),
        ("torch", "serialization.os.system"),
        ("torch._utils", "_rebuild_tensor.__globals__"),
        ("torch._utils", "_rebuild_tensor_v2.__class__"),
        ("collections", "OrderedDict.__init__.__globals__"),
        ("numpy.core.multiarray", "_reconstruct.__self__"),
        ("resbackbone.weights.pickles", "os.system"),
        ("collections", "OrderedDict\n"),
        ("", "eval"),
        ("builtins", ""),
        ("__main__", "__builtins__"),
    ],
)
def test_a_dotted_or_odd_name_reaches_nothing(tmp_path, module, name):
    assert "would run" in refusal(tmp_path, b"\x80\x04" + text(module) + text(name) + b"\x93.")


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


def test_the_builders_of_this_file_build_what_is_read(tmp_path):
    (tmp_path / "t.pth").write_bytes(torch_zip(b"\x80\x02" + tensor() + b".", {"0": b"\0" * 16}))
    (tmp_path / "a.pkl").write_bytes(b"\x80\x03" + array() + b".")
    assert torch.equal(read_pickle(tmp_path / "t.pth"), torch.zeros(4))
    assert torch.equal(read_pickle(tmp_path / "a.pkl"), torch.zeros(2))


@pytest.mark.parametrize(
    ("tensor_program", "why"),
    [
        (tensor(size=(2**40,)), "reaches beyond"),
        (tensor(size=(2**40, 2**40), stride=(0, 0)), f"tensor of size [{2**40}"),
        (tensor(size=(2**62, 0), stride=(0, 0)), f"tensor of size [{2**62}"),
        (tensor(size=(2**70,)), "whole numbers"),
        (tensor(size=(-4,)), "whole numbers"),
        (tensor(size=(2.0,)), "whole numbers"),
        (tensor(size=(True,)), "whole numbers"),
        (tensor(size="4"), "whole numbers"),
        (tensor(size=(2**30,), stride=(0,)), "repeats"),
        (tensor(size=(5,), stride=(0,)), "repeats"),
        (tensor(stride=(2,)), "reaches beyond"),
        (tensor(stride=(2**60,)), "reaches beyond"),
        (tensor(stride=(-1,)), "whole numbers"),
        (tensor(stride=(1, 1)), "2 strides"),
        (tensor(offset=1), "reaches beyond"),
        (tensor(offset=-1), "whole numbers"),
        (tensor(offset=2**62, size=(0,)), "reaches beyond"),
        (tensor(size=(1,) * 9, stride=(1,) * 9), "9 dimensions"),
        (tensor(storage=b"K\x01"), "instead of a storage"),
        (tensor(storage=storage_of(key="1")), "missing"),
        (tensor(storage=storage_of(key="../data.pkl")), "missing"),
        (tensor(storage=storage_of(count=b"K\x05")), "16 bytes"),
        (tensor(storage=storage_of(count=b"J\xff\xff\xff\xff")), "whole numbers"),
        (tensor(storage=storage_of(kind="Double")), "16 bytes"),
        (storage_of(), "Storage"),
        (b"(" + text("module") + b"NNNNtQ", "outside"),
        (text("0") + b"Q", "outside"),
        (REBUILD + b")R", "damaged"),
        (REBUILD + b"NR", "calls"),
        (REBUILD, "a value of type torch._utils._rebuild_tensor_v2"),
        (b"ctorch._utils\n_rebuild_parameter\n(K\x01\x88NtR", "parameter"),
        (b"ctorch._tensor\n_rebuild_from_type_v2\n(" + ORDERED_DICT + b"ctorch\nTensor\n)NtR", "made by"),
    ],
)
def test_a_tensor_that_does_not_fit_its_storage_is_refused(tmp_path, tensor_program, why):
    assert why in refusal(tmp_path, torch_zip(b"\x80\x02" + tensor_program + b".", {"0": b"\0" * 16}))


@pytest.mark.parametrize(
    ("program", "why"),
    [
        (array(shape=(3,)), "with 8 bytes"),
        (array(shape=(2**40,)), "with 8 bytes"),
        (array(shape=(-2,)), "whole numbers"),
        (array(shape=(1,) * 9), "9 dimensions"),
        (array(code="O8"), "'O8'"),
        (array(code="V8"), "'V8'"),
        (array(code="f16"), "'f16'"),
        (array(code="U2"), "'U2'"),
        (array(code="M8"), "'M8'"),
        (ARRAY_OF, "without content"),
        (b"cnumpy.core.multiarray\n_reconstruct\n" + ORDERED_DICT + b"K\x00\x85C\x01b\x87R", "not numpy.ndarray"),
        (b"cnumpy.core.multiarray\nscalar\n" + dtype("f4") + b"C\x02ab\x86R", "with 2 bytes"),
        (b"cnumpy.core.numeric\n_frombuffer\n(C\x04abcd" + dtype("f4") + inner((-1,)) + text("C") + b"tR", "whole"),
        (b"c_codecs\nencode\n" + text("x") + text("zip") + b"\x86R", "latin1"),
        (b"cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x01\x85R", "latin1"),
    ],
)  # fmt: skip
def test_an_array_that_is_not_plain_numbers_is_refused(tmp_path, program, why):
    assert why in refusal(tmp_path, b"\x80\x03" + program + b".")


@pytest.mark.parametrize(
    ("program", "why"),
    [
        (ORDERED_DICT + b"}" + text("__class__") + b"K\x01sb.", "set attributes of collections.OrderedDict"),
        (REBUILD + b"}" + text("__globals__") + b"}sb.", "set attributes of torch._utils._rebuild_tensor_v2"),
        (b"ctorch\nfloat32\n}b.", "set attributes of dtype"),
        (b"]}b.", "set attributes of list"),
        (b"ctorch\nfloat32\n)R.", "would call dtype"),
        (b"]" + b")R.", "would call list"),
        (text("os.system") + b")R.", "would call str"),
        (b"cnumpy\nndarray\n)R.", "would call numpy.ndarray"),
        (b"cnumpy\nndarray\n)\x81.", "would call numpy.ndarray"),
        (b"(ios\nsystem\n.", "INST"),
        (b"(" + ORDERED_DICT + b"o.", "OBJ"),
        (b"\x82\x01.", "EXT1"),
        (b"\x83\x01\x00.", "EXT2"),
        (b"\x84\x01\x00\x00\x00.", "EXT4"),
        (b"\x97.", "NEXT_BUFFER"),
        (b"Pname\n.", "PERSID"),
        (b"K\x01Q.", "outside"),
        (b"]K\x01K\x02s.", "fills list"),
        (b"}K\x01a.", "fills dict"),
        (b"cargparse\nNamespace\n)\x81K\x01a.", "fills Namespace"),
        (b"K\x01K\x02\x93.", "no string"),
        (b"}](K\x01K\x02es.", "damaged"),
        (b"}" + text("a") + b"K\x01s" + text("a") + b"K\x02s.", "'a' is there twice"),
        (b"}(" + (text("a") + b"K\x01") * 2 + b"u.", "'a' is there twice"),
        (b"(" + (text("a") + b"K\x01") * 2 + b"d.", "'a' is there twice"),
        (ORDERED_DICT + b")R(" + (text("a") + b"K\x01") * 2 + b"u.", "'a' is there twice"),
        (ORDERED_DICT + b"](" + (b"](" + text("a") + b"K\x01e") * 2 + b"e\x85R.", "'a' is there twice"),
        (b"}K\x01K\x01s\x88K\x02s.", "'True' is there twice"),
        (b"}" + text("k" * 1025) + b"K\x01s.", "1025 characters"),
        (b"}]K\x01s.", "key or set member of type list"),
        (b"})K\x01s.", "key or set member of type tuple"),
        (b"\x8f(]\x90.", "key or set member of type list"),
        (b"}(K\x01u.", "damaged"),
        (b"K\x01", "cut off"),
        (b".", "damaged"),
        (b"h\x05.", "damaged"),
        (b"t.", "damaged"),
        (b"", "empty file"),
        (b"<!DOCTYPE html>", "no instruction"),
        (b"version https://git-lfs.github.com/spec/v1\n", "no instruction"),
        (b"I" + b"9" * 5000 + b"\n.", "damaged"),
        (b"\x8b\x00\x10\x00\x00" + b"\x7f" * 4096 + b".", "LONG4"),
    ],
)
def test_a_program_that_no_weights_need_is_refused(tmp_path, program, why):
    assert why in refusal(tmp_path, program)


def test_what_a_message_quotes_from_a_file_is_short_and_on_one_line(tmp_path):
    message = refusal(tmp_path, b"\x80\x04" + text("line\nbreak\x1b[2J" * 10**5) + text("x") + b"\x93.")
    assert "\\n" in message and "\x1b" not in message


# Zip archives


def repacked(data: bytes, compression: int = zipfile.ZIP_STORED, **more: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
        for name, content in more.items():
            new.writestr(name, content)
    return file.getvalue()


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
    assert "encrypted" in refusal(tmp_path, bytes(encrypted))
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


def test_a_file_that_is_missing_or_a_folder_is_refused_in_a_sentence(tmp_path):
    for path in (tmp_path, tmp_path / "none.pth"):
        with pytest.raises(ValueError, match="cannot be read"):
            read_pickle(path)


# Sizes


def zip_of_overlapping_records() -> bytes:
    """Many records that all are the same megabyte of the file."""
    data = bytearray(torch_zip(b"N.", {"0": bytes(MEBIBYTE)}))
    start = data.index(b"PK\x01\x02", data.index(b"archive/data/0") + MEBIBYTE)
    end = data.rindex(b"PK\x05\x06")
    entry = bytes(data[data.rindex(b"PK\x01\x02", start, end) : end])
    copies = b"".join(entry.replace(b"data/0", b"data/%c" % name) for name in b"123456789abcdefghijk")
    total = end - start + len(copies)
    tail = bytearray(data[end:])
    tail[8:12] = struct.pack("<HH", 22, 22)
    tail[12:16] = struct.pack("<I", total)
    return bytes(data[:end]) + copies + bytes(tail)


def zip_with_a_huge_stated_size() -> bytes:
    data = bytearray(torch_zip(b"N.", {"0": b"\0" * 16}))
    entry = data.rindex(b"PK\x01\x02")
    data[entry + 20 : entry + 28] = struct.pack("<II", 2**31, 2**31)
    return bytes(data)


def laughs(opening: bytes, closing: bytes, times: int = 40) -> bytes:
    """Ten times what was before, again and again."""
    program = b"\x80\x02" + opening + closing + b"q\x00"
    for _ in range(times):
        program += opening + b"h\x00" * 10 + closing + b"q\x00"
    return program + b"."


MEGABYTE_OF = {"bytes": b"B\x00\x00\x10\x00" + bytes(MEBIBYTE), "text": b"X\x00\x00\x10\x00" + b"a" * MEBIBYTE}
BOMBS = {
    "bytearray8": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.",
    "binbytes8": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.",
    "binunicode8": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x.",
    "more than a pointer": b"\x80\x04\x8e" + struct.pack("<Q", 2**64 - 1) + b"x.",
    "binbytes": b"\x80\x03B\xff\xff\xff\xffx.",
    "negative binstring": b"\x80\x02T\xff\xff\xff\xffx.",
    "long4": b"\x80\x02\x8b\xff\xff\xff\x7fx.",
    "frame": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"]h\x00.",
    "memo index": b"\x80\x02]r\xff\xff\xff\x7fj\xff\xff\xff\x7e.",
    "memo index in decimal": b"]p" + b"9" * 4000 + b"\ng1\n.",
    "laughing lists": laughs(b"(", b"l"),
    "laughing tuples": laughs(b"(", b"t"),
    "laughing dicts": laughs(b"(", b"d").replace(b"h\x00" * 10, b"".join(b"K%ch\x00" % i for i in range(10))),
    "laughing keys": laughs(b"(", b"t").replace(b"q\x00.", b"}h\x00Ns."),
    "laughing storage key": torch_zip(
        laughs(b"(", b"t")[:-1] + b"(" + text("storage") + b"ctorch\nFloatStorage\nh\x00" + text("cpu") + b"K\x01tQ."
    ),
    "laughing encoding": laughs(b"(", b"t")[:-1] + b"c_codecs\nencode\n" + text("x") + b"h\x00\x86R.",
    "laughing dtype": laughs(b"(", b"t")[:-1] + b"cnumpy\ndtype\nh\x00\x85R.",
    "deep lists": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "deep tuples": b"\x80\x02)" + b"\x85" * 100_000 + b".",
    "deep tuples as a key": b"\x80\x02})" + b"\x85" * 100_000 + b"Ns.",
    "deep marks": b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".",
    "list within itself": b"\x80\x02]q\x00h\x00a.",
    "dict within itself": b"\x80\x02}q\x00K\x01h\x00s.",
    "too many containers": b"\x80\x02(" + b"\x8f" * (2 * MEBIBYTE) + b"t.",
    "one array's bytes for many": b"\x80\x03("
    + MEGABYTE_OF["bytes"]
    + b"q\x00"
    + dtype("u1")
    + b"q\x01"
    + (ARRAY_OF + b"(K\x01J\x00\x00\x10\x00\x85h\x01\x89h\x00tb") * 1000
    + b"t.",
    "one text encoded often": b"\x80\x02("
    + MEGABYTE_OF["text"]
    + b"q\x00"
    + (b"c_codecs\nencode\nh\x00\x85R") * 1000
    + b"t.",
    "one dict copied often": b"\x80\x02(("
    + b"".join(b"M%sN" % struct.pack("<H", i) for i in range(60_000))
    + b"dq\x00"
    + (b"ccollections\nCounter\nh\x00\x85R") * 3000
    + b"t.",
    "one tensor many times": torch_zip(
        b"\x80\x02("
        + tensor(size=(MEBIBYTE,), storage=storage_of(count=b"J\x00\x00\x10\x00"))
        + b"q\x00"
        + b"h\x00" * 9000
        + b"t.",
        {"0": bytes(4 * MEBIBYTE)},
    ),
    "many tensors of one storage": torch_zip(
        b"\x80\x02("
        + tensor(size=(MEBIBYTE,), storage=storage_of(count=b"J\x00\x00\x10\x00") + b"q\xfe")
        + tensor(size=(MEBIBYTE,), storage=b"h\xfe") * 200
        + b"t.",
        {"0": bytes(4 * MEBIBYTE)},
    ),
    "compressed zip": repacked(torch_zip(b"N.", {"0": bytes(8 * MEBIBYTE)}), zipfile.ZIP_DEFLATED),
    "overlapping zip": zip_of_overlapping_records(),
    "zip of huge stated size": zip_with_a_huge_stated_size(),
    "legacy storage count": torch_legacy(
        b"\x80\x02" + tensor(size=(1,), storage=storage_of(count=inner(2**40 - 1))[:-2] + b"NtQ") + b"."
    )[: -len(pickle.dumps([], 2))]
    + pickle.dumps(["0"], 2)
    + struct.pack("<Q", 2**40 - 1),
}  # fmt: skip

READ_IN_LITTLE_MEMORY = """
import resource, sys, time
from pathlib import Path
from resbackbone.weights.pickles import read_pickle
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
limit = used + int(sys.argv[1]) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in sys.argv[2:]:
    start = time.process_time()
    try:
        outcome = "value of " + type(read_pickle(path)).__name__
    except ValueError as error:
        outcome = str(error)
    print(f"{Path(path).stem}|{time.process_time() - start:.1f}|{outcome}", flush=True)
"""


needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory in use from /proc")


def read_in_memory_of(mebibytes: int, *paths: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", READ_IN_LITTLE_MEMORY, str(mebibytes), *map(str, paths)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})


@needs_proc
def test_bombs_are_refused_in_little_memory_and_time(tmp_path):
    paths = [tmp_path / f"{name}.pth" for name in BOMBS]
    for path, data in zip(paths, BOMBS.values(), strict=True):
        path.write_bytes(data)
    run = read_in_memory_of(400, *paths)
    assert run.returncode == 0, run.stdout + run.stderr
    outcomes = [line.split("|", 2) for line in run.stdout.splitlines()]
    assert [name for name, _, _ in outcomes] == list(BOMBS)
    assert [(name, outcome) for name, _, outcome in outcomes if not outcome.startswith("weights ")] == []
    assert "describes" in outcomes[list(BOMBS).index("many tensors of one storage")][2]
    assert [(name, seconds) for name, seconds, _ in outcomes if float(seconds) > 10] == []


@needs_proc
def test_reading_takes_little_more_than_the_size_of_the_file(tmp_path):
    weights = {f"w{i}": np.full(MEBIBYTE, i, "f4") for i in range(16)}  # 64 MiB
    files = {"zip.pth": saved({name: torch.from_numpy(weight) for name, weight in weights.items()})}
    files["2.pkl"], files["5.pkl"] = pickle.dumps(weights, 2), pickle.dumps(weights, 5)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    run = read_in_memory_of(3 * 64 + 64, *(tmp_path / name for name in files))
    assert [line.rpartition("|")[2] for line in run.stdout.splitlines()] == ["value of dict"] * 3, run.stdout


# Damage

MANY_KINDS = {
    "args": Namespace(lr=0.1), "p": torch.nn.Parameter(torch.ones(2)), "u": torch.ones(2).to(torch.uint16),
    "n": {1, 2}, "size": torch.Size([1]), "device": torch.device("cpu"), "a": np.ones((2, 3), "f4"), "s": np.float64(2),
    "b": b"\xff",
}  # fmt: skip
ARRAYS = {"w": np.arange(6, dtype="f4").reshape(2, 3), "s": np.float32(2), "l": [1, (2.5, "é")], "f": np.ones(2, ">i8")}
SEEDS = {
    "zip": saved({"state_dict": OrderedDict(w=torch.arange(6.0).view(2, 3).t(), b=torch.ones(2)), "epoch": 3}),
    "zip of many kinds": saved(MANY_KINDS),
    "legacy": saved({"w": torch.arange(6.0), "b": [torch.ones(2)], "l": None}, _use_new_zipfile_serialization=False),
    **{f"numpy {protocol}": pickle.dumps(ARRAYS, protocol) for protocol in (0, 1, 2, 4, 5)},
}
PROGRAMS = {name: zipfile.ZipFile(io.BytesIO(SEEDS[name])) for name in ("zip", "zip of many kinds")}
PROGRAMS = {name: archive.read(archive.namelist()[0]) for name, archive in PROGRAMS.items()}
STORAGES = {str(i): data for i, data in enumerate((bytes(24), bytes(8), bytes(4)))}
OPCODES = [op.code.encode("latin1") for op in pickletools.opcodes]


def mutated(source: random.Random) -> bytes:
    """A seed file with a few bytes changed, cut off, spliced with another, or with instructions moved about."""
    name = source.choice(list(SEEDS))
    inside = name in PROGRAMS and source.random() < 0.7  # damage in a zip archive is mostly caught by its checksums
    data = bytearray(PROGRAMS[name] if inside else SEEDS[name])
    kind = source.choice(["flip", "number", "cut", "splice", "instructions", "instructions", "opcode"])
    if kind == "instructions" and (inside or name.startswith("numpy")):
        starts = [position for _, _, position in pickletools.genops(bytes(data))]
        steps = [bytes(data[a:b]) for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]
        for _ in range(source.randint(1, 4)):
            i, j = source.randrange(len(steps)), source.randrange(len(steps))
            action = source.choice(["drop", "copy", "swap", "foreign"])
            if action == "drop" and len(steps) > 1:
                del steps[i]
            elif action == "copy":
                steps.insert(i, steps[j])
            elif action == "swap":
                steps[i], steps[j] = steps[j], steps[i]
            else:
                steps.insert(
                    i, source.choice([tensor(), array(), storage_of(), b"cos\nsystem\n", b"h\x00", b"R", b"b", b"("])
                )
            j = min(j, len(steps) - 1)
        data = bytearray(b"".join(steps))
    elif kind == "cut":
        del data[source.randrange(len(data)) :]
    elif kind == "splice":
        other = source.choice(list(SEEDS.values()))
        at = source.randrange(len(data))
        data[at : at + source.randrange(64)] = other[source.randrange(len(other)) :][: source.randrange(256)]
    elif kind == "number" and len(data) > 8:
        at = source.randrange(len(data) - 8)
        data[at : at + 4] = struct.pack("<i", source.choice([-1, 0, 1, 2**31 - 1, -(2**31), 9, 255, 65536]))
    else:
        for _ in range(source.randint(1, 6)):
            at = source.randrange(len(data))
            data[at : at + 1] = source.choice(OPCODES) if kind == "opcode" else bytes([source.randrange(256)])
    return torch_zip(bytes(data), STORAGES) if inside else bytes(data)


def assert_plain(value) -> None:
    if type(value) is dict:
        for item in value.values():
            assert_plain(item)
    elif type(value) in (list, tuple, set):
        for item in value:
            assert_plain(item)
    else:
        assert type(value) in PLAIN, type(value)
        if type(value) is torch.Tensor:
            value.clone()


watching, seen = [], []
WATCHED = {
    "exec", "compile", "import", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class",
    "os.remove", "socket.connect", "ctypes.dlopen",
}  # fmt: skip


def watch(event: str, arguments: tuple) -> None:
    if watching and (event in WATCHED or (event == "open" and arguments[1] not in ("r", "rb", None))):
        seen.append((event, arguments))


@pytest.fixture(scope="module")
def no_code_runs():
    """What Python reports that code is run, imported, or files are written, while a file is read."""
    "é".encode("raw-unicode-escape").decode("raw-unicode-escape")  # noqa: UP012 - imports its codec once
    sys.addaudithook(watch)  # cannot be taken off; it looks only while `watching` says so
    return seen


def outcome(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    watching.append(True)
    try:
        value = read_pickle(path)
    except ValueError as error:
        assert str(error).startswith("weights ") and len(str(error)) < 1000
        return "refused"
    finally:
        watching.clear()
    assert_plain(value)
    return "read"


@pytest.mark.parametrize("name", SEEDS)
def test_every_file_cut_off_anywhere_is_refused(tmp_path, name):
    data = SEEDS[name]
    assert outcome(tmp_path / "whole", data) == "read"
    for cut in range(50):
        refusal(tmp_path, data[: len(data) * cut // 50])


outcomes = {"read": 0, "refused": 0}


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
@settings(max_examples=4000, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**64))
def test_a_mutated_file_is_read_or_refused_and_runs_nothing(tmp_path, no_code_runs, seed):
    outcomes[outcome(tmp_path / "mutated.pth", mutated(random.Random(seed)))] += 1
    assert no_code_runs == []


def test_the_mutations_reach_both_ends():
    assert outcomes["read"] > 100 and outcomes["refused"] > 1000
