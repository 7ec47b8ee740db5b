"""timm, both ways: our networks made by timm are timm's own, and timm's networks are Backbones."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import resbackbone.adapters.timm  # noqa: F401 - registers resbackbone_18 .. resbackbone_152
from detection.faster_rcnn import build_faster_rcnn
from detection.saved import load_detector, save_detector
from resbackbone import Feature, build_resnet_backbone
from resbackbone.adapters.from_timm import TimmBackbone, from_timm
from resbackbone.weights import MEAN, STD


def images(height: int = 97, width: int = 130) -> torch.Tensor:
    return torch.randn(2, 3, height, width)


def assert_equal(given, expected) -> None:
    """1e-5 relative to the largest of a map."""
    assert len(given) == len(expected)
    for x, y in zip(given, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5 * y.abs().max().item())


# ---- ours in timm ----


@pytest.mark.parametrize("depth, stride", [(34, 32), (101, 32), (18, 16), (50, 16), ("18d", 32)])
def test_timm_makes_feature_maps_that_equal_its_own_on_odd_sizes(depth, stride, randomised):
    theirs = randomised(timm.create_model(f"resnet{depth}", features_only=True, output_stride=stride))
    ours = timm.create_model(f"resbackbone_{depth}", features_only=True, output_stride=stride).eval()
    ours.load_state_dict(theirs.state_dict())
    for part in ("channels", "reduction"):
        assert getattr(ours.feature_info, part)() == getattr(theirs.feature_info, part)()
    x = images(65, 97)
    with torch.no_grad():
        assert_equal(ours(x), theirs(x))


@pytest.mark.parametrize(
    "out_indices, reductions", [((1, 2, 3, 4), [4, 8, 16, 32]), ((0, 3), [2, 16]), (2, [16, 32]), ((-4,), [4])]
)
def test_out_indices_choose_maps_and_what_is_built(out_indices, reductions):
    model = timm.create_model("resbackbone_18", features_only=True, out_indices=out_indices)
    assert model.feature_info.reduction() == reductions
    maps = model(images())
    channels = model.feature_info.channels()
    for x, stride, count in zip(maps, reductions, channels, strict=True):
        assert x.shape == (2, count, -(-97 // stride), -(-130 // stride))
    assert hasattr(model, "layer4") == (32 in reductions)
    assert all(name in dict(model.named_modules()) for name in model.feature_info.module_name())


@pytest.mark.parametrize("depth", [18, 50])
def test_the_classifier_equals_timms(depth, randomised):
    theirs = randomised(timm.create_model(f"resnet{depth}", num_classes=7, in_chans=1))
    ours = timm.create_model(f"resbackbone_{depth}", num_classes=7, in_chans=1).eval()
    ours.load_state_dict(theirs.state_dict())
    assert ours.num_classes == 7 and ours.num_features == theirs.num_features and ours.get_classifier() is ours.fc
    x = torch.randn(2, 1, 49, 65)
    with torch.no_grad():
        maps = ours.forward_features(x)
        assert_equal([ours(x), maps], [theirs(x), theirs.forward_features(x)])
        assert_equal([ours.forward_head(maps, pre_logits=True)], [theirs.forward_head(maps, pre_logits=True)])


@pytest.mark.parametrize("features_only", [True, False])
def test_frozen_through_freezes_these_parts_and_changes_no_map(features_only, randomised):
    make = {"features_only": True} if features_only else {"num_classes": 3}
    theirs = randomised(timm.create_model("resnet18", **make))
    ours = timm.create_model("resbackbone_18", frozen_through="c2", **make)
    ours.load_state_dict(theirs.state_dict())
    x = images(65, 97)
    with torch.no_grad():
        given, expected = ours.eval()(x), theirs(x)
        assert_equal(*((given, expected) if features_only else ([given], [expected])))
    trainable = {name.partition(".")[0] for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert trainable == {"layer2", "layer3", "layer4", *(() if features_only else ("fc",))}
    before = ours.layer1[0].bn1.running_mean.clone()
    ours.train()(x)
    assert torch.equal(ours.layer1[0].bn1.running_mean, before)
    with pytest.raises(ValueError, match="unknown frozen_through 'layer1'; choose from None, stem, c2"):
        timm.create_model("resbackbone_18", frozen_through="layer1", **make)


def test_layers_have_learning_rates_of_their_own_as_in_timm():
    theirs, ours = (timm.create_model(name) for name in ("resnet18", "resbackbone_18"))
    for coarse in (False, True):
        expected = timm.models.group_parameters(theirs, theirs.group_matcher(coarse))
        assert timm.models.group_parameters(ours, ours.group_matcher(coarse)) == expected


def test_a_classifier_is_reset_to_other_classes_and_to_none():
    model = timm.create_model("resbackbone_18", num_classes=3, drop_rate=0.0)
    model.reset_classifier(5)
    assert model(images()).shape == (2, 5) and model.num_classes == 5
    model.reset_classifier(0)
    assert model(images()).shape == (2, 512)
    with pytest.raises(ValueError, match="unknown global_pool 'max'; choose from None, avg"):
        model.reset_classifier(4, "max")


@pytest.mark.parametrize("features_only", [False, True])
def test_checkpointed_activations_give_the_same_gradients(features_only):
    model, x = timm.create_model("resbackbone_18", features_only=features_only, num_classes=3), images(33, 47)
    gradients = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        assert model.checkpoint_activations is enable
        (model(x)[-1]).square().sum().backward()
        gradients.append(model.conv1.weight.grad.clone())
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("features_only", [False, True])
@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"drop_path_rate": 0.1}, "drop_path_rate=0.1; it takes num_classes"),
        ({"output_stride": 8}, "unknown output_stride 8; choose from 32, 16"),
        ({"norm": "IN"}, "unknown norm 'IN'"),
        ({"shortcut": "D", "output_stride": 16}, r"not supported, .*; leave dilate_c5 \(timm's output_stride=16\) out"),
    ],
)
def test_what_it_does_not_do_is_refused_in_a_sentence(arguments, message, features_only):
    with pytest.raises(ValueError, match=message):
        timm.create_model("resbackbone_50", features_only=features_only, **arguments)


def test_an_index_without_a_map_is_refused():
    with pytest.raises(ValueError, match="unknown out index 5"):
        timm.create_model("resbackbone_18", features_only=True, out_indices=(1, 5))


@pytest.mark.parametrize("features_only", [False, True])
def test_a_file_of_timms_network_is_loaded_as_a_checkpoint(tmp_path, randomised, features_only):
    theirs = randomised(timm.create_model("resnet18", num_classes=3))
    save_file(theirs.state_dict(), tmp_path / "r18.safetensors")
    ours = timm.create_model(
        "resbackbone_18", features_only=features_only, num_classes=3, checkpoint_path=tmp_path / "r18.safetensors"
    )
    x = images(33, 47)
    with torch.no_grad():
        expected = theirs.forward_features(x) if features_only else theirs(x)
        assert_equal([ours.eval()(x)[-1]], [expected if features_only else expected[-1]])


@pytest.mark.parametrize("kind", ["", "d"])
def test_pretrained_loads_what_timm_has_for_its_own_network(tmp_path, randomised, kind):
    cfg = timm.get_pretrained_cfg(f"resbackbone_50{kind}.a1_in1k")
    assert (cfg.hf_hub_id, cfg.num_classes) == (f"timm/resnet50{kind}.a1_in1k", 1000)
    theirs = randomised(timm.create_model(f"resnet18{kind}"))
    save_file(theirs.state_dict(), tmp_path / "r18.safetensors")
    source = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "r18.safetensors")}}
    for arguments in ({"in_chans": 1, "num_classes": 5}, {"features_only": True, "out_indices": (2,)}):
        ours = timm.create_model(f"resbackbone_18{kind}", **source, **arguments)
        assert torch.equal(ours.layer2[1].conv2.weight, theirs.layer2[1].conv2.weight)
        assert torch.equal(ours.layer2[1].bn2.running_var, theirs.layer2[1].bn2.running_var)


# ---- timm's in ours ----

KINDS = {  # channels of c2..c5
    "resnet10t": (64, 128, 256, 512),
    "vgg11": (256, 512, 512, 512),  # rounds down by itself
    "test_convnext": (24, 32, 48, 64),
    "swin_tiny_patch4_window7_224": (96, 192, 384, 768),  # channels last, of a fixed size
    "mobilenetv3_small_050": (8, 16, 24, 288),
    "test_vit": (64, 64, 64, 64),  # one stride, 16
}


def assert_as_advertised(backbone) -> None:
    with torch.no_grad():
        maps = backbone.eval()(images())
    assert list(maps) == list(backbone.features) and backbone.size_divisibility == 32
    for level, (channels, stride) in backbone.features.items():
        assert stride == 2 ** int(level[1])
        assert maps[level].shape == (2, channels, -(-97 // stride), -(-130 // stride))


@pytest.mark.parametrize("name", KINDS)
def test_every_level_has_the_channels_and_stride_it_advertises(name):
    backbone = from_timm(name)
    assert_as_advertised(backbone)
    assert tuple(feature.channels for feature in backbone.features.values()) == KINDS[name]


@pytest.mark.parametrize("levels", [None, ["p3", "p4", "p5", "p6", "p7"]])
def test_a_pyramid_stands_on_it(levels):
    backbone = from_timm("resnet10t", fpn=True, levels=levels, fpn_channels=24)
    assert list(backbone.features) == (levels or ["p2", "p3", "p4", "p5", "p6"])
    assert backbone.out_channels == 24 and "layer_blocks" in dict(backbone.fpn.named_children())
    assert_as_advertised(backbone)


@pytest.mark.parametrize("name", ["resnet10t", "swin_tiny_patch4_window7_224", "tf_mobilenetv3_small_minimal_100"])
def test_on_padded_images_maps_are_timms(name):
    backbone = from_timm(name, levels=["c3", "c5"]).eval()
    size = {"strict_img_size": False} if "swin" in name else {}
    theirs = timm.create_model(name, features_only=True, **size).eval()
    theirs.load_state_dict({**theirs.state_dict(), **backbone.network.state_dict()})
    x = images(96, 160)
    with torch.no_grad():
        expected = dict(zip(theirs.feature_info.reduction(), theirs(x), strict=True))
        given = backbone(x)
    channels_last = "swin" in name
    for level, stride in (("c3", 8), ("c5", 32)):
        y = expected[stride].permute(0, 3, 1, 2) if channels_last else expected[stride]
        assert torch.equal(given[level], y)


def test_a_plain_vit_gives_its_last_map_at_four_strides():
    backbone = from_timm("test_vit").eval()
    x = images(64, 96)
    with torch.no_grad():
        maps = backbone(x)
        (last,) = backbone.network(x)
    assert len(backbone.network.model.blocks) == 6  # all of them
    assert torch.equal(maps["c4"], last) and torch.equal(maps["c5"], nn.functional.max_pool2d(last, 2))
    torch.testing.assert_close(maps["c2"].mean(), last.mean(), rtol=1e-3, atol=1e-3)
    assert maps["c2"].unique().numel() > last.numel()  # between the patches, not copies of them


def test_a_level_is_the_last_map_of_its_stride():
    assert from_timm("resnet10t", output_stride=16).features["c4"] == Feature(512, 16)  # stage 5, not stage 4


def test_only_what_the_levels_need_is_built():
    assert "layer4" not in dict(from_timm("resnet10t", levels=["c3"]).network.named_children())


@pytest.fixture
def pretrained(randomised):
    """A network of timm's with random weights, and the arguments by which timm takes these for its own."""

    def make(name: str, **cfg) -> tuple[nn.Module, dict]:
        network = randomised(timm.create_model(name))
        return network, {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": network.state_dict(), **cfg}}

    return make


def test_pretrained_norms_are_frozen_by_default_and_stay_so(pretrained):
    network, source = pretrained("resnet10t")
    backbone = from_timm("resnet10t", **source).train()
    assert backbone.summary().startswith("frozen BN 14, trainable BN 0") and backbone.weights_source == "timm:resnet10t"
    x = images(64, 96)
    with torch.no_grad():
        assert_equal([backbone(x)["c5"]], [network.forward_features(x)])
    assert "pretrained_cfg_overlay" not in backbone.config.options
    assert from_timm("resnet10t", norm="BN", **source).summary().startswith("frozen BN 0, trainable BN 14")


@pytest.mark.parametrize(
    "name, through, trained, frozen",
    [
        ("resnet10t", "stem", "layer1.0.conv1", "conv1.3"),
        ("resnet10t", "c3", "layer3.0.conv1", "layer2.0.conv1"),
        ("vgg11", "stem", "features_6", "features_3"),
        ("resnet10t", "c5", None, "layer4.0.conv1"),
        ("test_convnext", "stem", "stages_0.blocks.0.conv_dw", "stem_0"),
        ("test_convnext", "c2", "stages_1.blocks.0.conv_dw", "stages_0.blocks.0.conv_dw"),
        ("mobilenetv3_small_050", "c2", "blocks.1.0.conv_pw", "blocks.0.0.conv_dw"),
    ],
)
def test_parts_are_frozen_through_the_level_named(pretrained, name, through, trained, frozen):
    _, source = pretrained(name)
    backbone = from_timm(name, frozen_through=through, norm="BN", **source)
    parts = dict(backbone.network.named_modules())
    assert not parts[frozen].weight.requires_grad
    assert trained is None or parts[trained].weight.requires_grad
    before = {key: x.clone() for key, x in backbone.state_dict().items()}
    backbone.train()(images(64, 96))
    position = list(parts).index(frozen)
    earlier = {f"network.{key}" for key in list(parts)[: position + 1]}
    moved = {key for key, x in backbone.state_dict().items() if not torch.equal(x, before[key])}
    assert not {key.rpartition(".")[0] for key in moved} & earlier
    assert bool(moved) == (name in ("resnet10t", "mobilenetv3_small_050") and through != "c5")  # the norms left


def test_another_input_than_ours_is_met_exactly(pretrained):
    mean, std = (0.5, 0.4, 0.3), (0.5, 0.6, 0.7)
    network, source = pretrained("resnet10t", mean=mean, std=std)
    backbone = from_timm("resnet10t", **source).eval()
    pixels = torch.rand(1, 3, 64, 96)
    ours = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    theirs = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        expected = network.forward_features(theirs)
        assert_equal([backbone(ours)["c5"]], [expected])
        again = TimmBackbone(backbone.config).eval()  # as a file's metadata describe it
        again.load_state_dict(backbone.state_dict())
        assert_equal([again(ours)["c5"]], [expected])


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        (nn.Conv2d(3, 8, 3), {}, "a network by its timm name, such as .vgg16.; it takes no Conv2d"),
        ("resnet1000", {}, "timm has no network 'resnet1000'; did you mean resnet"),
        ("unheard_of", {}, r"timm has no network 'unheard_of'; timm.list_models\(\) names those it has"),
        ("resnet10t", {"levels": ["c6"]}, "unknown level 'c6'"),
        ("resnet10t", {"output_stride": 16, "levels": ["c5"]}, "unknown level 'c5'; choose from c2, c3, c4"),
        ("resnet10t", {"output_stride": 16, "fpn": True}, "needs all from its finest to c5"),
        ("resnet10t", {"norm": "FrozenBN"}, "random weights"),
        ("resnet10t", {"fpn": True, "fpn_norm": "FrozenBN"}, "random weights"),
        ("resnet10t", {"frozen_through": "c2"}, "random weights"),
        ("resnet10t", {"frozen_through": "c6"}, "unknown frozen_through 'c6'"),
        ("resnet10t", {"norm": "SyncBN"}, "unknown norm 'SyncBN'"),
        ("resnet10t", {"wings": 2}, "cannot make feature maps of 'resnet10t': .*wings"),
        ("resnet10t", {"checkpoint_path": "x.pth"}, "pretrained_cfg_overlay"),
        ("resnet10t", {"out_indices": (1, 2)}, r"levels=\['c3', 'c4', 'c5'\]; out_indices is set from them"),
        ("test_vit", {"patch_size": 14}, "stride 14 alone"),
        (
            "resnet10t",
            {"pretrained": True, "pretrained_cfg_overlay": {"file": "none.pth"}},
            "with its weights: FileNotFound",
        ),
    ],
)
def test_a_mistake_is_answered_in_a_sentence(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        from_timm(name, **arguments)


def test_freezing_parts_of_a_network_whose_order_is_unknown_is_refused(pretrained):
    _, source = pretrained("test_vit")
    with pytest.raises(ValueError, match="timm does not show the order of test_vit's parts"):
        from_timm("test_vit", frozen_through="c2", **source)


def test_maps_of_other_sizes_than_their_strides_are_an_error():
    with pytest.raises(ValueError, match="timm states stride 4 for a map of"):  # without padding in its convolutions
        from_timm("inception_v3", levels=["c2"])(images(96, 96))


def test_fusing_leaves_outputs_as_they_are(randomised):
    backbone = randomised(from_timm("test_byobnet"))  # its norms carry the activations
    x = images(64, 96)
    with torch.no_grad():
        expected = backbone(x)
        assert torch.equal(backbone.train().fuse()(x)["c5"], expected["c5"])


@pytest.mark.parametrize("name", ["vgg11", "test_convnext", "test_vit"])
def test_faster_rcnn_trains_over_it_and_comes_back_from_a_file(name, tmp_path):
    detector = build_faster_rcnn(
        from_timm(name, fpn=True, fpn_channels=16), num_classes=3, min_size=64, max_size=96, representation_size=32
    )
    target = {"boxes": torch.tensor([[5.0, 6.0, 40.0, 50.0]]), "labels": torch.tensor([1])}
    sum(detector.train()([torch.rand(3, 61, 75)], [target]).values()).backward()
    gradients = [p.grad for p in detector.backbone.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients) and any(g.abs().sum() > 0 for g in gradients)
    save_detector(detector, tmp_path / "detector.safetensors")
    again = load_detector(tmp_path / "detector.safetensors")
    assert again.config == detector.config
    x = torch.rand(3, 61, 75)
    with torch.no_grad():
        (given,), (expected,) = again([x]), detector.eval()([x])
    assert torch.equal(given["boxes"], expected["boxes"]) and torch.equal(given["scores"], expected["scores"])


def test_our_own_network_comes_back_through_timm():
    backbone = from_timm("resbackbone_18", levels=["c4"]).eval()
    plain = build_resnet_backbone(18, levels=["c4"]).eval()
    plain.load_state_dict(backbone.network.state_dict())
    x = images(64, 96)
    with torch.no_grad():
        assert torch.equal(backbone(x)["c4"], plain(x)["c4"]) and backbone.features == {"c4": Feature(256, 16)}


# ---- files of timm's networks ----


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_a_file_of_a_network_gives_its_trunk_and_the_input_that_timm_states(tmp_path, randomised, kind):
    network = randomised(timm.create_model("tf_mobilenetv3_small_minimal_100", num_classes=3))
    state, path = network.state_dict(), tmp_path / f"trained.{kind}"
    if kind == "pth":  # as timm's train.py writes it
        average = {f"module.{key}": x for key, x in state.items()}
        others = {key: torch.zeros_like(x) for key, x in state.items()}
        torch.save({"epoch": 3, "arch": "x", "state_dict": others, "state_dict_ema": average}, path)
    else:
        del state["classifier.bias"], state["classifier.weight"]
        save_file(state, path)
    backbone = from_timm("tf_mobilenetv3_small_minimal_100", weights=path, frozen_through="auto").train()
    assert backbone.summary().startswith("frozen BN 34, trainable BN 0") and backbone.weights_source == str(path)
    assert (backbone.config.mean, backbone.config.frozen_through) == ((0.5, 0.5, 0.5), "c2")
    pixels = torch.rand(1, 3, 64, 96)
    ours = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        assert_equal([backbone(ours)["c5"]], [network.forward_features((pixels - 0.5) / 0.5)])  # eps 1e-3 is kept
    assert "state_dict" not in backbone.network.pretrained_cfg  # which every copy of the network would copy


def test_the_networks_whose_order_timm_shows_are_frozen_through_c2_by_auto(tmp_path, pretrained):
    for name, through in (("test_convnext", "c2"), ("test_vit", None)):
        network, _ = pretrained(name)
        torch.save(network.state_dict(), tmp_path / "net.pth")
        assert from_timm(name, weights=tmp_path / "net.pth", frozen_through="auto").config.frozen_through == through
    assert from_timm("test_convnext", frozen_through="auto").config.frozen_through is None


@pytest.mark.parametrize(
    "name, harm, message",
    [
        ("test_resnet", lambda state: state.pop("layer1.0.bn1.running_var"), "1 missing: layer1.0.bn1.running_var$"),
        ("test_resnet", lambda state: state.update({"neck.weight": torch.ones(2)}), "1 unexpected: neck.weight$"),
        (
            "test_resnet",
            lambda state: state.update({"conv1.0.weight": torch.ones(8, 3, 3, 3)}),
            r"1 of another shape: conv1.0.weight is \[8, 3, 3, 3\], not \[16",
        ),
        ("test_resnet", lambda state: state["conv1.0.weight"].fill_(torch.nan), "not finite: conv1.0.weight$"),
        ("test_resnet", lambda state: state.clear(), "holds no tensors by name; save the network's state_dict()"),
        (
            "resnet10t",
            lambda state: None,
            "do not fit: 5 unexpected: layer3.0.bn3.bias, .*; 70 of another shape: conv1",
        ),
        ("resnet34", lambda state: None, "does not state which; .* mean 0.485 0.456 0.406, .*: resnet34.a1_in1k; mean"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_the_names_of_its_tensors(tmp_path, name, harm, message):
    state = timm.create_model("test_resnet").state_dict()
    harm(state)
    save_file(state, tmp_path / "resnet.safetensors")
    with pytest.raises(ValueError, match=message):
        from_timm(name, weights=tmp_path / "resnet.safetensors")


@pytest.mark.parametrize(
    "name, weights, message",
    [
        ("test_resnet", "nowhere.pth", "weights 'nowhere.pth': no such file; .* or timm:test_resnet"),
        ("test_resnet", __file__, "a damaged file, or not a PyTorch or pickle file"),
        ("test_resnet", "hf:timm/test_resnet", "give a file of test_resnet, or timm:test_resnet for those"),
        ("test_resnet", "timm:test_vit", "are of another network than 'test_resnet'; give timm:test_resnet$"),
        ("test_resnet.r160_in1k", "timm:test_resnet.x", "are of another network than 'test_resnet.r160_in1k'"),
        ("test_resnet", "timm:test_resnet.x", r"of 'test_resnet.x': Invalid pretrained tag \(x\)"),
        ("test_resmet", "nowhere.pth", "timm has no network 'test_resmet'; did you mean test_resnet"),
    ],
)
def test_weights_of_nothing_that_timm_has_are_refused_in_a_sentence(name, weights, message):
    with pytest.raises(ValueError, match=message):
        from_timm(name, weights=weights)
