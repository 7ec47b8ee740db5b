import copy
from dataclasses import replace

import pytest
import torch
import torchvision
from torch import nn

from resbackbone import BackboneConfig, ResNetBackbone, build_resnet_backbone
from resbackbone.folding import FrozenBatchNorm2d
from resbackbone.resnet import DEPTHS
from resbackbone.weights import Weights, read_weights
from resbackbone.weights.fit import architecture_of, backbone_part, fit, pyramid_of, resolve_architecture

IN_TORCHVISION = [depth for depth in DEPTHS if hasattr(torchvision.models, f"resnet{depth}")]


def state_of(depth, **options):
    with torch.device("meta"):
        return ResNetBackbone(BackboneConfig(depth=depth, **options)).state_dict()


@pytest.mark.parametrize("depth", IN_TORCHVISION)
def test_the_depth_is_read_off_the_names(depth):
    with torch.device("meta"):
        state = getattr(torchvision.models, f"resnet{depth}")().state_dict()
    assert architecture_of(state) == {
        "depth": depth,
        "stem": "7x7",
        "shortcut": "B",
        "in_channels": 3,
        "norm": "BN",
        **({"groups": 1, "width_per_group": 64} if depth >= 50 else {}),
    }


@pytest.mark.parametrize(
    "depth, options",
    [
        (34, {}),  # as many blocks a stage as 50
        (50, {"groups": 32, "width_per_group": 4}),
        (101, {"levels": ["c4"]}),  # ends early, but only one depth fits
        (18, {"levels": ["c2"]}),
    ],
)
def test_the_depth_of_grouped_and_cut_trunks_is_read_off_too(depth, options):
    assert architecture_of(state_of(depth, **options))["depth"] == depth


@pytest.mark.parametrize("state", [{}, {"fc.weight": torch.zeros(1)}, state_of(50, levels=["c3"])], ids=len)
def test_names_that_fit_no_or_several_published_networks_tell_no_depth(state):
    assert "depth" not in architecture_of(state)


@pytest.mark.parametrize("shortcut, found", [("A", None), ("B", "B"), ("C", "C"), ("D", "D"), ("none", None)])
def test_shortcuts_are_found_where_they_have_parameters(shortcut, found):
    state = state_of(50, shortcut=shortcut, groups=32, width_per_group=4, in_channels=5, norm="GN")
    expected = {"depth": 50, "stem": "7x7", "groups": 32, "width_per_group": 4, "in_channels": 5, "norm": "GN"}
    assert architecture_of(state) == {**expected, **({"shortcut": found} if found else {})}


@pytest.mark.parametrize(
    "options, told",
    [
        ({"fpn_channels": 8}, {"levels": ["p2", "p3", "p4", "p5", "p6"], "fpn_channels": 8}),
        ({"levels": ["p3", "p7"]}, {"levels": ["p3", "p6", "p7"]}),
        ({"levels": ["p3", "p7"], "p6_from": "p5"}, {"levels": ["p3", "p5", "p6", "p7"], "p6_from": "p5"}),
        ({"levels": ["p4"], "fpn_norm": "BN"}, {"levels": ["p4", "p6"], "fpn_norm": "FrozenBN"}),
        ({"fpn_norm": "GN"}, {"fpn_norm": "GN"}),
    ],
)
def test_a_pyramid_is_read_off_its_names_and_shapes(options, told):
    state = build_resnet_backbone(18, fpn=True, **options).state_dict()
    assert {**pyramid_of(state), **told} == pyramid_of(state)
    assert pyramid_of(state_of(18)) == {}


def test_what_is_asked_stands_over_what_is_assumed_and_may_not_contradict_what_is_told():
    said = Weights(state_of(50), {"backbone": {"eps": 0.1}}, "a file", assumed={"stride_in_1x1": True})
    assert resolve_architecture(said)["stride_in_1x1"] is True and resolve_architecture(said)["eps"] == 0.1
    assert resolve_architecture(said, stride_in_1x1=False, depth=50)["stride_in_1x1"] is False
    assert resolve_architecture(said, norm="SyncBN")["norm"] == "SyncBN"
    with pytest.raises(ValueError, match="weights from a file are for eps=0.1, but you asked for eps=1e-05"):
        resolve_architecture(said, eps=1e-5)


def test_norms_without_statistics_are_group_norms_only_if_that_is_given_or_stated():
    said = Weights(state_of(18, norm="GN"), {}, "a file")
    with pytest.raises(ValueError, match=r"lack bn1.running_mean .*save the network's state_dict\(\).*norm='GN'"):
        resolve_architecture(said)
    with pytest.raises(ValueError, match="lack bn1.running_mean"):
        resolve_architecture(said, norm="BN")
    assert resolve_architecture(said, norm="GN")["norm"] == "GN"
    for stated in ({"backbone": {"norm": "GN"}}, {"publisher": "detectron2's model zoo"}):
        assert resolve_architecture(replace(said, metadata=stated))["norm"] == "GN"
    state = build_resnet_backbone(18, norm="GN").state_dict()
    assert resolve_architecture(read_weights(state, norm="GN"))["norm"] == "GN"


def test_a_group_norm_in_the_pyramid_that_nothing_states_is_said(caplog):
    state = build_resnet_backbone(18, fpn=True, fpn_norm="GN").state_dict()
    read_weights(state).announce_assumptions()
    assert "group norms of 32 groups and eps 1e-05 in the pyramid or box head" in caplog.text


@pytest.mark.parametrize("depth", [None, 18])
def test_weights_of_no_known_names_are_refused_by_their_names(depth):
    with pytest.raises(ValueError, match=r"hold no ResNet under known names \(stem.0.weight, \.\.\)"):
        resolve_architecture(Weights({"stem.0.weight": torch.zeros(1)}, {}, "a file"), depth=depth)


def test_a_detectors_backbone_is_taken_out_and_any_other_dict_is_taken_whole():
    assert backbone_part({"backbone.conv1.weight": 1, "rpn.head": 2}) == {"conv1.weight": 1}
    assert backbone_part({"conv1.weight": 1, "fc.bias": 2}) == {"conv1.weight": 1, "fc.bias": 2}


def network():
    return nn.ModuleDict({"trunk": nn.Linear(2, 3), "fpn": nn.Linear(3, 2), "bn": nn.BatchNorm1d(2)})


def weights(state):
    return Weights(dict(state), {}, "a file")


def test_a_misfit_names_everything_and_changes_nothing():
    module, state = network(), network().state_dict()
    before = copy.deepcopy(module.state_dict())
    del state["trunk.bias"], state["bn.running_var"]
    state["fpn.weight"] = torch.zeros(2, 4)
    state["head.weight"] = torch.zeros(1)
    with pytest.raises(ValueError) as error:
        fit(module, weights(state))
    assert str(error.value) == (
        "weights from a file do not fit: 2 missing: trunk.bias, bn.running_var; 1 unexpected: head.weight; "
        "1 of another shape: fpn.weight is [2, 4], not [2, 3]"
    )
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value):
    module, state = network(), network().state_dict()
    state["trunk.bias"][1] = value
    with pytest.raises(ValueError, match="do not fit: 1 with values that are not finite: trunk.bias$"):
        fit(module, weights(state))


def test_a_fresh_part_may_be_absent_as_a_whole_and_keeps_its_values_but_not_in_part():
    module, state = network(), network().state_dict()
    before = module.fpn.weight.clone()
    trunk_only = {name: value for name, value in state.items() if not name.startswith("fpn.")}
    with pytest.raises(ValueError, match=r"2 missing: fpn\.weight, fpn\.bias"):
        fit(module, weights(trunk_only))
    fit(module, weights(trunk_only), fresh=("fpn.",))
    assert torch.equal(module.fpn.weight, before)
    assert torch.equal(module.trunk.weight, state["trunk.weight"])
    with pytest.raises(ValueError, match=r"1 missing: fpn\.bias"):
        fit(module, weights({**trunk_only, "fpn.weight": state["fpn.weight"]}), fresh=("fpn.",))
    fit(module, weights(state), fresh=("fpn.",))
    assert torch.equal(module.fpn.weight, state["fpn.weight"])


@pytest.mark.parametrize("given, taken", [(True, False), (False, True), (True, True)])
def test_a_batch_counter_may_be_missing_on_either_side(given, taken):
    module = nn.BatchNorm1d(2) if taken else FrozenBatchNorm2d(2)
    state = {name: value + 1 for name, value in module.state_dict().items() if name != "num_batches_tracked"}
    fit(module, weights(state | ({"num_batches_tracked": torch.tensor(7)} if given else {})))
    if taken:
        assert module.num_batches_tracked == (7 if given else 0)
    assert all(torch.equal(module.state_dict()[name], value) for name, value in state.items())


def test_fused_weights_are_said_to_be_fused_in_one_line():
    state = build_resnet_backbone(18).fuse().state_dict()
    says = r"are fused: conv1.bias holds a norm that was folded into its convolution; save the weights before fuse\(\)"
    with pytest.raises(ValueError, match=says):
        build_resnet_backbone(weights=state)
