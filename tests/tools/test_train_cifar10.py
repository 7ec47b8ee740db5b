import json
import math
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from commands import (
    CIFAR,
    SIX_STEPS,
    TOOLS,
    as_srun_starts,
    assert_ended_alike,
    die_in_second_checkpoint,
    differing,
    error_line,
    metrics,
    timeless,
)
from PIL import Image
from safetensors.torch import load_file

from resbackbone.cifar import CifarResNet, build_cifar_resnet
from resbackbone.classification import cifar10
from resbackbone.classification.cifar10 import open_cifar10, to_model_input
from resbackbone.cli.command import be_quiet
from resbackbone.tools import train_cifar10

error_of = partial(error_line, train_cifar10.main)

pytestmark = pytest.mark.usefixtures("few_synthetic_images")


@pytest.fixture
def straight(six_steps_left_alone):
    return six_steps_left_alone


# A run


def test_a_run_leaves_everything_in_its_folder(straight):
    names = {path.name for path in straight.iterdir() if not path.name.startswith("events")}
    assert names == {"config.yaml", "metrics.jsonl", "checkpoints", "model.safetensors", "results.json", "report.html"}
    steps = sorted(path.name for path in (straight / "checkpoints").iterdir())
    assert steps == ["step_0000002", "step_0000004", "step_0000006"]
    config = yaml.safe_load((straight / "config.yaml").read_text())
    assert config["precision"] == "fp32" and config["effective"]["milestones"] == [3, 4]
    lines = metrics(straight)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(line["train_error"] * 8 == round(line["train_error"] * 8) for line in lines)
    assert all(line["loss"] == line["loss_class"] and math.isfinite(line["loss"]) for line in lines)
    assert [line["step"] for line in metrics(straight, "eval")] == [3, 6]


def test_a_run_in_fp16_whose_loss_is_scaled_resumes_to_the_same_weights(monkeypatch):
    monkeypatch.setattr("resbackbone.cli.options.choose_precision", lambda asked, *_: asked)  # refused on a CPU
    half = ["fp16" if word == "fp32" else word for word in SIX_STEPS]
    train_cifar10.main([*half, "--output", "whole"])
    train_cifar10.main([*half, "--output", "broken", "--max-steps", "4"])
    train_cifar10.main([*half, "--output", "broken", "--max-steps", "6", "--resume"])
    for name in ("model.safetensors", "checkpoints/step_0000006/optimizer.safetensors"):
        assert differing(Path("broken", name), Path("whole", name)) == []
    state = json.loads(Path("whole/checkpoints/step_0000006/state.json").read_text())
    assert state["scaler"]["scale"] == 65536


@pytest.mark.parametrize("words", [[], ["--quiet"]])
def test_a_run_says_how_it_goes_sums_up_and_ends_with_its_result_which_is_all_that_a_quiet_one_says(words, capsys):
    argv = ["--data", "synthetic", "--steps", "4", "--batch-size", "8", "--eval-period", "2", "--log-period", "2"]
    train_cifar10.main([*argv, "--device", "cpu", "--output", "run", *words])
    be_quiet(None)
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"test error \d+\.\d\d%", lines[-1])
    assert "quiet" not in yaml.safe_load(Path("run/config.yaml").read_text())
    if words:
        assert len(lines) == 1
        return
    assert re.fullmatch(r"step 2: test error \d+\.\d\d%", next(line for line in lines if line.startswith("step")))
    last = [line for line in lines if line.startswith("train ")][-1]
    assert re.match(r"train 4/4, loss .* images/s, data \d+%, [\d,]+ MiB, test error \d+\.\d\d%$", last)
    assert lines.index("Summary") > lines.index(last) and "weights: run/model.safetensors" in lines


def test_the_training_error_is_that_of_the_batch_the_update_saw(monkeypatch):
    forward, errors, labels_seen = CifarResNet.forward, [], []
    batches = train_cifar10.train_batches

    def noting(self, images):
        logits = forward(self, images)
        if self.training:
            errors.append(float((logits.argmax(1) != labels_seen[-1]).float().mean()))
        return logits

    def noted(*args, **kwargs):
        for images, labels in batches(*args, **kwargs):
            labels_seen.append(labels)
            yield images, labels

    monkeypatch.setattr(CifarResNet, "forward", noting)
    monkeypatch.setattr(train_cifar10, "train_batches", noted)
    train_cifar10.main([*CIFAR, "--steps", "3", "--output", "run"])
    assert [line["train_error"] for line in metrics(Path("run"))] == errors


def test_the_saved_network_has_the_error_that_is_reported():
    train_cifar10.main([*CIFAR, "--steps", "3", "--output", "run"])
    results = json.loads(Path("run/results.json").read_text())
    model = build_cifar_resnet(weights="run/model.safetensors").eval()
    test = open_cifar10("synthetic").test
    with torch.no_grad():
        logits = model(to_model_input(test.images, model.mean_image))
    assert results["error"] == float((logits.argmax(1) != test.labels).double().mean())
    assert results["loss"] == pytest.approx(float(F.cross_entropy(logits, test.labels)), rel=1e-4)
    assert (results["depth"], results["parameters"], results["images"]) == (20, 269_722, 10)


def test_the_learning_rate_is_the_papers():
    def rates(*argv):
        options = train_cifar10.complete(
            train_cifar10.parse(train_cifar10.Options, ["--data", "synthetic", "--device", "cpu", *argv])
        )
        schedule = train_cifar10.schedule_of(options)
        drops = {i: schedule.learning_rate(i) for i in range(schedule.steps)}
        return {i: round(r, 9) for i, r in drops.items() if i == 0 or r != drops[i - 1]}

    assert rates() == rates("--plain", "--depth", "56") == {0: 0.1, 32000: 0.01, 48000: 0.001}
    assert rates("--depth", "110") == {0: 0.01, 400: 0.1, 32000: 0.01, 48000: 0.001}
    assert rates("--depth", "110", "--steps", "100") == {0: 0.01, 10: 0.1, 50: 0.01, 75: 0.001}
    assert rates("--batch-size", "64") == {0: 0.05, 64000: 0.005, 96000: 0.0005}


def test_momentum_and_decay_are_the_papers_for_every_parameter(straight):
    groups = json.loads((straight / "checkpoints/step_0000006/state.json").read_text())["param_groups"]
    [group] = groups
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 1e-4, False)
    assert len(group["params"]) == len(list(build_cifar_resnet(20).parameters()))


def test_plain_nets_and_other_shortcuts_train_and_say_so():
    train_cifar10.main([*CIFAR, "--plain", "--steps", "1"])
    train_cifar10.main([*CIFAR, "--shortcut", "B", "--steps", "1"])
    found = {path.name: build_cifar_resnet(weights=path / "model.safetensors") for path in Path("runs").iterdir()}
    assert {name: model.config["shortcut"] for name, model in found.items()} == {
        "synthetic-plain-20": "none",
        "synthetic-resnet-20-B": "B",
    }


def test_validation_tests_on_a_tenth_of_the_training_images_and_says_so(capsys):
    train_cifar10.main([*CIFAR, "--steps", "1", "--validation", "--output", "run"])
    assert json.loads(Path("run/results.json").read_text())["images"] == 2
    assert capsys.readouterr().out.splitlines()[-1].startswith("validation error ")


# Interrupted and resumed


def test_three_steps_and_three_resumed_are_six_steps_of_the_first_command(straight, capsys, monkeypatch):
    first = ["tools/train_cifar10.py", *SIX_STEPS, "--output", "run", "--max-steps", "3", "--eval-period", "0"]
    second = ["tools/train_cifar10.py", "--output", "run", "--resume", "--max-steps", "6", "--eval-period", "3"]
    for argv in (first, second, second):
        monkeypatch.setattr("sys.argv", argv)
        monkeypatch.setattr("sys.orig_argv", ["python", *argv])
        train_cifar10.main()
    assert "resumed from step 3 to 6" in capsys.readouterr().out
    assert_ended_alike(Path("run"), straight)
    origin = yaml.safe_load(Path("run/config.yaml").read_text())["effective"]
    assert origin["command"] == " ".join(["python", *first])
    assert origin["resumed"] == ["after update 3", "after update 6"] and origin["parameters"] == 269_722


def test_a_run_that_dies_while_it_writes_a_checkpoint_resumes_from_the_one_before(straight):
    die_in_second_checkpoint(train_cifar10.main, SIX_STEPS, Path("run"))
    with open("run/metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')
    train_cifar10.main([*SIX_STEPS, "--output", "run", "--resume"])
    assert_ended_alike(Path("run"), straight)
    assert timeless(Path("run"), "eval") == timeless(straight, "eval")


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--depth", "32"], "--depth 32: the run in {} was made with 20"),
        (["--plain"], "--plain True: the run in {} was made with False"),
    ],
)
def test_a_run_is_not_resumed_with_another_configuration(straight, capsys, argv, says):
    assert says.format(straight) in error_of(["--resume", "--output", straight, *argv], capsys)


def test_a_run_is_not_resumed_on_other_images(straight, capsys, monkeypatch):
    shutil.copytree(straight, "run")
    monkeypatch.setattr(cifar10, "SYNTHETIC_IMAGES", {"train": 30, "test": 10})
    assert "was trained on other data" in error_of(["--resume", "--output", "run"], capsys)


def test_updates_beyond_the_schedule_are_warned_of(straight, capsys):
    shutil.copytree(straight, "run")
    train_cifar10.main(["--resume", "--output", "run", "--max-steps", "7", "--quiet"])
    said = capsys.readouterr().out
    assert "--max-steps 7 is beyond the schedule, which ends after 6 updates at a learning rate of 6.25e-05" in said


def test_two_ranks_that_srun_starts_train_one_network_and_test_every_image_once(tmp_path):
    data = tmp_path / "data"
    for split, count in (("train", 5), ("test", 3)):
        for label in range(2):
            (data / split / str(label)).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (32, 32), (60 * i, 100 * label, 9)).save(data / split / str(label) / f"{i}.png")
    said = as_srun_starts(TOOLS / "train_cifar10.py", [*CIFAR, "--data", data, "--steps", "2", "--output", "run"])
    assert "8 images per update on 2 cpu" in said and said.count("from step 0") == 1
    assert [line["step"] for line in metrics(Path("run"))] == [1, 2]
    results = json.loads(Path("run/results.json").read_text())
    assert results["images"] == 6 and results["num_classes"] == 2


# What bad input gets


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--depth", "50"], "unknown depth 50; choose from 20, 32, 44, 56, 110, 1202"),
        (["--shortcut", "none"], "unknown shortcut 'none'; choose from A, B, C (or --plain)"),
        (["--shortcut", "B", "--plain"], "--plain has no shortcuts, --shortcut B asks for them"),
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--eval-period", "-1"], "--eval-period -1: must be at least 0"),
        (["--precision", "fp8"], "unknown precision 'fp8'; choose from fp32, bf16"),
        (["--device", "tpu"], "unknown device 'tpu'; choose from cuda, cpu"),
        (["--data", "nowhere"], "--data nowhere: no such folder; it should hold cifar-10-batches-py/"),
    ],
)
def test_a_wrong_option_is_one_line_that_names_it_and_nothing_is_written(capsys, argv, says):
    assert says in error_of([*CIFAR, "--steps", "1", *argv], capsys)
    assert list(Path().iterdir()) == []


def test_without_data_one_line_says_where_it_is_to_be_had(capsys):
    said = error_of(["--device", "cpu"], capsys)
    assert "no CIFAR-10 in $CIFAR10_DIR or ./datasets/cifar10" in said and "cifar-10-python.tar.gz" in said
    assert "--data DIR" in said and "--data synthetic" in said


def test_a_loss_that_is_not_finite_stops_before_the_update_and_saves_the_batch(straight, capsys, monkeypatch):
    forward, calls = CifarResNet.forward, []

    def third_is_nan(self, images):
        calls.append(images)
        return forward(self, images) * (float("nan") if len(calls) == 3 else 1)

    monkeypatch.setattr(CifarResNet, "forward", third_is_nan)
    said = error_of([*SIX_STEPS, "--output", "run"], capsys)
    assert "step 2 is not finite: loss_class is nan on rank 0, its images are saved in run/bad_batch" in said
    saved = load_file("run/bad_batch_step_2_rank_0.safetensors")
    assert torch.equal(saved["images"], calls[2]) and len(saved["labels"]) == 8


def test_resume_without_a_run_and_a_variable_that_leads_nowhere_stop(capsys, monkeypatch):
    assert "--resume: there is no run in runs/typo;" in error_of([*CIFAR, "--output", "runs/typo", "--resume"], capsys)
    monkeypatch.setenv("CIFAR10_DIR", "nowhere")
    assert "$CIFAR10_DIR is 'nowhere', but there is no folder" in error_of(["--device", "cpu"], capsys)
    assert list(Path().iterdir()) == []
