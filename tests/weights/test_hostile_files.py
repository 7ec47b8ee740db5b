"""No program in a weight file runs code, reaches a name, or makes what does not fit its file."""

import pickle

import pytest
import torch
from pickle_programs import (
    ARRAY_OF,
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

from resbackbone.weights.pickles import read_pickle

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
        assert f"would run {module}.{name}: only tensors" in refusal(tmp_path, CONTAINERS[container](program))
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
        (tensor(size=(3,), storage=storage_of(count=b"K\x03")), "16 bytes"),
        (b"(" + text("storage") + dtype("f4") + text("0") + text("cpu") + b"K\x04tQ", "data of type NumpyDtype"),
        (tensor(storage=storage_of(count=b"J\xff\xff\xff\xff")), "whole numbers"),
        (tensor(storage=storage_of(kind="Double")), "16 bytes"),
        (storage_of(), "Storage"),
        (b"(" + text("module") + b"NNNNtQ", "outside"),
        (text("0") + b"Q", "outside"),
        (tensor()[:-2] + b"}K\x01K\x01stR", "dtype or with metadata"),
        (
            b"ctorch._utils\n_rebuild_tensor_v3\n(" + storage_of() + b"K\x00K\x04\x85K\x01\x85\x89NK\x07tR",
            "dtype or with metadata",
        ),
        (
            b"ctorch._tensor\n_rebuild_from_type_v2\n(" + REBUILD + ORDERED_DICT + b")NtR",
            "of type collections.OrderedDict",
        ),
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
        (b"}" + inner(2**64) + b"Ns.", "65 bits"),
        (b"Np4294967296\n.", "33 bits"),
        (b"\x8f(K\x01K\x01\x90.", "'1' is there twice"),
        (b"c__builtin__\nset\n" + text("ab") + b"\x85R.", "members of str"),
        (storage_of() + b".", "outside"),
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
