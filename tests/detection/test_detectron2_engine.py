import importlib
import importlib.util
import json
import math
import os
import shutil
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
from resbackbone.tools import evaluate_coco, train_coco

TOOLS = Path(__file__).parents[2] / "tools"

needs_detectron2 = pytest.mark.skipif(
    importlib.util.find_spec("detectron2") is None,
    reason="detectron2 is not installed; it has no release on the registry",
)
QUICK = ["--engine", "detectron2", "--recipe", "short", "--depth", "18", "--device", "cpu", "--batch-size", "2"]
QUICK += ["--log-period", "1", "--pictures", "1"]


@pytest.fixture(scope="module")
def gaps(module_path):
    """A small data set; its category ids have gaps, as COCO's own have."""
    return make_shapes(module_path / "gaps", train_images=6, val_images=3, size=64)


@pytest.fixture(scope="module")
def finished(gaps, module_path):
    """A run of two steps; tests only read it."""
    folder = module_path / "finished"
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
    assert ours | {"checkpoints", "detectron2.yaml", "model_final.pth"} <= names
    config, theirs = (yaml.safe_load((finished / name).read_text()) for name in ("config.yaml", "detectron2.yaml"))
    assert config["engine"] == "detectron2" and config["precision"] == "fp32" and config["data"] == str(gaps)
    assert theirs["MODEL"]["BACKBONE"]["NAME"] == "build_resbackbone_fpn" and theirs["INPUT"]["FORMAT"] == "RGB"


@needs_detectron2
def test_the_detections_rescored_by_pycocotools_give_the_results(finished, gaps):
    results, detections = (json.loads((finished / name).read_text()) for name in ("results.json", "detections.json"))
    assert rescored(gaps, finished) == [results["bbox"][name] for name in METRICS]
    assert results["images"] == 3 and results["detections"] == len(detections) > 0
    content = json.loads((gaps / "annotations" / "instances_val2017.json").read_text())
    assert {entry["category_id"] for entry in detections} <= {category["id"] for category in content["categories"]}


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
@pytest.mark.parametrize("variant", ["fpn", "c4", "dc5"])
def test_a_resumed_run_ends_like_one_left_alone(gaps, variant):
    argv = [*QUICK, "--data", str(gaps), "--variant", variant]
    train_coco.main([*argv, "--max-steps", "2", "--output", "straight"])
    train_coco.main([*argv, "--max-steps", "1", "--output", "run"])
    train_coco.main([*argv, "--max-steps", "2", "--output", "run", "--resume"])
    states = [torch.load(f"{name}/model_final.pth", weights_only=True)["model"] for name in ("run", "straight")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())
    losses = [line[name] for line in metrics(Path("run")) for name in line if "loss" in name]
    assert len(losses) == 10 and all(map(math.isfinite, losses))
    stage5 = {"c4": "roi_heads.res5.0.conv1.weight"}.get(variant, "backbone.body.layer4.0.conv1.weight")
    assert stage5 in states[0]


@needs_detectron2
@pytest.mark.parametrize("changes", [{}, {"cascade_ious": (0.6, 0.7, 0.8), "box_loss": "giou"}])
def test_losses_are_detectron2s_on_the_same_images_in_its_own_terms(gaps, changes):
    from detectron2.structures import Boxes, Instances
    from detectron2.utils.events import EventStorage

    from detection.detectron2_engine import Detectron2Detector, detectron2_config

    options = train_coco.complete(train_coco.parse(train_coco.Options, [*QUICK, "--data", str(gaps)]))
    recipe = replace(RECIPES["short"], detector=replace(RECIPES["short"].detector, **changes))
    config = detectron2_config(options, recipe, num_classes=10, device=torch.device("cpu"))
    dataset = open_split(gaps, "train")
    detector = Detectron2Detector(config, dataset.categories).train()
    images, targets = zip(*(dataset[i] for i in range(2)), strict=True)
    entries = [
        {"image": image, "instances": Instances((64, 64), gt_boxes=Boxes(t["boxes"]), gt_classes=t["labels"] - 1)}
        for image, t in zip(images, targets, strict=True)
    ]
    torch.manual_seed(0)
    with EventStorage():
        wanted = detector.model(entries)
    torch.manual_seed(0)
    found = detector([image / 255 for image in images], targets)
    stages = [f"_{i}" for i in range(3)] if changes else [""]
    of_boxes = {f"loss_{name}{stage}" for name in ("classifier", "box_reg") for stage in stages}
    assert found.keys() == {*of_boxes, "loss_objectness", "loss_rpn_box_reg"}
    torch.testing.assert_close(list(found.values()), list(wanted.values()))


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
def test_every_recipe_of_detectrons_own_detector_can_be_said_in_detectron2s_words():
    from detection.detectron2_engine import detectron2_config

    device = torch.device("cpu")
    for name in ("1x", "2x", "3x", "rsb", "fast", "small", "short"):
        options = train_coco.Options(recipe=name, depth=18, variant="fpn")
        config = detectron2_config(options, RECIPES[name], num_classes=3, device=device)
        assert config.MODEL.ROI_HEADS.NUM_CLASSES == 3
    options = train_coco.Options(recipe="v2", depth=18, variant="fpn")
    with pytest.raises(ValueError, match="cannot train recipe v2 with its box_conv_layers, box_norm, fpn_norm, rpn_"):
        detectron2_config(options, RECIPES["v2"], num_classes=3, device=device)


# What is refused


@needs_detectron2
@pytest.mark.parametrize(
    "argv, says",
    [
        (["--precision", "bf16"], "--precision bf16: --engine detectron2 trains in fp32"),
        (["--norm", "LN"], "unknown norm 'LN'"),
        (["--norm", "FrozenBN"], "norm='FrozenBN' without weights would freeze random layers"),
        (["--frozen-through", "c9"], "unknown frozen_through 'c9'"),
        (["--weights", "nowhere.pth"], "weights 'nowhere.pth': no such file"),
        (["--engine", "mmdet"], "unknown engine 'mmdet'; choose from torchvision, detectron2"),
    ],
)
def test_a_wrong_option_is_one_line_that_names_it_and_nothing_is_written(gaps, capsys, argv, says):
    assert says in error_of([*QUICK, "--data", gaps, "--max-steps", "1", *argv], capsys)
    assert list(Path().iterdir()) == []


@needs_detectron2
@pytest.mark.usefixtures("finished")  # after which the imports have warned of what they warn of
def test_a_loss_or_proposals_that_are_not_finite_end_the_run_in_one_line(gaps, monkeypatch, capsys):
    from detectron2.modeling import GeneralizedRCNN

    def diverged(self, batch):
        raise FloatingPointError("Predicted boxes or scores contain Inf/NaN.\nTraining has diverged.")

    forward = GeneralizedRCNN.forward
    infinite = lambda self, batch: {name: loss * math.inf for name, loss in forward(self, batch).items()}  # noqa: E731
    for wrong, says in ((infinite, "loss_classifier is inf"), (diverged, "detectron2: Predicted boxes or scores")):
        monkeypatch.setattr(GeneralizedRCNN, "forward", wrong)
        argv = [*QUICK, "--data", gaps, "--max-steps", "1", "--output", wrong.__name__.strip("<>")]
        assert says in error_of(argv, capsys)
    assert not list(Path().glob("*/model_final.pth"))


@needs_detectron2
def test_a_run_of_the_other_engine_or_on_other_classes_is_not_resumed(finished, gaps, tmp_path, capsys):
    said = error_of(["--output", finished, "--resume", "--engine", "torchvision"], capsys)
    assert "--engine torchvision: the run in" in said and "was made with detectron2" in said
    shutil.copytree(gaps, tmp_path / "other")
    for path in (tmp_path / "other" / "annotations").iterdir():
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, "categories": [*content["categories"], {"id": 99, "name": "new"}]}))
    said = error_of(["--output", finished, "--resume", "--data", tmp_path / "other", "--max-steps", "3"], capsys)
    assert "was trained on other categories" in said


@needs_detectron2
def test_its_run_holds_no_detector_of_this_package(finished, capsys):
    with pytest.raises(SystemExit, match="holds no detector"):
        main_of(lambda: evaluate_coco.main([str(finished)]))


def test_without_detectron2_it_is_one_line_that_says_how_to_install_it(gaps, capsys, monkeypatch):
    monkeypatch.setattr(train_coco, "find_spec", lambda name: None)
    said = error_of([*QUICK, "--data", gaps], capsys)
    assert "detectron2 is not installed; build it with pip install --no-build-isolation git+https://github.com/" in said
    assert list(Path().iterdir()) == []
