"""The wheel is enough to use the library and to train; a package that is missing is one line that names its extra."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import Distribution
from pathlib import Path

import pytest

import resbackbone
from detection.shapes import make_shapes

ROOT = Path(__file__).parents[1]
BROUGHT = ("torch", "torchvision", "safetensors")  # what the core needs


def run(*words, folder: Path, status: int = 0, path: str = "") -> subprocess.CompletedProcess:
    """Run a command in `folder`, with this PYTHONPATH."""
    hidden = ("COCO_DIR", "DETECTRON2_DATASETS", "RESBACKBONE_DEBUG")
    env = {name: value for name, value in os.environ.items() if name not in hidden} | {"PYTHONPATH": path}
    words = [str(word) for word in words]
    process = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, encoding="utf-8")
    assert process.returncode == status, process.stdout + process.stderr
    return process


def environment(folder: Path, wheel: Path, *site_packages: str) -> tuple[Path, Path]:
    """Make a virtual environment with the wheel and the packages in these folders; returns its Python and scripts."""
    venv.create(folder, symlinks=os.name != "nt")
    python = shutil.which("python", path=os.pathsep.join(str(folder / name) for name in ("bin", "Scripts")))
    where = "import sysconfig; print(*map(sysconfig.get_path, ('purelib', 'scripts')), sep='\\n')"
    purelib, scripts = run(python, "-c", where, folder=folder).stdout.splitlines()
    (Path(purelib) / "others.pth").write_text("\n".join(site_packages), encoding="utf-8")
    options = ("--no-deps", "--no-index", "--ignore-installed", "--quiet", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel, folder=folder)
    return Path(python), Path(scripts)


@pytest.fixture(scope="module")
def wheel(module_path) -> Path:
    folder = module_path / "wheel"
    source = folder / "source"  # a copy, for a build leaves folders in its source
    others = (".*", "build", "datasets", "docs", "runs", "site", "tests", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*others))
    options = ("--no-deps", "--no-build-isolation", "--quiet", "--disable-pip-version-check", "--wheel-dir", folder)
    run(sys.executable, "-m", "pip", "wheel", *options, source, folder=folder)
    [wheel] = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def full(module_path, wheel):
    """An environment with the wheel and all packages of this one."""
    return environment(module_path / "full", wheel, *(p for p in sys.path if p.endswith("site-packages")))


@pytest.fixture(scope="module")
def bare(module_path, wheel):
    """An environment with the wheel and, of the packages here, only the core's and what these need themselves."""
    if os.name == "nt":
        pytest.skip("symbolic links need rights on Windows")
    folder = module_path / "packages"
    folder.mkdir()
    queue, seen = list(BROUGHT), set()
    while queue:
        name = re.sub(r"[-_.]+", "-", queue.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            distribution = Distribution.from_name(name)
        except ModuleNotFoundError:  # of another platform
            continue
        for file in distribution.files or ():
            top = Path(file).parts[0]
            if top not in ("..", "__pycache__") and not (folder / top).exists():
                (folder / top).symlink_to(Path(distribution.locate_file(top)))
        for requirement in distribution.requires or ():
            if "extra ==" not in requirement:
                queue.append(re.match(r"[\w.-]+", requirement)[0])
    return environment(module_path / "bare", wheel, str(folder))


def test_the_wheel_has_this_version_and_the_files_that_are_not_python(wheel):
    assert wheel.name.startswith(f"resbackbone-{resbackbone.__version__}-")
    names = zipfile.ZipFile(wheel).namelist()
    templates = [f"resbackbone/report/templates/{path.name}" for path in ROOT.glob("resbackbone/report/templates/*")]
    assert {"resbackbone/py.typed", "detection/py.typed", "resbackbone/tools/train_coco.py", *templates} <= set(names)
    assert not [name for name in names if name.startswith(("tools/", "tests/"))]


def test_every_console_script_has_its_function(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    [entries] = [name for name in names if name.endswith("entry_points.txt")]
    scripts = re.findall(r"resbackbone-[\w-]+ = ([\w.]+):run", zipfile.ZipFile(wheel).read(entries).decode())
    assert "resbackbone.tools.train_coco" in scripts
    for script in scripts:
        assert callable(importlib.import_module(script).run) and f"{script.replace('.', '/')}.py" in names


def test_the_installed_commands_train_and_check(full, tmp_path):
    python, scripts = full
    make_shapes(tmp_path / "shapes", train_images=8, val_images=2, size=64)
    where = (
        "from importlib.util import find_spec as find; "
        "print(*(find(name).origin for name in ('detection', 'resbackbone.tools.detect')), sep='\\n')"
    )
    for file in run(python, "-c", where, folder=tmp_path).stdout.splitlines():
        assert Path(file).is_relative_to(scripts.parent)
    train = ("--data", "shapes", "--recipe", "short", "--max-steps", "5", "--log-period", "1", "--device", "cpu")
    run(scripts / "resbackbone-train-coco", *train, "--output", "run", folder=tmp_path)
    steps = [line for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines() if '"train"' in line]
    assert len(steps) == 5 and (tmp_path / "run/model.safetensors").exists() and (tmp_path / "run/report.html").exists()
    detected = run(scripts / "resbackbone-detect", "run", "shapes/val2017", "--device", "cpu", folder=tmp_path)
    assert "all detections:" in detected.stdout
    assert "everything installed works" in run(scripts / "resbackbone-doctor", folder=tmp_path).stdout


def test_the_core_needs_torch_torchvision_and_safetensors_alone(bare, tmp_path):
    python, _ = bare
    code = "import resbackbone as r, torch; print(*r.build_resnet_backbone(50, fpn=True)(torch.zeros(1, 3, 65, 97)))"
    assert run(python, "-c", code, folder=tmp_path).stdout.split() == ["p2", "p3", "p4", "p5", "p6"]


MISSING = {  # what a line says when a package is missing
    "import detection": "detection needs .*pycocotools.*: pip install 'resbackbone[detection]'",
    "import resbackbone.classification": "resbackbone.classification needs .*: pip install 'resbackbone[train]'",
    "import resbackbone.engine": "resbackbone.engine needs yaml: pip install 'resbackbone[train]'",
    "build(18, weights='timm:resnet18.a1_in1k')": "a timm: source needs timm: pip install 'resbackbone[train]'",
    "build(18, weights='hf:owner/name')": "Hugging Face hub needs huggingface_hub: pip install 'resbackbone[train]'",
}


@pytest.fixture(scope="module")
def tracebacks(bare, module_path):
    """What Python prints of each of MISSING; all in one process, which takes seconds to start."""
    program = """
import json, sys, traceback
from resbackbone import build_resnet_backbone as build
printed = {}
for code in sys.argv[1:]:
    try:
        exec(code)
    except Exception:
        printed[code] = traceback.format_exc()
print(json.dumps(printed))
"""
    return json.loads(run(bare[0], "-c", program, *MISSING, folder=module_path).stdout)


@pytest.mark.parametrize("code", MISSING)
def test_a_missing_package_is_one_line_that_names_its_extra(tracebacks, code):
    assert "During handling" not in tracebacks[code]
    assert re.search(MISSING[code].replace("[", r"\[") + "$", tracebacks[code].splitlines()[-1])


def test_a_command_whose_packages_are_missing_is_one_line(bare, tmp_path):
    python, scripts = bare
    line = "error: a command needs .*rich.*tyro.*: pip install 'resbackbone\\[train\\]'\n"
    for command in ([scripts / "resbackbone-train-coco"], [python, ROOT / "tools/train_coco.py"]):
        assert re.fullmatch(line, run(*command, folder=tmp_path, status=1).stderr)
    said = run(scripts / "resbackbone-doctor", folder=tmp_path).stdout
    assert re.search(r"missing  detection needs \w+: pip install 'resbackbone\[detection\]'", said)


def test_another_package_named_detection_is_one_line(full, tmp_path):
    _, scripts = full
    (tmp_path / "other").mkdir()
    (tmp_path / "other/detection.py").write_text("faces = ['not ours']")
    fix = "detection.py is another package named detection: pip uninstall detection, then install resbackbone again"
    failed = run(scripts / "resbackbone-train-coco", folder=tmp_path, status=1, path=str(tmp_path / "other"))
    assert failed.stderr.startswith("error: ") and failed.stderr.endswith(fix + "\n") and failed.stderr.count("\n") == 1
    said = run(scripts / "resbackbone-doctor", folder=tmp_path, status=1, path=str(tmp_path / "other")).stdout
    assert "FAILED   import detection: " in said and fix in said
