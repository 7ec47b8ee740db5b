"""A Backbone inside torchvision's detectors: they train and predict over it, and their weights fit it."""

from collections import OrderedDict

import pytest
import torch
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.resnet import resnet18
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from resbackbone import Backbone, build_resnet_backbone
from resbackbone.adapters.torchvision import as_torchvision, frozen_through

SIZES = {"min_size": 64, "max_size": 96}


def frozen_backbone(**arguments) -> Backbone:
    """Frozen through c2, on weights that mean nothing."""
    return build_resnet_backbone(18, weights=build_resnet_backbone(18).state_dict(), fpn=True, **arguments)


def anchors(levels: int) -> detection.anchor_utils.AnchorGenerator:
    return detection.anchor_utils.AnchorGenerator(((16,),) * levels, ((0.5, 1.0, 2.0),) * levels)


def pyramid_detector(kind: str) -> torch.nn.Module:
    if kind in ("RetinaNet", "FCOS"):
        backbone = as_torchvision(frozen_backbone(levels=["p3", "p4", "p5", "p6", "p7"]))
        if kind == "RetinaNet":
            return detection.RetinaNet(backbone, 3, anchor_generator=anchors(5), **SIZES)
        return detection.FCOS(backbone, 3, **SIZES)
    few = {"rpn_post_nms_top_n_train": 20, "rpn_post_nms_top_n_test": 20, "box_batch_size_per_image": 16}
    return getattr(detection, kind)(as_torchvision(frozen_backbone()), 3, **few, **SIZES)


def test_a_trunk_without_a_pyramid_is_refused_when_the_detector_is_built():
    with pytest.raises(
        ValueError, match="have different channels .*: build the backbone with fpn=True, or with a sing"
    ):
        detection.FasterRCNN(as_torchvision(build_resnet_backbone(18)), 4)
    assert as_torchvision(build_resnet_backbone(18, levels=["c5"])).out_channels == 512


def target(kind: str) -> dict[str, torch.Tensor]:
    found = {"boxes": torch.tensor([[5.0, 6.0, 40.0, 50.0]]), "labels": torch.tensor([1])}
    if kind == "MaskRCNN":
        found["masks"] = torch.zeros(1, 61, 75, dtype=torch.uint8)
        found["masks"][:, 6:50, 5:40] = 1
    if kind == "KeypointRCNN":
        found["keypoints"] = torch.tensor([[[10.0, 12.0, 1.0]] * 17])
    return found


def assert_trains_its_trainable_part(model: torch.nn.Module, kind: str, backbone: Backbone) -> None:
    sum(model.train()([torch.rand(3, 61, 75)], [target(kind)]).values()).backward()
    assert backbone.conv1.weight.grad is None and backbone.layer1[0].conv1.weight.grad is None
    for stage in (backbone.layer2, backbone.layer4):
        gradient = stage[0].conv1.weight.grad
        assert gradient.isfinite().all() and gradient.abs().sum() > 0


@pytest.mark.parametrize("kind", ["FasterRCNN", "MaskRCNN", "KeypointRCNN", "RetinaNet", "FCOS"])
def test_each_detector_trains_and_predicts_over_it(kind):
    model = pyramid_detector(kind)
    assert_trains_its_trainable_part(model, kind, model.backbone.backbone)
    with torch.no_grad():
        (found,) = model.eval()([torch.rand(3, 61, 75)])
    assert found["boxes"].shape == (len(found["labels"]), 4) and found["boxes"].isfinite().all()


@pytest.mark.parametrize(
    "arguments, names",
    [
        ({"fpn": True}, ["0", "1", "2", "3", "pool"]),
        ({"fpn": True, "levels": ["p3", "p4", "p5", "p6", "p7"]}, ["0", "1", "2", "p6", "p7"]),
        ({"fpn": True, "levels": ["p3", "p5"]}, ["0", "1"]),
        ({}, ["0", "1", "2", "3"]),
        ({"levels": ["c4"]}, ["0"]),
    ],
)
def test_maps_are_the_backbones_under_torchvisions_names(arguments, names):
    backbone = build_resnet_backbone(18, **arguments).eval()
    model = as_torchvision(backbone)
    images = torch.randn(1, 3, 65, 97)
    with torch.no_grad():
        maps, expected = model(images), backbone(images)
    assert isinstance(maps, OrderedDict) and list(maps) == names
    assert all(torch.equal(given, x) for given, x in zip(maps.values(), expected.values(), strict=True))
    if arguments:  # without a pyramid, levels have different channels
        assert model.out_channels == backbone.out_channels == list(maps.values())[-1].shape[1]


def test_a_single_map_serves_faster_rcnn():
    backbone = build_resnet_backbone(18, levels=["c4"])
    model = detection.FasterRCNN(
        as_torchvision(backbone),
        3,
        rpn_anchor_generator=detection.anchor_utils.AnchorGenerator(((16, 32),), ((1.0,),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 7, 2),
        **SIZES,
    )
    sum(model([torch.rand(3, 61, 75)], [target("FasterRCNN")]).values()).backward()
    assert backbone.conv1.weight.grad.abs().sum() > 0 and not hasattr(backbone, "layer4")


def test_a_backbone_as_it_is_serves_where_its_level_names_are_given():
    backbone = frozen_backbone()
    pool = MultiScaleRoIAlign(["p2", "p3", "p4", "p5"], 7, 2)
    model = detection.FasterRCNN(backbone, 3, box_roi_pool=pool, **SIZES)
    assert_trains_its_trainable_part(model, "FasterRCNN", backbone)


def test_another_module_than_a_backbone_is_refused():
    with pytest.raises(ValueError, match="not Conv2d"):
        as_torchvision(torch.nn.Conv2d(3, 3, 3))


POOLING = {"FasterRCNN": "box", "MaskRCNN": "box_roi_pool and mask", "KeypointRCNN": "box_roi_pool and keypoint"}


@pytest.mark.parametrize("kind", POOLING)
@pytest.mark.parametrize(
    "arguments, names", [({"fpn": True}, "['p2', 'p3', 'p4', 'p5']"), ({"levels": ["c4"]}, "['c4']")]
)
def test_a_detector_that_would_look_for_torchvisions_names_is_refused_and_as_torchvision_named(kind, arguments, names):
    with pytest.raises(ValueError) as error:
        getattr(detection, kind)(build_resnet_backbone(18, **arguments), 3, **SIZES)
    assert "give them as_torchvision(backbone), from resbackbone.adapters.torchvision," in str(error.value)
    assert f"or {POOLING[kind]}_roi_pool with featmap_names={names}" in str(error.value)


@pytest.mark.parametrize("kind", ["RetinaNet", "FCOS"])
def test_a_detector_that_looks_for_no_names_takes_a_backbone_as_it_is(kind):
    backbone = frozen_backbone(levels=["p3", "p4", "p5", "p6", "p7"])
    model = getattr(detection, kind)(backbone, 3, **SIZES)
    assert_trains_its_trainable_part(model, kind, backbone)


def test_torchvisions_v2_detector_computes_the_same_maps_over_our_backbone(randomised):
    theirs, ours = (detection.fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None) for _ in range(2))
    ours.backbone = as_torchvision(build_resnet_backbone(50, fpn=True, fpn_norm="BN"))
    ours.load_state_dict(randomised(theirs).state_dict())
    x = torch.rand(1, 3, 65, 97)
    with torch.no_grad():
        maps, expected = ours.eval().backbone(x), theirs.backbone(x)
    assert list(maps) == list(expected)
    for name, x in expected.items():
        assert (maps[name] - x).abs().max() < 1e-5 * x.abs().max()


def test_torchvisions_own_detector_gives_its_state_dict_and_gets_the_same_boxes(randomised):
    settings = {"num_classes": 4, **SIZES, "rpn_nms_thresh": 1.0, "box_nms_thresh": 1.0, "box_score_thresh": 0.0}
    theirs = randomised(detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, **settings))
    with torch.no_grad():
        for block in theirs.backbone.fpn.layer_blocks:
            block[0].weight.mul_(1e-4)  # random activations are large, and would put every box outside the image
    ours = detection.FasterRCNN(as_torchvision(build_resnet_backbone(50, fpn=True)), **settings).eval()
    ours.load_state_dict(theirs.state_dict())
    images = [torch.rand(3, 61, 75), torch.rand(3, 70, 50)]
    with torch.no_grad():
        for given, expected in zip(ours(images), theirs(images), strict=True):
            assert len(expected["boxes"]) == 100 and torch.equal(given["labels"], expected["labels"])
            torch.testing.assert_close(given["boxes"], expected["boxes"], rtol=1e-5, atol=1e-3)
            torch.testing.assert_close(given["scores"], expected["scores"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("levels", [None, ["p3", "p4", "p5", "p6", "p7"]])
def test_the_state_dict_has_the_keys_and_shapes_of_torchvisions(levels):
    extra = None if levels is None else LastLevelP6P7(256, 256)
    theirs = _resnet_fpn_extractor(resnet18(), 5, [1, 2, 3, 4] if levels is None else [2, 3, 4], extra)
    ours = as_torchvision(build_resnet_backbone(18, fpn=True, levels=levels, p6_from="p5"))
    assert {key: x.shape for key, x in ours.state_dict().items()} == {
        key: x.shape for key, x in theirs.state_dict().items()
    }
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(theirs.body.layer4[1].conv2.weight, ours.backbone.layer4[1].conv2.weight)


def test_a_key_that_does_not_fit_is_still_named():
    ours = as_torchvision(build_resnet_backbone(18, fpn=True))
    state = ours.state_dict()
    state["body.extra"] = state.pop("body.conv1.weight")
    with pytest.raises(RuntimeError, match="(?s)Missing.*backbone.conv1.weight.*Unexpected.*backbone.extra"):
        ours.load_state_dict(state)


def trains(module: torch.nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("trainable_layers", [0, 1, 2, 3, 4, 5])
def test_trainable_layers_is_the_same_choice_counted_from_the_other_end(trainable_layers):
    theirs = _resnet_fpn_extractor(resnet18(norm_layer=FrozenBatchNorm2d), trainable_layers).body
    weights = build_resnet_backbone(18).state_dict()
    ours = build_resnet_backbone(18, weights=weights, frozen_through=frozen_through(trainable_layers))
    assert trains(ours) == {name for name in trains(theirs) if "fc" not in name}


@pytest.mark.parametrize("wrong", [6, -1, True, "3"])
def test_another_count_of_layers_is_refused(wrong):
    with pytest.raises(ValueError, match="choose from 5, 4, 3, 2, 1, 0"):
        frozen_through(wrong)
