import pytest
import torch
from torchvision.ops import MultiScaleRoIAlign

from detection.roi_align import PyramidRoIAlign
from resbackbone import Feature

HEIGHT, WIDTH = 160, 192  # of the padded images; multiples of every stride
BOXES = {
    "inside": [[10.0, 20, 70, 90], [3, 5, 180, 150], [30.5, 40.25, 61.125, 55]],
    "partly outside": [[-30.0, -20, 40, 50], [150, 120, 260, 230], [-5, -5, 300, 300]],
    "wholly outside": [[-90.0, -80, -40, -30], [400, 400, 500, 520]],
    "tiny": [[50.0, 50, 50.01, 50.01], [7, 9, 8, 10], [100, 100, 103, 101]],
    "at the border": [[0.0, 0, 192, 160], [191, 159, 192, 160], [0, 0, 1, 1], [176, 0, 192, 160]],
    "flat": [[20.0, 30, 150, 31], [20, 30, 21, 150], [60, 60, 60, 60]],
    "none": [],
}


def pyramid(levels, channels=5, batch=2):
    features = {level: Feature(channels, 2 ** int(level[1])) for level in levels}
    maps = {level: torch.randn(batch, channels, HEIGHT // f.stride, WIDTH // f.stride) for level, f in features.items()}
    return features, {**maps, "unused": torch.randn(batch, channels, 1, 1)}


def ours_and_theirs(levels=("p2", "p3", "p4", "p5"), size=7, ratio=2, scale=224):
    features, maps = pyramid(levels)
    theirs = MultiScaleRoIAlign(list(features), size, ratio, canonical_scale=scale)
    return PyramidRoIAlign(features, size, ratio, scale), theirs, maps


def boxes_of(*names):
    return [torch.tensor(BOXES[name]).reshape(-1, 4) for name in names]


@pytest.mark.parametrize("levels", [("p2", "p3", "p4", "p5"), ("p3", "p4", "p5"), ("c4",), ("p5",)])
@pytest.mark.parametrize("names", [(name, "inside") for name in BOXES] + [("inside", "none"), ("none", "none")])
@pytest.mark.parametrize("scale", [224, 56])
def test_outputs_and_gradients_are_torchvisions(levels, names, scale):
    ours, theirs, maps = ours_and_theirs(levels, scale=scale)
    boxes, sizes = boxes_of(*names), [(HEIGHT, WIDTH), (HEIGHT - 9, WIDTH - 30)]
    results = []
    for pool in (ours, theirs):
        leaves = {level: map.clone().requires_grad_() for level, map in maps.items()}
        pooled = pool(leaves, boxes, sizes)
        pooled.mul(torch.linspace(-1, 2, pooled.numel()).view_as(pooled)).sum().backward()
        results.append((pooled, [leaves[level].grad for level in levels]))
    (pooled, gradients), (wanted, wanted_gradients) = results
    assert pooled.shape == (sum(map(len, boxes)), 5, 7, 7)
    torch.testing.assert_close(pooled, wanted, atol=1e-4, rtol=1e-4)
    for gradient, wanted_gradient in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted_gradient, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size, ratio", [(14, 2), (3, 1), (5, 3)])
def test_other_output_sizes_and_sampling_ratios_agree_too(size, ratio):
    ours, theirs, maps = ours_and_theirs(size=size, ratio=ratio)
    boxes = boxes_of("partly outside", "inside")
    torch.testing.assert_close(ours(maps, boxes, [(HEIGHT, WIDTH)] * 2), theirs(maps, boxes, [(HEIGHT, WIDTH)] * 2))


def test_outputs_are_the_same_with_and_without_gradients():
    ours, _, maps = ours_and_theirs()
    boxes, sizes = boxes_of("partly outside", "at the border"), [(HEIGHT, WIDTH)] * 2
    wanted = ours({level: map.requires_grad_() for level, map in maps.items()}, boxes, sizes)
    with torch.inference_mode():
        assert torch.equal(ours(maps, boxes, sizes), wanted)


def test_channels_last_and_bfloat16_maps_give_what_plain_ones_do():
    ours, _, maps = ours_and_theirs()
    boxes, sizes = boxes_of("inside", "tiny"), [(HEIGHT, WIDTH)] * 2
    wanted = ours(maps, boxes, sizes)
    strided = {level: map.to(memory_format=torch.channels_last) for level, map in maps.items()}
    assert torch.equal(ours(strided, boxes, sizes), wanted)
    halved = {level: map.bfloat16() for level, map in maps.items()}
    torch.testing.assert_close(ours(halved, boxes, sizes).float(), wanted, atol=0.05, rtol=0.02)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("first", [(33, 180), (2, 192), (HEIGHT, WIDTH)])
def test_strides_are_the_stated_ones_whatever_size_the_first_image_has(gradients, first):
    """torchvision infers them from its first image, unpadded, and goes wrong for good where that is narrow."""
    ours, theirs, maps = ours_and_theirs()
    boxes = boxes_of("inside", "at the border")
    wanted = theirs(maps, boxes, [(HEIGHT, WIDTH)] * 2)
    narrow = {level: map[:1, :, : -(-64 // 2 ** int(level[1]))] for level, map in maps.items() if level != "unused"}
    with torch.set_grad_enabled(gradients):
        ours(narrow, boxes[:1], [first])
        torch.testing.assert_close(ours(maps, boxes, [first, first]), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("gradients", [True, False])
def test_a_pyramid_with_a_gap_pools_every_box_from_a_level_it_has(gradients):
    ours, _, maps = ours_and_theirs(("p2", "p4"))
    with torch.set_grad_enabled(gradients):
        pooled = ours(maps, [torch.tensor([[0.0, 0, 190, 158], [5, 5, 120, 120], [5, 5, 20, 20]])], [(HEIGHT, WIDTH)])
    assert (pooled.flatten(1).abs().amax(1) > 0).all()
