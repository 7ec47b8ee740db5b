import math
from collections import OrderedDict
from itertools import combinations

import pytest
import torch
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from resbackbone.fpn import FPN, PYRAMID_LEVELS, trunk_levels_for
from resbackbone.resnet import Feature

TRUNK = {"c2": Feature(3, 4), "c3": Feature(5, 8), "c4": Feature(6, 16), "c5": Feature(7, 32)}
DILATED = {**TRUNK, "c5": Feature(7, 16)}
COMBINATIONS = [levels for n in range(1, 7) for levels in combinations(PYRAMID_LEVELS, n)]


def trunk_maps(trunk, height, width, batch=2):
    return {
        level: torch.randn(batch, channels, math.ceil(height / stride), math.ceil(width / stride))
        for level, (channels, stride) in trunk.items()
    }


def assert_same(pyramid, expected):
    assert len(pyramid) == len(expected)
    for x, y in zip(pyramid.values(), expected.values(), strict=True):
        assert x.shape == y.shape
        assert (x - y).abs().max() <= 1e-6 * y.abs().max()


@pytest.mark.parametrize("height, width", [(128, 64), (97, 130), (33, 65)])
def test_p2_to_p6_equal_torchvision(height, width):
    reference = FeaturePyramidNetwork([3, 5, 6, 7], 8, LastLevelMaxPool())
    fpn = FPN(TRUNK, channels=8)
    fpn.load_state_dict(reference.state_dict())
    maps = trunk_maps(TRUNK, height, width)
    assert_same(fpn(maps), reference(OrderedDict(maps)))


@pytest.mark.parametrize("p6_from", ["c5", "p5"])
def test_p3_to_p7_equal_torchvision(p6_from):
    # torchvision starts p6 from p5 where c5 would have as many channels as the pyramid, so that side says 7 or 8.
    reference = FeaturePyramidNetwork([5, 6, 7], 8, LastLevelP6P7(7 if p6_from == "c5" else 8, 8))
    fpn = FPN(TRUNK, ["p3", "p4", "p5", "p6", "p7"], channels=8, p6_from=p6_from)
    fpn.load_state_dict(reference.state_dict())
    for module in (fpn, reference):  # biases start at zero, where a forgotten one would not show
        for i, (_, p) in enumerate(sorted((n, p) for n, p in module.named_parameters() if n.endswith("bias"))):
            torch.nn.init.constant_(p, 0.1 * (i + 1))
    maps = {level: x for level, x in trunk_maps(TRUNK, 97, 130).items() if level != "c2"}
    assert_same(fpn(maps), reference(OrderedDict(maps)))


@pytest.mark.parametrize("p6_from", ["c5", "p5"])
@pytest.mark.parametrize("trunk", [TRUNK, DILATED], ids=["stride 32", "dilated"])
def test_every_combination_of_levels_advertises_what_it_returns_and_uses_every_parameter(trunk, p6_from):
    for levels in COMBINATIONS:
        fpn = FPN(trunk, reversed(levels), channels=4, p6_from=p6_from)
        assert fpn.trunk_levels == trunk_levels_for(levels)
        maps = {level: x for level, x in trunk_maps(trunk, 97, 130).items() if level in fpn.trunk_levels}
        pyramid = fpn(maps)  # no map of a trunk level that it does not name is read
        assert list(pyramid) == list(levels) == list(fpn.features)
        for level, x in pyramid.items():
            channels, stride = fpn.features[level]
            assert x.shape == (2, channels, math.ceil(97 / stride), math.ceil(130 / stride)), (levels, level)
        sum(x.sum() for x in pyramid.values()).backward()
        unused = [name for name, p in fpn.named_parameters() if p.grad is None]
        assert not unused, (levels, unused)  # DDP would wait for them for ever


@pytest.mark.parametrize("levels", [levels for levels in COMBINATIONS if "p7" not in levels or "p6" in levels])
def test_a_level_is_the_same_whatever_else_is_asked_for(levels):
    # p7 makes p6 a convolution, so the whole is asked for with p7 exactly where the part is
    whole = FPN(TRUNK, PYRAMID_LEVELS if "p7" in levels else PYRAMID_LEVELS[:-1], channels=4)
    part = FPN(TRUNK, levels, channels=4)
    finest = 4 - len(part.trunk_levels)  # blocks are numbered from the finest trunk level that is there
    state = {}
    for name, value in whole.state_dict().items():
        kind, block, rest = name.split(".", 2)
        state[name if kind == "extra_blocks" else f"{kind}.{int(block) - finest}.{rest}"] = value
    part.load_state_dict({name: state[name] for name in part.state_dict()})
    maps = trunk_maps(TRUNK, 65, 33)
    everything = whole(maps)
    assert all(torch.equal(x, everything[level]) for level, x in part(maps).items())


@pytest.mark.parametrize(
    "levels, inner, layer, extra",
    [
        (["p2", "p3", "p4", "p5"], 4, 4, []),
        (["p3"], 3, 1, []),
        (["p4", "p6"], 2, 2, []),  # p6 is p5 subsampled
        (["p4", "p6", "p7"], 2, 1, ["p6", "p7"]),  # p6 is a convolution of c5
        (["p7"], 0, 0, ["p6", "p7"]),
    ],
)
def test_only_the_layers_that_the_levels_need_are_built(levels, inner, layer, extra):
    fpn = FPN(TRUNK, levels)
    assert len(fpn.inner_blocks) == inner
    assert len(fpn.layer_blocks) == layer
    assert list(fpn.extra_blocks) == extra


def test_a_pyramid_with_frozen_norms_has_torchvisions_maps_and_gradients(randomised):
    reference = randomised(FeaturePyramidNetwork([3, 5, 6, 7], 8, LastLevelMaxPool(), FrozenBatchNorm2d)).double()
    fpn = FPN(TRUNK, channels=8, norm="FrozenBN").double()
    fpn.load_state_dict(reference.state_dict())
    given = {level: x.double() for level, x in trunk_maps(TRUNK, 97, 130).items()}
    gradients = []
    for network in (fpn, reference):
        maps = OrderedDict((level, x.clone().requires_grad_()) for level, x in given.items())
        pyramid = network(maps)
        sum((x**2).sum() for x in pyramid.values()).backward()
        gradients.append([pyramid, *(x.grad for x in maps.values()), *(p.grad for p in network.parameters())])
    assert_same(gradients[0].pop(0), gradients[1].pop(0))
    assert len(gradients[0]) == 12
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm, parameters", [(None, {"weight", "bias"}), ("BN", {"weight"})])
def test_a_norm_takes_the_place_of_the_bias(norm, parameters):
    fpn = FPN(TRUNK, norm=norm, channels=8)
    for block in [*fpn.inner_blocks.values(), *fpn.layer_blocks.values()]:
        assert {name for name, _ in block[0].named_parameters()} == parameters
        assert len(block) == (1 if norm is None else 2)
    assert all(x.isfinite().all() for x in fpn(trunk_maps(TRUNK, 97, 130)).values())


def test_hooks_and_other_layers_work_on_lateral_maps_as_on_any_other():
    fpn, seen, gradients = FPN(TRUNK, channels=8), {}, []
    fpn.inner_blocks["0"].register_forward_hook(lambda module, inputs, output: seen.update(kept=output))
    fpn.inner_blocks["1"].register_full_backward_hook(lambda module, inputs, outputs: gradients.append(outputs[0]))
    fpn.inner_blocks["2"] = torch.nn.Sequential(fpn.inner_blocks["2"], torch.nn.ReLU())
    maps = {level: x.requires_grad_() for level, x in trunk_maps(TRUNK, 97, 130).items()}
    sum(x.square().sum() for x in fpn(maps).values()).backward()
    assert torch.equal(seen["kept"], fpn.inner_blocks["0"](maps["c2"]))
    with torch.no_grad():
        fpn(maps)
    assert torch.equal(seen["kept"], fpn.inner_blocks["0"](maps["c2"]))
    assert len(gradients) == 1 and all(p.grad is not None for p in fpn.parameters())


@pytest.mark.parametrize("norm", [None, "FrozenBN", "BN"])
@pytest.mark.parametrize("onednn", [False, True])
def test_sums_that_are_part_of_a_convolution_are_the_same(norm, onednn, randomised):
    fpn, maps = randomised(FPN(TRUNK, channels=8, norm=norm)), trunk_maps(TRUNK, 97, 130)
    for i, p in enumerate(p for n, p in fpn.named_parameters() if n.endswith("bias")):
        torch.nn.init.constant_(p, 0.1 * (i + 1))
    expected, kept = fpn(maps), {level: x.clone() for level, x in maps.items()}
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=onednn):
        assert_same(fpn(maps), expected)
    assert all(torch.equal(x, kept[level]) for level, x in maps.items())


@pytest.mark.parametrize("norm", [None, "FrozenBN", "BN"])
def test_a_pyramid_keeps_no_more_for_backward_than_torchvisions(norm):
    def kept(network, maps):
        sizes = {}

        def note(x):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            alive = network(maps)
        return sum(sizes.values()) if alive else 0

    theirs = {None: None, "FrozenBN": FrozenBatchNorm2d, "BN": torch.nn.BatchNorm2d}[norm]
    maps = OrderedDict((level, x.requires_grad_()) for level, x in trunk_maps(TRUNK, 97, 130).items())
    reference = FeaturePyramidNetwork([3, 5, 6, 7], 8, LastLevelMaxPool(), theirs)
    assert 0 < kept(FPN(TRUNK, channels=8, norm=norm), maps) <= kept(reference, maps)
