import copy

import pytest
import torch
import torchvision
from torch import nn

from resbackbone.resnet import DEPTHS, ResNet
from resbackbone.weights import Weights, backbone_part, fit, guess_depth


def state_of(depth, **options):
    with torch.device("meta"):
        return ResNet(depth, **options).state_dict()


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("prefix", ["", "body."])
def test_the_depth_is_read_off_the_names(depth, prefix):
    with torch.device("meta"):
        state = getattr(torchvision.models, f"resnet{depth}")().state_dict()
    assert guess_depth({prefix + name: value for name, value in state.items()}) == depth


def test_34_and_50_have_the_same_blocks_a_stage_and_are_told_apart():
    assert [counts for _, counts in (DEPTHS[34], DEPTHS[50])] == [(3, 4, 6, 3)] * 2
    assert guess_depth(state_of(34)) == 34
    assert guess_depth(state_of(50, groups=32, width_per_group=4)) == 50


@pytest.mark.parametrize("state", [{}, {"fc.weight": 0}, state_of(50, levels=["c4"])], ids=["empty", "fc", "no c5"])
def test_names_that_count_no_published_network_tell_no_depth(state):
    assert guess_depth(state) is None


def test_a_detectors_backbone_is_taken_out_and_any_other_dict_is_taken_whole():
    assert backbone_part({"backbone.conv1.weight": 1, "rpn.head": 2}) == {"conv1.weight": 1}
    assert backbone_part({"module.backbone.body.bn1.bias": 1, "module.rpn.head": 2}) == {"body.bn1.bias": 1}
    assert backbone_part({"module.conv1.weight": 1, "module.fc.bias": 2}) == {"conv1.weight": 1, "fc.bias": 2}


def network():
    return nn.ModuleDict({"trunk": nn.Linear(2, 3), "fpn": nn.Linear(3, 2), "bn": nn.BatchNorm1d(2)})


def weights(state):
    return Weights(dict(state), {}, "a file")


def test_what_fits_is_loaded_all_of_it():
    given, module = network(), network()
    fit(module, weights(given.state_dict()))
    assert all(torch.equal(value, given.state_dict()[name]) for name, value in module.state_dict().items())


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
    module = nn.ModuleDict(
        {"bn": nn.BatchNorm1d(2, track_running_stats=True) if taken else ResNet(18, norm="FrozenBN")}
    )
    state = {name: value + 1 for name, value in module.state_dict().items() if "num_batches" not in name}
    if given:
        state["bn.num_batches_tracked"] = torch.tensor(7)
    fit(module, weights(state))
    if taken:
        assert module.bn.num_batches_tracked == (7 if given else 0)
    assert all(torch.equal(module.state_dict()[n], v) for n, v in state.items() if "num_batches" not in n)
