import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import error_line
from PIL import Image

from detection.faster_rcnn import build_faster_rcnn, save_detector
from resbackbone import build_resnet_backbone

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
detect = importlib.import_module("detect")

CATEGORIES = {3: "car", 13: "stop sign"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.manual_seed(0)
    backbone = build_resnet_backbone(18, fpn=True, fpn_channels=16)
    options = {"min_size": 64, "max_size": 97, "box_score_thresh": 0.0, "representation_size": 16}
    folder = tmp_path_factory.mktemp("run")
    save_detector(build_faster_rcnn(backbone, 2, categories=CATEGORIES, **options), folder / "model.safetensors")
    return folder


@pytest.fixture(autouse=True)
def photos(tmp_path, monkeypatch):
    """In an empty folder: a photo, a tall grey one, and one of the first's name elsewhere."""
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (50, 61, 3), dtype=np.uint8)
    Path("other").mkdir()
    for name, image in [("a.png", noise), ("b.jpg", noise[:, :21, 0]), ("other/a.png", noise[:33])]:
        Image.fromarray(np.ascontiguousarray(image)).save(name)


def detected(*argv):
    detect.main([*map(str, argv), "--device", "cpu"])


def error_of(*argv):
    return error_line(lambda words: detected(*words), argv)


def test_every_image_gets_a_picture_and_all_detections_are_written(run, capsys):
    detected(run, "a.png", "b.jpg", "--output", "found")
    assert sorted(path.name for path in Path("found").iterdir()) == ["a.png", "b.png", "detections.json"]
    detections = json.loads(Path("found/detections.json").read_text())
    assert {entry["image"] for entry in detections} == {"a.png", "b.jpg"}
    for entry in detections:
        width, height = (61, 50) if entry["image"] == "a.png" else (21, 50)
        x, y, w, h = entry["bbox"]
        assert entry["category"] == CATEGORIES[entry["category_id"]] and 0 <= entry["score"] <= 1
        assert x >= 0 and y >= 0 and x + w <= width + 1e-3 and y + h <= height + 1e-3
    said = capsys.readouterr().out
    assert "a.png: " in said and "b.jpg: " in said and "found/detections.json" in said


def test_the_threshold_decides_what_is_drawn_and_not_what_is_written(run, capsys):
    written, drawn = [], []
    for threshold in ("0", "1"):
        detected(run, "a.png", "--threshold", threshold, "--output", threshold)
        written.append(json.loads(Path(threshold, "detections.json").read_text()))
        drawn.append(np.asarray(Image.open(Path(threshold, "a.png"))))
    assert written[0] == written[1] and len(written[0]) > 0
    assert not np.array_equal(*drawn)
    said = capsys.readouterr().out
    assert f"a.png: {len(written[0])} found" in said and "a.png: 0 found" in said


def test_by_default_pictures_go_beside_the_detector(run):
    detected(run / "model.safetensors", "a.png")
    assert (run / "detected" / "a.png").is_file() and (run / "detected" / "detections.json").is_file()


def test_images_of_one_name_get_pictures_of_their_own(run):
    detected(run, "a.png", "other/a.png", "b.jpg", "--output", "found")
    assert sorted(path.name for path in Path("found").glob("*.png")) == ["a-1.png", "a-2.png", "b.png"]
    detections = json.loads(Path("found/detections.json").read_text())
    assert {entry["image"] for entry in detections} == {"a.png", "other/a.png", "b.jpg"}


@pytest.mark.parametrize("argv", [("other/a.png", "--output", "other"), ("a.png", "b.jpg", "--output", ".")])
def test_the_images_themselves_are_never_written_over(run, argv):
    before = {path: path.read_bytes() for path in Path().rglob("*.*g")}
    assert "a picture would replace the image" in error_of(run, *argv)
    assert {path: path.read_bytes() for path in Path().rglob("*.*g")} == before


def test_a_broken_image_is_one_line_that_names_it_or_is_skipped(run, capsys):
    Path("b.jpg").write_bytes(Path("b.jpg").read_bytes()[:200])
    said = error_of(run, "a.png", "b.jpg", "--output", "found")
    assert said.startswith("error: image b.jpg: cannot be decoded")
    assert not Path("found/detections.json").exists()
    detected(run, "b.jpg", "a.png", "--output", "found", "--skip-bad-images")
    assert "skipped image b.jpg: cannot be decoded" in capsys.readouterr().out
    assert {entry["image"] for entry in json.loads(Path("found/detections.json").read_text())} == {"a.png"}


def test_wrong_input_is_one_line_that_names_it(run):
    assert "no-run: no such run folder or file" in error_of("no-run", "a.png")
    assert "other holds no detector" in error_of("other", "a.png")
    assert "no image given: python tools/detect.py RUN IMAGE..." in error_of(run)
    assert "image nowhere.png: no such file" in error_of(run, "nowhere.png", "--output", "found")
    assert "--threshold 1.5: a score between 0 and 1 is wanted" in error_of(run, "a.png", "--threshold", "1.5")
    assert "--threshold" in error_of(run, "a.png", "--threshold", "high")
    assert "unknown precision 'fp8'" in error_of(run, "a.png", "--precision", "fp8")
    assert not Path("found/detections.json").exists()
    error_line(detect.main, [])
