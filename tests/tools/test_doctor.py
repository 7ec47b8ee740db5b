import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision

from resbackbone.tools import doctor

TOOLS = Path(__file__).parents[2] / "tools"


def test_a_machine_where_all_works_gets_a_line_for_each_check_and_status_0(capsys):
    assert doctor.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("python 3.") and lines[-1] == "everything installed works"
    names = ("packages", "torchvision operators", "backbone", "import detection")
    for name in (*names, "detection", "train"):
        assert any(line.startswith(f"  ok       {name}: ") for line in lines)
    assert f"  ok       packages: torch {torch.__version__.partition('+')[0]}" in "\n".join(lines)
    assert any(line.startswith("  device   cpu") for line in lines)


def test_an_operator_that_fails_is_named_with_its_fix_and_the_other_checks_are_made(capsys, monkeypatch):
    def missing(*_):
        raise RuntimeError("operator torchvision::nms\n does not exist")

    monkeypatch.setattr(torchvision.ops, "nms", missing)
    assert doctor.main([]) == 1
    said = capsys.readouterr().out
    assert "FAILED   torchvision operators: operator torchvision::nms does not exist\n" in said
    assert "fix: install torch and torchvision together" in said
    assert "ok       backbone" in said and "1 checks failed" in said


def test_an_operator_that_computes_wrongly_fails_too(capsys, monkeypatch):
    monkeypatch.setattr(torchvision.ops, "nms", lambda boxes, scores, threshold: torch.arange(3))
    assert doctor.main([]) == 1
    assert "kept [0, 1, 2], expected [0, 2]" in capsys.readouterr().out


@pytest.mark.parametrize("package, status", [("safetensors", 1), ("tyro", 0), ("onnxruntime", 0)])
def test_a_missing_package_is_named_with_its_extra_and_fails_only_if_the_core_needs_it(
    capsys, monkeypatch, package, status
):
    version = importlib.metadata.version

    def without(name):
        if name == package:
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name) if name in ("torch", "torchvision") else "1.0"

    monkeypatch.setattr(importlib.metadata, "version", without)
    assert doctor.main([]) == status
    said = capsys.readouterr().out
    extra = {"tyro": "train", "onnxruntime": "export"}.get(package)
    assert (f"missing  {extra} needs {package}: pip install 'resbackbone[{extra}]'" in said) == (not status)
    assert ("FAILED   packages" in said and package in said) == bool(status)


def test_it_says_why_there_is_no_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    doctor.main([])
    assert "no GPU   torch is built " in capsys.readouterr().out


def test_from_the_shell_its_status_is_that_of_the_checks():
    process = subprocess.run([sys.executable, TOOLS / "doctor.py"], capture_output=True, text=True)
    assert process.returncode == 0 and "everything installed works" in process.stdout


def test_its_help_checks_nothing(capsys):
    assert doctor.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("Check this machine") and "ok  " not in said


@pytest.mark.parametrize("words", [[f"{name}.py", "--help"] for name in ("train_coco", "pretrain")])
def test_with_a_torchvision_that_cannot_be_imported_a_command_points_to_it_in_one_line(tmp_path, words):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    tool, *words = words
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    process = subprocess.run([sys.executable, TOOLS / tool, *words], capture_output=True, text=True, env=environment)
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr == (
        "error: torchvision cannot be imported (operator torchvision::nms does not exist); run resbackbone-doctor "
        "(python tools/doctor.py), which names the fix\n"
    )


def test_with_a_torchvision_that_cannot_be_imported_detection_and_sources_say_so_and_the_doctor_names_the_fix(tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    program = """
from resbackbone import build_resnet_backbone
for code in ("import detection", "build_resnet_backbone(18, weights='torchvision:ResNet18_Weights.IMAGENET1K_V1')"):
    try:
        exec(code)
    except ValueError as error:
        print(type(error).__name__, isinstance(error, ImportError), error)
from resbackbone.tools import doctor
doctor.main([])
"""
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{TOOLS.parent}"}
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    said = process.stdout.splitlines()
    assert said[0].startswith("BrokenPackage True torchvision cannot be imported (operator torchvision::nms does not")
    assert said[1].startswith(
        "UserError False weights 'torchvision:ResNet18_Weights.IMAGENET1K_V1': torchvision cannot be"
    )
    assert "  FAILED   torchvision operators: operator torchvision::nms does not exist" in said
    assert "           fix: install torch and torchvision together, of one build" in process.stdout
