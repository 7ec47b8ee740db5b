import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from commands import (
    TOOLS,
    as_srun_starts,
    assert_ended_alike,
    die_in_second_checkpoint,
    differing,
    error_line,
    kill_after_three_steps,
    metrics,
)
from PIL import Image
from safetensors.torch import load_file

from detection import crops
from resbackbone import build_resnet_backbone, build_resnet_classifier
from resbackbone.classification.data import open_images
from resbackbone.classification.evaluate import Ensemble, evaluate
from resbackbone.cli.command import main_of
from resbackbone.engine.distributed import Rank
from resbackbone.tools import make_shards, pretrain
from resbackbone.weights import read_weights

error_of = partial(error_line, pretrain.main)

QUICK = ["--depth", "18", "--device", "cpu", "--precision", "fp32", "--log-period", "1", "--size", "32"]
SIX_STEPS = [*QUICK, "--batch-size", "4", "--checkpoint-period", "2", "--max-steps", "6"]
RUNS = {  # what is resumed: the optimizers, an average, mixing, parts
    "a2": ["--recipe", "a2", "--epochs", "3", "--ema", "0.9", "--clip-grad", "0.5"],
    "torchvision-v2": ["--recipe", "torchvision-v2", "--epochs", "8", "--accumulate", "2", "--eval-period", "4"],
}


@pytest.fixture(scope="module")
def photos(module_path):
    """Three classes told by their colour, of unequal size; odd-sized images."""
    folder, rng = module_path / "photos", np.random.default_rng(0)
    for split, count in (("train", 5), ("val", 3)):
        for label, name in enumerate(("blue", "green", "red")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count + label):
                pixels = rng.integers(0, 120, (37 + i, 45, 3), dtype=np.uint8)
                pixels[..., 2 - label] += 100
                Image.fromarray(pixels).save(folder / split / name / f"{i}.jpg")
    return folder


@pytest.fixture(scope="module")
def straight(photos, module_path):
    """Runs of six steps that were left alone, by recipe; tests only read them."""
    for name, argv in RUNS.items():
        pretrain.main([*SIX_STEPS, *argv, "--data", str(photos), "--output", str(module_path / name)])
    return module_path


# A run


def test_a_run_leaves_everything_in_its_folder(straight, photos):
    run = straight / "torchvision-v2"
    names = {path.name for path in run.iterdir() if not path.name.startswith("events")}
    files = {"config.yaml", "metrics.jsonl", "model.safetensors", "results.json", "report.html"}
    assert names == files | {"checkpoints", "best"}
    last = {path.name for path in (run / "checkpoints/step_0000006").iterdir()}
    tensors = {f"{name}.safetensors" for name in ("model", "average", "optimizer")}
    assert last == {*tensors, "state.json", "checksums.json"}
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4, 5, 6]
    assert all(line["loss_class"] > 0 and line["seconds"] > line["data_seconds"] > 0 for line in metrics(run))
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["data"], config["size"], config["accumulate"]) == (str(photos), 32, 2)
    assert config["effective"]["steps"] == 36 and config["effective"]["rate"] == pytest.approx(0.5 * 4 / 1024)


def test_the_results_are_what_the_written_classifier_scores(straight, photos):
    results = json.loads((straight / "a2" / "results.json").read_text())
    model = build_resnet_classifier(weights=straight / "a2" / "model.safetensors")
    again, _ = evaluate(
        model, open_images(photos, "val"), Rank(0, 1, torch.device("cpu")), crop=32, resize=34, batch_size=50
    )
    assert results.pop("loss") == pytest.approx(again.pop("loss"))
    assert results == {**again, "skipped_images": [], "skipped_training_images": []}
    assert results["images"] == 12 and 0 <= results["top1"] <= results["top5"] <= 1


def test_the_file_says_what_it_is_and_a_detectors_backbone_starts_from_it(straight):
    path = straight / "a2" / "model.safetensors"
    metadata = read_weights(path).metadata
    assert metadata["classes"] == ["blue", "green", "red"] and metadata["num_classes"] == 3
    assert metadata["architecture"] == "resnet18" and metadata["backbone"]["stride_in_1x1"] is False
    assert metadata["recipe"]["name"] == "a2" and metadata["recipe"]["optimizer"] == "lamb"
    backbone = build_resnet_backbone(18, fpn=True, weights=path)
    state, trunk = load_file(path), backbone.state_dict()
    assert torch.equal(next(v for k, v in trunk.items() if k.endswith("conv1.weight")), state["conv1.weight"])


@pytest.mark.parametrize("recipe", RUNS)
def test_the_average_is_what_is_evaluated_and_written(straight, recipe):
    run = straight / recipe
    last = run / "checkpoints" / "step_0000006"
    assert differing(run / "model.safetensors", last / "average.safetensors") == []
    assert differing(run / "model.safetensors", last / "model.safetensors") != []


def test_it_learns_colours(photos):
    argv = [*QUICK, "--data", str(photos), "--recipe", "demo", "--batch-size", "6", "--epochs", "8"]
    pretrain.main([*argv, "--output", "run", "--norm", "GN"])
    assert json.loads(Path("run/results.json").read_text())["top1"] > 0.9


def test_parts_of_a_batch_make_the_same_update_as_the_whole(photos):
    argv = [*QUICK, "--data", str(photos), "--recipe", "torchvision-v1", "--batch-size", "8", "--max-steps", "2"]
    for parts in ("1", "2"):
        pretrain.main([*argv, "--norm", "GN", "--accumulate", parts, "--output", f"in-{parts}"])
    one, other = (load_file(f"in-{parts}/model.safetensors") for parts in ("1", "2"))
    pretrain.seed_step(0, 0, 0)
    start = build_resnet_classifier(18, 3, norm="GN").state_dict()
    for key in one:
        torch.testing.assert_close(other[key], one[key], rtol=1e-4, atol=1e-6)
        assert start[key].shape != one[key].shape or not torch.equal(start[key], one[key])  # and it is an update


def test_without_data_it_draws_the_embedded_set_and_says_first_how_to_give_ones_own(monkeypatch, capsys):
    drawn = {"train_scenes": 8, "val_scenes": 4, "size": 64}
    monkeypatch.setattr(pretrain, "make_shape_crops", lambda folder: crops.make_shape_crops(folder, **drawn))
    monkeypatch.setattr(pretrain, "open_images", lambda data, split, **_: open_anyway(Path(data), split))
    pretrain.main(["--device", "cpu", "--batch-size", "2", "--size", "32", "--max-steps", "1"])
    first, second, *others = capsys.readouterr().out.splitlines()
    assert "built-in data set in datasets/shape-crops" in first and "--data DIR" in first and "train/<class>/" in first
    assert "drawing it" in second and "run:   runs/shape-crops-r18-demo" in others
    assert Path("runs/shape-crops-r18-demo/results.json").is_file()


def open_anyway(data, split):
    """So few scenes leave classes empty, which is an error."""
    for path in data.glob("*/*"):
        if not any(path.iterdir()):
            Image.new("RGB", (24, 24)).save(path / "0.jpg")
    return open_images(data, split)


def test_synthetic_images_show_the_speed_and_are_not_evaluated(capsys):
    pretrain.main([*QUICK, "--data", "synthetic", "--batch-size", "2", "--max-steps", "2", "--output", "run"])
    assert [line["images_per_second"] > 0 for line in metrics(Path("run"))] == [True, True]
    assert not Path("run/results.json").exists() and not metrics(Path("run"), "eval")
    assert "nothing is evaluated" in capsys.readouterr().out


def test_a_plain_net_and_the_papers_stride_are_in_the_files_that_are_written(photos):
    argv = [*QUICK, "--data", str(photos), "--batch-size", "2", "--max-steps", "1", "--recipe", "paper"]
    pretrain.main([*argv, "--plain", "--output", "plain"])
    pretrain.main([*argv, "--depth", "50", "--stride-in-1x1", "--shortcut", "C", "--norm", "GN", "--output", "strided"])
    plain, strided = (read_weights(f"{run}/model.safetensors").metadata for run in ("plain", "strided"))
    assert plain["architecture"] == "plain18" and plain["backbone"]["shortcut"] == "none"
    assert strided["backbone"]["stride_in_1x1"] is True and strided["backbone"]["shortcut"] == "C"


@pytest.mark.parametrize(
    "flags, zero", [(["--recipe", "a2"], True), (["--recipe", "a2", "--plain"], False), ([], False)]
)
def test_blocks_start_as_their_shortcuts_where_the_recipe_has_it_and_there_are_any(photos, flags, zero):
    argv = ["--data", str(photos), "--device", "cpu", "--depth", "18", *flags]
    options = pretrain.complete(pretrain.parse(pretrain.Options, argv))
    model, _ = pretrain.build(options, pretrain.recipe_of(options), ["blue", "green", "red"], None)
    assert all((not block.bn2.weight.any()) == zero for block in (model.layer1[1], model.layer4[0]))


def test_a_run_starts_from_weights_it_is_given(straight, photos):
    path = straight / "a2" / "model.safetensors"
    argv = [*QUICK, "--data", str(photos), "--recipe", "paper", "--batch-size", "2", "--max-steps", "1"]
    pretrain.main([*argv, "--weights", str(path), "--output", "run"])
    pretrain.main([*argv, "--seed", "1", "--output", "random"])
    far, start = (
        (load_file(f"{run}/model.safetensors")["fc.weight"] - load_file(path)["fc.weight"]).norm()
        for run in ("random", "run")
    )
    assert start < far / 10


def test_weights_give_the_depth_and_all_but_the_last_layer_for_other_classes(straight):
    path = straight / "a2" / "model.safetensors"
    argv = ["--data", "synthetic", "--device", "cpu", "--weights", str(path)]
    options = pretrain.complete(pretrain.parse(pretrain.Options, argv))
    model, _ = pretrain.build(options, pretrain.recipe_of(options), list("abcde"), None)
    given, found = load_file(path), model.state_dict()
    assert options.depth == 18 != pretrain.RECIPES[options.recipe].depth and found["fc.weight"].shape == (5, 512)
    assert all(found[key].equal(given[key]) for key in given if not key.startswith("fc."))


def test_a_smaller_size_shrinks_all_that_is_seen_in_proportion(photos):
    argv = ["--data", str(photos), "--device", "cpu", "--recipe", "paper", "--size", "112"]
    recipe = pretrain.recipe_of(pretrain.complete(pretrain.parse(pretrain.Options, argv)))
    assert (recipe.size, recipe.shorter_side, recipe.crop, recipe.resize) == (112, (128, 240), 112, 128)


def test_a_value_of_the_recipe_that_is_set_is_used_kept_and_known_to_an_evaluation(photos, capsys):
    argv = ["--data", str(photos), *QUICK, "--recipe", "demo", "--batch-size", "2", "--output", "run"]
    values = ["--lr", "0.0005", "--recipe.smoothing", "0.2", "--recipe.resize=72", "--recipe.shorter-side", "None"]
    pretrain.main([*argv, *values, "--max-steps", "1"])
    assert "recipe: demo, but " in (said := capsys.readouterr().out) and "smoothing 0.2 (0.0)" in said
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    assert (config["lr"], config["recipe.smoothing"], config["effective"]["rate"]) == (0.0005, 0.2, 0.0005)
    known = pretrain.complete_for_evaluation(pretrain.parse(pretrain.Options, ["--eval-only", "run"]))
    recipe = pretrain.recipe_of(known)
    assert (recipe.size, recipe.resize, recipe.smoothing, recipe.shorter_side) == (32, 36, 0.2, None)
    shutil.copytree("run", "run/best")
    Path("run/best/best.json").touch()
    best = pretrain.complete_for_evaluation(pretrain.parse(pretrain.Options, ["--eval-only", "run/best"]))
    assert best.output == Path("run/eval-best").absolute()  # a training replaces best/
    pretrain.main(["--print-recipe", "--config", "run/config.yaml"])
    assert yaml.safe_load(capsys.readouterr().out)["recipe.smoothing"] == 0.2


# Interrupted and resumed


@pytest.mark.slow  # the two tests below show the same, one of either recipe
@pytest.mark.parametrize("recipe", RUNS)
def test_three_steps_and_three_resumed_are_six_steps(straight, photos, recipe):
    argv = [*SIX_STEPS, *RUNS[recipe], "--data", str(photos)]
    pretrain.main([*argv, "--output", "run", "--max-steps", "3"])
    pretrain.main(["--output", "run", "--resume", "--max-steps", "6"])  # the rest is known from the run
    assert_ended_alike(Path("run"), straight / recipe)


def test_a_run_that_dies_while_it_writes_a_checkpoint_resumes_from_the_one_before(straight, photos):
    argv = [*SIX_STEPS, *RUNS["torchvision-v2"], "--data", str(photos)]
    die_in_second_checkpoint(pretrain.main, argv, Path("run"))
    pretrain.main([*argv, "--output", "run", "--resume"])
    assert_ended_alike(Path("run"), straight / "torchvision-v2")


def test_a_run_killed_in_the_middle_and_resumed_ends_like_one_left_alone(straight, photos):
    kill_after_three_steps("pretrain.py", [*SIX_STEPS, *RUNS["a2"], "--data", str(photos)], Path("run"))
    pretrain.main(["--output", "run", "--resume", "--max-steps", "6"])
    assert_ended_alike(Path("run"), straight / "a2")


def test_a_run_is_not_resumed_on_other_images_or_with_another_recipe(straight, photos, tmp_path, capsys):
    run = shutil.copytree(straight / "a2", "run")
    other = shutil.copytree(photos, tmp_path / "other")
    (other / "train" / "blue" / "0.jpg").unlink()
    said = error_of(["--resume", "--output", run, "--data", other, "--max-steps", "7"], capsys)
    assert "was trained on other data" in said
    assert "--recipe a3: the run in run was made with a2" in error_of(
        ["--resume", "--output", run, "--recipe", "a3"], capsys
    )


@pytest.fixture(scope="module")
def shards(photos, module_path):
    """The same images in shards, 18 of them in three to train on."""
    folder = module_path / "shards"
    argv = ["--data", str(photos), "--output", str(folder), "--images-per-shard", "7", "--workers", "1"]
    make_shards.main([*argv, "--shorter-side", "40"])
    return f"{folder}/train-{{000000..000002}}.tar"


def test_training_from_shards_is_resumed_exactly_and_scores_the_images_that_were_not_in_them(shards, photos, capsys):
    argv = [*SIX_STEPS, "--recipe", "demo", "--data", shards]
    pretrain.main([*argv, "--output", "straight"])
    assert "18 images of 3 classes in 3 shards" in capsys.readouterr().out
    pretrain.main([*argv, "--output", "run", "--max-steps", "3"])
    pretrain.main(["--output", "run", "--resume", "--max-steps", "6", "--workers", "2"])
    assert_ended_alike(Path("run"), Path("straight"))
    results = json.loads(Path("run/results.json").read_text())
    assert results.pop("skipped_training_images") == []
    pretrain.main(["--eval-only", "run", "--data", str(photos), "--device", "cpu", "--precision", "fp32"])
    again = json.loads(Path("run/results-1crop.json").read_text())
    assert again["loss"] == pytest.approx(results.pop("loss"), rel=1e-12)  # a sum in another order
    assert again.items() >= results.items()


# Several processes


def test_two_processes_train_one_classifier_and_both_hold_it(photos):
    script = (
        "import os, sys; from resbackbone.tools import pretrain\n"
        "from safetensors.torch import save_file\n"
        "def save(model, name):\n"
        "    tensors = {k: v.contiguous() for k, v in model.state_dict().items()}\n"
        "    save_file(tensors, f'{name}-{os.environ[\"RANK\"]}.st')\n"
        "def train(task, state, *rest, train=pretrain.loop.train):\n"
        "    train(task, state, *rest)\n"
        "    save(state.model.module, 'trained')\n"
        "def evaluate(model, *rest, evaluate=pretrain.evaluate, **named):\n"
        "    save(model, 'evaluated')\n"
        "    return evaluate(model, *rest, **named)\n"
        "pretrain.loop.train, pretrain.evaluate = train, evaluate\n"
        "pretrain.main(sys.argv[2:])\n"
    )
    Path("spy.py").write_text(script)
    argv = [*QUICK, "--data", str(photos), "--recipe", "torchvision-v2", "--batch-size", "8", "--accumulate", "2"]
    argv += ["--max-steps", "2", "--output", "run"]
    assert "8 images per update in 2 parts on 2 cpu" in as_srun_starts("spy.py", [TOOLS, *argv])
    assert {name for name in differing("trained-0.st", "trained-1.st") if "running" not in name} == set()
    assert differing("evaluated-0.st", "evaluated-1.st") == []  # statistics included
    assert differing("evaluated-0.st", "run/model.safetensors") == []
    assert json.loads(Path("run/results.json").read_text())["images"] == 12


# Evaluation alone


def test_runs_and_files_are_evaluated_together_and_alone_on_their_data_by_any_protocol(straight, photos, capsys):
    shutil.copytree(straight / "a2", "run")  # data, sizes and recipe are known from the run
    argv = ["--device", "cpu", "--precision", "fp32"]
    runs = ["run", str(straight / next(name for name in RUNS if name != "a2"))]
    pretrain.main(["--eval-only", *runs, *argv, "--eval", "10crop", "--output", "out"])
    found = json.loads(Path("out/results-10crop.json").read_text())
    model = Ensemble(build_resnet_classifier(weights=f"{run}/model.safetensors") for run in runs)
    rank = Rank(0, 1, torch.device("cpu"))
    wanted, _ = evaluate(model, open_images(photos, "val"), rank, protocol="10crop", crop=32, resize=34)
    assert found["loss"] == pytest.approx(wanted.pop("loss"))
    assert {name: found[name] for name in wanted} == wanted
    pretrain.main(["--eval-only", "run/model.safetensors", *argv])
    again = json.loads(Path("run/results-1crop.json").read_text())
    trained = json.loads(Path("run/results.json").read_text())
    assert trained.pop("skipped_training_images") == []
    assert {name: again[name] for name in trained} == trained
    assert "10crop" in capsys.readouterr().out


# What bad input gets: one line, status 1, nothing written


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--depth", "51"], "unknown depth 51; choose from 18, "),
        (
            ["--recipe", "a4"],
            "unknown recipe 'a4'; choose from paper, torchvision-v1, torchvision-v2, a1, a2, a3, demo",
        ),
        (["--eval", "5crop"], "unknown evaluation '5crop'; choose from 1crop, 10crop, multiscale"),
        (["--norm", "FrozenBN"], "unknown norm 'FrozenBN'; choose from BN, SyncBN, GN"),
        (["--shortcut", "E"], "unknown shortcut 'E'; choose from A, B, C, D (or --plain)"),
        (["--stem", "5x5"], "unknown stem '5x5'; choose from 7x7, deep"),
        (["--plain", "--shortcut", "B"], "--plain has no shortcuts, --shortcut B asks for them; leave one out"),
        (
            ["--batch-size", "5", "--accumulate", "2"],
            "--batch-size 5: must be a multiple of 2 (processes times --accumulate)",
        ),
        (["--recipe", "a3", "--batch-size", "6", "--accumulate", "2"], "recipe a3 mixes pairs"),
        (["--batch-size", "1"], "batch norm has no statistics of one image of 32 pixels"),
        (["--batch-size", "2", "--accumulate", "2"], "--batch-size 2: batch norm has no statistics of one image"),
        (["--accumulate", "0"], "--accumulate 0: must be at least 1"),
        (["--recipe.optimizer", "lamb"], "lamb: the learning rate of recipe torchvision-v1 is for sgd; give --lr too"),
        (["--recipe.auto-augment", "foo"], "auto_augment is 'foo'; it must be trivial or timm's rand-"),
        (["--recipe.smoothing", "2"], "smoothing is 2.0; it must be from 0 to 1"),
        (["--recipe.source", "x"], "--recipe.source: cannot be set"),
        (["--recipe.shorter-side", "64"], "--recipe.shorter-side 64: must be 2 whole numbers or None"),
        (["--size", "8"], "--size 8: must be at least 32"),
        (["--ema", "1"], "--ema 1: must be from 0 (no average) to below 1"),
        (["--clip-grad", "-1"], "--clip-grad -1: must be a norm above 0"),
        (["--early-stop", "3"], "--early-stop 3: needs evaluations on the way; give --eval-period too"),
        (["--weights", "nowhere.pth"], "weights 'nowhere.pth': no such file"),
        (["--data", "nowhere"], "--data nowhere: no such folder"),
        (["--data", "synthetic", "--eval-period", "1"], "--eval-period 1: synthetic images are not evaluated"),
        (["--eval-only", "nowhere"], "--eval-only nowhere: no such run folder or file"),
        (["--eval-only", ".", "--data", "."], "no folder val or test in it"),
        (["--eval-only", ".", "--data", "synthetic"], "synthetic images show only the speed"),
    ],
)
def test_a_wrong_option_is_one_line_that_names_it_and_nothing_is_written(photos, capsys, argv, says):
    with pytest.raises(SystemExit) as exit:
        main_of(lambda: pretrain.main([*QUICK, "--data", str(photos), "--max-steps", "1", *argv]))
    assert exit.value.code.startswith("error: ") and says in exit.value.code
    assert "run:" not in capsys.readouterr().out and list(Path().iterdir()) == []


def test_images_that_cannot_be_read_are_named_and_counted(photos, tmp_path, capsys):
    other = shutil.copytree(photos, tmp_path / "other")
    for name in ("train/green/0.jpg", "val/red/1.jpg"):
        (other / name).write_bytes(b"")
    argv = [*QUICK, "--recipe", "demo", "--data", str(other), "--batch-size", "18", "--max-steps", "1"]
    assert "0.jpg: empty file; --skip-bad-images skips" in error_of([*argv, "--output", "run"], capsys)
    pretrain.main([*argv, "--output", "skipping", "--skip-bad-images"])
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped ")]
    results = json.loads(Path("skipping/results.json").read_text())
    assert said == [f"skipped image {other / name}: empty file" for name in ("train/green/0.jpg", "val/red/1.jpg")]
    assert (results["images"], results["unreadable"]) == (12, 1)
    listed = results["skipped_training_images"] + results["skipped_images"]
    assert [f"skipped {message}" for message in listed] == said


def test_what_is_not_given_for_an_evaluation_is_that_of_its_run_and_of_no_other_file(straight, photos):
    Path("config.yaml").write_text("recipe: demo\nsize: 64\n")  # not of what is evaluated
    named, run = "torchvision:ResNet18_Weights.IMAGENET1K_V1", str(straight / "a2")
    alone, of_run, both = (
        pretrain.complete_for_evaluation(pretrain.Options(eval_only=sources, data=data, device="cpu"))
        for sources, data in (((named,), str(photos)), ((run,), None), ((run, named), None))
    )
    assert (alone.output, of_run.output, both.output) == (None, Path(run), None)
    assert (alone.recipe, alone.size, alone.precision) == ("torchvision-v1", 224, "fp32")  # as its publisher does
    assert (of_run.recipe, of_run.size, of_run.data) == ("a2", 32, str(photos))


def test_a_classifier_of_other_classes_than_the_images_is_refused(straight, photos, tmp_path, capsys):
    other = shutil.copytree(photos, tmp_path / "other")
    for split in ("train", "val"):
        shutil.copytree(other / split / "blue", other / split / "yellow")
    path = straight / "a2" / "model.safetensors"
    assert "num_classes=3, but you asked for num_classes=4" in error_of(["--eval-only", path, "--data", other], capsys)
    for split in ("train", "val"):
        shutil.rmtree(other / split / "blue")
    assert "was trained on other classes" in error_of(["--eval-only", path, "--data", other], capsys)
    assert list(Path().iterdir()) == []


def test_classes_that_differ_between_the_splits_are_named(photos, tmp_path, capsys):
    other = shutil.copytree(photos, tmp_path / "other")
    (other / "val" / "blue").rename(other / "val" / "violet")
    said = error_of([*QUICK, "--data", other, "--max-steps", "1"], capsys)
    assert "blue" in said and "violet" in said
    assert list(Path().iterdir()) == []


def test_the_embedded_crops_are_drawn_once_and_alike_and_not_over_other_files(tmp_path):
    drawn = {"train_scenes": 3, "val_scenes": 2, "size": 64}
    one, other = (crops.make_shape_crops(tmp_path / name, **drawn) for name in ("one", "other"))
    files = sorted(path.relative_to(one) for path in one.rglob("*.jpg"))
    assert {path.parts[0] for path in files} == {"train", "val"}
    assert all((one / path).read_bytes() == (other / path).read_bytes() for path in files)
    before = (one / files[0]).stat().st_mtime_ns
    assert crops.make_shape_crops(one, **drawn) == one and (one / files[0]).stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="already holds"):
        crops.make_shape_crops(one, **{**drawn, "size": 96})


def test_resume_without_a_run_and_a_variable_that_leads_nowhere_stop(capsys, monkeypatch):
    assert "--resume: there is no run in runs/typo;" in error_of(["--output", "runs/typo", "--resume"], capsys)
    monkeypatch.setenv("IMAGENET_DIR", "nowhere")
    said = error_of(["--device", "cpu"], capsys)
    assert f"$IMAGENET_DIR is 'nowhere', but there is no folder {Path.cwd() / 'nowhere'}; correct or unset" in said
    assert list(Path().iterdir()) == []
