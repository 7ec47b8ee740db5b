"""3x3 convolutions with fewer multiplications: the same numbers, used where they gain and nowhere else."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resbackbone import build_resnet_backbone, winograd
from resbackbone.folding import conv_block, conv_norm_relu
from resbackbone.layers import ConvBlocks, FrozenBatchNorm2d, fuse

SIZES = [(1, 1), (1, 9), (4, 4), (5, 7), (8, 12), (13, 3), (17, 30)]


def convolved(x, weight, bias, relu=False):
    return winograd.convolve(x, winograd.transform(weight), bias, relu)


@pytest.fixture
def everywhere(monkeypatch):
    """Used for every 3x3 convolution in fp32 that is not mostly padding."""
    monkeypatch.setattr(winograd, "FEWEST_CHANNELS", 1)
    monkeypatch.setattr(winograd, "FEWEST_TILES", 1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "last"])
def test_in_fp64_it_is_the_convolution_to_rounding(size, images, relu, memory_format):
    x = torch.randn(images, 5, *size, dtype=torch.float64).to(memory_format=memory_format)
    weight, bias = torch.randn(7, 5, 3, 3, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    expected = F.conv2d(x, weight, bias, padding=1)
    found = convolved(x, weight, bias, relu)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, expected.relu() if relu else expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("at_once", [1, 4, 7])
@pytest.mark.parametrize("images, size", [(1, (23, 18)), (5, (6, 9))])
def test_it_is_the_same_however_many_tiles_are_computed_at_once(at_once, images, size, monkeypatch):
    monkeypatch.setattr(winograd, "TILES_AT_ONCE", at_once)
    x, weight, bias = torch.randn(images, 5, *size).double(), torch.randn(4, 5, 3, 3).double(), torch.randn(4).double()
    torch.testing.assert_close(convolved(x, weight, bias), F.conv2d(x, weight, bias, padding=1), rtol=0, atol=1e-12)


def test_its_rounding_errors_are_of_the_order_of_the_ordinary_convolution():
    x, weight = torch.randn(1, 256, 20, 24).relu(), torch.randn(256, 256, 3, 3) / 48
    bias = torch.randn(256)
    exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    error = convolved(x, weight, bias) - exact
    assert error.norm() < 1e-6 * exact.norm() and error.abs().max() < 3e-6 * exact.abs().max()


def test_it_is_used_for_large_maps_of_many_channels_in_full_precision_only():
    x = torch.randn(1, 256, 20, 28)

    def used(x=x, channels=(256, 256), kernel=3, **settings):
        return winograd.is_faster(nn.Conv2d(*channels, kernel, **{"padding": 1, **settings}), x)

    assert used()
    assert not used(x[:, :, :12, :16]) and used(x[:, :, :12, :16].repeat(3, 1, 1, 1))  # 12 and 36 tiles
    assert not used(torch.randn(1, 256, 2, 400))  # half of each tile is padding
    assert not used(x[:, :128], channels=(128, 256)) and not used(channels=(256, 128))
    assert not used(x.double()) and not used(x.bfloat16())
    assert not used(stride=2) and not used(dilation=2, padding=2) and not used(groups=2) and not used(kernel=1)
    assert not used(padding=0) and not used(padding="same")


def test_it_is_not_used_where_the_user_allows_less_precise_products():
    conv, x = nn.Conv2d(256, 256, 3, padding=1), torch.randn(1, 256, 20, 28)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert not winograd.is_faster(conv, x)
    finally:
        torch.set_float32_matmul_precision(before)


def test_less_precise_products_allowed_through_torch_backends_are_no_error():
    conv, x = nn.Conv2d(256, 256, 3, padding=1), torch.randn(1, 256, 20, 28)
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    try:
        settings.fp32_precision = "tf32"
        assert not winograd.is_faster(conv, x)
    finally:
        settings.fp32_precision = before


def test_maps_in_any_order_in_memory_are_taken(everywhere):
    x = torch.randn(2, 12, 8, 5).permute(0, 3, 1, 2).transpose(2, 3)  # [B, C, H, W]
    mixed = torch.randn(2, 8, 5, 12).permute(0, 2, 3, 1)  # B, W, C, H in memory
    weight, bias = torch.randn(4, 5, 3, 3), torch.randn(4)
    for maps in (x, mixed):
        torch.testing.assert_close(
            convolved(maps, weight, bias), F.conv2d(maps, weight, bias, padding=1), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("spare", [False, True])
def test_a_fused_step_with_a_sum_and_relu_uses_it_and_is_the_same(everywhere, fused, spare, monkeypatch):
    calls = []
    monkeypatch.setattr(winograd, "convolve", lambda *args, real=winograd.convolve: calls.append(1) or real(*args))
    conv, norm, relu = nn.Conv2d(5, 6, 3, padding=1, bias=False), FrozenBatchNorm2d(6), nn.ReLU()
    norm.running_var.uniform_(0.5, 1.5)
    x, shortcut = torch.randn(2, 5, 8, 12), torch.randn(2, 6, 8, 12)
    with torch.no_grad():
        expected = relu(norm(conv(x)) + shortcut)
        if fused:
            conv, norm = fuse(nn.Sequential(conv, norm))
        found = conv_norm_relu(conv, norm, relu, x, lambda: shortcut.clone(), spare)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert len(calls) == fused


def test_a_fused_backbone_with_a_pyramid_is_the_same_network(everywhere, randomised, monkeypatch):
    calls = []
    monkeypatch.setattr(winograd, "convolve", lambda *args, real=winograd.convolve: calls.append(1) or real(*args))
    backbone = randomised(build_resnet_backbone(50, fpn=True)).eval()
    images = torch.randn(1, 3, 128, 192)
    with torch.inference_mode():
        expected = backbone.double()(images.double())
        backbone.float().fuse()
        for _ in range(2):
            found = backbone(images)
            for level, y in expected.items():
                assert (found[level] - y).norm() < 1e-5 * y.norm(), level
    assert len(calls) > 10


@pytest.mark.parametrize("where", ["block", "convolution", "relu"])
def test_whoever_observes_blocks_sees_every_step(where, everywhere):
    blocks = ConvBlocks(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()), nn.Flatten())
    seen, x = [], torch.randn(1, 4, 8, 12)
    observed = {"block": blocks[0], "convolution": blocks[0][0], "relu": blocks[0][1]}[where]
    with torch.no_grad():
        expected = blocks(x)
        observed.register_forward_hook(lambda module, args, y: seen.append(y))
        found = fuse(blocks)(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert len(seen) == 1


def test_a_sum_comes_before_no_relu():
    block, x, total = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()), torch.randn(1, 4, 5, 7), torch.randn(1, 4, 5, 7)
    with torch.no_grad():
        torch.testing.assert_close(conv_block(block, x, total.clone()), total + block(x))
