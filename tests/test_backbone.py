import copy
import math

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from resbackbone import Feature, ResNetBackbone, build_resnet_backbone
from resbackbone.layers import FrozenBatchNorm2d
from resbackbone.weights import write_weights

TRAINABLE_NORM = nn.modules.batchnorm._BatchNorm


def assert_same_maps(maps, expected, tolerance=0.0):
    assert list(maps) == list(expected)
    for level, x in maps.items():
        assert x.shape == expected[level].shape
        error, scale = (x - expected[level]).abs().max(), expected[level].abs().max()
        assert error <= tolerance * scale, f"{level} differs by {error:.1e} of {scale:.1e}"


@pytest.fixture
def resnet18(randomised):
    """A published file's content: torchvision's names, classifier and batch counters included."""
    return randomised(torchvision.models.resnet18()).state_dict()


@pytest.mark.parametrize("size", [(64, 128), (97, 130)])
@pytest.mark.parametrize(
    "depth, options, divisibility",
    [
        (18, {}, 32),
        (50, {"levels": ["c5", "c3"]}, 32),
        (50, {"levels": ["c4"]}, 16),
        (50, {"dilate_c5": True}, 16),
        (50, {"fpn": True}, 32),
        (18, {"fpn": True, "levels": ["p7", "p3", "p5"], "fpn_channels": 8, "p6_from": "p5"}, 32),
        (18, {"fpn": True, "levels": ["p4", "p6"], "fpn_norm": "GN", "fpn_channels": 64}, 32),
        (50, {"fpn": True, "dilate_c5": True, "fpn_channels": 8}, 16),
    ],
)
def test_every_level_has_the_channels_and_stride_it_advertises(depth, options, divisibility, size):
    backbone = build_resnet_backbone(depth, **options).eval()
    maps = backbone(torch.zeros(2, 3, *size))
    assert list(maps) == list(backbone.features) == sorted(options.get("levels", maps))
    for level, x in maps.items():
        channels, stride = backbone.features[level]
        assert x.shape == (2, channels, *(math.ceil(n / stride) for n in size))
    assert backbone.out_channels == list(maps.values())[-1].shape[1]
    assert backbone.size_divisibility == divisibility


def test_the_default_is_all_of_the_trunk_or_p2_to_p6():
    assert build_resnet_backbone(50).features == {
        "c2": Feature(256, 4),
        "c3": Feature(512, 8),
        "c4": Feature(1024, 16),
        "c5": Feature(2048, 32),
    }
    pyramid = build_resnet_backbone(18, fpn=True).features
    assert pyramid == {f"p{k}": Feature(256, 2**k) for k in range(2, 7)}


def train_steps(backbone, steps=3):
    optimizer = torch.optim.SGD(backbone.parameters(), 0.01, momentum=0.9, weight_decay=0.1)
    backbone.train()
    for _ in range(steps):
        optimizer.zero_grad()
        sum(x.square().mean() for x in backbone(torch.randn(2, 3, 33, 65)).values()).backward()
        optimizer.step()


@pytest.mark.parametrize("norm", [None, "BN", "SyncBN"])
@pytest.mark.parametrize("checkpoint_activations", [False, True])
def test_frozen_means_frozen(norm, checkpoint_activations, resnet18):
    backbone = build_resnet_backbone(
        18, norm=norm, frozen_through="c3", weights=resnet18, checkpoint_activations=checkpoint_activations
    )
    images = torch.randn(1, 3, 33, 65)
    before, c3 = copy.deepcopy(backbone.state_dict()), backbone.train()(images)["c3"].detach()
    train_steps(backbone)
    changed = {name for name, value in backbone.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in changed} == {"layer3", "layer4"}
    assert torch.equal(backbone(images)["c3"], c3)
    # every convolution of the other stages did train, and their norms count batches unless frozen as a type
    assert {name for name, _ in backbone.named_parameters() if name.startswith(("layer3", "layer4"))} <= changed
    assert any(name.endswith("running_mean") for name in changed) == (norm is not None)


def test_with_weights_every_norm_is_frozen_and_so_are_the_stem_and_c2(resnet18):
    backbone = build_resnet_backbone(18, weights=resnet18)
    assert not any(isinstance(m, TRAINABLE_NORM) for m in backbone.modules())
    trains = {name.split(".")[0] for name, p in backbone.named_parameters() if p.requires_grad}
    assert trains == {"layer2", "layer3", "layer4"}
    assert backbone.summary().startswith("frozen BN 20, trainable BN 0, ")
    assert backbone.weights_source == "the given state dict"


def test_without_weights_everything_trains():
    backbone = build_resnet_backbone(18)
    assert not any(isinstance(m, FrozenBatchNorm2d) for m in backbone.modules())
    assert all(p.requires_grad for p in backbone.parameters())
    assert backbone.summary() == "frozen BN 0, trainable BN 20, parameters 11.2 M trainable, 0.0 M frozen"
    assert backbone.weights_source is None


def test_with_weights_nothing_need_be_frozen(resnet18):
    backbone = build_resnet_backbone(18, weights=resnet18, norm="BN", frozen_through="none")
    assert all(p.requires_grad for p in backbone.parameters())
    assert sum(isinstance(m, nn.BatchNorm2d) for m in backbone.modules()) == 20


@pytest.mark.parametrize("options", [{"norm": "FrozenBN"}, {"frozen_through": "c2"}, {"frozen_through": "stem"}])
def test_freezing_random_layers_is_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}='.*' without weights would freeze random layers"):
        build_resnet_backbone(18, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"levels": ["c3"], "fpn": True}, "unknown level 'c3'; choose from p2, p3, p4, p5, p6, p7"),
        ({"levels": [], "fpn": True}, "no level asked for; choose from p2"),
        ({"fpn": True, "p6_from": "p4"}, "unknown source of p6 'p4'; choose from c5, p5"),
    ],
)
def test_an_unknown_name_is_answered_with_the_choices(options, message):
    with pytest.raises(ValueError, match=message):
        build_resnet_backbone(**{"depth": 18, **options})


def test_an_unknown_part_to_freeze_is_answered_with_the_choices(resnet18):
    with pytest.raises(ValueError, match="'c6'; choose from None, stem, c2, c3, c4, c5"):
        build_resnet_backbone(18, weights=resnet18, frozen_through="c6")


def test_a_pyramid_is_new_on_weights_of_a_classifier(resnet18):
    backbone = build_resnet_backbone(18, fpn=True, weights=resnet18)
    trunk = build_resnet_backbone(18, weights=resnet18)
    images = torch.randn(1, 3, 33, 65)
    assert_same_maps(backbone.fpn(trunk(images)), backbone(images))
    assert all(p.requires_grad for p in backbone.fpn.parameters())


@pytest.mark.parametrize("prefix", ["", "backbone.", "module.backbone."])
def test_the_names_of_a_torchvision_detector_are_understood(prefix, randomised):
    reference = randomised(resnet_fpn_backbone(backbone_name="resnet18", weights=None))
    state = {prefix + name: value for name, value in reference.state_dict().items()}
    if prefix:
        state[prefix.removesuffix("backbone.") + "rpn.head.conv.weight"] = torch.zeros(3)  # not the backbone's
    backbone = build_resnet_backbone(18, fpn=True, weights=state)
    images = torch.randn(1, 3, 97, 130)
    expected = reference(images)
    assert_same_maps(backbone(images), dict(zip(backbone.features, expected.values(), strict=True)), 1e-5)
    trunk = build_resnet_backbone(18, weights=state)  # the pyramid is left out where none is wanted
    assert_same_maps(trunk(images), dict(zip(trunk.features, reference.body(images).values(), strict=True)), 1e-5)


def test_a_module_around_a_backbone_loads_those_names_strictly(randomised):
    reference = randomised(resnet_fpn_backbone(backbone_name="resnet18", weights=None))
    detector = nn.ModuleDict({"backbone": build_resnet_backbone(18, fpn=True)}).eval()
    detector.load_state_dict({f"backbone.{name}": value for name, value in reference.state_dict().items()})
    images = torch.randn(1, 3, 33, 65)
    maps = detector["backbone"](images)
    assert_same_maps(maps, dict(zip(maps, reference(images).values(), strict=True)), 1e-5)


def test_a_prefixed_checkpoint_loads_and_the_givers_dict_is_left_alone(resnet18):
    state = {f"module.{name}": value for name, value in resnet18.items()}
    names = list(state)
    images = torch.randn(1, 3, 33, 65)
    assert_same_maps(
        build_resnet_backbone(18, weights=state)(images), build_resnet_backbone(18, weights=resnet18)(images)
    )
    assert list(state) == names


@pytest.fixture
def own_file(tmp_path, randomised):
    """A backbone that strides the paper's way, and the file it was saved to."""
    backbone = randomised(build_resnet_backbone(50, fpn=True, stride_in_1x1=True, fpn_channels=8, levels=["p3", "p5"]))
    path = tmp_path / "r50.safetensors"
    write_weights(path, backbone.state_dict(), {"backbone": backbone.config.to_json()})
    return backbone, path


def test_a_saved_backbone_comes_back_with_its_stride_style_and_pyramid(own_file):
    backbone, path = own_file
    images = torch.randn(1, 3, 33, 65)
    for stride_in_1x1 in (None, True):
        loaded = build_resnet_backbone(
            50, fpn=True, levels=["p3", "p5"], fpn_channels=8, weights=path, stride_in_1x1=stride_in_1x1
        )
        assert loaded.config.stride_in_1x1 is True
        assert loaded.weights_source == str(path)
        assert_same_maps(loaded(images), backbone(images), 1e-5)


@pytest.mark.parametrize(
    "depth, options, stated, asked",
    [
        (34, {}, "depth=50", "depth=34"),
        (50, {"stride_in_1x1": False}, "stride_in_1x1=True", "stride_in_1x1=False"),
        (50, {"shortcut": "C"}, "shortcut=B", "shortcut=C"),
        (50, {"width_per_group": 128}, "width_per_group=64", "width_per_group=128"),
    ],
)
def test_what_a_file_says_of_itself_cannot_be_asked_otherwise(own_file, depth, options, stated, asked):
    with pytest.raises(ValueError) as error:
        build_resnet_backbone(depth, weights=own_file[1], **options)
    said = f"weights from {own_file[1]} are for {stated}, but you asked for {asked}; leave "
    assert str(error.value).startswith(said)


@pytest.mark.parametrize(
    "depth, options",
    [
        (18, {}),
        (50, {"levels": ["c4"], "stride_in_1x1": True, "norm": "GN"}),
        (50, {"fpn": True, "levels": ["p3", "p7"], "fpn_norm": "BN", "p6_from": "p5", "dilate_c5": True}),
        (18, {"shortcut": "none", "in_channels": 4, "checkpoint_activations": True, "eps": 1e-3}),
        (18, {"shortcut": "C", "zero_init_residual": True}),
        (50, {"levels": ["c3"], "stem": "deep", "shortcut": "D", "in_channels": 1, "checkpoint_activations": True}),
    ],
)
def test_a_backbone_is_made_again_from_its_config(depth, options):
    backbone = build_resnet_backbone(depth, **options).eval()
    again = ResNetBackbone(backbone.config).eval()
    again.load_state_dict(backbone.state_dict())
    images = torch.randn(1, options.get("in_channels", 3), 33, 65)
    assert_same_maps(again(images), backbone(images))
    assert again.config == backbone.config
    assert again.features == backbone.features


def test_a_frozen_backbone_is_made_again_as_frozen(resnet18):
    backbone = build_resnet_backbone(18, weights=resnet18, frozen_through="c3")
    again = ResNetBackbone(backbone.config)
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in backbone.parameters()]
    assert again.summary() == backbone.summary()


@pytest.mark.parametrize(
    "depth, options",
    [
        (18, {"levels": ["c4"]}),
        (50, {"levels": ["c5"], "dilate_c5": True}),
        (18, {"fpn": True}),
        (18, {"fpn": True, "levels": ["p3", "p4", "p5", "p6", "p7"]}),
        (18, {"fpn": True, "levels": ["p7"]}),
        (18, {"fpn": True, "levels": ["p4"], "checkpoint_activations": True}),
    ],
)
def test_no_parameter_is_left_without_a_gradient(depth, options):
    # DDP without find_unused_parameters waits for ever for one that is
    backbone = build_resnet_backbone(depth, **options)
    sum(x.sum() for x in backbone(torch.randn(2, 3, 65, 97)).values()).backward()
    assert not [name for name, p in backbone.named_parameters() if p.grad is None]


@pytest.mark.parametrize("norm", ["BN", None])
def test_fusing_keeps_the_outputs(norm, resnet18):
    backbone = build_resnet_backbone(18, norm=norm, weights=resnet18, fpn=True, fpn_norm="BN").eval()
    images = torch.randn(1, 3, 33, 65)
    expected = backbone(images)
    assert backbone.fuse() is backbone and not backbone.training
    assert_same_maps(backbone(images), expected, 1e-5)
    assert backbone.summary().startswith("frozen BN 0, trainable BN 0, ")


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_autocast_computes_in_bfloat16_and_trains_in_fp32(norm, resnet18):
    backbone = build_resnet_backbone(18, norm=norm, weights=resnet18, fpn=True).train()
    images = torch.randn(2, 3, 65, 97)
    expected = copy.deepcopy(backbone).eval()(images)
    with torch.autocast("cpu", torch.bfloat16):
        maps = backbone.eval()(images)
        loss = sum(x.float().square().mean() for x in backbone.train()(images).values())
    assert all(x.dtype == torch.bfloat16 for level, x in maps.items())
    assert_same_maps(maps, expected, 0.05)
    loss.backward()
    gradients = [p.grad for p in backbone.parameters() if p.requires_grad]
    assert all(g.dtype == torch.float32 and g.isfinite().all() and g.any() for g in gradients)


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_channels_last_stays_channels_last_and_changes_no_output(norm, resnet18):
    backbone = build_resnet_backbone(18, norm=norm, weights=resnet18, fpn=True).eval()
    images = torch.randn(2, 3, 65, 97)
    expected = backbone(images)
    maps = backbone.to(memory_format=torch.channels_last)(images.contiguous(memory_format=torch.channels_last))
    assert_same_maps(maps, expected, 1e-5)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in maps.values())


def test_a_compiled_backbone_is_one_graph_for_every_size(resnet18):
    backbone = build_resnet_backbone(18, weights=resnet18, fpn=True).eval()
    compiled = torch.compile(backbone, backend="eager", fullgraph=True, dynamic=True)
    for size in ((64, 96), (97, 131)):
        images = torch.randn(1, 3, *size)
        assert_same_maps(compiled(images), backbone(images), 1e-5)


def test_eps_is_the_weights_own_or_the_asked_one_and_never_another(tmp_path):
    backbone = build_resnet_backbone(18, levels=["c2"], eps=1e-3)
    assert backbone.bn1.eps == backbone.layer1[0].bn2.eps == 1e-3
    write_weights(tmp_path / "own.safetensors", backbone.state_dict(), {"backbone": backbone.config.to_json()})
    assert build_resnet_backbone(18, levels=["c2"], weights=tmp_path / "own.safetensors").bn1.eps == 1e-3
    with pytest.raises(ValueError, match=r"are for eps=0.001, but you asked for eps=1e-05"):
        build_resnet_backbone(18, levels=["c2"], weights=tmp_path / "own.safetensors", eps=1e-5)


def test_a_plain_net_has_no_shortcut_to_start_from():
    with pytest.raises(ValueError, match="a plain net has none"):
        build_resnet_backbone(18, shortcut="none", zero_init_residual=True)


def test_a_pyramid_that_no_weights_hold_is_not_frozen():
    weights = build_resnet_backbone(18).state_dict()
    with pytest.raises(ValueError, match="fpn_norm='FrozenBN', but weights from the given state dict hold no pyramid"):
        build_resnet_backbone(18, fpn=True, fpn_norm="FrozenBN", weights=weights)


def test_a_file_that_does_not_say_where_it_strides_is_said_to_be_assumed(tmp_path, caplog):
    torch.save(build_resnet_backbone(50).state_dict(), tmp_path / "plain.pth")
    build_resnet_backbone(50, weights=tmp_path / "plain.pth")
    said = (
        "plain.pth do not state all settings; assuming an input of RGB 0..1, mean 0.485 0.456 0.406, std 0.229 0.224 "
        "0.225, the stride in the 3x3, as usual for torchvision / timm names; if that is not so, give "
    )
    assert len(caplog.messages) == 1 and said in caplog.text
    caplog.clear()
    build_resnet_backbone(50, weights=tmp_path / "plain.pth", stride_in_1x1=False)
    assert len(caplog.messages) == 1 and "the stride" not in caplog.text
    caplog.clear()
    build_resnet_backbone(18, weights=build_resnet_backbone(18).state_dict())  # its owner knows
    assert not caplog.messages


def test_what_is_not_asked_comes_from_the_weights(own_file):
    backbone, path = own_file
    loaded = build_resnet_backbone(weights=path, fpn=True)
    images = torch.randn(1, 3, 33, 65)
    assert list(loaded.features) == ["p3", "p5"] and loaded.fpn is not None
    assert_same_maps(loaded(images), backbone(images), 1e-5)
    with pytest.raises(ValueError, match="unknown depth None; choose from 18"):
        build_resnet_backbone()


@pytest.mark.parametrize(
    "options",
    [
        {"shortcut": "C"},
        {"groups": 32, "width_per_group": 4},
        {"in_channels": 4},
        {"stem": "deep"},
        {"stem": "deep", "shortcut": "D"},
    ],
)
def test_names_and_shapes_tell_what_a_plain_state_dict_does_not_say(options):
    state = build_resnet_backbone(50, levels=["c2", "c4"], **options).state_dict()
    loaded = build_resnet_backbone(weights=state, levels=["c4"])
    assert all(getattr(loaded.config, name) == value for name, value in {"depth": 50, **options}.items())


def test_a_pool_in_a_shortcut_behind_a_7x7_stem_has_to_be_asked_for():
    state = build_resnet_backbone(50, levels=["c3"], shortcut="D").state_dict()
    with pytest.raises(ValueError, match="something without tensors in front of .*: give shortcut='D' if it averages"):
        build_resnet_backbone(50, weights=state, levels=["c3"])
    assert build_resnet_backbone(50, weights=state, levels=["c3"], shortcut="D").config.stem == "7x7"


def test_group_norms_have_to_be_asked_for():
    state = build_resnet_backbone(50, levels=["c4"], norm="GN").state_dict()
    with pytest.raises(ValueError, match="give norm='GN'"):
        build_resnet_backbone(weights=state, levels=["c4"])
    assert build_resnet_backbone(weights=state, levels=["c4"], norm="GN").config.norm == "GN"


def test_norms_that_hold_other_tensors_are_a_conflict(resnet18):
    with pytest.raises(ValueError, match="are for norm=BN, but you asked for norm=GN"):
        build_resnet_backbone(18, weights=resnet18, norm="GN")


def test_a_network_of_no_published_depth_has_to_be_named():
    state = build_resnet_backbone(18).state_dict()
    state = {name: value for name, value in state.items() if not name.startswith("layer2.1.")}
    with pytest.raises(ValueError, match="have 2-1-2-2 basic blocks in their stages"):
        build_resnet_backbone(weights=state)
    with pytest.raises(ValueError, match=r"missing: layer2\.1\.conv1\.weight"):
        build_resnet_backbone(18, weights=state)


@pytest.mark.parametrize("levels", [["c4"], ["c2", "c5"]])
def test_other_levels_of_the_same_layers_leave_the_backbone_as_it_was(resnet18, levels):
    backbone = build_resnet_backbone(18, weights=resnet18, levels=["c3", "c5"]).eval()
    images = torch.randn(1, 3, 65, 97)
    keys, features, expected = list(backbone.state_dict()), backbone.features, backbone(images)
    view = backbone.with_levels(levels)
    assert list(view.features) == levels == list(view(images)) and not view.training
    assert view.config.levels == tuple(levels) and view.weights_source == backbone.weights_source
    assert view.conv1.weight is backbone.conv1.weight and hasattr(view, "layer4") == ("c5" in levels)
    assert torch.equal(view(images)[levels[-1]], build_resnet_backbone(18, weights=resnet18).eval()(images)[levels[-1]])
    assert list(backbone.state_dict()) == keys and backbone.features == features
    assert_same_maps(backbone(images), expected)
    view.load_state_dict(backbone.state_dict())  # the stages that it does not have are left out
    with pytest.raises(ValueError, match="unknown level 'c3'; choose from c2"):
        build_resnet_backbone(18, levels=["c2"]).with_levels(["c3"])


def test_weights_of_frozen_norms_in_norms_that_train_are_announced(caplog):
    trained = build_resnet_backbone(18)
    frozen = build_resnet_backbone(18, weights=trained.state_dict())
    trained.load_state_dict(trained.state_dict())
    frozen.load_state_dict(trained.state_dict())
    frozen.load_state_dict(frozen.state_dict())
    build_resnet_backbone(18, weights=trained.state_dict(), norm="BN")
    assert not caplog.messages
    trained.load_state_dict(frozen.state_dict())
    build_resnet_backbone(18, weights=frozen.state_dict(), norm="BN")
    said = "these weights are of frozen batch norms (num_batches_tracked is missing), and the"
    announced = [message.partition(":")[0] for message in caplog.messages if message.startswith(said)]
    assert announced == [f"{said} {count} batch norms here train" for count in (20, 15)]


def test_torchscript_is_refused_with_what_works_and_tracing_does():
    backbone, x = build_resnet_backbone(18).eval(), torch.randn(1, 3, 33, 65)
    for module in (backbone, nn.Sequential(backbone)):
        with pytest.raises(ValueError, match=r"use torch.jit.trace\(backbone, images, strict=False\), torch.export"):
            torch.jit.script(module)
    with torch.no_grad():
        assert_same_maps(torch.jit.trace(backbone, x, strict=False)(x), backbone(x), 1e-6)
