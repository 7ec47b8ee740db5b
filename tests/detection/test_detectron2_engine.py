import importlib
import importlib.util
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from made import pycocotools_says

from detection.data import open_split
from detection.evaluate import METRICS
from detection.recipes import RECIPES
from detection.shapes import make_shapes
from resbackbone import build_resnet_backbone
from resbackbone.cli.command import main_of
from resbackbone.tools import train_coco

TOOLS = Path(__file__).parents[2] / "tools"

needs_detectron2 = pytest.mark.skipif(
    importlib.util.find_spec("detectron2") is None,
    reason="detectron2 is not installed; it has no release on the registry",
)
QUICK = ["--engine", "detectron2", "--recipe", "short", "--depth", "18", "--device", "cpu", "--batch-size", "2"]
QUICK += ["--log-period", "1", "--pictures", "1"]


@pytest.fixture(scope="session")
def gaps(tmp_path_factory):
    """A small data set; its category ids have gaps, as COCO's own have."""
    return make_shapes(tmp_path_factory.mktemp("detectron2") / "gaps", train_images=6, val_images=3, size=64)


@pytest.fixture(scope="session")
def finished(gaps, tmp_path_factory):
    """A run of two steps; tests only read it."""
    folder = tmp_path_factory.mktemp("detectron2_runs") / "finished"
    train_coco.main([*QUICK, "--data", str(gaps), "--max-steps", "2", "--output", str(folder)])
    return folder


@pytest.fixture(autouse=True)
def empty_place(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in ("DETECTRON2_DATASETS", "COCO_DIR", "RESBACKBONE_DEBUG"):
        monkeypatch.delenv(name, raising=False)


def metrics(folder, kind="train"):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def rescored(data, run):
    return pycocotools_says(data / "annotations" / "instances_val2017.json", str(run / "detections.json"))


def error_of(argv, capsys):
    """The one line that the command ends with."""
    with pytest.raises(SystemExit) as exit:
        main_of(lambda: train_coco.main([str(word) for word in argv]))
    assert isinstance(exit.value.code, str) and len(exit.value.code.splitlines()) == 1
    assert capsys.readouterr().err == ""
    return exit.value.code


# A run


@needs_detectron2
def test_a_run_leaves_everything_in_its_folder(finished, gaps):
    names = {path.name for path in finished.iterdir()}
    ours = {"config.yaml", "metrics.jsonl", "detections.json", "results.json", "report.html", "pictures"}
    assert ours | {"detectron2.yaml", "log.txt", "last_checkpoint", "model_final.pth"} <= names
    config, theirs = (yaml.safe_load((finished / name).read_text()) for name in ("config.yaml", "detectron2.yaml"))
    assert config["engine"] == "detectron2" and config["precision"] == "fp32" and config["data"] == str(gaps)
    assert config["effective"]["rate"] == theirs["SOLVER"]["BASE_LR"] == 0.002
    assert theirs["MODEL"]["BACKBONE"]["NAME"] == "build_resbackbone_fpn"
    assert theirs["INPUT"]["FORMAT"] == "RGB" and theirs["SOLVER"]["MAX_ITER"] == 2
    assert "Saving checkpoint" in (finished / "log.txt").read_text()


@needs_detectron2
def test_its_metrics_are_those_of_the_other_engine(finished):
    lines, schedule = metrics(finished), RECIPES["short"].schedule
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        parts = [line[f"loss_{name}"] for name in ("classifier", "box_reg", "objectness", "rpn_box_reg")]
        assert line["loss"] == pytest.approx(sum(parts)) and all(map(math.isfinite, parts))
        spent = [line[f"{part}_seconds"] for part in ("data", "forward", "backward", "optimizer")]
        assert min(spent) > 0 and sum(spent) < line["seconds"] and line["memory_mib"] > 0
    rates = [schedule.for_batch(2, 8, scale_rate=False).learning_rate(step) for step in (0, 1)]
    assert [line["lr"] for line in lines] == pytest.approx(rates)
    [evaluation] = metrics(finished, "eval")
    assert evaluation["step"] == 2 and set(METRICS) <= evaluation.keys()


@needs_detectron2
def test_the_detections_rescored_by_pycocotools_give_the_results(finished, gaps):
    results, detections = (json.loads((finished / name).read_text()) for name in ("results.json", "detections.json"))
    assert rescored(gaps, finished) == [results["bbox"][name] for name in METRICS]
    assert results["images"] == 3 and results["detections"] == len(detections) > 0
    content = json.loads((gaps / "annotations" / "instances_val2017.json").read_text())
    assert {entry["category_id"] for entry in detections} <= {category["id"] for category in content["categories"]}


@needs_detectron2
def test_labels_are_the_categories_in_order_and_boxes_those_of_the_annotations(gaps):
    from detection.detectron2_engine import dataset_dicts

    content = json.loads((gaps / "annotations" / "instances_train2017.json").read_text())
    entries = dataset_dicts(open_split(gaps, "train"))
    ids = sorted(category["id"] for category in content["categories"])
    assert ids != list(range(1, len(ids) + 1))
    assert [entry["image_id"] for entry in entries] == [image["id"] for image in content["images"]]
    for entry, image in zip(entries, content["images"], strict=True):
        assert Path(entry["file_name"]).is_file() and (entry["width"], entry["height"]) == (64, 64)
        wanted = [a for a in content["annotations"] if a["image_id"] == image["id"] and not a["iscrowd"]]
        assert [ids[found["category_id"]] for found in entry["annotations"]] == [a["category_id"] for a in wanted]
        for found, annotation in zip(entry["annotations"], wanted, strict=True):
            (x, y, w, h), (x1, y1, x2, y2) = annotation["bbox"], found["bbox"]
            assert (x, y, w, h) == pytest.approx((x1, y1, x2 - x1, y2 - y1), abs=1e-4)


@needs_detectron2
def test_the_backbone_it_trained_loads_here_and_started_from_the_weights_given(gaps, tmp_path):
    torch.save(build_resnet_backbone(18).state_dict(), tmp_path / "start.pth")
    train_coco.main(
        [*QUICK, "--data", str(gaps), "--max-steps", "1", "--output", "run", "--weights", str(tmp_path / "start.pth")]
    )
    trained = build_resnet_backbone(18, weights="run/model_final.pth").state_dict()
    start = build_resnet_backbone(18, weights=tmp_path / "start.pth").state_dict()
    moved = {name for name, x in trained.items() if not torch.equal(x, start[name])}
    assert moved and not [name for name in moved if name.startswith(("conv1", "layer1")) or "bn" in name]


@needs_detectron2
@pytest.mark.parametrize("variant", ["c4", "dc5"])
def test_the_other_variants_train_and_resume(gaps, variant, capsys):
    argv = [*QUICK, "--data", str(gaps), "--variant", variant, "--output", "run"]
    train_coco.main([*argv, "--max-steps", "1"])
    train_coco.main([*argv, "--max-steps", "2", "--resume"])
    assert "resumed at step 1 to 2" in capsys.readouterr().out
    assert [line["step"] for line in metrics(Path("run"))] == [1, 2]
    state = torch.load("run/model_final.pth", weights_only=True)
    stage5 = {"c4": "roi_heads.res5.0.conv1.weight", "dc5": "backbone.body.layer4.0.conv1.weight"}
    assert {variant for variant, name in stage5.items() if name in state["model"]} == {variant}
    assert state["trainer"]["iteration"] == 1 and state["trainer"]["hooks"]["LRScheduler"]["last_epoch"] == 2


@needs_detectron2
def test_sgd_is_detectron2s_own_and_evaluations_on_the_way_are_recorded(gaps, monkeypatch):
    sgd = replace(RECIPES["short"], schedule=RECIPES["1x"].schedule, optimizer="sgd", clip_grad=None, batch_size=16)
    monkeypatch.setitem(RECIPES, "short", sgd)
    periods = ["--eval-period", "1", "--checkpoint-period", "1"]
    train_coco.main([*QUICK, *periods, "--data", str(gaps), "--max-steps", "2", "--output", "run"])
    assert [line["step"] for line in metrics(Path("run"), "eval")] == [1, 2]
    state = torch.load("run/model_0000000.pth", weights_only=True)
    assert {group["momentum"] for group in state["trainer"]["optimizer"]["param_groups"]} == {0.9}
    assert metrics(Path("run"))[0]["lr"] == pytest.approx(0.02 / 8 * 0.001)  # batch 2 of 16, at the warm-up's start


@needs_detectron2
def test_two_processes_train_one_detector_and_evaluate_every_image_once(gaps):
    argv = [*QUICK, "--data", str(gaps), "--max-steps", "2", "--output", "run"]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [*start, str(TOOLS / "train_coco.py"), *argv], env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    assert "2 images per update on 2 cpu" in process.stdout and process.stdout.count("from step 0") == 1
    assert [line["step"] for line in metrics(Path("run"))] == [1, 2]
    results = json.loads(Path("run/results.json").read_text())
    assert results["images"] == 3 and rescored(gaps, Path("run")) == [results["bbox"][name] for name in METRICS]


@needs_detectron2
def test_every_recipe_can_be_said_in_detectron2s_words():
    from detection.detectron2_engine import KEYS

    taken = [recipe for name, recipe in RECIPES.items() if not name.startswith("paper-")]  # those are refused
    assert {name for recipe in taken for name in recipe.detector} <= {*KEYS, "anchor_scale"}


# What is refused


@needs_detectron2
@pytest.mark.parametrize(
    "argv, says",
    [
        (["--precision", "bf16"], "--precision bf16: --engine detectron2 trains in fp32"),
        (["--skip-bad-images"], "--skip-bad-images: --engine detectron2 stops at the first"),
        (["--norm", "LN"], "unknown norm 'LN'"),
        (["--norm", "FrozenBN"], "norm='FrozenBN' without weights would freeze random layers"),
        (["--frozen-through", "c9"], "unknown part to freeze through 'c9'"),
        (["--weights", "nowhere.pth"], "weights 'nowhere.pth': no such file"),
        (["--engine", "mmdet"], "unknown engine 'mmdet'; choose from torchvision, detectron2"),
    ],
)
def test_a_wrong_option_is_one_line_that_names_it_and_nothing_is_written(gaps, capsys, argv, says):
    assert says in error_of([*QUICK, "--data", gaps, "--max-steps", "1", *argv], capsys)
    assert list(Path().iterdir()) == []


@needs_detectron2
@pytest.mark.usefixtures("finished")  # after which the imports have warned of what they warn of
def test_a_loss_that_is_not_finite_ends_the_run_in_one_line(gaps, monkeypatch, capsys):
    from detectron2.modeling import GeneralizedRCNN

    forward = GeneralizedRCNN.forward
    diverged = lambda self, batch: {name: loss * math.inf for name, loss in forward(self, batch).items()}  # noqa: E731
    monkeypatch.setattr(GeneralizedRCNN, "forward", diverged)
    said = error_of([*QUICK, "--data", gaps, "--max-steps", "1", "--output", "run"], capsys)
    assert "Loss became infinite or NaN at iteration=0" in said
    assert not Path("run/model_final.pth").exists()


@needs_detectron2
def test_a_run_of_the_other_engine_is_not_resumed(finished, capsys):
    said = error_of(["--output", finished, "--resume", "--engine", "torchvision"], capsys)
    assert "--engine torchvision: the run in" in said and "was made with detectron2" in said


def test_without_detectron2_it_is_one_line_that_says_how_to_install_it(gaps, capsys, monkeypatch):
    monkeypatch.setattr(train_coco, "find_spec", lambda name: None)
    said = error_of([*QUICK, "--data", gaps], capsys)
    assert "detectron2 is not installed; pip install --no-build-isolation git+https://github.com/" in said
    assert list(Path().iterdir()) == []
