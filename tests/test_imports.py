"""Imports run one way: tools -> detection -> resbackbone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY, CORE = sorted(ROOT.glob("resbackbone/**/*.py")), sorted(ROOT.glob("resbackbone/*.py"))
WEIGHTS, ADAPTERS = (sorted(ROOT.glob(f"resbackbone/{folder}/*.py")) for folder in ("weights", "adapters"))
OWN = {"detection", "resbackbone", "tools"}
# The parts of resbackbone that each part may import; "core" is the files directly in it. Every part may import itself.
FLOORS = {
    "core": {"weights"},  # build_resnet_backbone(weights=..) reads them
    "weights": {"core"},
    "adapters": {"core", "weights"},
    "engine": {"core", "weights"},
    "report": {"core", "engine"},
    "classification": {"core", "weights", "engine", "report"},
    "cli": {"core", "weights", "engine", "report"},
}


def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import, which this test does not follow"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def packages(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(path)}


def part_of(module: str) -> str:
    """The part of resbackbone that a module is in: "engine" for resbackbone.engine.loop, "core" for resbackbone.fpn."""
    part = (module.split(".") + [""])[1]
    return part if (ROOT / "resbackbone" / part).is_dir() and part else "core"


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [*CORE, *WEIGHTS], ids=relative)
def test_the_core_imports_only_torch_safetensors_and_itself(path):
    # weights/ names sources that others own, and asks them; inside functions, as the last test here shows
    owners = {"torchvision", "timm", "huggingface_hub", "filelock", "numpy", "yaml"} if path in WEIGHTS else set()
    if path.name == "image_io.py":  # users import it by name; `import resbackbone` does not
        owners = {"numpy", "PIL", "simplejpeg"}
    if path.name == "compat.py":  # imports torchvision inside the function that needs it
        owners = {"torchvision"}
    if path.name == "kernels.py":  # comes with torch for GPUs; imported where there is one
        owners = {"triton"}
    allowed = {"torch", "safetensors", "resbackbone", *owners}
    assert packages(path) - set(sys.stdlib_module_names) <= allowed


@pytest.mark.parametrize("path", LIBRARY, ids=relative)
def test_imports_of_the_library_run_downwards_and_only_cli_knows_a_terminal(path):
    assert packages(path) & OWN <= {"resbackbone"}
    part = part_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    parts = {part_of(name) for name in imported(path) if name.startswith("resbackbone.")}
    assert parts <= {part, *FLOORS[part]}
    assert part == "cli" or not packages(path) & {"tyro", "rich"}


@pytest.mark.parametrize("path", ADAPTERS, ids=relative)
def test_an_adapter_imports_the_core_and_its_one_framework(path):
    frameworks = packages(path) - set(sys.stdlib_module_names) - {"torch", "resbackbone"}
    assert frameworks <= {"__init__": set(), "from_timm": {"timm"}}.get(path.stem, {path.stem})


@pytest.mark.parametrize("path", sorted(ROOT.glob("detection/**/*.py")), ids=relative)
def test_detection_imports_neither_tools_nor_the_terminal(path):
    assert packages(path) & {*OWN, "tyro", "rich"} <= {"detection", "resbackbone"}
    assert not [name for name in imported(path) if name.startswith(("resbackbone.tools", "resbackbone.cli"))]


HEAVY = {"torchvision", "timm", "huggingface_hub", "onnx", "pycocotools", "tyro", "rich", "yaml", "tensorboard"}


@pytest.mark.parametrize(
    "modules, absent",
    [
        ("resbackbone", {*HEAVY, "detection"}),
        ("detection.faster_rcnn, resbackbone.adapters", {"timm", "transformers", "detectron2", "tyro"}),
    ],
)
def test_an_import_loads_no_framework_that_it_does_not_need(modules, absent):
    code = f"import {modules}, sys; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "torch" in run.stdout.split() and not absent & set(run.stdout.split())
