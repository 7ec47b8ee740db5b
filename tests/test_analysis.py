import copy
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from resbackbone import build_resnet_backbone, build_resnet_classifier
from resbackbone.analysis import count_multiply_adds, count_parameters
from resbackbone.layers import freeze
from resbackbone.resnet import DEPTHS


@pytest.mark.parametrize("depth, billions", [(18, 1.8), (34, 3.6), (50, 3.8), (101, 7.6), (152, 11.3)])
def test_every_depth_has_torchvisions_parameters_and_the_cost_of_table_1(depth, billions):
    with torch.device("meta"):
        reference = getattr(torchvision.models, f"resnet{depth}")()
        model = build_resnet_classifier(depth, stride_in_1x1=True)
    assert count_parameters(model) == sum(p.numel() for p in reference.parameters())
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


def costs(**trunk) -> dict[str, str]:
    """Parameters (M) and multiply-adds (G) of a classifier, and of a backbone with FPN at 800 x 1216."""
    with torch.device("meta"):
        classifier, backbone = build_resnet_classifier(**trunk), build_resnet_backbone(fpn=True, **trunk)
    return {
        "parameters": f"{count_parameters(classifier) / 1e6:.2f}",
        "adds": f"{count_multiply_adds(classifier) / 1e9:.2f}",
        "with FPN": f"{count_parameters(backbone) / 1e6:.2f}",
        "adds with FPN": f"{count_multiply_adds(backbone, 800, 1216) / 1e9:.1f}",
    }


def test_the_model_zoos_tables_of_architectures_are_what_the_code_counts():
    lines = (Path(__file__).parents[1] / "MODEL_ZOO.md").read_text().splitlines()
    rows = {row[0]: row for row in ([cell.strip() for cell in line.strip("|").split("|")] for line in lines) if row[1:]}
    assert set(map(str, DEPTHS)) == {name for name in rows if name.isdigit()}
    for depth in DEPTHS:
        _, parameters, adds, in_1x1, _, channels, with_fpn, adds_with_fpn = rows[str(depth)]
        assert list(costs(depth=depth).values()) == [parameters, adds, with_fpn, adds_with_fpn]
        with torch.device("meta"):
            strided = build_resnet_classifier(depth, stride_in_1x1=True)
            features = build_resnet_backbone(depth).features.values()
        assert f"{count_multiply_adds(strided) / 1e9:.2f}" == in_1x1
        assert ", ".join(str(feature.channels) for feature in features) == channels
    for name, trunk in other_trunks().items():
        assert rows[name][1:] == list(costs(**trunk).values())
