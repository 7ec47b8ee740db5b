import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from resbackbone.analysis import gradient_norms, layer_responses
from resbackbone.cifar import build_cifar_resnet, save_cifar_resnet
from resbackbone.classification.cifar10 import mean_image_of, open_cifar10
from resbackbone.tools import layer_responses as tool


@pytest.fixture
def trained(tmp_path) -> Path:
    """A run's folder with two checkpoints; the network's norms have learned 0.5, then 0.25."""
    folder, data = tmp_path / "trained", open_cifar10("synthetic")
    for step, gamma in ((9, 0.5), (12, 0.25)):
        model = build_cifar_resnet(20, shortcut="B")
        for name, parameter in model.named_parameters():
            if "bn" in name and name.endswith("weight"):
                torch.nn.init.constant_(parameter, gamma)
        checkpoint = folder / "checkpoints" / f"step_{step:07d}"
        checkpoint.mkdir(parents=True)
        mean_image = mean_image_of(data.train)
        save_cifar_resnet(model, checkpoint / tool.FILE, mean_image=mean_image, classes=data.classes, recipe="none")
    (folder / "config.yaml").write_text("data: synthetic\ndepth: 20\n")
    return folder


def run(output: Path, *arguments: str) -> list[dict]:
    tool.main([*arguments, "--images", "8", "--output", str(output)])
    return json.loads((output / "layer_responses.json").read_text())["measured"]


def test_initialised_networks_are_measured_drawn_and_tabulated(tmp_path, capsys):
    measured = run(tmp_path / "out", "--networks", "plain-20", "resnet-32", "--seed", "3")
    assert [(m["network"], m["step"], len(m["layers"])) for m in measured] == [
        ("plain-20", 0, 19),
        ("resnet-32", 0, 31),
    ]
    with Image.open(tmp_path / "out" / "layer_responses.png") as picture:
        assert picture.width > 1000 and len(picture.convert("RGB").getcolors(1 << 20)) > 50  # lines, not a blank page
    said = capsys.readouterr().out
    assert said.startswith("measuring on 8 training images of synthetic\n")
    table = (tmp_path / "out" / "layer_responses.md").read_text()
    assert table in said and [line.split(" | ")[:2] for line in table.splitlines()[2:]] == [
        ["| plain-20", "at initialisation"],
        ["| resnet-32", "at initialisation"],
    ]
    norms = [layer["norm"] for layer in measured[0]["layers"]]
    assert f"{norms[0] / norms[-1]:.3g} | {max(norms) / min(norms):.3g} |" in table.splitlines()[2]


def test_every_checkpoint_of_a_run_is_measured_with_the_weights_that_are_in_it(tmp_path, trained):
    measured = run(tmp_path / "out", "--networks", "resnet-20", "--runs", str(trained))
    assert [(m["network"], m["step"]) for m in measured] == [("resnet-20", 0), ("resnet-20-B", 9), ("resnet-20-B", 12)]
    for m, std in zip(measured, (1, 0.5, 0.25), strict=True):
        assert [layer["std"] for layer in m["layers"]] == pytest.approx([std] * 19, rel=2e-2)


def test_the_numbers_are_those_of_images_less_the_mean_image(tmp_path, trained):
    [measured] = run(tmp_path / "out", "--networks", "--runs", str(trained / "checkpoints" / "step_0000012"), *DATA)
    model = build_cifar_resnet(weights=trained / "checkpoints" / "step_0000012" / tool.FILE)
    split = open_cifar10("synthetic").train
    drawn = torch.randperm(len(split.labels), generator=torch.Generator().manual_seed(0))[:8]
    images = split.images[drawn] / 255 - mean_image_of(split)
    assert [x["std"] for x in measured["layers"]] == [x["std"] for x in layer_responses(model, images)]
    gradients = gradient_norms(model, images, split.labels[drawn])
    assert [x["relative"] for x in measured["layers"]] == pytest.approx([x["relative"] for x in gradients])
    assert len(set(split.labels[drawn].tolist())) > 2  # not those of the first class


DATA = ("--data", "synthetic")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--networks", "plain-21"], "unknown network 'plain-21'; choose from plain-20, plain-32"),
        (["--networks"], "nothing to measure: no --networks and no --runs"),
        (["--images", "1"], "--images 1: must be at least 2"),
        (["--runs", "nowhere", *DATA], r"--runs nowhere: holds no checkpoint \(checkpoints/step_NNNNNNN/model"),
        (["--data", "nowhere"], "--data nowhere: no such folder"),
        (["--output", __file__], "--output .*: is a file; give a folder"),
    ],
)
def test_a_users_mistake_is_one_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        tool.main(arguments)


def test_a_checkpoint_alone_does_not_say_what_it_was_trained_on(trained):
    with pytest.raises(ValueError, match=r"does not say what it was trained on \(no config.yaml\); give --data DIR"):
        tool.main(["--runs", str(trained / "checkpoints" / "step_0000009")])
