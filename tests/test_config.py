import inspect
import json
import math

import pytest

from detection.config import DetectorConfig
from detection.faster_rcnn import build_faster_rcnn
from resbackbone import BackboneConfig, build_resnet_backbone, build_resnet_classifier
from resbackbone.cifar import build_cifar_resnet
from resbackbone.weights import read_weights

# What files said before configs had a version, the oldest of them without relu_before_p7.
OLD_BACKBONE = {
    "depth": 50,
    "shortcut": "B",
    "stride_in_1x1": True,
    "groups": 1,
    "width_per_group": 64,
    "in_channels": 3,
    "eps": 1e-05,
    "norm": "FrozenBN",
    "levels": ["p2", "p3", "p4", "p5", "p6"],
    "fpn_channels": 256,
    "fpn_norm": None,
    "p6_from": "c5",
    "fpn": True,
    "frozen_through": "none",
    "dilate_c5": False,
    "zero_init_residual": False,
    "checkpoint_activations": False,
}
OLD_DETECTOR = {
    "num_classes": 2,
    "variant": "c4",
    "categories": [[3, "cat"], [7, "dog"]],
    "min_size": 600,
    "max_size": 1000,
    "resize_in_training": False,
    "anchor_scale": 8.0,
    "anchor_sides": [64, 128, 256, 512],
    "representation_size": 1024,
    "rpn_post_nms_top_n_test": 300,
}


def test_settings_of_older_files_are_read():
    expected = BackboneConfig(depth=50, fpn=True, norm="FrozenBN", stride_in_1x1=True)
    for written in (OLD_BACKBONE, {**OLD_BACKBONE, "relu_before_p7": True}):
        assert BackboneConfig.from_json(written) == expected and expected.frozen_through is None
    detector = DetectorConfig.from_json(OLD_DETECTOR)
    assert detector.categories == ((3, "cat"), (7, "dog")) and detector.anchor_sides == (64, 128, 256, 512)
    assert detector.rpn_post_nms_top_n_test == 300 and detector.geometry == "torchvision"


@pytest.mark.parametrize(
    "config",
    [
        BackboneConfig(depth=18),
        BackboneConfig(depth=50, fpn=True, levels=["p7", "p3"], groups=32, width_per_group=4, eps=0),
        DetectorConfig(num_classes=2, variant="vgg16", anchor_sides=[32, 64]),
    ],
)
def test_what_goes_to_json_comes_back_equal(config):
    assert type(config).from_json(json.loads(json.dumps(config.to_json()))) == config
    assert hash(config) == hash(type(config).from_json(config.to_json()))


@pytest.mark.parametrize(
    "kind, written, message",
    [
        (DetectorConfig, {"foo": 1}, r"unknown detector setting 'foo' \(written by a newer version\?\)"),
        (BackboneConfig, {"foo": 1}, r"unknown backbone setting 'foo' \(written by a newer version\?\)"),
        (BackboneConfig, {"version": 2}, "backbone settings of version 2: this release reads version 1 and older"),
        (BackboneConfig, {"depth": "50"}, "backbone setting depth must be int, not '50'"),
        (BackboneConfig, {"fpn": 1}, "backbone setting fpn must be bool, not 1"),
        (BackboneConfig, {"levels": "c5"}, "backbone setting levels must be tuple.*, not 'c5'"),
        (BackboneConfig, {"frozen_through": "c6"}, "unknown frozen_through 'c6'"),
        (BackboneConfig, {"eps": -1.0}, "eps -1.0, .* must be at least 0"),
        (BackboneConfig, {"eps": math.nan}, "eps nan, .* must be at least 0"),
        (BackboneConfig, {"eps": math.inf}, "eps inf, .* must be at least 0 and finite"),
        (BackboneConfig, {"fpn_channels": 0}, "backbone setting fpn_channels must be at least 1, not 0"),
        (BackboneConfig, {"in_channels": 0}, "backbone setting in_channels must be at least 1, not 0"),
        (BackboneConfig, {"groups": -1}, "backbone setting groups must be at least 1, not -1"),
        (BackboneConfig, {"width_per_group": 0}, "backbone setting width_per_group must be at least 1, not 0"),
        (DetectorConfig, {"variant": "yolo"}, "unknown variant 'yolo'"),
        (DetectorConfig, {"categories": [["3", "cat"], [7, "dog"]]}, "detector setting categories must be"),
        (DetectorConfig, {"min_size": 0}, "min_size is 0; it must be at least 1"),
        (DetectorConfig, {"min_size": [600, 0]}, r"min_size is \(600, 0\); it must be at least 1"),
        (DetectorConfig, {"min_size": []}, "need at least one number"),
        (DetectorConfig, {"anchor_scale": 0.0}, "anchor_scale is 0.0; it must be above 0"),
        (DetectorConfig, {"anchor_scale": -8.0}, "anchor_scale is -8.0; it must be above 0"),
        (DetectorConfig, {"anchor_sides": []}, "need at least one number"),
        (DetectorConfig, {"canonical_scale": 0}, "canonical_scale is 0; it must be at least 1"),
        (DetectorConfig, {"box_nms_thresh": 1.5}, "box_nms_thresh is 1.5; it must be from 0 to 1"),
        (DetectorConfig, {"rpn_score_thresh": math.nan}, "rpn_score_thresh is nan; it must be from 0 to 1"),
        (DetectorConfig, {"box_positive_fraction": 2}, "box_positive_fraction is 2; it must be from 0 to 1"),
        (DetectorConfig, {"box_detections_per_img": -1}, "box_detections_per_img is -1; it must be at least 1"),
        (
            DetectorConfig,
            {"bbox_reg_weights": [1.0] * 3},
            r"bbox_reg_weights must be tuple\[float, float, float, float",
        ),
        (DetectorConfig, {"bbox_reg_weights": [1, 1, 0, 1]}, "bbox_reg_weights is .*; it must be above 0"),
        (
            DetectorConfig,
            {"rpn_fg_iou_thresh": 0.2},
            "rpn_bg_iou_thresh is 0.3; it must be at most .*_fg_iou_thresh, 0.2",
        ),
        (DetectorConfig, {"box_score_thresh": None}, "detector setting box_score_thresh must be float, not None"),
    ],
)
def test_a_setting_that_cannot_be_read_is_named(kind, written, message):
    old = OLD_DETECTOR if kind is DetectorConfig else OLD_BACKBONE
    with pytest.raises(ValueError, match=message):
        kind.from_json({**old, **written})
    with pytest.raises(ValueError, match="setting 'depth' is missing"):
        BackboneConfig.from_json({"fpn": True})


def test_a_module_given_for_a_setting_is_named_by_its_type():
    module = build_resnet_backbone(18)
    for build in (lambda: build_resnet_backbone(module), lambda: BackboneConfig(depth=module)):
        with pytest.raises(ValueError, match="depth.* of type ResNetBackbone") as error:
            build()
        assert "\n" not in str(error.value)


def test_every_setting_that_changes_numbers_can_be_asked_of_the_network():
    asked = set(inspect.signature(build_resnet_backbone).parameters) - {"weights"}
    backbone = build_resnet_backbone(18, fpn=True, weights=build_resnet_backbone(18).state_dict())
    assert asked <= set(backbone.config.to_json())
    assert (backbone.config.norm, backbone.config.frozen_through, backbone.config.eps) == ("FrozenBN", "c2", 1e-5)
    asked = set(inspect.signature(build_faster_rcnn).parameters) - {"backbone", "settings"}
    config = build_faster_rcnn(backbone, 2, box_score_thresh=0.1).config
    assert asked <= set(config.to_json()) and (config.box_score_thresh, config.min_size) == (0.1, 800)


def test_every_network_takes_weights_that_were_read_before():
    for build in (build_resnet_backbone, build_resnet_classifier):
        state = build_resnet_classifier(18, num_classes=3).state_dict()
        assert build(18, weights=read_weights(state)).config.depth == 18
    state = build_cifar_resnet(20).state_dict()
    assert build_cifar_resnet(weights=read_weights(state), shortcut="none").config["depth"] == 20
