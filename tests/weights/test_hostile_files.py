"""No program in a weight file runs code, reaches a name, or makes what does not fit its file."""

import os
import pickle

import pytest
import torch
from pickle_programs import (
    CONTAINERS,
    ORDERED_DICT,
    REBUILD,
    array,
    dtype,
    inner,
    refusal,
    storage_of,
    tensor,
    text,
    torch_zip,
)

from resbackbone.weights.pickles import NAMES, Foreign, read_pickle

pytestmark = pytest.mark.filterwarnings("ignore")  # torch warns of what it then refuses

CANARY = "canary_was_run"
COMMAND = f"touch {CANARY}"
CODE = f"open({CANARY!r}, 'w').close()"
CALLS = [  # one of each kind, as the reader knows only what it allows
    ("os", "system", (COMMAND,)),
    ("os", "popen", (COMMAND,)),
    ("subprocess", "Popen", (["touch", CANARY],)),
    ("builtins", "eval", (CODE,)),
    ("__builtin__", "eval", (CODE,)),
    ("builtins", "open", (CANARY, "w")),
    ("builtins", "__import__", ("antigravity",)),
    ("builtins", "getattr", ("text", "join")),
    ("builtins", "type", ("T", (), {})),
    ("io", "FileIO", (CANARY, "w")),
    ("pickle", "loads", (pickle.dumps(1),)),
    ("marshal", "loads", (b"N",)),
    ("torch", "load", ("other.pth",)),
    ("torch.storage", "_load_from_bytes", (b"",)),
    ("torch.jit", "load", ("other.pt",)),
    ("torch._utils", "_import_dotted_name", ("os.system",)),
    ("torch.nn.modules.linear", "Linear", (2, 2)),
    ("torch", "zeros", (2**40,)),
    ("numpy", "load", ("other.npy", "r", True)),
    ("numpy", "fromfile", ("/etc/passwd",)),
    ("functools", "partial", (1,)),
    ("operator", "attrgetter", ("system",)),
    ("runpy", "run_path", ("other.py",)),
    ("importlib", "import_module", ("antigravity",)),
    ("types", "CodeType", (1,)),
    ("ctypes", "CDLL", ("libc.so.6",)),
    ("codecs", "decode", (b"x", "zip")),
    ("copyreg", "_reconstructor", (1, 2, None)),
    ("copyreg", "__newobj__", (1,)),
    ("pathlib", "Path", ("x",)),
    ("resbackbone.weights.pickles", "read_pickle", ("x",)),
    ("tests.conftest", "pytest", ()),
]


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize(("module", "name", "arguments"), CALLS, ids=[f"{module}.{name}" for module, name, _ in CALLS])
def test_what_a_file_would_call_is_kept_as_its_name_and_not_run(
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
    whole = f"it is a whole {module}.{name}, which is not run"
    for program in programs:
        (tmp_path / "hostile.pth").write_bytes(CONTAINERS[container](program))
        try:
            read = read_pickle(tmp_path / "hostile.pth")
        except ValueError as error:
            assert whole in str(error)
        else:
            assert read in (1, {}) or (read["w"].name == f"{module}.{name}" and type(read["w"]) is Foreign)
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
    assert "it is a whole " in refusal(tmp_path, b"\x80\x04" + text(module) + text(name) + b"\x93.")


def test_the_builders_of_this_file_build_what_is_read(tmp_path):
    (tmp_path / "t.pth").write_bytes(torch_zip(b"\x80\x02" + tensor() + b".", {"0": b"\0" * 16}))
    (tmp_path / "a.pkl").write_bytes(b"\x80\x03}" + text("w") + array() + b"s.")
    assert torch.equal(read_pickle(tmp_path / "t.pth"), torch.zeros(4))
    assert torch.equal(read_pickle(tmp_path / "a.pkl")["w"], torch.zeros(2))


@pytest.mark.parametrize(
    "tensor_program",
    [
        *(tensor(size=size) for size in [(2**40,), (2**70,), (-4,), (2.0,), (True,), "4"]),
        *(tensor(stride=stride) for stride in [(2,), (2**60,), (-1,), (1, 1)]),
        *(tensor(offset=offset) for offset in [1, -1]),
        tensor(size=(2**40, 2**40), stride=(0, 0)),
        *(tensor(storage=storage_of(key=key)) for key in ["1", "../data.pkl"]),
        *(tensor(storage=storage_of(count=count)) for count in [b"K\x05", b"J\xff\xff\xff\x0f", b"J\xff\xff\xff\xff"]),
        tensor(storage=storage_of(kind="Double")),
        tensor(storage=b"K\x01"),
        b"(" + text("module") + b"NNNNtQ",
        text("0") + b"Q",
        b"ctorch._tensor\n_rebuild_from_type_v2\n(" + REBUILD + b"ctorch\nTensor\n)NtR",
    ],
)
def test_a_tensor_that_does_not_fit_its_storage_is_refused(tmp_path, tensor_program):
    refusal(tmp_path, torch_zip(b"\x80\x02" + tensor_program + b".", {"0": b"\0" * 16}))


RECORDS = b"(K\x03" + text("<") + b"N(" + text("a") + b"t}K\x04K\x04K\x00tb"  # the state of a dtype with fields


@pytest.mark.parametrize(
    "program",
    [
        *(array(shape=shape) for shape in [(3,), (2**40,), (-2,)]),
        *(array(code=code) for code in ("O8", "V8", "f16", "U2", "M8", "f4,f4")),
        b"cnumpy\ndtype\n}\x85R",
        b"cnumpy\ndtype\n" + text("f4") + b"\x85R" + RECORDS,
        b"cnumpy.core.multiarray\n_reconstruct\n" + ORDERED_DICT + b"K\x00\x85K\x01\x87R",
        b"cnumpy.core.multiarray\nscalar\n" + dtype("f4") + b"K\x01\x86R",
    ],
)
def test_an_array_that_is_not_plain_numbers_is_refused(tmp_path, program):
    refusal(tmp_path, b"\x80\x02" + program + b".")


@pytest.mark.parametrize(
    "program",
    [
        ORDERED_DICT + b"}" + text("__class__") + b"K\x01sb.",
        b"cnumpy\nndarray\n}" + text("__setstate__") + b"K\x01sb.",
        b"cnumpy.core.multiarray\nscalar\nN}" + text("__defaults__") + b"K\x01s\x86b.",
        b"]}b.",
        b"])R.",
        text("os.system") + b")R.",
        b"(ios\nsystem\n.",
        *(code + b"\x01\x00\x00\x00." for code in (b"\x82", b"\x83", b"\x84")),
        b"\x97.",
        b"Pname\n.",
        b"K\x01Q.",
        b"]K\x01K\x02s.",
        b"}K\x01a.",
        b"K\x01K\x02\x93.",
        storage_of() + b".",
        b"}]K\x01s.",
        *(b"K\x01", b".", b"h\x05.", b"t.", b"", b"I" + b"9" * 5000 + b"\n."),
        b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b"x.",
        b"\x80\x02]r\xff\xff\xff\x7fj\xff\xff\xff\x7e.",
    ],
)  # fmt: skip
def test_a_program_that_no_weights_need_is_refused(tmp_path, program):
    refusal(tmp_path, program)


def test_a_file_changes_nothing_that_later_files_are_read_with(tmp_path):
    before = [dict(vars(value)) for value in NAMES.values() if hasattr(value, "__dict__")]
    for name in NAMES:
        module, _, attribute = name.rpartition(".")
        for state in (inner({"shape": 1}), b"N" + inner({"__doc__": "changed"}) + b"\x86"):
            program = f"c{module}\n{attribute}\n".encode() + state + b"b."
            refusal(tmp_path, program)
            refusal(tmp_path, torch_zip(b"\x80\x02" + program))
    assert [dict(vars(value)) for value in NAMES.values() if hasattr(value, "__dict__")] == before


def test_what_this_process_lets_torch_load_is_not_used(tmp_path):
    with torch.serialization.safe_globals([os.path.join]):
        refusal(tmp_path, torch_zip(b"\x80\x02cposixpath\njoin\n" + inner(("a", "b")) + b"R."))


def test_a_sparse_tensor_is_named_and_not_made(tmp_path):
    indices = tensor(size=(1, 1), stride=(1, 1), storage=storage_of("0", b"K\x01", "Long"))
    values = tensor(size=(1,), storage=storage_of("1", b"K\x01"))
    layout = b"ctorch.serialization\n_get_layout\n" + text("torch.sparse_coo") + b"\x85R"
    sparse = b"ctorch._utils\n_rebuild_sparse_tensor\n" + layout + b"(" + indices + values + inner((2,)) + b"\x89t\x86R"
    storages = {"0": (99).to_bytes(8, "little"), "1": bytes(4)}  # index 99 of 2
    (tmp_path / "w.pth").write_bytes(torch_zip(b"\x80\x02}" + text("w") + sparse + b"s.", storages))
    assert read_pickle(tmp_path / "w.pth")["w"].name == "torch._utils._rebuild_sparse_tensor"


def test_a_method_that_a_file_gives_a_tensor_is_not_called(tmp_path):
    poisoned = b"ctorch._tensor\n_rebuild_from_type_v2\n(" + REBUILD + b"ctorch\nTensor\n("
    poisoned += storage_of() + inner(0) + inner((4,)) + inner((1,)) + b"\x89" + ORDERED_DICT + b")Rt}"
    poisoned += text("detach") + b"cbuiltins\ndict\nstR"
    (tmp_path / "w.pth").write_bytes(torch_zip(b"\x80\x02}" + text("w") + poisoned + b"s.", {"0": bytes(16)}))
    assert torch.equal(read_pickle(tmp_path / "w.pth")["w"], torch.zeros(4))


def test_what_a_message_quotes_from_a_file_is_short_and_on_one_line(tmp_path):
    message = refusal(tmp_path, b"\x80\x04" + text("line\nbreak\x1b[2J" * 10**5) + text("x") + b"\x93.")
    assert "\\n" in message and "\x1b" not in message
