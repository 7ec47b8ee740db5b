"""What the sources must not do. Attacks on weight files are in tests/weights, those on other input in its own tests."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for folder in ("resbackbone", "detection", "tools") for path in (ROOT / folder).rglob("*.py"))
RUNS_CODE = {  # calls that run code from a file or a string
    *("eval", "exec", "compile", "__import__"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "cPickle.load", "dill.load", "dill.loads", "joblib.load"),
    *("marshal.load", "marshal.loads", "shelve.open", "torch.load", "torch.jit.load", "torch.hub.load"),
    *("yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all", "pandas.read_pickle"),
    *("os.system", "os.popen", "os.execv", "os.execvp", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("runpy.run_path", "imp.load_source", "importlib.import_module"),
}
UNPACKS = {"extractall", "extract", "unpack_archive"}  # a member's name in an archive becomes a path


def calls(path):
    """(full name, call) for every call in a source; the name is pickle.load, say, however it was imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    known = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            first, *rest = name.split(".")
            yield ".".join([known.get(first, first), *rest]), node


def offences(path):
    found = []
    for name, call in calls(path):
        keywords = {word.arg: ast.unparse(word.value) for word in call.keywords}
        if name in RUNS_CODE and not (name == "torch.load" and keywords.get("weights_only") == "True"):
            found.append(name)
        if name.split(".")[-1] in UNPACKS:
            found.append(name)
        if keywords.get("shell", "False") != "False" or keywords.get("allow_pickle", "False") != "False":
            found.append(f"{name} with shell or allow_pickle")
        if name.startswith("subprocess.") and call.args and isinstance(call.args[0], ast.Constant | ast.JoinedStr):
            found.append(f"{name} of a string")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(ROOT)) for path in SOURCES])
def test_no_source_runs_code_from_a_file_starts_a_shell_or_unpacks_an_archive(path):
    assert offences(path) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.load(open('a'))",
        "import pickle as p\np.loads(b'')",
        "from pickle import loads\nloads(b'')",
        "import torch\ntorch.load('a', weights_only=False)",
        "from yaml import load as read\nread('a')",
        "import numpy\nnumpy.load('a', allow_pickle=True)",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import subprocess\nsubprocess.run(f'ls {1}')",
        "import tarfile\ntarfile.open('a').extractall()",
        "eval('1')",
    ],
)
def test_each_offence_is_found(tmp_path, source):
    (tmp_path / "source.py").write_text(source)
    assert offences(tmp_path / "source.py")
