"""No weight file takes memory or time out of proportion to its size."""

import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from pickle_programs import (
    ARRAY_OF,
    ORDERED_DICT,
    dtype,
    inner,
    repacked,
    saved,
    storage_of,
    tensor,
    text,
    torch_legacy,
    torch_zip,
)

ROOT = Path(__file__).parents[2]
MEBIBYTE = 2**20


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


def zip_of_directory(size: int) -> bytes:
    """One record, and a directory that has it and others without a name until it is full."""
    data = torch_zip(b"N.")
    start, end = data.index(b"PK\x01\x02"), data.rindex(b"PK\x05\x06")
    entry = bytearray(data[start : start + 46])
    entry[28:34] = bytes(6)
    more = bytes(entry) * ((size - (end - start)) // 46)
    stated = struct.pack("<I", end - start + len(more))
    return data[:end] + more + data[end : end + 12] + stated + data[end + 16 :]


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
        b"\x80\x02" + tensor(size=(1,), storage=storage_of(count=inner(2**40 - 1))[:-2] + b"NtQ") + b".",
        ["0"],
        struct.pack("<Q", 2**40 - 1),
    ),
    "keys of one hash": b"\x80\x02}("
    + b"".join(b"\x8a\x0b" + (n * (2**61 - 1)).to_bytes(11, "little") + b"N" for n in range(200_000))
    + b"u.",
    "memo indexes of one hash": b"N" + b"".join(b"p%d\n" % (n * (2**61 - 1)) for n in range(200_000)) + b".",
    "one list made a set often": b"\x80\x02((" + b"N" * 500_000 + b"lq\x00" + b"c__builtin__\nset\nq\x01"
    + b"h\x01h\x00\x85R" * 50_000 + b"t.",
    "an array taken apart": b"\x80\x03" + ORDERED_DICT + b"cnumpy.core.numeric\n_frombuffer\n(" + MEGABYTE_OF["bytes"]
    + dtype("u1") + inner((MEBIBYTE, 1)) + text("C") + b"tR\x85R.",
    "zip of nothing but a directory": zip_of_directory(9 * MEBIBYTE),
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
    assert [
        (name, outcome) for name, _, outcome in outcomes if not outcome.startswith("weights ") or "alloc" in outcome
    ] == []
    assert "directory of" in outcomes[list(BOMBS).index("zip of nothing but a directory")][2]
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
