import contextlib
import io
import json
import math
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torchvision
import yaml
from commands import (
    TOOLS,
    assert_ended_alike,
    die_in_second_checkpoint,
    differing,
    error_line,
    kill_after_three_steps,
    metrics,
    timeless,
    torchrun,
)
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors.torch import load_file, save_file
from torchvision.models.detection import FasterRCNN as TorchvisionFasterRCNN
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.rpn import RPNHead

from detection import data as data_module
from detection.evaluate import METRICS
from detection.faster_rcnn import FasterRCNN, build_faster_rcnn
from detection.recipes import RECIPES
from detection.saved import load_detector, save_detector
from detection.shapes import make_shapes
from resbackbone import build_resnet_backbone
from resbackbone.cli import load, training
from resbackbone.cli import options as options_module
from resbackbone.cli.command import parse
from resbackbone.engine.lock import release_all_folders
from resbackbone.tools import convert_weights, detect, evaluate_coco, export, train_coco

error_of = partial(error_line, train_coco.main)

QUICK = ["--recipe", "short", "--depth", "18", "--device", "cpu", "--batch-size", "2", "--log-period", "1"]
# Where the network does not matter; a ResNet-18 takes seconds to write and read.
TINY = [*QUICK[:2], "--backbone", "timm:test_resnet", *QUICK[4:], "--pictures", "0"]
SIX_STEPS = [*QUICK, "--checkpoint-period", "2", "--max-steps", "6", "--pictures", "0"]
SIX_STEPS += ["--ema", "0.9", "--accumulate", "2", "--repeat-factor", "0.9"]  # are resumed exactly too


@pytest.fixture(scope="module")
def shapes(module_path):
    return make_shapes(module_path / "shapes", train_images=6, val_images=3, size=64)


@pytest.fixture(scope="module")
def straight(shapes, module_path):
    """A run of six steps that was left alone; tests only read it."""
    folder = module_path / "straight"
    train_coco.main([*SIX_STEPS, "--data", str(shapes), "--output", str(folder), "--pictures", "3"])
    return folder


@pytest.fixture
def own_shapes(shapes, tmp_path):
    """A copy of the data set that a test may harm."""
    return Path(shutil.copytree(shapes, tmp_path / "own"))


def files(folder=Path()):
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def config_of(run, resumed=()):
    """A run's config.yaml without the lines on where it was resumed, which are `resumed`."""
    config = yaml.safe_load(Path(run, "config.yaml").read_text())
    assert config["effective"].pop("resumed", []) == list(resumed)
    return config


def annotation_file(folder, split="train"):
    return folder / "annotations" / f"instances_{split}2017.json"


# A run


def test_a_run_leaves_everything_in_its_folder(straight):
    names = {path.name for path in straight.iterdir()}
    wanted = {"config.yaml", "metrics.jsonl", "checkpoints", "model.safetensors", "detections.json", "results.json"}
    wanted |= {"pictures", "report.html"}
    assert wanted <= names
    assert len(names - wanted) == 1 and any(name.startswith("events.out.tfevents") for name in names)
    steps = sorted(path.name for path in (straight / "checkpoints").iterdir())
    assert steps == ["step_0000002", "step_0000004", "step_0000006"]
    assert len(list((straight / "pictures").glob("*.jpg"))) == 3
    assert not [path for path in straight.rglob("*") if path.name.endswith((".tmp", ".partial"))]


def test_a_run_logs_every_step_and_its_evaluation(straight):
    lines = metrics(straight)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        parts = [line[f"loss_{name}"] for name in ("classifier", "box_reg", "objectness", "rpn_box_reg")]
        assert line["loss"] == pytest.approx(sum(parts)) and all(map(math.isfinite, parts))
        spent = [line[f"{part}_seconds"] for part in ("data", "forward", "backward", "optimizer")]
        assert min(spent) > 0 and sum(spent) < line["seconds"] and line["memory_mib"] > 0
    assert [line["lr"] for line in lines] == sorted(line["lr"] for line in lines)  # still warming up
    [evaluation] = metrics(straight, "eval")
    assert evaluation["step"] == 6 and set(METRICS) <= evaluation.keys()


def test_a_run_states_the_whole_configuration_it_ran_with(straight, shapes):
    config = yaml.safe_load((straight / "config.yaml").read_text())
    assert config["data"] == str(shapes) and config["max_steps"] == 6 and config["checkpoint_period"] == 2
    assert (config["depth"], config["recipe"], config["variant"], config["seed"]) == (18, "short", "fpn", 0)
    assert None not in (config["workers"], config["precision"], config["batch_size"])
    assert config["effective"]["steps"] == 4 * 1100 and config["effective"]["rate"] == 0.002


def test_the_detections_rescored_by_pycocotools_give_the_results(straight, shapes):
    results = json.loads((straight / "results.json").read_text())
    assert json.loads((straight / "detections.json").read_text())
    assert list(rescored(shapes, straight)) == [results["bbox"][name] for name in METRICS]
    assert results["images"] == 3


def rescored(data, run):
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotation_file(data, "val")))
        scorer = COCOeval(truth, truth.loadRes(str(run / "detections.json")), "bbox")
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return [None if value < 0 else value for value in scorer.stats]


def test_real_images_train_and_evaluate(data, capsys):
    train_coco.main(
        [*QUICK, "--data", str(data / "coco_tiny"), "--max-steps", "2", "--output", "run", "--pictures", "0"]
    )
    results = json.loads(Path("run/results.json").read_text())
    assert results["images"] == 50 and len(results["per_class"]) == 80
    assert rescored(data / "coco_tiny", Path("run")) == [results["bbox"][name] for name in METRICS]
    said = capsys.readouterr().out
    assert "crowds (6)" in said and "AP " in said


def test_without_data_it_draws_the_embedded_set_and_the_run_can_be_used_from_anywhere(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(data_module, "EMBEDDED_SET", {"train_images": 4, "val_images": 2, "size": 64})
    train_coco.main(["--device", "cpu", "--batch-size", "2", "--max-steps", "1"])
    first, second, *others = capsys.readouterr().out.splitlines()
    assert "built-in data set in datasets/shapes; to train on yours, give --data DIR, which should hold" in first
    assert "drawing it" in second and "run:   runs/shapes-r18-fpn-short" in others
    run = Path("runs/shapes-r18-fpn-short").absolute()
    before = (run / "results.json").read_text()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    evaluate_coco.main([str(run), "--device", "cpu"])
    assert json.loads((run / "results.json").read_text())["bbox"] == json.loads(before)["bbox"]
    train_coco.main(["--output", str(run), "--resume"])
    assert not list(Path().iterdir())
    (run.parents[1] / "datasets").rename("moved")
    said = error_line(evaluate_coco.main, [str(run), "--device", "cpu"])
    assert said.startswith(f"error: --data (from config.yaml) {run.parents[1]}/datasets/shapes: no such folder")


def test_synthetic_images_show_the_speed_and_are_not_evaluated(capsys):
    train_coco.main([*TINY, "--data", "synthetic", "--accumulate", "2", "--max-steps", "2", "--output", "run"])
    first, second = metrics(Path("run"))
    assert first["loss"] > 0 and second["data_seconds"] < 0.1 * second["seconds"]
    assert "nothing is evaluated" in capsys.readouterr().out
    assert not Path("run/results.json").exists() and not metrics(Path("run"), "eval")
    said = error_of(["--data", "synthetic", "--device", "cpu", "--eval-period", "5"], capsys)
    assert "--eval-period 5: synthetic images are not evaluated" in said


def test_a_saved_configuration_starts_a_new_run_and_flags_override_it(straight):
    before = files(straight)
    train_coco.main(["--config", str(straight / "config.yaml"), "--max-steps", "1", "--output", "run"])
    config, saved = (yaml.safe_load((folder / "config.yaml").read_text()) for folder in (Path("run"), straight))
    assert {**config, "max_steps": 6} == saved
    assert metrics(Path("run"))[0]["loss"] == metrics(straight)[0]["loss"]
    assert files(straight) == before


def test_another_seed_gives_another_run(shapes, straight):
    train_coco.main([*SIX_STEPS, "--data", str(shapes), "--max-steps", "1", "--seed", "1", "--output", "run"])
    assert metrics(Path("run"))[0]["loss"] != metrics(straight)[0]["loss"]


def test_evaluations_on_the_way_change_nothing_of_the_training_and_the_best_is_kept(
    shapes, straight, monkeypatch, capsys
):
    scores = iter([0.9, 0.1])
    monkeypatch.setattr(train_coco.Detection, "score", lambda *_: next(scores))
    train_coco.main([*SIX_STEPS, "--data", str(shapes), "--output", "run", "--eval-period", "4", "--val-loss"])
    evaluations = metrics(Path("run"), "eval")
    assert [line["step"] for line in evaluations] == [4, 6]
    for line in evaluations:
        parts = [line[f"loss_{name}"] for name in ("classifier", "box_reg", "objectness", "rpn_box_reg")]
        assert line["loss"] == pytest.approx(sum(parts))
    assert differing(Path("run/best/model.safetensors"), Path("run/checkpoints/step_0000004/average.safetensors")) == []
    assert "at step 4, in best/" in capsys.readouterr().out
    assert "Best evaluation: after update 4, AP " in Path("run/report.html").read_text()
    kept = files(Path("run/best"))
    evaluate_coco.main(["run/best", "--device", "cpu"])
    again = json.loads(Path("run/eval-best/results.json").read_text())["bbox"]
    assert again.items() <= evaluations[0].items() and files(Path("run/best")) == kept
    assert_ended_alike(Path("run"), straight)


def test_no_detections_give_zero_and_the_reason_is_printed(shapes, capsys):
    argv = [*TINY, "--data", str(shapes), "--max-steps", "1", "--output", "run"]
    train_coco.main([*argv, "--recipe.detector.box-score-thresh", "0.999"])
    said = capsys.readouterr().out
    assert "no detections at all" in said and "AP 0.0, AP50 0.0 on 3 images" in said
    assert json.loads(Path("run/detections.json").read_text()) == []


@pytest.mark.parametrize("variant", [pytest.param("c4", marks=pytest.mark.slow), "dc5"])
def test_the_other_variants_train_and_resume(shapes, variant):
    argv = [*QUICK, "--data", str(shapes), "--variant", variant, "--output", "run", "--pictures", "0"]
    train_coco.main([*argv, "--max-steps", "1"])
    train_coco.main([*argv, "--max-steps", "2", "--resume"])
    assert [line["step"] for line in metrics(Path("run"))] == [1, 2]


# Values of a recipe


def test_a_value_that_is_set_is_used_printed_kept_and_resumed(shapes, capsys):
    argv = [*TINY, "--data", str(shapes), "--output", "run"]
    values = ["--lr", "0.004", "--epochs", "2", "--image-size", "96", "--weight-decay", "0.01", "--clip-grad", "0"]
    values += ["--recipe.detector.rpn-nms-thresh=0.6", "--recipe.augmentation.short-sides", "64", "80"]
    train_coco.main([*argv, *values, "--recipe.augmentation.photometric", "True", "--max-steps", "1"])
    said = " ".join(capsys.readouterr().out.split())
    assert "recipe: short, but " in said and "detector.rpn_nms_thresh 0.6 (0.7)" in said and "lr 0.004" in said
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    kept = [config[f"recipe.{name}"] for name in ("detector.rpn_nms_thresh", "augmentation.short_sides")]
    assert kept == [0.6, [64, 80]] and config["recipe.augmentation.photometric"] is True
    assert (config["lr"], config["epochs"], config["clip_grad"]) == (0.004, 2.0, 0.0)
    assert config["effective"]["rate"] == 0.004 and config["effective"]["steps"] == 6  # 2 x 6 images, 2 at a time
    [folder] = Path("run/checkpoints").iterdir()
    groups = json.loads((folder / "state.json").read_text())["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0]
    detector = load_detector("run/model.safetensors")
    assert detector.transform.min_size == (96,) and detector.rpn.nms_thresh == 0.6

    train_coco.main([*argv[:0], "--output", "run", "--resume", "--max-steps", "2"])
    assert config_of("run", ["after update 1"]) == {**config, "max_steps": 2}
    train_coco.main(["--config", "run/config.yaml", "--lr", "0.003", "--recipe.detector.rpn-nms-thresh", "0.5"])
    again = yaml.safe_load((next(Path("runs").iterdir()) / "config.yaml").read_text())
    assert (again["lr"], again["recipe.detector.rpn_nms_thresh"]) == (0.003, 0.5)
    assert again["recipe.augmentation.short_sides"] == [64, 80]


def test_it_says_that_no_class_is_rare(shapes, capsys):
    argv = [*TINY, "--data", str(shapes), "--output", "run", "--max-steps", "1"]
    train_coco.main([*argv, "--repeat-factor", "0.0001"])
    assert "every class is in at least 0.01 % of the images, so none is drawn" in capsys.readouterr().out
    assert yaml.safe_load(Path("run/config.yaml").read_text())["repeat_factor"] == 0.0001


@pytest.mark.parametrize("name", ["small", "paper-vgg16-c5"])
def test_a_printed_recipe_is_a_file_for_config_that_sets_what_was_set_and_lists_the_rest(name, capsys):
    argv = ["--recipe", name, "--recipe.detector.box-nms-thresh", "0.4", "--clip-grad", "0", "--device", "cpu"]
    train_coco.main([*argv, "--batch-size", "3", "--lr", "0.003", "--print-recipe"])
    Path("recipe.yaml").write_text(printed := capsys.readouterr().out)
    assert [line.partition(":")[0] for line in printed.splitlines() if not line.startswith("#")] == [
        *("recipe", "lr", "batch_size", "clip_grad", "recipe.detector.box_nms_thresh")
    ]
    options = parse(train_coco.Options, ["--config", "recipe.yaml", "--device", "cpu"])
    recipe = RECIPES[name]
    assert (options.batch_size, options.lr) == (3, 0.003)
    assert train_coco.recipe_of(options) == replace(recipe, detector=replace(recipe.detector, box_nms_thresh=0.4))


def test_a_printed_recipe_whose_lines_are_all_in_use_is_that_recipe(capsys):
    train_coco.main(["--recipe", "v2-100ep", "--print-recipe", "--device", "cpu"])
    comment, *lines = capsys.readouterr().out.split("\n# lr: ")
    Path("recipe.yaml").write_text(f"{comment}\nlr: {lines[0]}".replace("\n# ", "\n").replace("\nLines", "\n#", 1))
    Path("recipe.yaml").write_text(Path("recipe.yaml").read_text().replace("\nupdates", "\n#", 1))
    options = parse(train_coco.Options, ["--config", "recipe.yaml", "--device", "cpu"])
    assert train_coco.recipe_of(options) == (recipe := RECIPES["v2-100ep"])
    given = {name: getattr(options, name) for name in train_coco.SCHEDULE}
    assert recipe.schedule_for(3, images=10, **given) == recipe.schedule  # for another batch size it was set too


def test_a_size_that_is_set_by_its_name_wins_over_that_of_all_images():
    argv = ["--recipe", "1x", "--image-size", "400", "--recipe.augmentation.short-sides", "300", "310"]
    recipe = train_coco.recipe_of(parse(train_coco.Options, argv))
    assert recipe.augmentation.short_sides == (300, 310) and recipe.augmentation.max_size == 666
    assert (recipe.detector.min_size, recipe.detector.max_size) == (400, 666)


def test_norms_decay_as_the_optimizer_or_their_own_value_has_it():
    argv = ["--recipe", "1x", "--optimizer", "adamw", "--lr", "1e-4"]
    assert not train_coco.recipe_of(parse(train_coco.Options, argv)).decay_norms
    assert train_coco.recipe_of(parse(train_coco.Options, [*argv, "--recipe.decay-norms", "True"])).decay_norms


# Data of one's own


def without_val(folder):
    shutil.rmtree(folder / "val2017")
    annotation_file(folder, "val").unlink()
    return folder


def test_a_planned_run_is_resumed_and_repeated_by_the_flags_that_it_prints(shapes, capsys, monkeypatch):
    monkeypatch.setattr(train_coco, "seconds_of", lambda work: work() and 0.5)
    argv = ["--data", str(shapes), "--device", "cpu", "--batch-size", "2", "--pictures", "0", "--max-steps"]
    train_coco.main([*argv, "1", "--output", "run"])
    said = capsys.readouterr().out
    assert "plan:  10 minutes" in said
    [flags] = re.findall("equivalent flags: (.*)", said)
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    assert config["recipe"] == "scratch" and config["steps"] == config["effective"]["steps"] > 900
    assert flags == (
        f"--recipe scratch --batch-size 2 --anchor-scale {config['anchor_scale']} --steps {config['steps']} "
        "--image-size 128"
    )
    train_coco.main([*argv, "2", "--output", "run", "--minutes", "10", "--resume"])
    assert "--minutes 10: the resumed run keeps its plan" in capsys.readouterr().out
    assert config_of("run", ["after update 1"]) == {**config, "max_steps": 2}
    train_coco.main([*argv, "2", "--output", "again", *flags.split()])
    assert not differing("run/model.safetensors", "again/model.safetensors")


def test_the_time_for_a_named_recipe_sets_its_length_alone(shapes, capsys, monkeypatch):
    monkeypatch.setattr(train_coco, "seconds_of", lambda work: work() and 1.0)
    argv = ["--data", str(shapes), *QUICK, "--pictures", "0", "--max-steps", "1", "--output", "run"]
    train_coco.main([*argv, "--minutes", "5"])
    assert "plan:  5 minutes" in capsys.readouterr().out
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    short = RECIPES["short"].detector
    assert (config["image_size"], config["anchor_scale"]) == (short.min_size, short.anchor_scale)
    assert 100 < config["steps"] < 300


def test_anchors_are_fitted_to_the_boxes_without_a_time_too(shapes, capsys):
    train_coco.main([*QUICK, "--data", str(shapes), "--max-steps", "1", "--anchor-scale", "auto", "--output", "run"])
    [scale] = re.findall("anchors: --anchor-scale ([0-9.]+); they miss", capsys.readouterr().out)
    assert load_detector("run/model.safetensors").config.anchor_scale == float(scale)
    assert yaml.safe_load(Path("run/config.yaml").read_text())["anchor_scale"] == float(scale)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--minutes", "5", "--steps", "7"], "--minutes 5 and --steps 7: give one of them"),
        (["--minutes", "0"], "--minutes 0: must be a finite number above 0"),
        (["--minutes", "0.001"], "--minutes: too short; one update takes"),
        (["--minutes", "5", "--data", "synthetic"], "--minutes 5: give --steps for synthetic data"),
        (["--minutes", "5", "--compile"], "--minutes 5: give --steps for synthetic data"),
        (["--cuda-graphs"], "--cuda-graphs: needs an NVIDIA GPU; on other devices use --compile"),
        (["--anchor-scale", "none"], "--anchor-scale"),
        (["--anchor-scale", "auto", "--variant", "c4"], "--anchor-scale auto: is for fpn and real data"),
    ],
)
def test_a_time_that_cannot_be_planned_for_is_refused(shapes, flags, message):
    assert message in error_of([*QUICK, "--data", str(shapes), *flags])


@pytest.mark.slow
def test_a_compiled_run_trains_saves_and_evaluates(shapes, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # inductor takes minutes
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    argv = ["--data", str(shapes), "--device", "cpu", "--batch-size", "2", "--pictures", "0", "--max-steps", "2"]
    train_coco.main([*argv, "--output", "run", "--compile"])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert metrics(Path("run"))[-1]["step"] == 2
    assert yaml.safe_load(Path("run/config.yaml").read_text())["compile"] and Path("run/results.json").exists()


def test_a_recipe_that_is_asked_for_wins_over_that_of_the_datas_size(shapes, straight, tmp_path, monkeypatch):
    options = train_coco.Options(data=shapes, device="cpu")
    completed = train_coco.complete(options)
    assert (completed.recipe, completed.minutes) == ("scratch", 10)
    for other in ({"variant": "c4"}, {"engine": "detectron2"}):
        assert train_coco.recipe_for(replace(options, **other), shapes, "cpu") == "small"
    torch.save(build_resnet_backbone(18).state_dict(), tmp_path / "trunk.pth")
    detector = straight / "model.safetensors"
    for file, recipe in ((tmp_path / "trunk.pth", "scratch"), (detector, "small")):
        with_weights = replace(options, weights=str(file))
        assert train_coco.recipe_for(with_weights, shapes, "cpu") == recipe
        assert train_coco.recipe_for(with_weights, shapes, "cuda") == "small"
    for given in ({"recipe": "1x"}, {"steps": 3}, {"epochs": 2.0}):
        assert train_coco.complete(replace(options, **given)).minutes is None
    assert train_coco.complete(replace(options, recipe="1x")).recipe == "1x"
    assert train_coco.recipe_for(options, shapes, "cuda") == "small"
    monkeypatch.setattr("detection.recipes.SMALL_DATA", 6)
    assert train_coco.recipe_for(options, shapes, "cuda") == "1x"


def test_a_tenth_is_held_out_where_there_is_no_validation_split_and_found_again(own_shapes, capsys):
    argv = [*TINY, "--data", str(without_val(own_shapes)), "--output", "run"]
    train_coco.main([*argv, "--max-steps", "1"])
    said = capsys.readouterr().out
    assert "there is no validation split, so one image in 10 is held out for it" in said
    assert "train: 5 images" in said and "val:   1 images" in said
    config, results = config_of("run"), json.loads(Path("run/results.json").read_text())
    train_coco.main(["--output", "run", "--resume"])
    assert config_of("run", ["after update 1"]) == config
    assert json.loads(Path("run/results.json").read_text()) == results and results["images"] == 1


def test_files_in_any_places_are_trained_on_kept_and_found_again_and_a_leak_is_counted(own_shapes, capsys):
    (own_shapes / "more").mkdir()
    for split, place in (("train", "one.json"), ("val", "more/two.json")):
        annotation_file(own_shapes, split).rename(own_shapes / place)
    shutil.copy(own_shapes / "train2017/000000000002.jpg", own_shapes / "val2017/000001000001.jpg")
    given = ["--train-json", str(own_shapes / "one.json"), "--val-json", str(own_shapes / "more/two.json")]
    argv = [*QUICK, *given, "--output", "run", "--pictures", "0"]
    train_coco.main([*argv, "--val-images", str(own_shapes / "val2017"), "--max-steps", "1"])
    said = capsys.readouterr().out
    assert (
        f"{own_shapes}/one.json in the layout of a COCO file: {own_shapes}/one.json and {own_shapes}/more/two" in said
    )
    assert "train: 6 images" in said and "1 of 3 images of val are also in train: the AP will be too high" in said
    config, results = yaml.safe_load(Path("run/config.yaml").read_text()), Path("run/results.json").read_bytes()
    assert config["data"] is None and config["train_json"] == given[1] and config["val_images"].endswith("val2017")
    evaluate_coco.main(["run", "--device", "cpu"])
    assert Path("run/results.json").read_bytes() == results
    moved = Path(shutil.move(own_shapes, "moved"))
    files = {"train-json": "one.json", "val-json": "more/two.json", "val-images": "val2017"}
    argv = [word for name, place in files.items() for word in (f"--{name}", str(moved / place))]
    train_coco.main(["--output", "run", "--resume", "--max-steps", "2", *argv])
    assert [line["step"] for line in metrics(Path("run"))] == [1, 2]


def test_a_run_starts_from_a_detector_of_other_classes_with_a_new_head(own_shapes, straight, capsys):
    for split in ("train", "val"):
        content = json.loads(annotation_file(own_shapes, split).read_text())
        content["categories"] = [{"id": 5, "name": "shape"}]
        for annotation in content["annotations"]:
            annotation["category_id"] = 5
        annotation_file(own_shapes, split).write_text(json.dumps(content))
    weights = straight / "model.safetensors"
    argv = [*QUICK[:2], *QUICK[4:], "--data", str(own_shapes), "--weights", str(weights), "--max-steps", "1"]
    train_coco.main([*argv, "--output", "run"])
    said = capsys.readouterr().out
    parts = [f"roi_heads.box_predictor.{name}" for name in ("cls_score.weight", "cls_score.bias", "bbox_pred.weight")]
    assert f"weights: a detector of 10 classes, from {weights}; new, for 1 others: {', '.join(parts)}" in said
    before, after = load_file(weights), load_file("run/model.safetensors")
    frozen = [key for key in after if key.startswith(("backbone.conv1", "backbone.layer1"))]
    assert frozen and all(torch.equal(before[key], after[key]) for key in frozen)
    for key in ("rpn.head.cls_logits.weight", "roi_heads.box_head.fc6.weight"):
        assert (before[key] - after[key]).abs().max() < 1e-4  # one update of the warm-up
    assert after["roi_heads.box_predictor.cls_score.weight"].shape[0] == 2
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    assert (config["depth"], config["variant"]) == (18, "fpn")  # the weights'; nothing asked for them


def v2_of_torchvision(channels=16):
    """torchvision's V2 detector, smaller."""
    trunk = torchvision.models.resnet18(weights=None)
    backbone = _resnet_fpn_extractor(trunk, 5, norm_layer=torch.nn.BatchNorm2d)
    head = FastRCNNConvFCHead((256, 7, 7), [channels] * 4, [channels], norm_layer=torch.nn.BatchNorm2d)
    predictor = FastRCNNPredictor(channels, 3)
    rpn_head = RPNHead(256, 3, conv_depth=2)
    return TorchvisionFasterRCNN(backbone, rpn_head=rpn_head, box_head=head, box_predictor=predictor)


def test_torchvisions_v2_detector_is_fine_tuned_resumed_evaluated_and_converted_back(
    shapes, tmp_path, capsys, caplog, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    torch.save(v2_of_torchvision().state_dict(), "v2.pth")
    argv = [*QUICK[:2], *QUICK[4:], "--data", str(shapes), "--weights", "v2.pth", "--output", "run", "--pictures", "0"]
    train_coco.main([*argv, "--max-steps", "1"])
    said = capsys.readouterr().out
    assert "weights: a detector of 2 classes, from v2.pth; new, for 10 others: roi_heads.box_predictor." in said
    assert "frozen BN 28, trainable BN 0, " in said  # 20 of the trunk and 8 of the pyramid
    train_coco.main(["--output", "run", "--resume", "--max-steps", "2"])
    evaluate_coco.main(["run", "--device", "cpu"])
    convert_weights.main(["run/model.safetensors", "back.pth", "--to", "torchvision"])
    theirs = v2_of_torchvision()
    theirs.roi_heads.box_predictor = FastRCNNPredictor(16, 11)
    theirs.load_state_dict(torch.load("back.pth"))
    assert torch.equal(
        theirs.rpn.head.conv[1][0].weight, load_file("run/model.safetensors")["rpn.head.conv.1.0.weight"]
    )
    caplog.clear()
    monkeypatch.setattr(train_coco, "seconds_of", lambda work: work() and 0.5)
    argv = [*argv[:-4], "--output", "trainable", "--norm", "BN", "--max-steps", "1", "--pictures", "0"]
    train_coco.main([*argv, "--minutes", "2"])
    assert "frozen BN 5, trainable BN 23, " in capsys.readouterr().out  # frozen: those up to c2
    for assumed in ("do not state how their detector was built", "do not state all settings"):
        assert caplog.text.count(assumed) == 1  # though the plan builds a detector too
    moved = load_file("trainable/model.safetensors")["roi_heads.box_head.3.1.running_var"]
    assert not torch.equal(moved, torch.ones(16))


def test_of_another_detectors_weights_the_backbone_is_taken_and_the_rest_is_named(tmp_path):
    torch.save(
        v2_of_torchvision().state_dict() | {"roi_heads.mask_head.0.0.weight": torch.zeros(1)}, tmp_path / "m.pth"
    )
    options, said = train_coco.Options(weights=str(tmp_path / "m.pth"), depth=18, variant="fpn"), []
    built = train_coco.build(options, RECIPES["1x"], {1: "cat"}, said.append)
    assert built.backbone.config.fpn_norm == "FrozenBN" and built.config.rpn_conv_depth == 1
    assert len(said) == 1 and "m.pth; left out: rpn.head.conv.0.0.weight, rpn.head" in said[0] and "(39)" in said[0]


def test_the_stages_of_a_cascade_are_those_of_the_weights_whatever_the_recipe_has(tmp_path):
    pyramid = build_resnet_backbone(18, fpn=True, fpn_channels=8)
    cascade = build_faster_rcnn(pyramid, 2, cascade_ious=(0.5, 0.55, 0.6), representation_size=8)
    save_detector(cascade, tmp_path / "m.safetensors")
    options = train_coco.Options(weights=str(tmp_path / "m.safetensors"), depth=18, variant="fpn")
    for recipe, line in (("cascade", "recipe: without its detector.cascade_ious"), ("1x", "weights: a detector of 2")):
        said = []
        built = train_coco.build(options, RECIPES[recipe], {1: "cat"}, said.append)
        assert built.roi_heads.ious == (0.5, 0.55, 0.6) and said[0].startswith(line)


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--depth", "34"], "are for depth=18, but you asked for depth=34"),
        (["--variant", "c4"], "--variant c4: the detector in {} is fpn; leave it out"),
        (
            ["--recipe", "cascade"],
            "--recipe cascade trains 3 box heads, and the detector in {} has 1: give another recip",
        ),
        (["--norm", "GN"], "are for norm=BN, but you asked for norm=GN"),
        (["--anchor-scale", "8"], "--anchor-scale 8.0: the detector in {} has 4.0; leave the option out"),
        (["--recipe.backbone.fpn-norm", "GN"], "fpn_norm GN: the detector in {} comes with its backbone; leave the"),
    ],
)
def test_a_detectors_weights_for_another_network_are_an_error(shapes, straight, capsys, argv, says):
    weights = straight / "model.safetensors"
    wanted = [*QUICK[:2], *QUICK[4:], "--data", shapes, "--max-steps", "1", "--weights", weights]
    assert says.format(weights) in error_of([*wanted, *argv], capsys)


# On a network of timm

NETWORK = "timm:tf_mobilenetv3_small_minimal_100"  # small, of another input than ours, with TensorFlow's padding
ON_TIMM = [*QUICK[:2], *QUICK[4:], "--image-size", "64", "--checkpoint-period", "2", "--max-steps", "6"]


@pytest.fixture(scope="module")
def timm_weights(module_path):
    """A file of NETWORK as timm's users have it."""
    torch.manual_seed(0)
    timm = pytest.importorskip("timm")
    save_file(timm.create_model(NETWORK[5:], num_classes=5).state_dict(), module_path / "timm.safetensors")
    return module_path / "timm.safetensors"


@pytest.fixture(scope="module")
def on_timm(shapes, timm_weights, module_path):
    """A run on NETWORK that was left alone; tests only read it."""
    argv = [*ON_TIMM, "--backbone", NETWORK, "--weights", str(timm_weights)]
    train_coco.main([*argv, "--data", str(shapes), "--output", str(module_path / "on_timm")])
    return module_path / "on_timm"


def test_a_run_on_a_network_of_timm_resumes_exactly_and_is_loaded_as_a_resnets_is(
    shapes, timm_weights, on_timm, capsys
):
    argv = [*ON_TIMM, "--backbone", NETWORK, "--weights", str(timm_weights), "--data", str(shapes)]
    die_in_second_checkpoint(train_coco.main, argv, Path("run"))
    train_coco.main(["--output", "run", "--resume", "--max-steps", "6"])
    assert_ended_alike(Path("run"), on_timm)
    Path("run/results.json").unlink()
    evaluate_coco.main(["run", "--data", str(shapes), "--device", "cpu"])
    results = [json.loads((folder / "results.json").read_text()) for folder in (on_timm, Path("run"))]
    assert results[0]["bbox"] == results[1]["bbox"]
    photo = str(next((shapes / "val2017").iterdir()))
    detect.main(["run", photo, "--device", "cpu", "--output", "found"])
    assert Path("found/detections.json").is_file()
    detector = load_detector(on_timm)
    assert detector.backbone.summary().startswith("frozen BN 34, trainable BN 0")
    assert (detector.backbone.config.mean, detector.backbone.config.frozen_through) == ((0.5, 0.5, 0.5), "c2")
    assert list(detector.backbone.features) == ["p2", "p3", "p4", "p5"] and detector.backbone.out_channels == 64
    given, trained = load_file(timm_weights), load_file(on_timm / "model.safetensors")
    moved = {key for key, x in given.items() if not torch.equal(x, trained.get(f"backbone.network.{key}", x))}
    assert "blocks.4.0.conv_pw.weight" in moved and not any(key.startswith(("conv_stem", "bn1")) for key in moved)
    assert not any(key.endswith("running_mean") for key in moved)
    assert "tf_mobilenetv3_small_minimal_100-fpn" in (on_timm / "report.html").read_text()


def test_a_run_starts_from_a_detector_on_a_network_of_timm(own_shapes, on_timm, capsys):
    path = on_timm / "model.safetensors"
    argv = [*QUICK[:2], *QUICK[4:], "--data", str(own_shapes), "--weights", str(path), "--max-steps", "1"]
    train_coco.main([*argv, "--weights", str(on_timm), "--pictures", "0"])  # its folder does as well
    assert "weights: a detector of 10 classes" in capsys.readouterr().out
    (run,) = Path("runs").iterdir()
    assert run.name == "own-tf_mobilenetv3_small_minimal_100-fpn-short"
    assert yaml.safe_load((run / "config.yaml").read_text())["backbone"] == NETWORK
    for words, says in (
        (["--depth", "18"], f"--depth 18: is for ResNets, and the network is {NETWORK}; leave it out"),
        (["--backbone", "timm:test_resnet"], f"the detector in {path} is on {NETWORK}; leave it out"),
    ):
        assert says in error_of([*argv, *words, "--output", "other"], capsys)
    assert "a ResNet's are needed" in error_line(convert_weights.main, [path, "x.pth", "--to", "torchvision"])


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_a_detector_on_a_network_of_timm_is_exported(shapes, on_timm, suffix, capsys):
    pytest.importorskip("onnxruntime")
    export.main([str(on_timm), f"net.{suffix}", "--check", *map(str, sorted((shapes / "val2017").iterdir()))])
    assert capsys.readouterr().out.count("objects, boxes within") == 3


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--backbone", "resnet50"], "--backbone resnet50: give timm:NAME, a network of timm; this package's ResNets"),
        (
            ["--backbone", "timm:resmet50"],
            "--backbone timm:resmet50: timm has no network 'resmet50'; did you mean resnet50",
        ),
        (["--backbone", NETWORK, "--depth", "50"], "--depth 50: is for ResNets, and the network is timm:tf_mob"),
        (["--backbone", NETWORK, "--variant", "c4"], f"--variant c4: --backbone {NETWORK} is for fpn; leave one"),
        (["--backbone", NETWORK, "--engine", "detectron2"], "--engine detectron2 has ResNets alone; leave one of"),
        (["--backbone", NETWORK, "--norm", "GN"], "its norm can be BN or FrozenBN, not GN; give --norm BN"),
        (["--backbone", NETWORK, "--recipe", "v2"], "its norm can be BN or FrozenBN, not SyncBN; give --norm BN"),
        (["--backbone", NETWORK, "--recipe.backbone.stem", "deep"], "--recipe.backbone.stem: is for ResNets, and"),
        (["--backbone", NETWORK, "--norm", "FrozenBN"], "would freeze random weights"),
        (["--backbone", NETWORK, "--weights", "nowhere.pth"], "weights 'nowhere.pth': no such file; give a .safet"),
        (["--backbone", "timm:crossvit_9_240"], "crossvit_9_240 has maps of strides "),
        (["--backbone", NETWORK, "--weights", "RESNET"], "/model.safetensors is on a ResNet; leave it out"),
    ],
)
def test_what_a_network_of_timm_cannot_be_is_one_line(shapes, straight, capsys, argv, says):
    argv = [str(straight / "model.safetensors") if word == "RESNET" else word for word in argv]
    assert says in error_of([*QUICK[:2], *QUICK[4:], "--data", shapes, "--max-steps", "1", *argv], capsys)


# Interrupted and resumed


@pytest.mark.slow  # the tests of killed runs below show the same
def test_three_steps_and_three_resumed_are_six_steps(shapes, straight, capsys):
    train_coco.main([*SIX_STEPS, "--data", str(shapes), "--output", "run", "--max-steps", "3"])
    assert (Path("run") / "checkpoints" / "step_0000003" / "state.json").is_file()
    train_coco.main(["--output", "run", "--resume", "--max-steps", "6"])  # the rest is known from the run
    assert "resumed from step 3 to 6" in capsys.readouterr().out
    assert_ended_alike(Path("run"), straight)


def test_a_run_killed_in_the_middle_and_resumed_ends_like_one_left_alone(shapes, straight):
    kill_after_three_steps("train_coco.py", [*SIX_STEPS, "--data", str(shapes)], Path("run"))
    train_coco.main(["--output", "run", "--resume", "--max-steps", "6"])
    assert_ended_alike(Path("run"), straight)


def test_a_run_that_dies_while_it_writes_a_checkpoint_resumes_from_the_one_before(shapes, straight):
    argv = [*SIX_STEPS, "--data", str(shapes)]
    die_in_second_checkpoint(train_coco.main, argv, Path("run"))
    train_coco.main([*argv, "--output", "run", "--resume"])
    assert_ended_alike(Path("run"), straight)


def test_resuming_a_finished_run_evaluates_it_again_and_changes_nothing(straight, tmp_path, monkeypatch, capsys):
    shutil.copytree(straight, "run")
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    assert config["coco_backend"] == "hotcoco" and config["effective"]["threads"] == torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(load.START, "cores_of_others", lambda: 0.0)
    train_coco.main(["--output", "run", "--resume", "--coco-backend", "pycocotools"])
    assert yaml.safe_load(Path("run/config.yaml").read_text())["coco_backend"] == "pycocotools"
    assert_ended_alike(Path("run"), straight)
    assert timeless(Path("run"), "eval") == timeless(straight, "eval")


@pytest.mark.parametrize("folder", [None, "runs/typo"])
def test_resume_without_a_run_stops_and_writes_nothing(shapes, capsys, folder):
    output = [] if folder is None else ["--output", folder]
    said = error_of([*QUICK, "--data", shapes, "--resume", *output], capsys)
    name = folder or "runs/shapes-r18-fpn-short"
    assert said == f"error: --resume: there is no run in {name}; give its folder as --output, or leave --resume out"
    assert list(Path().iterdir()) == []


def test_resume_without_a_folder_goes_on_with_the_latest_run_of_the_name(shapes):
    argv = [*TINY, "--data", str(shapes)]
    for _ in range(2):
        train_coco.main([*argv, "--max-steps", "1"])
    train_coco.main([*argv, "--max-steps", "2", "--resume"])
    steps = {path.name: [line["step"] for line in metrics(path)] for path in Path("runs").iterdir()}
    assert steps == {"shapes-test_resnet-fpn-short": [1], "shapes-test_resnet-fpn-short-2": [1, 2]}


# Several processes


def test_two_processes_train_one_detector_and_evaluate_every_image_once(shapes):
    argv = [*QUICK, "--data", str(shapes), "--max-steps", "2", "--output", "run", "--pictures", "1"]
    said = torchrun(TOOLS / "train_coco.py", argv)
    assert "2 images per update on 2 cpu" in said and said.count("from step 0") == 1
    assert [line["step"] for line in metrics(Path("run"))] == [1, 2]
    results = json.loads(Path("run/results.json").read_text())
    assert results["images"] == 3 and rescored(shapes, Path("run")) == [results["bbox"][name] for name in METRICS]
    detections = json.loads(Path("run/detections.json").read_text())
    assert {entry["image_id"] for entry in detections} == {1_000_001, 1_000_002, 1_000_003}
    # Both ranks evaluated the detector that was saved, statistics included: one process finds the same with it.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks, whose bits depend on it
    evaluate_coco.main(["run"])
    torch.set_num_threads(threads)
    assert json.loads(Path("run/detections.json").read_text()) == detections


def test_an_error_in_processes_that_were_spawned_for_gpus_is_one_line_too(shapes, straight, capfd, monkeypatch):
    monkeypatch.setattr(options_module, "count_processes", lambda device, gpus: 2)  # as with two GPUs
    with pytest.raises(SystemExit) as exit:  # rank 0 finds it, and both raise it
        train_coco.main([*QUICK, "--data", str(shapes), "--output", str(straight)])
    assert exit.value.code == 1
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ") and "already holds a run" in lines[0]
    assert files() == {}


# What bad input gets: one line, status 1, nothing half-written


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--depth", "51"], "unknown depth 51; choose from 18, "),
        (["--recipe", "4x"], "unknown recipe '4x'; choose from 1x, 2x, 3x, rsb, v2,"),
        (["--variant", "yolo"], "unknown variant 'yolo'; choose from fpn, c4, dc5"),
        (["--norm", "LN"], "unknown norm 'LN'; choose from BN, FrozenBN, SyncBN, GN"),
        (["--norm", "FrozenBN"], "norm='FrozenBN' without weights would freeze random layers"),
        (["--frozen-through", "c3"], "frozen_through='c3' without weights would freeze random layers"),
        (["--weights", "nowhere.pth"], "weights 'nowhere.pth': no such file"),
        (["--weights", "torchvision:ResNet51"], "torchvision has no such weights"),
        (["--coco-backend", "fast"], "unknown COCO backend 'fast'; choose from hotcoco, pycocotools"),
        (["--gpus", "2"], "--gpus 2: the device is cpu; leave it out"),
        (["--accumulate", "4"], "--batch-size 2: must be a multiple of 4 (processes times --accumulate)"),
        (["--ema", "1"], "--ema 1: must be from 0 (no average) to below 1"),
        (["--early-stop", "3"], "--early-stop 3: needs evaluations on the way; give --eval-period too"),
        (["--track", "wandb"], "--track wandb: is not installed; pip install wandb"),
        (["--pictures", "-1"], "--pictures -1: must be at least 0"),
        (["--optimizer", "sgd"], "optimizer sgd: the learning rate of recipe short is for adamw; give --lr too"),
        (
            ["--image-size", "64", "--recipe.detector.min-size", "9"],
            "--recipe.detector.min-size sets the same; give one",
        ),
        (
            ["--milestones", "2"],
            "--milestones: the learning rate follows a cosine; give --recipe.schedule.cosine False",
        ),
        (["--milestones", "a"], "--milestones a: must be whole numbers"),
        (["--steps", "4", "--warmup-steps", "9"], "a warm-up of 9 steps: must be at most the schedule's 4"),
        (["--recipe.schedule.warmup-factor", "-3"], "a warm-up factor from 0 to 1, not 1100, 0.002 and -3"),
        (["--recipe.least-epochs", "-3"], "least_epochs is -3.0; it must be at least 0"),
        (["--weight-decay", "-1"], "--weight-decay -1: must be at least 0"),
        (["--recipe.detector.bbox-reg-weights", "1", "2"], "weights 1 2: must be 4 numbers or None"),
        (["--recipe", "v2", "--variant", "c4"], "--variant c4 does not fit recipe v2: box_conv_layers are for fpn"),
        (["--epochs", "2", "--steps", "9"], "--epochs 2 and --steps 9 are both a length; give one"),
        (["--repeat-factor", "2"], "--repeat-factor 2: must be a share of the images, from 0 to 1"),
        (["--lr", "0"], "--lr 0: must be a finite number above 0"),
        (["--recipe.schedule.rate", "1"], "--recipe.schedule.rate: give --lr instead"),
        (
            ["--recipe.detector.nms", "1"],
            "no option --recipe.detector.nms nor one like it; --print-recipe lists the values",
        ),
        (["--recipe.detector.box-nms-thresh", "x"], "--recipe.detector.box-nms-thresh x: must be a number"),
        (["--recipe.detector.box-nms-thresh", "2"], "box_nms_thresh is 2.0; it must be from 0 to 1"),
        (["--output", __file__], f"--output {__file__}: is a file; give a folder"),
        (["--data", "."], "no known data layout; it should contain"),
        (
            ["--data", "nowhere"],
            "--data nowhere: no such folder; give the data's folder, its data.yaml or a COCO .json",
        ),
    ],
)
def test_a_wrong_option_is_one_line_that_names_it_and_nothing_is_written(shapes, capsys, argv, says):
    assert says in error_of([*QUICK, "--data", shapes, "--max-steps", "1", *argv], capsys)
    assert files() == {}


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def first_image_lost(folder):
    (folder / "train2017" / "000000000001.jpg").unlink()


def other_categories_in_val(folder):
    content = json.loads(annotation_file(folder, "val").read_text())
    used = content["annotations"][0]["category_id"]
    next(category for category in content["categories"] if category["id"] == used)["name"] = "person"
    annotation_file(folder, "val").write_text(json.dumps(content))


@pytest.mark.parametrize(
    "harm, says",
    [
        (first_image_lost, "lacks 1 of 6 images that"),
        (lambda folder: half(annotation_file(folder)), "instances_train2017.json: not JSON"),
        (
            other_categories_in_val,
            "its classes 'person' are not among the 10 of the detector or the training set",
        ),
        (
            lambda folder: annotation_file(folder, "val").unlink(),
            "no annotations/instances_val2017.json; it should contain",
        ),
    ],
)
def test_bad_data_is_one_line_that_says_what_is_wrong_and_nothing_is_written(own_shapes, capsys, harm, says):
    harm(own_shapes)
    assert says in error_of([*QUICK, "--data", own_shapes, "--max-steps", "1", "--output", "run"], capsys)
    assert files() == {}


def test_unusable_boxes_are_counted_and_printed_once_and_training_goes_on(own_shapes, capsys):
    content = json.loads(annotation_file(own_shapes).read_text())
    nan, inf = float("nan"), float("inf")
    boxes = [nan, 1, 5, 5], [1, 1, inf, 5], [5, 5, -3, 4], [5, 5, 0, 4], [200, 5, 9, 9], [-4, -4, 30, 30]
    for i, box in enumerate(boxes):
        content["annotations"].append({"id": 900 + i, "image_id": 1, "category_id": 1, "bbox": box})
    annotation_file(own_shapes).write_text(json.dumps(content))
    train_coco.main([*TINY, "--data", str(own_shapes), "--max-steps", "4", "--output", "run"])
    said = capsys.readouterr().out
    counts = (
        "boxes that are not finite (2)",
        "boxes of zero or negative size (2)",
        "boxes under a pixel or outside their image (1)",
        "boxes clipped to their image (1)",
    )
    assert [said.count(count) for count in counts] == [1, 1, 1, 1]
    assert all(math.isfinite(line["loss"]) for line in metrics(Path("run")))


def test_a_broken_training_image_stops_with_its_name_or_is_skipped_and_named(own_shapes, capsys):
    half(own_shapes / "train2017" / "000000000003.jpg")
    argv = [*TINY, "--data", own_shapes, "--max-steps", "4"]
    assert "train2017/000000000003.jpg: " in error_of([*argv, "--output", "run"], capsys)
    assert not Path("run/model.safetensors").exists() and not Path("run/results.json").exists()
    train_coco.main([*map(str, argv), "--output", "other", "--skip-bad-images"])
    assert capsys.readouterr().out.count("000000000003.jpg") == 1
    assert metrics(Path("other"))[-1]["step"] == 4


def test_missing_and_broken_images_are_named_in_the_results_and_the_report(own_shapes, capsys):
    first_image_lost(own_shapes)
    half(own_shapes / "val2017" / "000001000002.jpg")
    argv = [*TINY, "--data", str(own_shapes), "--max-steps", "1", "--output", "run", "--pictures", "3"]
    train_coco.main([*argv, "--skip-bad-images"])
    said = capsys.readouterr().out
    assert "images missing (1)" in said and "val2017/000001000002.jpg" in said
    results = json.loads(Path("run/results.json").read_text())
    assert results["images"] == 3 and len(results["skipped_images"]) == 1
    [lost] = results["skipped_training_images"]
    assert lost.endswith(": no such file") and lost in Path("run/report.html").read_text()
    train_coco.main([*argv, "--skip-bad-images", "--resume", "--max-steps", "2"])
    evaluate_coco.main(["run", "--skip-bad-images"])
    assert json.loads(Path("run/results.json").read_text())["skipped_training_images"] == [lost]
    assert len(list(Path("run/pictures").iterdir())) == 2


def test_a_folder_that_holds_a_run_is_not_written_over(shapes, straight, capsys):
    before = files(straight)
    said = error_of([*QUICK, "--data", shapes, "--max-steps", "1", "--output", straight], capsys)
    assert "already holds a run; add --resume to continue it" in said
    assert files(straight) == before


def annotation_lost(folder):
    content = json.loads(annotation_file(folder).read_text())
    content["annotations"].pop()
    annotation_file(folder).write_text(json.dumps(content))


def other_categories(folder):
    for split in ("train", "val"):
        path = annotation_file(folder, split)
        path.write_text(path.read_text().replace('"disk"', '"person"'))


@pytest.mark.parametrize(
    "change, says",
    [(other_categories, "was trained on other categories"), (annotation_lost, "was trained on other data")],
)
def test_a_run_is_not_resumed_on_other_data(straight, own_shapes, capsys, change, says):
    change(own_shapes)
    before = files(straight)
    argv = ["--resume", "--output", straight, "--data", own_shapes, "--max-steps", "7"]
    assert says in error_of(argv, capsys)
    assert files(straight) == before


def test_a_run_all_of_whose_checkpoints_were_harmed_is_one_line_and_stays_as_it_is(straight, capsys):
    shutil.copytree(straight, "run")
    for step, name in ((2, "model.safetensors"), (4, "optimizer.safetensors"), (6, "state.json")):
        half(Path(f"run/checkpoints/step_000000{step}") / name)
    before = files(Path("run"))
    said = error_of(["--resume", "--output", "run", "--max-steps", "7"], capsys)
    assert "run: all of its 3 checkpoints are damaged" in said and files(Path("run")) == before


def test_a_batch_that_does_not_divide_over_the_processes_leaves_no_run_behind(shapes, capsys, monkeypatch):
    monkeypatch.setattr(train_coco, "distributed", lambda detector, rank: detector)
    for module in (train_coco, training):
        monkeypatch.setattr(module, "from_main", lambda make, rank: make())
    options = train_coco.complete(train_coco.parse(train_coco.Options, [*QUICK, "--data", str(shapes)]))
    with pytest.raises(ValueError, match="--batch-size 2: must be a multiple of 3, the number of processes"):
        train_coco.train(train_coco.Rank(0, 3, torch.device("cpu")), options)
    release_all_folders()  # as `launch` does
    assert files() == {}


def test_a_loss_that_is_not_finite_stops_before_the_update_names_the_images_and_saves_them(
    shapes, straight, capsys, monkeypatch
):
    forward, calls = FasterRCNN.forward, []

    def a_loss_of_the_third_update_is_nan(self, images, targets=None):
        losses = forward(self, images, targets)
        if targets is not None:
            calls.append((images, targets))
            if len(calls) == 6:  # of two parts each
                losses["loss_box_reg"] = losses["loss_box_reg"] * float("nan")
        return losses

    with monkeypatch.context() as patch:
        patch.setattr(FasterRCNN, "forward", a_loss_of_the_third_update_is_nan)
        said = error_of([*SIX_STEPS, "--data", shapes, "--output", "run"], capsys)
    images, targets = (first + second for first, second in zip(*calls[-2:], strict=True))
    ids = ", ".join(str(target["image_id"]) for target in targets)
    assert f"step 2 is not finite: loss_box_reg is nan on rank 0, images {ids} are saved in run/bad_batch" in said
    saved = load_file("run/bad_batch_step_2_rank_0.safetensors")
    assert len(calls) == 6 and len(images) == 2
    for i, (image, target) in enumerate(zip(images, targets, strict=True)):
        assert torch.equal(saved[f"image_{i}"], image)
        assert torch.equal(saved[f"boxes_{i}"], target["boxes"]) and torch.equal(saved[f"labels_{i}"], target["labels"])
    assert [line["step"] for line in metrics(Path("run"))] == [1, 2]
    train_coco.main([*SIX_STEPS, "--data", str(shapes), "--output", "run", "--resume"])
    assert_ended_alike(Path("run"), straight)
