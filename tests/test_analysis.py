import copy
import re
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from resbackbone import build_resnet_backbone, build_resnet_classifier
from resbackbone.analysis import count_multiply_adds, count_parameters
from resbackbone.layers import freeze
from resbackbone.resnet import DEPTHS

IN_TORCHVISION = [depth for depth in DEPTHS if hasattr(torchvision.models, f"resnet{depth}")]


@pytest.mark.parametrize("depth", IN_TORCHVISION)
def test_every_depth_has_as_many_parameters_as_torchvision(depth):
    with torch.device("meta"):
        reference = getattr(torchvision.models, f"resnet{depth}")()
        model = build_resnet_classifier(depth)
    assert count_parameters(model) == sum(p.numel() for p in reference.parameters())


@pytest.mark.parametrize("depth, billions", [(18, 1.8), (34, 3.6), (50, 3.8), (101, 7.6), (152, 11.3)])
def test_every_depth_costs_what_table_1_of_the_paper_says(depth, billions):
    with torch.device("meta"):
        model = build_resnet_classifier(depth, stride_in_1x1=True)
    assert count_multiply_adds(model) / 1e9 == pytest.approx(billions, rel=0.03)


def test_multiply_adds_of_a_convolution_and_a_product_are_counted_exactly():
    convolution = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
    assert count_multiply_adds(convolution, 7, 9) == 8 * 3 * 3 * 3 * 4 * 5
    network = nn.Sequential(nn.Conv2d(2, 4, 1, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 6))
    assert count_multiply_adds(network, 5, 5, in_channels=2) == 4 * 1 * 25 + 4 * 6


def test_counting_leaves_the_network_alone():
    backbone = build_resnet_backbone(18, fpn=True, fpn_channels=8).train()
    before = copy.deepcopy(backbone.state_dict())
    assert count_multiply_adds(backbone, 33, 65) > 0
    assert backbone.training and next(backbone.parameters()).device.type == "cpu"
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_frozen_convolutions_are_parameters_and_statistics_are_not():
    block = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))
    assert count_parameters(block) == 3 * 4 + 2 * 4
    assert count_parameters(freeze(block)) == 3 * 4  # the frozen norm's affine map is a constant


def other_trunks() -> dict[str, dict]:
    """The arguments that make the trunks of the model zoo's second table, by name."""
    trunks = {f"plain{depth}": {"depth": depth, "shortcut": "none"} for depth in (18, 34)}
    for depth, groups, width in ((50, 32, 4), (101, 32, 8), (101, 64, 4)):
        name = f"resnext{depth}_{groups}x{width}d"
        trunks[name] = {"depth": depth, "groups": groups, "width_per_group": width}
    return trunks | {f"wide_resnet{depth}_2": {"depth": depth, "width_per_group": 128} for depth in (50, 101)}


@pytest.mark.parametrize("name", other_trunks())
def test_the_model_zoos_other_trunks_are_what_the_code_counts(name):
    zoo = (Path(__file__).parents[1] / "MODEL_ZOO.md").read_text()
    _, *figures = [cell.strip() for cell in re.search(rf"\| {name} \|.*", zoo)[0].strip("|").split("|")]
    with torch.device("meta"):
        classifier = build_resnet_classifier(**other_trunks()[name])
        backbone = build_resnet_backbone(fpn=True, **other_trunks()[name])
    assert figures == [
        f"{count_parameters(classifier) / 1e6:.2f}",
        f"{count_multiply_adds(classifier) / 1e9:.2f}",
        f"{count_parameters(backbone) / 1e6:.2f}",
        f"{count_multiply_adds(backbone, 800, 1216) / 1e9:.1f}",
    ]


def test_the_model_zoos_table_of_architectures_is_what_the_code_counts():
    lines = (Path(__file__).parents[1] / "MODEL_ZOO.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if re.match(r"\| \d+ \|", line)]
    assert [int(row[0]) for row in rows] == list(DEPTHS)
    for depth, parameters, ours, in_1x1, _, channels, with_fpn, with_fpn_adds in rows:
        with torch.device("meta"):
            classifier, first = (build_resnet_classifier(int(depth), stride_in_1x1=first) for first in (False, True))
            backbone, trunk = (build_resnet_backbone(int(depth), fpn=fpn) for fpn in (True, False))
        widths = [feature.channels for feature in trunk.features.values()]
        assert f"{count_parameters(classifier) / 1e6:.2f}" == parameters
        assert f"{count_multiply_adds(classifier) / 1e9:.2f}" == ours
        assert f"{count_multiply_adds(first) / 1e9:.2f}" == in_1x1
        assert ", ".join(map(str, widths)) == channels
        assert f"{count_parameters(backbone) / 1e6:.2f}" == with_fpn
        assert f"{count_multiply_adds(backbone, 800, 1216) / 1e9:.1f}" == with_fpn_adds
