import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resbackbone.folding import conv_norm
from resbackbone.layers import (
    FrozenBatchNorm2d,
    PaddedIdentity,
    Projection,
    conv,
    freeze,
    fuse,
    norm_layer,
    shortcut,
)
from resbackbone.resnet import BasicBlock, Bottleneck, Layout


def relative_error(x, expected):
    return ((x - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture
def frozen(randomised):
    return randomised(FrozenBatchNorm2d(6))


def test_a_frozen_norm_is_a_batch_norm_in_eval_mode(frozen):
    reference = nn.BatchNorm2d(6).eval()
    reference.load_state_dict(frozen.state_dict(), strict=False)
    x = torch.randn(2, 6, 5, 7)
    assert relative_error(frozen(x), reference(x)) < 1e-6


def test_a_frozen_norm_loads_a_batch_norm_and_holds_nothing_else(randomised):
    source = randomised(nn.BatchNorm2d(6))
    frozen = FrozenBatchNorm2d(6)
    frozen.load_state_dict(source.state_dict())  # strict: its batch counter is no misfit
    x = torch.randn(2, 6, 5, 7)
    assert relative_error(frozen(x), source(x)) < 1e-6
    assert set(frozen.state_dict()) == {"weight", "bias", "running_mean", "running_var"}
    assert "num_batches_tracked" in source.state_dict()  # the giver keeps its own


def test_neither_train_mode_nor_an_optimizer_thaws_a_frozen_norm(frozen):
    network = nn.Sequential(nn.Conv2d(3, 6, 1), frozen).train()
    x, y = torch.randn(4, 3, 5, 7), torch.randn(4, 6, 5, 7)
    before, output = copy.deepcopy(frozen.state_dict()), frozen(y)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    weight = network[0].weight.clone()
    for _ in range(3):
        optimizer.zero_grad()
        network(x + 5).square().mean().backward()
        optimizer.step()
    assert not torch.equal(network[0].weight, weight)  # something did train
    assert all(torch.equal(before[name], value) for name, value in frozen.state_dict().items())
    assert torch.equal(frozen(y), output)


@pytest.mark.parametrize("stride, dilation, groups", [(1, 1, 1), (2, 1, 2), (1, 2, 1)])
def test_folding_a_frozen_norm_changes_no_output_and_no_gradient(frozen, stride, dilation, groups):
    convolution = conv(4, 6, kernel=3, stride=stride, dilation=dilation, groups=groups)
    x = torch.randn(2, 4, 9, 7, requires_grad=True)
    results = []
    for forward in (lambda: conv_norm(convolution, frozen, x), lambda: frozen(convolution(x))):
        output = forward()
        (output * torch.arange(output.numel()).view_as(output).sin()).sum().backward()
        results.append((output.detach(), convolution.weight.grad, x.grad))
        convolution.weight.grad = x.grad = None
    for folded, unfolded in zip(*results, strict=True):
        assert relative_error(folded, unfolded) < 1e-5


def test_a_variance_near_zero_stays_finite_and_exact_in_half_precision():
    frozen = FrozenBatchNorm2d(4, eps=1e-8)
    frozen.running_var.fill_(1e-8)  # var + eps is 0 in fp16, and its inverse root infinite
    x = torch.randn(1, 4, 5, 5) / 1000
    for dtype in (torch.bfloat16, torch.float16):
        y = frozen(x.to(dtype))
        assert y.dtype == dtype
        assert relative_error(y.float(), frozen(x)) < 0.02
    convolution = conv(4, 4, kernel=1)
    expected = conv_norm(convolution, frozen, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(conv_norm(convolution, frozen, x), expected) < 0.03
    assert relative_error(conv_norm(convolution.bfloat16(), frozen, x.bfloat16()), expected) < 0.03


def test_shortcut_a_subsamples_and_fills_new_channels_with_zeros():
    x = torch.randn(2, 3, 5, 7)
    y = shortcut("A", 3, 8, 2, nn.BatchNorm2d)(x)
    assert y.shape == (2, 8, 3, 4)
    assert torch.equal(y[:, :3], x[:, :, ::2, ::2])
    assert not y[:, 3:].any()
    assert not list(shortcut("A", 3, 8, 2, nn.BatchNorm2d).parameters())


@pytest.mark.parametrize(
    "option, unchanged, changed",
    [("A", type(None), PaddedIdentity), ("B", type(None), Projection), ("C", Projection, Projection)],
)
def test_a_projects_nowhere_b_where_the_shape_changes_c_everywhere(option, unchanged, changed):
    assert type(shortcut(option, 8, 8, 1, nn.BatchNorm2d)) is unchanged
    assert type(shortcut(option, 8, 8, 2, nn.BatchNorm2d)) is changed
    assert type(shortcut(option, 4, 8, 1, nn.BatchNorm2d)) is changed


def test_a_projection_is_a_strided_convolution_and_its_norm(randomised):
    for norm in (nn.BatchNorm2d, FrozenBatchNorm2d):
        projection = randomised(shortcut("B", 3, 8, 2, norm))
        x = torch.randn(2, 3, 5, 7)
        expected = projection[1](F.conv2d(x, projection[0].weight, stride=2))
        assert relative_error(projection(x), expected) < 1e-5


@pytest.mark.parametrize("changes", [False, True])
def test_without_a_shortcut_a_block_adds_nothing(changes):
    block = BasicBlock(4, 8 if changes else 4, Layout(nn.BatchNorm2d, shortcut="none"), stride=2 if changes else 1)
    nn.init.zeros_(block.bn2.weight)
    assert not block(torch.randn(2, 4, 5, 7)).any()


@pytest.mark.parametrize("option", ["A", "B", "C"])
def test_a_block_whose_residual_is_zero_is_its_rectified_shortcut(option):
    block = BasicBlock(4, 8, Layout(nn.BatchNorm2d, shortcut=option), stride=2).eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.randn(2, 4, 5, 7)
    assert torch.equal(block(x), block.downsample(x).relu())


def network_with_odd_eps(norm):
    # A block with a projection, and a norm whose eps is not the default: freezing that forgets eps moves its output.
    block = Bottleneck(8, 8, Layout(norm), stride=2)
    for module in block.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm | FrozenBatchNorm2d):
            module.eps = 0.3
    return block


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d])
def test_freezing_keeps_the_outputs_of_eval_mode_even_in_train_mode(norm, randomised):
    block = randomised(network_with_odd_eps(norm))
    x = torch.randn(2, 8, 7, 9)
    expected = block(x).detach()
    frozen = freeze(block)
    assert frozen is block
    assert relative_error(frozen.train()(x), expected) < 1e-6
    assert not any(p.requires_grad for p in frozen.parameters())
    assert sum(isinstance(m, FrozenBatchNorm2d) for m in frozen.modules()) == 4


def test_freezing_leaves_group_norm_and_stops_its_parameters():
    block = Bottleneck(32, 32, Layout(norm_layer("GN")))
    x = torch.randn(2, 32, 5, 7)
    expected = block(x).detach()
    assert torch.equal(freeze(block)(x), expected)
    assert isinstance(block.bn1, nn.GroupNorm) and not block.bn1.weight.requires_grad


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, FrozenBatchNorm2d])
def test_fusing_keeps_the_outputs_of_eval_mode_and_leaves_no_norm(norm, randomised):
    block = randomised(network_with_odd_eps(norm))
    x = torch.randn(2, 8, 7, 9)
    expected = block(x).detach()
    fused = fuse(block)
    assert relative_error(fused(x), expected) < 1e-5
    assert not any(isinstance(m, nn.BatchNorm2d | FrozenBatchNorm2d) for m in fused.modules())


def test_fusing_takes_a_bias_of_the_convolution_along(randomised):
    block = randomised(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)))
    x = torch.randn(2, 3, 5, 7)
    expected = block(x).detach()
    assert relative_error(fuse(block)(x), expected) < 1e-5


def test_fusing_leaves_group_norm_alone():
    block = Bottleneck(32, 32, Layout(norm_layer("GN"))).eval()
    x = torch.randn(2, 32, 5, 7)
    expected = block(x).detach()
    assert torch.equal(fuse(block)(x), expected)
    assert isinstance(block.bn3, nn.GroupNorm)
