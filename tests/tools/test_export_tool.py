import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import error_line
from PIL import Image

from detection.faster_rcnn import build_faster_rcnn
from detection.saved import save_detector
from resbackbone import build_resnet_backbone
from resbackbone.tools import export

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def run(module_path):
    torch.manual_seed(0)
    backbone = build_resnet_backbone(18, levels=["c5"], dilate_c5=True)
    options = {"min_size": 64, "max_size": 97, "representation_size": 16, "rpn_post_nms_top_n_test": 30}
    detector = build_faster_rcnn(backbone, 2, variant="dc5", categories={3: "car", 13: "stop sign"}, **options)
    save_detector(detector, module_path / "model.safetensors")
    return module_path


@pytest.fixture(autouse=True)
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (50, 61, 3), dtype=np.uint8)
    for name, image in [("a.png", noise), ("b.png", noise[:, :33])]:
        Image.fromarray(np.ascontiguousarray(image)).save(name)


def error_of(*argv):
    before = sorted(Path().rglob("*"))
    said = error_line(export.main, argv)
    assert sorted(Path().rglob("*")) == before
    return said


def test_a_run_becomes_a_file_that_finds_what_the_detector_finds(run, capsys):
    words = ["--input-type", "float32", "--score-thresh", "0.1", "--check", "a.png", "b.png"]
    export.main([str(run), "net.pt2", *words])
    announced, exported, *checked = capsys.readouterr().out.splitlines()
    assert announced.startswith(f"exporting {run}") and exported == "exported: net.pt2"
    for line, name in zip(checked, ("a.png", "b.png"), strict=True):
        assert re.fullmatch(rf"{name}: \d+ objects, boxes within [\d.e-]+ pixels, scores within [\d.e-]+", line)


BOXES = {"boxes": [[1.0, 2, 30, 40], [5, 6, 20, 30]], "scores": [0.9, 0.8], "labels": [1, 2]}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, None),
        ({"boxes": [[1.0, 2, 30, 40], [5, 6, 20, 31]]}, "boxes within 1 pixels, scores within 0;"),
        ({"scores": [0.9, 0.7]}, "boxes within 0 pixels, scores within 0.1;"),
        ({"labels": [1, 1]}, "boxes within inf pixels"),
        ({name: [] for name in BOXES}, "the file finds 0 objects and the detector 2;"),
    ],
)
def test_a_file_that_finds_something_else_fails_the_check_in_one_line(changes, message):
    found, expected = ({name: torch.tensor(x) for name, x in {**BOXES, **part}.items()} for part in (changes, {}))
    if message is None:
        assert export.agreement("a.png", found, expected).startswith("2 objects, boxes within 0 pixels")
        return
    with pytest.raises(ValueError, match=f"--check a.png: .*{message}") as error:
        export.agreement("a.png", found, expected)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "words, message",
    [
        (("net.pth",), "unknown suffix '.pth'; choose from .onnx, .pt2"),
        (("no/net.onnx",), "no/net.onnx: no folder no to export to"),
        (("net.onnx", "--input-type", "int8"), "unknown input type 'int8'; choose from uint8, float32"),
        (("net.onnx", "--score-thresh", "2"), "--score-thresh 2: must be from 0 to 1"),
        (("net.onnx", "--check", "c.png"), "--check image c.png: no such file"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(run, words, message):
    assert message in error_of(run, *words)


def test_a_check_without_onnxruntime_names_the_command_that_installs_it(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    said = error_of(run, "net.onnx", "--check", "a.png")
    assert said == "error: --check of an .onnx needs onnxruntime: pip install 'resbackbone[export]'"
