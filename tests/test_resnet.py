import copy
import math

import pytest
import timm
import torch
import torchvision
from torch import nn

from resbackbone import BackboneConfig, ResNetBackbone, build_resnet_backbone
from resbackbone.analysis import count_multiply_adds
from resbackbone.layers import FrozenBatchNorm2d, Projection
from resbackbone.resnet import DEPTHS, STAGES

RESNET_D = {"stem": "deep", "shortcut": "D"}


def resnet(depth: int, **settings) -> ResNetBackbone:
    return ResNetBackbone(BackboneConfig(depth=depth, **settings))


def assert_same_maps(maps, expected, tolerance=1e-5):
    assert len(maps) == len(expected)
    for (level, x), y in zip(maps.items(), expected, strict=True):
        assert x.shape == y.shape
        error = ((x - y).abs().max() / y.abs().max()).item()
        assert error < tolerance, f"{level} differs by {error:.1e}"


@torch.no_grad()
def torchvision_maps(model, images):
    x = model.maxpool(model.relu(model.bn1(model.conv1(images))))
    return [x := getattr(model, stage)(x) for stage in STAGES.values()]


@torch.no_grad()
def folded_and_loaded(reference, images, depth, **options):
    """Our maps of the reference's weights, by both ways in: frozen and folded, and as plain batch norms."""
    folded = build_resnet_backbone(depth, weights=reference.state_dict(), **options).train()
    plain = build_resnet_backbone(depth, norm="BN", **options).eval()
    plain.load_state_dict(reference.state_dict())  # strict: the classifier's fc is dropped
    return folded(images), plain(images)


@pytest.mark.parametrize(
    "depth, size", [(18, (97, 130)), (34, (65, 33)), (50, (97, 130)), (101, (37, 53)), (152, (33, 65))]
)
def test_every_depth_equals_torchvision_given_its_weights_untranslated(depth, size, randomised):
    reference = randomised(getattr(torchvision.models, f"resnet{depth}")())
    images = torch.randn(2, 3, *size)
    expected = torchvision_maps(reference, images)
    for maps in folded_and_loaded(reference, images, depth):
        assert_same_maps(maps, expected)


@pytest.mark.parametrize(
    "name, options",
    [
        ("resnext50_32x4d", {"groups": 32, "width_per_group": 4}),
        ("wide_resnet50_2", {"width_per_group": 128}),
    ],
)
def test_resnext_and_wide_networks_equal_torchvision(name, options, randomised):
    reference = randomised(getattr(torchvision.models, name)())
    images = torch.randn(1, 3, 33, 65)
    for maps in folded_and_loaded(reference, images, 50, **options):
        assert_same_maps(maps, torchvision_maps(reference, images))


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("dilate_c5", [False, True])
def test_the_maps_equal_timm_given_its_weights_untranslated(depth, dilate_c5, randomised):
    reference = timm.create_model(
        f"resnet{depth}",
        pretrained=False,
        features_only=True,
        out_indices=(1, 2, 3, 4),
        output_stride=16 if dilate_c5 else 32,
    )
    randomised(reference)
    images = torch.randn(2, 3, 65, 97)
    with torch.no_grad():
        expected = reference(images)
    for maps in folded_and_loaded(reference, images, depth, dilate_c5=dilate_c5):
        assert_same_maps(maps, expected)


@pytest.mark.parametrize("depth, size", [(18, (97, 130)), (50, (33, 65))])
def test_resnet_d_equals_timm_given_its_weights_and_so_it_does_fused(depth, size, randomised):
    reference = randomised(timm.create_model(f"resnet{depth}d", features_only=True, out_indices=(1, 2, 3, 4)))
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = reference(images)
    for maps in folded_and_loaded(reference, images, depth, **RESNET_D):
        assert_same_maps(maps, expected)
    fused = build_resnet_backbone(depth, weights=reference.state_dict()).fuse()
    assert_same_maps(fused(images), expected)
    assert not any(isinstance(m, FrozenBatchNorm2d) for m in fused.modules())


def test_the_gradients_of_resnet_d_are_timms(randomised):
    reference = randomised(timm.create_model("resnet18d", features_only=True, out_indices=(1, 2, 3, 4))).double()
    network = build_resnet_backbone(weights=reference.state_dict(), frozen_through=None).double()
    images = torch.randn(2, 3, 33, 49, dtype=torch.float64)
    for maps in (reference(images), network(images).values()):
        sum(x.sin().sum() for x in maps).backward()
    convolutions = {name: p.grad for name, p in network.named_parameters()}
    expected = {name: p.grad for name, p in reference.named_parameters() if p.dim() == 4}
    assert convolutions.keys() == expected.keys()
    for name, gradient in convolutions.items():
        assert (gradient - expected[name]).norm() < 1e-9 * expected[name].norm(), name


def test_a_dilated_c5_equals_torchvision(randomised):
    reference = randomised(torchvision.models.resnet50(replace_stride_with_dilation=[False, False, True]))
    images = torch.randn(2, 3, 65, 97)
    for maps in folded_and_loaded(reference, images, 50, dilate_c5=True):
        assert_same_maps(maps, torchvision_maps(reference, images))


@pytest.mark.parametrize("depth, stride_in_1x1", [(18, False), (50, False), (50, True)])
@pytest.mark.parametrize("size", [(64, 128), (65, 97)])
def test_a_dilated_c5_agrees_with_the_strided_one_where_both_have_a_value(depth, stride_in_1x1, size, randomised):
    strided = randomised(resnet(depth, levels=["c5"], stride_in_1x1=stride_in_1x1))
    dilated = resnet(depth, levels=["c5"], stride_in_1x1=stride_in_1x1, dilate_c5=True).eval()
    dilated.load_state_dict(strided.state_dict())
    images = torch.randn(1, 3, *size, dtype=torch.float64)  # in fp32 the difference depends on the processor
    with torch.no_grad():
        expected, c5 = strided.double()(images)["c5"], dilated.double()(images)["c5"]
    assert dilated.features["c5"].stride == 16
    assert c5.shape[-2:] == tuple(math.ceil(n / 16) for n in size)
    assert_same_maps({"c5": c5[:, :, ::2, ::2]}, [expected], tolerance=1e-12)


def test_the_stride_style_moves_the_stride_and_nothing_else(randomised):
    late = randomised(resnet(50))
    early = resnet(50, stride_in_1x1=True).eval()
    early.load_state_dict(late.state_dict())
    images = torch.randn(1, 3, 65, 97)
    with torch.no_grad():
        late_maps, early_maps = late(images), early(images)
    assert torch.equal(late_maps["c2"], early_maps["c2"])  # conv2_x has no stride
    assert late_maps["c3"].shape == early_maps["c3"].shape
    assert not torch.allclose(late_maps["c3"], early_maps["c3"])
    assert count_multiply_adds(early, 64, 64) < count_multiply_adds(late, 64, 64)


@pytest.mark.parametrize("levels, stages", [(["c2"], 1), (["c3"], 2), (["c4", "c2"], 3), (["c5"], 4)])
def test_only_what_is_asked_for_is_built_and_returned_finest_first(levels, stages, randomised):
    full = randomised(resnet(18))
    asked = resnet(18, levels=levels).eval()
    assert [hasattr(asked, f"layer{k}") for k in (1, 2, 3, 4)] == [k <= stages for k in (1, 2, 3, 4)]
    asked.load_state_dict(full.state_dict())  # strict: the stages that are not built are dropped
    images = torch.randn(1, 3, 33, 65)
    with torch.no_grad():
        everything, maps = full(images), asked(images)
    assert list(maps) == sorted(levels) == list(asked.features)
    assert all(torch.equal(maps[level], everything[level]) for level in maps)


@pytest.mark.parametrize("kind", [{}, RESNET_D], ids=["ResNet", "ResNet-D"])
@pytest.mark.parametrize("norm", ["BN", "FrozenBN", "SyncBN", "GN"])
def test_a_network_with_any_norm_trains_a_step(norm, kind):
    network = resnet(18, norm=norm, **kind).train()
    before = copy.deepcopy(dict(network.named_parameters()))
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    sum(x.square().mean() for x in network(torch.randn(2, 3, 33, 65)).values()).backward()
    optimizer.step()
    assert all(not torch.equal(before[name], p) and p.isfinite().all() for name, p in network.named_parameters())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"depth": 51}, "unknown depth 51; choose from 18, "),
        ({"depth": "50"}, "unknown depth '50'; choose from 18, "),
        ({"levels": ["c3", "c6"]}, "unknown level 'c6'; choose from c2, c3, c4, c5"),
        ({"levels": []}, "no level asked for; choose from c2, c3, c4, c5"),
        ({"levels": "c5"}, r"levels is a list of names .*, not the string 'c5'"),
        ({"norm": "LN"}, "unknown norm 'LN'; choose from BN, FrozenBN, SyncBN, GN"),
        ({"shortcut": "E"}, "unknown shortcut 'E'; choose from A, B, C, D, none"),
        ({"stem": "5x5"}, "unknown stem '5x5'; choose from 7x7, deep"),
        ({"shortcut": "D", "dilate_c5": True}, r"leave dilate_c5 \(timm's output_stride=16\) out"),
        ({"groups": 32}, "groups and width_per_group are for depths 50, 101, 152"),
    ],
)
def test_an_unknown_name_is_answered_with_the_choices(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_resnet_backbone(**{"depth": 18, **arguments})


def test_a_part_to_freeze_through_that_is_not_there_is_answered_with_the_choices():
    with pytest.raises(ValueError, match="unknown frozen_through 'c6'; choose from stem, c2, c3, c4, c5"):
        resnet(18).freeze("c6")


@pytest.mark.parametrize("kind", [{}, RESNET_D], ids=["ResNet", "ResNet-D"])
@pytest.mark.parametrize("through, frozen", [("stem", 0), ("c2", 1), ("c5", 4)])
def test_freezing_stops_the_stem_and_the_stages_up_to_the_one_named(through, frozen, kind):
    network = resnet(18, **kind)
    network.freeze(through)
    trains = {name.split(".")[0] for name, p in network.named_parameters() if p.requires_grad}
    assert trains == {f"layer{k}" for k in (1, 2, 3, 4) if k > frozen}
    batch_norms = {name.split(".")[0] for name, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert batch_norms == trains
    assert isinstance(network.bn1, FrozenBatchNorm2d)


@pytest.mark.parametrize("depth", [18, 50])
def test_a_plain_network_computes_what_a_residual_one_does_but_for_the_projections(depth):
    plain, residual = (resnet(depth, shortcut=shortcut) for shortcut in ("none", "B"))
    assert not any(isinstance(m, Projection) for m in plain.modules())
    # One 1x1 a stage, on the stage's output positions: an image of 64 x 64 has 16 x 16 in c2, 2 x 2 in c5.
    expansion = DEPTHS[depth][0].expansion
    channels = [64, *(64 * expansion * 2**i for i in range(4))]
    projections = sum(
        channels[i] * channels[i + 1] * (16 // 2**i) ** 2 for i in range(4) if i or channels[0] != channels[1]
    )
    assert count_multiply_adds(residual, 64, 64) - count_multiply_adds(plain, 64, 64) == projections
    padded = resnet(depth, shortcut="A")
    assert count_multiply_adds(padded, 64, 64) == count_multiply_adds(plain, 64, 64)


@pytest.mark.parametrize("depth", [18, 50])
def test_zero_init_residual_starts_every_block_as_its_shortcut(depth):
    network = resnet(depth, zero_init_residual=True)
    for _, stage in network.stages():
        x = torch.rand(2, stage[1].conv1.in_channels, 5, 7)
        assert all(torch.equal(block(x), x) for block in stage[1:])
    block = resnet(depth).layer1[1]  # without it, a block does compute something
    x = torch.rand(2, block.conv1.in_channels, 5, 7)
    assert not torch.allclose(block(x), x)


@pytest.mark.parametrize("depth", [18, 50])
def test_convolutions_start_with_the_deviation_of_he_et_al(depth):
    for name, module in resnet(depth).named_modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            deviation = module.weight.std().item() / math.sqrt(2 / fan_out)
            # 4 standard errors of a deviation estimated from so many numbers
            assert abs(deviation - 1) < 4 / math.sqrt(2 * module.weight.numel()), name
            assert abs(module.weight.mean()) < 4 * math.sqrt(2 / fan_out / module.weight.numel()), name


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_recomputing_activations_changes_no_gradient_and_no_statistic(norm):
    kept = resnet(18, norm=norm).train()
    recomputed = resnet(18, norm=norm, checkpoint_activations=True).train()
    recomputed.load_state_dict(kept.state_dict())
    images = torch.randn(2, 3, 33, 65)
    for network in (kept, recomputed):
        network.freeze("c2")  # a frozen stage has nothing to recompute for, and must not be an obstacle
        sum(x.sin().sum() for x in network(images).values()).backward()
    gradients = [{name: p.grad for name, p in n.named_parameters() if p.requires_grad} for n in (kept, recomputed)]
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())
    assert all(torch.equal(value, recomputed.state_dict()[name]) for name, value in kept.state_dict().items())


def test_recomputing_keeps_fewer_activations():
    kept = []
    for checkpoint_activations in (False, True):
        network = resnet(18, levels=["c5"], checkpoint_activations=checkpoint_activations).train()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: s.append(x.numel()) or x, lambda x: x):
            network(torch.randn(2, 3, 65, 97))
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 3


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (33, 65)])
@pytest.mark.parametrize("depth, options", [(18, {}), (50, {"dilate_c5": True}), (18, RESNET_D)])
def test_an_image_of_any_size_gives_maps_rounded_up(size, depth, options):
    network = resnet(depth, **options).eval()
    maps = network(torch.randn(1, 3, *size))
    for level, (channels, stride) in network.features.items():
        assert maps[level].shape == (1, channels, *(math.ceil(n / stride) for n in size))
        assert maps[level].isfinite().all()


@pytest.mark.parametrize("kind", [{}, RESNET_D], ids=["ResNet", "ResNet-D"])
def test_a_batch_without_images_gives_maps_without_images(kind):
    maps = resnet(18, norm="FrozenBN", **kind)(torch.zeros(0, 3, 33, 65))
    assert [x.shape[:2] for x in maps.values()] == [(0, 64), (0, 128), (0, 256), (0, 512)]


def test_images_may_have_other_than_three_channels():
    assert resnet(18, in_channels=5, levels=["c2"]).eval()(torch.randn(1, 5, 33, 65))["c2"].shape == (1, 64, 9, 17)
