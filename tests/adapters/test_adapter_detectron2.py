import itertools
import logging
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2", reason="detectron2 is not installed; it has no release on the registry")

import detectron2
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_backbone, build_model
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage

from resbackbone import build_resnet_backbone
from resbackbone.adapters.detectron2 import INPUT, add_resbackbone_config
from resbackbone.layers import FrozenBatchNorm2d

ZOO = Path(detectron2.__file__).parent / "model_zoo" / "configs"
OURS = sorted((Path(__file__).parents[2] / "configs" / "detectron2").glob("*.yaml"))
CANONICAL = [word for setting in INPUT.items() for word in setting]
SMALL = ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.DEVICE", "cpu"]
RANDOM = ["MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 0]
FPN = ["MODEL.BACKBONE.NAME", "build_resbackbone_fpn", "MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"]]
RETINANET = [
    "MODEL.BACKBONE.NAME",
    "build_retinanet_resbackbone_fpn",
    "MODEL.FPN.IN_FEATURES",
    ["res3", "res4", "res5"],
]


def config(*settings, base=None):
    """detectron2's config for a small trunk: its own defaults, a file over them, and `settings` over that."""
    cfg = get_cfg()
    if base is not None:
        cfg.merge_from_file(str(base))
    cfg.merge_from_list(["MODEL.BACKBONE.NAME", "build_resbackbone", "MODEL.WEIGHTS", "", *SMALL, *RANDOM, *settings])
    return cfg


def frozen(cfg):
    cfg.merge_from_list(["MODEL.RESNETS.NORM", "FrozenBN", "MODEL.BACKBONE.FREEZE_AT", 2])
    return cfg


@pytest.fixture
def weights(tmp_path, randomised):
    """A file with the weights of a ResNet-18, statistics included."""
    torch.save(randomised(build_resnet_backbone(18)).state_dict(), tmp_path / "resnet18.pth")
    return str(tmp_path / "resnet18.pth")


# Maps


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_choice_of_out_features_has_the_shapes_it_advertises(count):
    for names in itertools.combinations(["res2", "res3", "res4", "res5"], count):
        backbone = build_backbone(config("MODEL.RESNETS.OUT_FEATURES", list(names)))
        assert_as_advertised(backbone, 65, 94)
        assert list(backbone.output_shape()) == list(names)
        assert backbone.size_divisibility == 0


@pytest.mark.parametrize(
    "settings, levels",
    [
        (FPN, ["p2", "p3", "p4", "p5", "p6"]),
        ([*FPN, "MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"]], ["p3", "p4", "p5", "p6"]),
        ([*FPN, "MODEL.FPN.OUT_CHANNELS", 64, "MODEL.FPN.NORM", "GN"], ["p2", "p3", "p4", "p5", "p6"]),
        (RETINANET, ["p3", "p4", "p5", "p6", "p7"]),
    ],
)
def test_the_pyramids_have_the_levels_of_detectron2s_and_the_shapes_they_advertise(settings, levels):
    cfg = config(*settings)
    backbone = build_backbone(cfg)
    assert list(backbone.output_shape()) == levels
    assert {shape.channels for shape in backbone.output_shape().values()} == {cfg.MODEL.FPN.OUT_CHANNELS}
    assert_as_advertised(backbone, 64, 64)
    assert_as_advertised(backbone, 97, 130)


def assert_as_advertised(backbone, height, width):
    maps, shapes = backbone(torch.zeros(2, 3, height, width)), backbone.output_shape()
    assert list(maps) == list(shapes)
    for name, x in maps.items():
        channels, stride = shapes[name].channels, shapes[name].stride
        assert stride == 2 ** int(name[-1]) and x.shape == (2, channels, -(-height // stride), -(-width // stride))


def test_images_are_padded_under_a_pyramid_as_detectron2_does_and_not_for_a_trunk():
    images = [{"image": torch.zeros(3, 97, 130)}]
    padded = build_model(config(*FPN, base=ZOO / "Base-RCNN-FPN.yaml")).preprocess_image(images)
    assert padded.tensor.shape == (1, 3, 128, 160)
    assert build_model(config()).preprocess_image(images).tensor.shape == (1, 3, 97, 130)


def test_the_maps_are_those_of_the_same_backbone_built_here(weights):
    images = torch.randn(1, 3, 65, 70)
    for settings, arguments in (
        (["MODEL.RESNETS.OUT_FEATURES", ["res3", "res5"]], {"levels": ["c3", "c5"]}),
        (FPN, {"fpn": True}),
    ):
        backbone = build_backbone(frozen(config(*settings, *CANONICAL, "MODEL.RESBACKBONE.WEIGHTS", weights)))
        same = build_resnet_backbone(18, weights=weights, **arguments)
        same.load_state_dict(backbone.body.state_dict())  # a pyramid starts at random
        found, wanted = backbone(images), same(images)
        assert [torch.equal(x, y) for x, y in zip(found.values(), wanted.values(), strict=True)] == [True] * len(wanted)
        trunk = build_resnet_backbone(18, weights=weights).state_dict()
        assert all(torch.equal(x, trunk[name]) for name, x in backbone.body.state_dict().items() if "fpn" not in name)


def test_resnext_and_wide_bottlenecks_follow_the_config():
    words = ["MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256, "MODEL.RESNETS.NUM_GROUPS", 32]
    words += ["MODEL.RESNETS.WIDTH_PER_GROUP", 4]
    block = build_backbone(config(*words, "MODEL.RESNETS.STRIDE_IN_1X1", False)).body.layer2[0]
    assert (block.conv2.groups, block.conv2.in_channels, block.conv2.stride) == (32, 256, (2, 2))
    assert build_backbone(config(*words)).body.layer2[0].conv1.stride == (2, 2)  # detectron2's default: in the 1x1


# Freezing and norms


@pytest.mark.parametrize("freeze_at", range(6))
def test_freeze_at_counts_the_stem_and_then_the_stages(freeze_at):
    cfg = config("MODEL.BACKBONE.FREEZE_AT", freeze_at, "MODEL.WEIGHTS", "to be loaded.pth")
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    trunk = build_backbone(cfg).body
    parts = [trunk.conv1, trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4]
    assert [all(p.requires_grad for p in part.parameters()) for part in parts] == [k >= freeze_at for k in range(5)]
    assert isinstance(trunk.bn1, FrozenBatchNorm2d) == (freeze_at >= 1)


@pytest.mark.parametrize(
    "norm, kind",
    [
        ("BN", torch.nn.BatchNorm2d),
        ("FrozenBN", FrozenBatchNorm2d),
        ("SyncBN", torch.nn.SyncBatchNorm),
        ("nnSyncBN", torch.nn.SyncBatchNorm),
        ("GN", torch.nn.GroupNorm),
    ],
)
def test_norms_go_by_detectron2s_names(norm, kind):
    cfg = config(*FPN, "MODEL.RESNETS.NORM", norm, "MODEL.FPN.NORM", norm, "MODEL.WEIGHTS", "to be loaded.pth")
    backbone = build_backbone(cfg).body
    assert type(backbone.bn1) is kind and type(backbone.fpn.inner_blocks["0"][1]) is kind


# What is refused


@pytest.mark.parametrize(
    "settings, says",
    [
        (["MODEL.RESNETS.DEPTH", 51], "unknown MODEL.RESNETS.DEPTH 51; choose from 18, "),
        (["MODEL.RESNETS.NORM", "LN"], "unknown MODEL.RESNETS.NORM 'LN'; choose from BN, FrozenBN"),
        (["MODEL.RESNETS.OUT_FEATURES", ["stem"]], "unknown OUT_FEATURES 'stem'; choose from res2"),
        (["MODEL.RESNETS.RES5_DILATION", 4], "MODEL.RESNETS.RES5_DILATION 4"),
        (["MODEL.RESNETS.STEM_OUT_CHANNELS", 32], "MODEL.RESNETS.STEM_OUT_CHANNELS 32: at depth 18 only 64 is"),
        (["MODEL.RESNETS.RES2_OUT_CHANNELS", 256], "MODEL.RESNETS.RES2_OUT_CHANNELS 256: at depth 18 only 64 is"),
        (["MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, False, False, True]], "MODEL.RESNETS.DEFORM_ON_PER_STAGE"),
        (["MODEL.BACKBONE.FREEZE_AT", 6], "unknown MODEL.BACKBONE.FREEZE_AT 6"),
        ([*FPN, "MODEL.FPN.FUSE_TYPE", "avg"], "unknown MODEL.FPN.FUSE_TYPE 'avg'"),
        ([*FPN, "MODEL.FPN.NORM", "LN"], "unknown MODEL.FPN.NORM 'LN'"),
        ([*FPN, "MODEL.FPN.IN_FEATURES", ["res2", "res4"]], "unknown MODEL.FPN.IN_FEATURES"),
        (["MODEL.RESNETS.NORM", "FrozenBN"], "norm='FrozenBN' without weights would freeze random layers"),
        (["MODEL.BACKBONE.FREEZE_AT", 2], "frozen_through='c2' without weights would freeze random layers"),
    ],
)
def test_a_setting_that_cannot_be_followed_is_an_error_that_names_it(settings, says):
    with pytest.raises(ValueError) as error:
        build_backbone(config(*settings))
    assert says in str(error.value)


@pytest.mark.parametrize(
    "setting",
    [
        ["INPUT.FORMAT", "BGR"],
        ["MODEL.PIXEL_MEAN", [103.53, 116.28, 123.675]],
        ["MODEL.PIXEL_STD", [1.0, 1.0, 1.0]],
        ["MODEL.PIXEL_MEAN", [103.53, 116.28, 123.675, 0.0]],
    ],
)
def test_weights_with_input_they_are_not_made_for_are_refused(weights, setting):
    cfg = frozen(config(*CANONICAL, "MODEL.RESBACKBONE.WEIGHTS", weights))
    build_backbone(cfg)
    cfg.merge_from_list(setting)
    with pytest.raises(ValueError, match=rf"^{setting[0]} .*set INPUT.FORMAT RGB, MODEL.PIXEL_MEAN \[123.675, 116.28,"):
        build_backbone(cfg)


def test_the_weights_show_that_the_trunk_is_a_resnet_d(tmp_path):
    torch.save(build_resnet_backbone(18, stem="deep", shortcut="D").state_dict(), tmp_path / "resnet18d.pth")
    cfg = frozen(config(*CANONICAL, "MODEL.RESBACKBONE.WEIGHTS", str(tmp_path / "resnet18d.pth")))
    trunk = build_backbone(cfg).body.config
    assert (trunk.stem, trunk.shortcut) == ("deep", "D")


def test_without_weights_any_input_will_do():
    assert build_backbone(config("INPUT.FORMAT", "BGR"), ShapeSpec(channels=4)).body.conv1.in_channels == 4


# Checkpoints of detectron2


def test_a_checkpoint_of_the_model_loads_again_and_its_backbone_loads_here(tmp_path, weights):
    cfg = frozen(config(*FPN, *CANONICAL, "MODEL.RESBACKBONE.WEIGHTS", weights, base=ZOO / "Base-RCNN-FPN.yaml"))
    model = build_model(cfg)
    DetectionCheckpointer(model, str(tmp_path)).save("model_final")

    cfg.merge_from_list(["MODEL.RESBACKBONE.WEIGHTS", "", "MODEL.WEIGHTS", str(tmp_path / "model_final.pth")])
    again = build_model(cfg)
    DetectionCheckpointer(again).load(cfg.MODEL.WEIGHTS)
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in model.state_dict().items())
    alone = build_resnet_backbone(18, fpn=True, weights=tmp_path / "model_final.pth")
    assert all(torch.equal(x, alone.state_dict()[name]) for name, x in model.backbone.body.state_dict().items())


@pytest.mark.parametrize("other", [["MODEL.RESNETS.DEPTH", 34], ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"]])
def test_a_checkpoint_of_another_model_is_refused_where_detectron2_would_go_on_with_random_layers(tmp_path, other):
    cfg = config(*FPN, "MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"], base=ZOO / "Base-RCNN-FPN.yaml")
    model = build_model(cfg)
    cfg.merge_from_list(other)
    DetectionCheckpointer(model, str(tmp_path)).save("whole")
    DetectionCheckpointer(build_model(cfg), str(tmp_path)).save("other")
    DetectionCheckpointer(model).load(str(tmp_path / "whole.pth"))
    deeper = build_model(cfg) if "DEPTH" in other[0] else model
    file = "whole.pth" if "DEPTH" in other[0] else "other.pth"
    with pytest.raises(ValueError, match=r"lacks \d+ of the backbone's \d+ tensors.*MODEL.RESBACKBONE.WEIGHTS"):
        DetectionCheckpointer(deeper).load(str(tmp_path / file))


# The config


def test_a_new_config_has_the_key_and_an_older_one_gets_it():
    assert get_cfg().MODEL.RESBACKBONE.WEIGHTS == ""
    older = get_cfg()
    del older.MODEL["RESBACKBONE"]
    older.merge_from_list(["MODEL.BACKBONE.NAME", "build_resbackbone", *SMALL, *RANDOM])
    assert list(build_backbone(older).output_shape()) == ["res4"]
    add_resbackbone_config(older)
    older.MODEL.RESBACKBONE.WEIGHTS = "mine.pth"
    add_resbackbone_config(older)
    assert older.MODEL.RESBACKBONE.WEIGHTS == "mine.pth"


@pytest.mark.parametrize(
    "base, name, outputs",
    [
        ("Base-RCNN-FPN.yaml", "build_resbackbone_fpn", ["p2", "p3", "p4", "p5", "p6"]),
        ("Base-RCNN-C4.yaml", "build_resbackbone", ["res4"]),
        ("Base-RCNN-DilatedC5.yaml", "build_resbackbone", ["res5"]),
        ("Base-RetinaNet.yaml", "build_retinanet_resbackbone_fpn", ["p3", "p4", "p5", "p6", "p7"]),
    ],
)
def test_the_zoos_configs_take_our_names_and_give_what_theirs_give(base, name, outputs):
    cfg = get_cfg()
    cfg.merge_from_file(str(ZOO / base), allow_unsafe=True)
    cfg.MODEL.WEIGHTS = "to be loaded.pth"
    theirs = BACKBONE_REGISTRY.get(cfg.MODEL.BACKBONE.NAME)(cfg, ShapeSpec(channels=3))
    cfg.MODEL.BACKBONE.NAME = name
    ours = build_backbone(cfg)
    assert ours.output_shape() == theirs.output_shape() and list(ours.output_shape()) == outputs
    assert ours.size_divisibility == theirs.size_divisibility
    trainable = [sum(p.numel() for p in b.parameters() if p.requires_grad) for b in (ours, theirs)]
    assert trainable[0] == trainable[1]


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.stem)
def test_the_configs_here_build_a_detector_that_trains(path, weights):
    cfg = get_cfg()
    cfg.merge_from_file(str(path))
    assert cfg.MODEL.RESBACKBONE.WEIGHTS.startswith("torchvision:ResNet50_Weights.")
    assert not cfg.MODEL.RESNETS.STRIDE_IN_1X1 and cfg.MODEL.RESNETS.DEPTH == 50
    cfg.merge_from_list([*SMALL, "MODEL.RESBACKBONE.WEIGHTS", weights])
    assert_trains(build_model(cfg))


# Detectors


@pytest.mark.parametrize(
    "base, settings",
    [
        ("Base-RCNN-FPN.yaml", FPN),
        ("Base-RCNN-FPN.yaml", [*FPN, "MODEL.MASK_ON", True, "INPUT.MASK_FORMAT", "bitmask"]),
        ("Base-RCNN-FPN.yaml", [*FPN, "MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 3]),
        ("Base-RCNN-C4.yaml", []),
        ("Base-RCNN-C4.yaml", ["MODEL.ROI_HEADS.NAME", "ResBackboneRes5ROIHeads"]),
        ("Base-RCNN-DilatedC5.yaml", []),
    ],
)
def test_detectron2s_detectors_train_over_it(base, settings):
    assert_trains(build_model(config(*settings, base=ZOO / base)))


def assert_trains(model):
    """One step in training mode: losses are finite, and every parameter that trains gets a finite gradient."""
    with EventStorage():
        losses = model(samples())
    assert len(losses) >= 2 and all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, grad in gradients.items() if grad is None or not torch.isfinite(grad).all()] == []
    assert any(grad.abs().sum() > 0 for name, grad in gradients.items() if name.startswith("backbone.body.layer"))
    model.eval()
    [output] = model(samples()[:1])
    assert output["instances"].image_size == (65, 94)


def samples():
    truth = Instances((65, 94))
    truth.gt_boxes, truth.gt_classes = Boxes([[5.0, 6.0, 50.0, 60.0]]), torch.tensor([3])
    masks = torch.zeros(1, 65, 94, dtype=torch.bool)
    masks[:, 6:60, 5:50] = True
    truth.gt_masks = BitMasks(masks)
    truth.gt_keypoints = Keypoints(torch.tensor([[[10.0, 10.0, 2.0], [30.0, 30.0, 2.0], [40.0, 50.0, 1.0]]]))
    empty = Instances((70, 64))
    empty.gt_boxes, empty.gt_classes = Boxes(torch.zeros(0, 4)), torch.zeros(0, dtype=torch.int64)
    empty.gt_masks, empty.gt_keypoints = BitMasks(torch.zeros(0, 70, 64)), Keypoints(torch.zeros(0, 3, 3))
    image, other = (torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((65, 94), (70, 64)))
    return [{"image": image, "instances": truth}, {"image": other, "instances": empty}]


def test_the_c4_head_runs_our_stage_5_with_the_weights_given(weights, caplog):
    settings = [*CANONICAL, "MODEL.RESBACKBONE.WEIGHTS", weights, "MODEL.ROI_HEADS.NAME"]
    model = build_model(frozen(config(*settings, "ResBackboneRes5ROIHeads", "MODEL.BACKBONE.FREEZE_AT", 5)))
    stage5 = {f"layer4.{name}": x for name, x in model.roi_heads.res5.state_dict().items()}
    whole = build_resnet_backbone(18, weights=weights).state_dict()
    assert stage5 and all(torch.equal(x, whole[name]) for name, x in stage5.items())
    assert all(p.requires_grad for p in model.roi_heads.res5.parameters())  # FREEZE_AT is of the backbone
    assert not hasattr(model.backbone.body, "layer4") and "random" not in caplog.text
    with caplog.at_level(logging.WARNING):
        build_model(frozen(config(*settings, "Res5ROIHeads")))
    assert "Res5ROIHeads starts from a random stage 5" in caplog.text
