"""A weight file with any damage is read or refused, and runs nothing."""

import io
import pickle
import pickletools
import random
import struct
import sys
import zipfile
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pickle_programs import array, refusal, saved, storage_of, tensor, torch_zip

from resbackbone.weights.pickles import Array, Dtype, Foreign, read_pickle

pytestmark = pytest.mark.filterwarnings("ignore")  # torch warns of what it then refuses

PLAIN = {  # Types and functions are inert: nobody calls them, and no state dict may hold them
    *(type(None), bool, int, float, str, bytes, bytearray, memoryview, torch.Tensor, torch.dtype),
    *(Foreign, Array, Dtype, type, type(read_pickle)),
}

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
    if isinstance(value, dict):
        for item in dict.values(value):
            assert_plain(item)
    elif type(value) in (list, tuple, set, torch.Size):
        for item in value:
            assert_plain(item)
    else:
        assert type(value) in PLAIN, type(value)
        if isinstance(value, torch.Tensor) and value.numel() < 1000:
            value.clone()


watching, seen = [], []
WATCHED = {
    "exec", "compile", "import", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class",
    "os.remove", "socket.connect", "ctypes.dlopen",
}  # fmt: skip


def watch(event: str, arguments: tuple) -> None:
    if event in ("import", "exec") and "encodings" in str(arguments[0]):  # a codec that Python looks up
        return
    if watching and (event in WATCHED or (event == "open" and arguments[1] not in ("r", "rb", None))):
        seen.append((event, arguments))


@pytest.fixture(scope="module")
def no_code_runs():
    """What Python reports that code is run, imported, or files are written, while a file is read."""
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


@settings(max_examples=2000, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**64))
def test_a_mutated_file_is_read_or_refused_and_runs_nothing(tmp_path, no_code_runs, seed):
    outcomes[outcome(tmp_path / "mutated.pth", mutated(random.Random(seed)))] += 1
    assert no_code_runs == []


def test_the_mutations_reach_both_ends():
    assert outcomes["read"] > 100 and outcomes["refused"] > 1000
