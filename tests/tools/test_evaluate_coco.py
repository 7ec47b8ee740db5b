import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from commands import TOOLS, as_srun_starts, error_line
from safetensors.torch import save_file

from detection import scoring, tta
from detection.annotations import read_annotations
from detection.data import open_split
from detection.evaluate import evaluate
from detection.faster_rcnn import build_faster_rcnn, prepare_for_detection
from detection.saved import load_detector, save_detector
from detection.scoring import DETECTION, entries, score
from detection.shapes import CATEGORY_IDS, CLASSES, make_shapes
from resbackbone import build_resnet_backbone
from resbackbone.engine.checkpoints import save_checkpoint
from resbackbone.engine.distributed import Rank
from resbackbone.tools import convert_data, evaluate_coco


@pytest.fixture(scope="module")
def shapes(module_path):
    return make_shapes(module_path / "shapes", train_images=1, val_images=5, size=64)


@pytest.fixture(scope="module")
def model(module_path):
    """A detector that finds things at random, and many of them."""
    torch.manual_seed(0)
    backbone = build_resnet_backbone(18, fpn=True, fpn_channels=16)
    options = {"min_size": 64, "max_size": 97, "box_score_thresh": 0.0, "representation_size": 16}
    categories = dict(zip(CATEGORY_IDS, CLASSES, strict=True))
    detector = build_faster_rcnn(backbone, len(CLASSES), categories=categories, anchor_scale=4.0, **options)
    path = module_path / "model.safetensors"
    save_detector(detector, path)
    return path


@pytest.fixture
def run(model, shapes, tmp_path, monkeypatch):
    """A run's folder, as far as it matters here."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(model, folder)
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": str(shapes), "precision": "fp32"}))
    return folder


def evaluated(*argv):
    evaluate_coco.main([*map(str, argv), "--device", "cpu"])


def error_of(*argv):
    return error_line(lambda words: evaluated(*words), argv)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_run_is_scored_on_the_data_it_was_trained_on(run, shapes, capsys):
    evaluated(run)
    detections = json.loads((run / "detections.json").read_text())
    results = json.loads((run / "results.json").read_text())
    annotations = read_annotations(shapes / "annotations" / "instances_val2017.json")
    assert {entry["image_id"] for entry in detections} == set(range(1_000_001, 1_000_006))
    assert {entry["category_id"] for entry in detections} <= set(CATEGORY_IDS)
    rows = np.array([tuple(entry.values()) for entry in detections], DETECTION)
    assert results == {**score(annotations, rows), "skipped_images": []}
    assert len(results["bbox"]) == 12 and list(results["per_class"]) == list(CLASSES)
    said = capsys.readouterr().out
    assert "checkered square" in said and "AR100" in said and "on 5 images" in said


def test_either_backend_writes_the_same_and_an_unknown_one_is_refused_before_anything_is_detected(run, monkeypatch):
    used = []
    for name, backend in list(scoring.BACKENDS.items()):
        monkeypatch.setitem(scoring.BACKENDS, name, lambda *a, n=name, b=backend: used.append(n) or b(*a))
        evaluated(run, "--output", name, "--coco-backend", name)
    for file in ("results.json", "detections.json"):
        assert Path("hotcoco", file).read_bytes() == Path("pycocotools", file).read_bytes()
    assert used == ["hotcoco", "pycocotools"]
    monkeypatch.setattr(evaluate_coco, "load_detector", None)
    assert "unknown COCO backend 'fast'; choose from hotcoco, pycocotools" in error_of(run, "--coco-backend", "fast")


def test_other_data_and_another_place_for_the_results_can_be_given(run, model, shapes, tmp_path):
    before = names(run)
    evaluated(run, "--data", shapes, "--output", tmp_path / "a" / "b")
    assert names(run) == before and names(tmp_path / "a" / "b") == ["detections.json", "results.json"]
    evaluated(model, "--data", shapes, "--output", "c", "--precision", "fp32")
    assert (tmp_path / "c" / "results.json").read_bytes() == (tmp_path / "a" / "b" / "results.json").read_bytes()


def test_test_time_augmentation_is_scored_in_a_folder_of_its_own(run, shapes):
    evaluated(run, "--tta", "--tta-sizes", "48")
    detector = prepare_for_detection(load_detector(run).to(memory_format=torch.channels_last))
    augmented = tta.TestTimeAugmentation(detector, (48,))
    _, wanted = evaluate(augmented, open_split(shapes, "val"), Rank(0, 1, torch.device("cpu")))
    found = json.loads((run / "eval-tta-48" / "detections.json").read_text())
    assert len(found) > 50 and found == list(entries(wanted))
    assert not (run / "results.json").exists()


def test_a_run_that_still_trains_is_scored_by_its_last_checkpoint(run):
    model = run / "model.safetensors"
    save_checkpoint(run, 2, lambda folder: model.rename(folder / model.name), nbytes=model.stat().st_size)
    evaluated(run)
    assert json.loads((run / "results.json").read_text())["images"] == 5


def test_two_processes_write_what_one_does(run):
    as_srun_starts(TOOLS / "evaluate_coco.py", [run, "--device", "cpu", "--output", "two"])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        evaluated(run, "--output", "one")
    finally:
        torch.set_num_threads(threads)
    for name in ("results.json", "detections.json"):
        assert Path("two", name).read_bytes() == Path("one", name).read_bytes()


def test_a_broken_image_stops_it_and_nothing_is_written_or_it_is_skipped_and_named(run, shapes, tmp_path, capsys):
    data = Path(shutil.copytree(shapes, tmp_path / "own"))
    (data / "val2017" / "000001000004.jpg").write_bytes(b"")
    before = names(run)
    assert "val2017/000001000004.jpg: empty file" in error_of(run, "--data", data)
    assert names(run) == before
    evaluated(run, "--data", data, "--skip-bad-images")
    assert "skipped image" in capsys.readouterr().out
    results = json.loads((run / "eval-own" / "results.json").read_text())  # the run's own results are not written over
    assert results["images"] == 5 and "000001000004.jpg" in results["skipped_images"][0]


def test_wrong_input_is_one_line_that_names_it(run, shapes, tmp_path):
    assert "no-run: no such run folder or file" in error_of("no-run")
    (tmp_path / "empty").mkdir()
    assert "empty holds no detector" in error_of("empty")
    assert "--data no-data: no such folder" in error_of(run, "--data", "no-data")
    assert "no known data layout" in error_of(run, "--data", tmp_path)
    assert "unknown precision 'fp8'; choose from fp32, bf16" in error_of(run, "--precision", "fp8")
    assert "--depth" in error_of(run, "--depth", "18")
    assert "--workers many: must be a whole number" in error_of(run, "--workers", "many")
    assert "--scales 200, 200: must be distinct sizes in pixels" in error_of(run, "--scales", "200", "200")
    assert "--tta-sizes 1: sizes must be a list of distinct whole" in error_of(run, "--tta", "--tta-sizes", "1")
    assert "--tta-sizes are for --tta" in error_of(run, "--tta-sizes", "200")
    assert "--tta and --scales exclude each other" in error_of(run, "--tta", "--scales", "200")
    assert "--tta and --box-refinement exclude each other" in error_of(run, "--tta", "--box-refinement")
    assert f"--output {__file__}: is a file; give a folder" in error_of(run, "--output", __file__)
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    assert "other.safetensors hold no Faster R-CNN" in error_of("other.safetensors", "--data", shapes)
    (run / "config.yaml").unlink()
    assert "does not say what it was trained on (no config.yaml); give --data DIR" in error_of(run)


def test_data_of_other_categories_than_the_detectors_is_refused(run, shapes, tmp_path):
    data = Path(shutil.copytree(shapes, tmp_path / "own"))
    path = data / "annotations" / "instances_val2017.json"
    path.write_text(path.read_text().replace('"ring"', '"bracelet"'))
    assert "its classes 'bracelet' are not among the 10 of the detector" in error_of(run, "--data", data)


def test_the_test_split_of_another_format_is_scored_with_the_same_numbers(run, shapes, capsys):
    evaluated(run)
    wanted = json.loads((run / "results.json").read_text())["bbox"]
    shutil.copytree(shapes, "own")
    Path("own/val2017").rename("own/test2017")
    Path("own/annotations/instances_val2017.json").rename("own/annotations/instances_test2017.json")
    convert_data.main(["own", "yolo", "--to", "yolo"])
    capsys.readouterr()
    evaluated(run, "--data", "yolo", "--split", "test")
    assert "category ids differ and are matched by name" in capsys.readouterr().out
    assert json.loads((run / "eval-yolo-test" / "results.json").read_text())["bbox"] == wanted
    assert "key named test" in error_of(run, "--split", "test")
    assert "unknown split 'best'; choose from train, val, test" in error_of(run, "--split", "best")
