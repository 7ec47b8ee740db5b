"""Faster R-CNN weights of torchvision and detectron2 detect here what they detect there."""

import pickle
import re
from pathlib import Path

import pytest
import torch
import torchvision
from made import lively
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

from detection import build_faster_rcnn
from detection.config import DetectorConfig
from detection.foreign import SINGLE_MAP_PROPOSALS, describe_detector
from detection.saved import load_detector, save_detector
from resbackbone import build_resnet_backbone
from resbackbone.atomic import file_digest
from resbackbone.weights import MEAN, STD, read_weights
from resbackbone.weights.sources import RECOGNISED
from resbackbone.weights.translate import from_ours
from resbackbone.weights.write import write_as


def assert_same_detections(got, scores, boxes, labels):
    assert len(got["scores"]) == len(scores) == 100
    assert (got["scores"] - scores).abs().max() < 1e-5
    top = scores > scores[20]  # further down equal scores may change places
    assert (got["boxes"][top] - boxes[top]).abs().max() < 1e-3
    assert torch.equal(got["labels"][top], labels[top])


def torchvisions(kind):
    options = {"box_score_thresh": 0.0, "min_size": 160, "rpn_post_nms_top_n_test": 200}
    build = getattr(torchvision.models.detection, kind)
    return lively(build(weights=None, weights_backbone=None, **options))


@pytest.mark.parametrize("kind", ["fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2"])
@torch.inference_mode()
def test_a_torchvision_checkpoint_is_a_detector_with_the_classes_of_its_ninety_ids(kind, tmp_path):
    theirs = torchvisions(kind)
    torch.save({"model": theirs.state_dict(), "epoch": 25}, tmp_path / "model_25.pth")
    ours = load_detector(tmp_path / "model_25.pth")
    assert (ours.categories[1], ours.categories[90], ours.categories[12]) == ("person", "toothbrush", "N/A")
    ours.roi_heads.score_thresh, ours.transform.min_size = 0.0, (160,)
    ours.rpn._post_nms_top_n["testing"] = 200
    image = torch.rand(3, 140, 210)  # 160 x 240, padded to 160 x 256: p6 is 3 x 4, and its stride is taken for 53
    expected = theirs([image])[0]
    assert_same_detections(ours([image])[0], expected["scores"], expected["boxes"], expected["labels"])


@torch.inference_mode()
def test_torchvisions_v2_detector_loads_by_its_name_and_goes_back_as_it_came(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    name = "torchvision:FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1"
    path = tmp_path / "hub" / "checkpoints" / Path(torchvision.models.get_weight(name.split(":")[1]).url).name
    path.parent.mkdir(parents=True)
    state = torchvisions("fasterrcnn_resnet50_fpn_v2").state_dict()
    torch.save(state, path)
    ours = load_detector(name)
    heads, backbone = ours.config, ours.backbone.config
    assert (heads.rpn_conv_depth, heads.box_conv_layers, backbone.eps) == (2, (256,) * 4, 1e-5)
    assert heads.box_norm == backbone.fpn_norm == backbone.norm == "FrozenBN"
    save_detector(ours, tmp_path / "ours.safetensors")
    for source in (read_weights(name), read_weights(tmp_path / "ours.safetensors")):
        write_as(tmp_path / "back.pth", source, "torchvision")
        back = torch.load(tmp_path / "back.pth")
        torchvisions("fasterrcnn_resnet50_fpn_v2").load_state_dict(back)
        assert all(torch.equal(tensor, state[key]) for key, tensor in back.items())


@torch.inference_mode()
def test_regions_go_to_torchvisions_levels_whatever_the_anchors(tmp_path):
    sizes, ratios = ((16,), (32,), (64,), (128,), (256,)), ((0.5, 1.0, 2.0),) * 5
    options = {"box_score_thresh": 0.0, "min_size": 160, "rpn_pre_nms_top_n_test": 40}  # of each level, large ones too
    trunk = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    anchors = AnchorGenerator(sizes, ratios)
    theirs = torchvision.models.detection.FasterRCNN(trunk, 4, rpn_anchor_generator=anchors, **options)
    torch.save(lively(theirs).state_dict(), tmp_path / "theirs.pth")
    ours = load_detector(tmp_path / "theirs.pth", anchor_scale=4.0, **options)
    assert (ours.config.canonical_scale, ours.roi_heads.box_roi_pool.canonical_scale) == (224, 224)
    image = torch.rand(3, 140, 210, dtype=torch.float64)
    [wanted], [found] = theirs.double()([image]), ours.double()([image])
    assert len(found["boxes"]) == 100
    torch.testing.assert_close(found["scores"], wanted["scores"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found["boxes"], wanted["boxes"], rtol=1e-6, atol=1e-6)
    of_older_file = {key: value for key, value in ours.config.to_json().items() if key != "canonical_scale"}
    assert DetectorConfig.from_json(of_older_file).canonical_scale == 112


@pytest.fixture(scope="module")
def without_eps():
    """torchvision's detector with frozen norms of small variances and an eps of 0, as its COCO_V1 was trained."""
    torch.manual_seed(0)
    trunk = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=FrozenBatchNorm2d)
    theirs = torchvision.models.detection.FasterRCNN(trunk, 91, box_score_thresh=0.0, min_size=160)
    for module in lively(theirs).modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.eps = 0.0
            module.weight.mul_(1e-3)
            module.running_var.mul_(1e-5)
    return theirs


EPS = "eps 1e-05 (0 if it was trained from torchvision's published detector: then give eps=0.0 to load_detector"


@torch.inference_mode()
def test_the_eps_of_a_plain_detector_is_announced_and_can_be_given(without_eps, tmp_path, caplog):
    torch.save(without_eps.state_dict(), path := tmp_path / "mine.pth")
    assert load_detector(path).backbone.bn1.eps == 1e-5 and EPS in caplog.text
    caplog.clear()
    torch.save(without_eps.backbone.state_dict(), tmp_path / "part.pth")
    assert build_resnet_backbone(weights=tmp_path / "part.pth", fpn=True).bn1.eps == 1e-5 and EPS in caplog.text
    caplog.clear()
    ours = load_detector(path, eps=0.0)
    assert len(caplog.messages) == 2 and "eps 1e-05" not in caplog.text
    image = torch.rand(3, 140, 210)
    images = without_eps.transform([image])[0].tensors
    for found, wanted in zip(ours.backbone(images).values(), without_eps.backbone(images).values(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())
    trunk = build_resnet_backbone(weights=path, eps=0.0, fpn=True)
    assert trunk.bn1.eps == 0 and "eps 1e-05" not in caplog.text
    save_detector(ours, tmp_path / "ours.safetensors")
    assert load_detector(tmp_path / "ours.safetensors").backbone.bn1.eps == 0
    with pytest.raises(
        ValueError, match="ours.safetensors are for eps=0.0, but you asked for eps=1e-05; leave eps out"
    ):
        load_detector(tmp_path / "ours.safetensors", eps=1e-5)


def test_torchvisions_published_detector_is_recognised_by_its_content(without_eps, tmp_path, caplog, monkeypatch):
    torch.save(without_eps.state_dict(), path := tmp_path / "mine.pth")
    assert RECOGNISED["258fb6c6"]["backbone"]["eps"] == 0
    monkeypatch.setitem(RECOGNISED, file_digest(path)[:8], RECOGNISED["258fb6c6"])
    assert load_detector(path).backbone.bn1.eps == 0 and not caplog.messages
    with pytest.raises(ValueError, match="mine.pth are for eps=0.0, but you asked for eps=1e-05"):
        load_detector(path, eps=1e-5)


def test_trained_batch_norms_have_torchs_eps_of_which_nothing_is_said(tmp_path, caplog):
    theirs = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    torch.save(theirs.state_dict(), tmp_path / "mine.pth")
    assert load_detector(tmp_path / "mine.pth").backbone.bn1.eps == 1e-5 and "eps 1e-05" not in caplog.text


@torch.inference_mode()
def test_another_eps_is_that_of_all_batch_norms_and_goes_into_the_scales_that_are_written(tmp_path):
    torch.manual_seed(0)
    backbone = build_resnet_backbone(18, fpn=True, fpn_channels=16, fpn_norm="BN", eps=0.1)
    heads = {"box_conv_layers": (8,), "box_norm": "BN", "representation_size": 8}
    detector = lively(build_faster_rcnn(backbone, 3, **heads))
    assert {module.eps for module in detector.modules() if hasattr(module, "running_var")} == {0.1}
    save_detector(detector, tmp_path / "ours.safetensors")
    write_as(tmp_path / "theirs.pth", read_weights(tmp_path / "ours.safetensors"), "torchvision")
    back, x = load_detector(tmp_path / "theirs.pth"), torch.rand(2, 3, 65, 97)
    assert back.backbone.config.eps == 1e-5
    for level, expected in detector.backbone(x).items():
        torch.testing.assert_close(back.backbone(x)[level], expected, rtol=1e-4, atol=1e-5)
    regions = torch.rand(3, 16, 7, 7)
    wanted, found = (network.roi_heads.box_head(regions) for network in (detector, back))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        "COCO-Detection/faster_rcnn_R_50_FPN_1x",
        "COCO-Detection/faster_rcnn_R_50_C4_1x",
        "COCO-Detection/faster_rcnn_R_50_DC5_1x",
        "COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x",
        "Misc/cascade_mask_rcnn_R_50_FPN_1x",
    ],
)
@torch.inference_mode()
def test_a_detectron2_checkpoint_gives_detectron2s_boxes(config, tmp_path):
    pytest.importorskip("detectron2", reason="detectron2 is not installed")
    from detectron2 import model_zoo
    from detectron2.modeling import build_model

    settings = model_zoo.get_config(f"{config}.yaml")
    settings.MODEL.DEVICE, settings.MODEL.WEIGHTS, settings.MODEL.ROI_HEADS.SCORE_THRESH_TEST = "cpu", "", 0.0
    settings.MODEL.MASK_ON = False
    theirs = lively(build_model(settings))
    state = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    state |= {"pixel_mean": theirs.pixel_mean.numpy(), "pixel_std": theirs.pixel_std.numpy()}
    path = tmp_path / "model_final.pkl"
    path.write_bytes(pickle.dumps({"model": state, "__author__": "Detectron2 Model Zoo"}))
    ours = load_detector(path)
    assert list(ours.categories.items())[11] == (13, "stop sign") and len(ours.categories) == 80
    ours.roi_heads.score_thresh, ours.transform.min_size = 0.0, (101,)
    image = torch.randint(0, 256, (3, 101, 135))
    expected = theirs([{"image": image.flip(0)}])[0]["instances"]
    got = ours([image / 255])[0]
    assert_same_detections(got, expected.scores, expected.pred_boxes.tensor, expected.pred_classes + 1)


@torch.inference_mode()
def test_a_detectron2_checkpoint_is_built_as_the_config_beside_it_says(tmp_path, caplog):
    pytest.importorskip("detectron2", reason="detectron2 is not installed")
    from detectron2 import model_zoo
    from detectron2.modeling import build_model

    settings = model_zoo.get_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    settings.MODEL.DEVICE, settings.MODEL.WEIGHTS, settings.MODEL.RESNETS.STRIDE_IN_1X1 = "cpu", "", False
    settings.MODEL.PIXEL_MEAN, settings.MODEL.PIXEL_STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    settings.INPUT.FORMAT, settings.INPUT.MIN_SIZE_TEST, settings.TEST.DETECTIONS_PER_IMAGE = "RGB", 101, 100
    settings.MODEL.ROI_HEADS.NUM_CLASSES, settings.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 7, 0.0
    settings.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32], [64], [128], [256]]
    settings.MODEL.RPN.POST_NMS_TOPK_TEST, settings.MODEL.ROI_HEADS.NMS_THRESH_TEST = 300, 0.3
    settings.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS = (5.0, 5.0, 2.0, 2.0)
    theirs = lively(build_model(settings))
    torch.save({"model": theirs.state_dict(), "iteration": 9}, tmp_path / "model_final.pth")
    (tmp_path / "config.yaml").write_text(settings.dump())
    ours = load_detector(tmp_path / "model_final.pth")
    assert "from detectron2's config.yaml beside it" in caplog.text and "assuming" not in caplog.text
    image = torch.randint(0, 256, (3, 101, 135))
    expected = theirs([{"image": image}])[0]["instances"]
    got = ours([image / 255])[0]
    assert_same_detections(got, expected.scores, expected.pred_boxes.tensor, expected.pred_classes + 1)


@pytest.mark.parametrize(
    "sides, ratios, settings, named",
    [
        ([[32], [64], [128], [256], [512]], (0.5, 1, 2), {"anchor_scale": 8.0}, ""),
        ([[16], [32], [64], [128], [256]], (0.5, 1, 2), {"anchor_scale": 4.0}, ""),
        ([[16], [32], [64], [128], [512]], (0.5, 1, 2), {}, "have anchors of the sides .* on maps of the strides"),
        ([[32, 40], [64], [128], [256], [512]], (0.5, 1, 2), {}, "have anchors of the sides"),
        ([[32], [64], [128], [256]], (0.5, 1, 2), {}, "have anchors of the sides"),
        ([[32], [64], [128], [256], [512]], (0.5, 1, 3), {}, r"have anchors of \(side, height over width\) .*3.0"),
        ([[32], [64], [128], [256], [512]], (2, 1, 0.5), {}, "the ratios 0.5, 1.0, 2.0 at each side, in this order"),
    ],
)
def test_cell_anchors_of_a_checkpoint_are_the_detectors_or_refused(small, sides, ratios, settings, named):
    state = from_ours(small.state_dict(), "detectron2")
    state |= {"pixel_mean": torch.tensor([103.53, 116.28, 123.675]), "pixel_std": torch.ones(3)}
    for i, level in enumerate(sides):
        shapes = torch.tensor([(side / ratio**0.5, side * ratio**0.5) for side in level for ratio in ratios])
        state[f"proposal_generator.anchor_generator.cell_anchors.{i}"] = torch.cat((-shapes, shapes), 1) / 2
    weights = read_weights(state)
    if named:
        with pytest.raises(ValueError, match=named):
            describe_detector(weights)
    else:
        assert settings.items() <= describe_detector(weights)["detector"].items()


def test_cell_anchors_of_one_map_are_its_sides(tmp_path):
    backbone = build_resnet_backbone(18, levels=["c4", "c5"])
    settings = {"variant": "c4", "geometry": "detectron2", "anchor_sides": (16, 48), "min_size": 64}
    ours = lively(build_faster_rcnn(backbone, 2, **settings, **SINGLE_MAP_PROPOSALS))
    state = from_ours(ours.state_dict(), "detectron2")
    state |= {"pixel_mean": torch.tensor(MEAN), "pixel_std": torch.tensor(STD)}
    shapes = torch.tensor([(side / ratio**0.5, side * ratio**0.5) for side in (16, 48) for ratio in (0.5, 1, 2)])
    state["proposal_generator.anchor_generator.cell_anchors.0"] = torch.cat((-shapes, shapes), 1) / 2
    torch.save({"model": state}, tmp_path / "model_final.pth")
    back = load_detector(tmp_path / "model_final.pth")
    back.transform.min_size = (64,)
    image = torch.rand(3, 65, 97)
    with torch.inference_mode():
        got, expected = back([image])[0], ours([image])[0]
    assert len(got["boxes"]) == len(expected["boxes"]) > 0
    assert (got["boxes"] - expected["boxes"]).abs().max() < 1e-3


@pytest.mark.parametrize("format", ["torchvision", "detectron2", "mmdetection"])
def test_a_detector_on_c5_alone_is_asked_for_the_stride_of_c5(format, tmp_path):
    depth, style = (18, {}) if format == "torchvision" else (50, {"stride_in_1x1": True})
    backbone = build_resnet_backbone(depth, levels=["c5"], dilate_c5=True, **style)
    ours = lively(build_faster_rcnn(backbone, 2, variant="dc5", representation_size=8))
    torch.save(from_ours(ours.state_dict(), format), tmp_path / "model.pth")
    given = {} if format == "torchvision" else {"given_input": "rgb", **style}
    weights = read_weights(tmp_path / "model.pth", **given)
    for build in (load_detector, lambda weights: build_resnet_backbone(weights=weights)):
        with pytest.raises(
            ValueError, match="do not state whether c5 is dilated at stride 16 .* give dilate_c5=True or"
        ):
            build(weights)
    with pytest.raises(ValueError, match="of a Faster R-CNN on c5 at stride 32, and this package builds DC5"):
        load_detector(read_weights(tmp_path / "model.pth", **given, dilate_c5=False))
    back = load_detector(read_weights(tmp_path / "model.pth", **given, dilate_c5=True))
    assert back.config.variant == "dc5" and back.backbone.features["c5"].stride == 16


MMDETECTION = """
model = dict(
    backbone=dict(type='ResNet', depth=18),
    neck=dict(type='FPN', num_outs=5),
    rpn_head=dict(anchor_generator=dict(type='AnchorGenerator', scales=[4], ratios=RATIOS, strides=[4, 8, 16, 32, 64])),
    roi_head=dict(bbox_head=dict(bbox_coder=dict(target_stds=[0.1, 0.1, 0.1, 0.1]))),
    test_cfg=dict(rpn=dict(nms_pre=500), rcnn=dict(score_thr=SCORE, max_per_img=50)))
img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
"""


def test_classes_anchors_and_thresholds_of_mmdetections_config_are_the_detectors(small, tmp_path):
    def save(ratios, score):
        config = MMDETECTION.replace("RATIOS", ratios).replace("SCORE", score)
        state = from_ours(small.state_dict(), "mmdetection")
        torch.save({"meta": {"cfg": config, "CLASSES": ("a", "b", "c")}, "state_dict": state}, tmp_path / "net.pth")
        return tmp_path / "net.pth"

    config = load_detector(save("[0.5, 1.0, 2.0]", "0.2")).config
    assert config.categories == ((1, "a"), (2, "b"), (3, "c"))
    assert (config.anchor_scale, config.bbox_reg_weights, config.rpn_pre_nms_top_n_test) == (4.0, (10.0,) * 4, 500)
    assert (config.box_score_thresh, config.box_detections_per_img) == (0.2, 50)
    for ratios, score, named in (
        ("[0.5, 1.0, 3.0]", "0.2", "have anchors of"),
        ("R", "0.2", "have an anchor_generator that this package does not know"),
        ("[0.5, 1.0, 2.0]", "S", "state box_score_thresh, but not as numbers"),
    ):
        with pytest.raises(ValueError, match=named):
            load_detector(save(ratios, score))
        assert build_resnet_backbone(weights=tmp_path / "net.pth", fpn=True).config.depth == 18


MMDETECTION_3 = """
model = dict(
    type='FasterRCNN',
    data_preprocessor=dict(type='DetDataPreprocessor', mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375],
                           bgr_to_rgb=True, pad_size_divisor=32),
    backbone=dict(type='ResNet', depth=18, num_stages=4, out_indices=(0, 1, 2, 3), frozen_stages=1, norm_eval=True,
                  norm_cfg=dict(type='BN', requires_grad=True), style='pytorch',
                  init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet50')),
    neck=dict(type='FPN', in_channels=[256, 512, 1024, 2048], out_channels=256, num_outs=5),
    rpn_head=dict(
        type='RPNHead', in_channels=256, feat_channels=256,
        anchor_generator=dict(type='AnchorGenerator', scales=[8], ratios=[0.5, 1.0, 2.0], strides=[4, 8, 16, 32, 64]),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[.0, .0, .0, .0], target_stds=[1.0, 1.0, 1.0, 1.0]),
        loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=1.0),
        loss_bbox=dict(type='L1Loss', loss_weight=1.0)),
    roi_head=dict(
        type='StandardRoIHead',
        bbox_roi_extractor=dict(
            type='SingleRoIExtractor', roi_layer=dict(type='RoIAlign', output_size=7, sampling_ratio=0),
            out_channels=256, featmap_strides=[4, 8, 16, 32]),
        bbox_head=dict(
            type='Shared2FCBBoxHead', in_channels=256, fc_out_channels=1024, roi_feat_size=7, num_classes=80,
            bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[0., 0., 0., 0.], target_stds=[0.1, 0.1, 0.2, 0.2]),
            reg_class_agnostic=False,
            loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
            loss_bbox=dict(type='L1Loss', loss_weight=1.0))),
    train_cfg=dict(rpn_proposal=dict(nms_pre=2000, max_per_img=1000, nms=dict(type='nms', iou_threshold=0.7))),
    test_cfg=dict(
        rpn=dict(nms_pre=1000, max_per_img=1000, nms=dict(type='nms', iou_threshold=0.7), min_bbox_size=0),
        rcnn=dict(score_thr=0.05, nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)))
test_pipeline = [
    dict(type='LoadImageFromFile', backend_args=None), dict(type='Resize', scale=(1333, 800), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True), dict(type='PackDetInputs', meta_keys=('img_id', 'img_path'))]
test_dataloader = dict(dataset=dict(type='CocoDataset', pipeline=test_pipeline))
test_cfg = dict(type='TestLoop')
"""
MMDETECTION_2_C4 = """
norm_cfg = dict(type='BN', requires_grad=False)
model = dict(
    type='FasterRCNN',
    pretrained='open-mmlab://detectron2/resnet50_caffe',
    backbone=dict(type='ResNet', depth=18, num_stages=3, strides=(1, 2, 2), dilations=(1, 1, 1), out_indices=(2, ),
                  frozen_stages=1, norm_cfg=norm_cfg, norm_eval=True, style='caffe'),
    rpn_head=dict(
        type='RPNHead', in_channels=1024, feat_channels=1024,
        anchor_generator=dict(type='AnchorGenerator', scales=[2, 4, 8, 16, 32], ratios=[0.5, 1.0, 2.0], strides=[16]),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[.0, .0, .0, .0], target_stds=[1.0, 1.0, 1.0, 1.0]),
        loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=1.0),
        loss_bbox=dict(type='L1Loss', loss_weight=1.0)),
    roi_head=dict(
        type='StandardRoIHead',
        shared_head=dict(type='ResLayer', depth=50, stage=3, stride=2, dilation=1, style='caffe', norm_cfg=norm_cfg,
                         norm_eval=True),
        bbox_roi_extractor=dict(
            type='SingleRoIExtractor', roi_layer=dict(type='RoIAlign', out_size=14, sample_num=0),
            out_channels=1024, featmap_strides=[16]),
        bbox_head=dict(
            type='BBoxHead', with_avg_pool=True, roi_feat_size=7, in_channels=2048, num_classes=80,
            bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[0., 0., 0., 0.], target_stds=[0.1, 0.1, 0.2, 0.2]),
            reg_class_agnostic=False,
            loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
            loss_bbox=dict(type='L1Loss', loss_weight=1.0))))
test_cfg = dict(
    rpn=dict(nms_across_levels=False, nms_pre=6000, nms_post=1000, max_num=1000, nms_thr=0.7, min_bbox_size=0),
    rcnn=dict(score_thr=0.05, nms=dict(type='nms', iou_thr=0.5), max_per_img=100))
img_norm_cfg = dict(mean=[103.530, 116.280, 123.675], std=[1.0, 1.0, 1.0], to_rgb=False)
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='MultiScaleFlipAug', img_scale=(1333, 800), flip=False, transforms=[
        dict(type='Resize', keep_ratio=True), dict(type='RandomFlip'), dict(type='Normalize', **img_norm_cfg),
        dict(type='Pad', size_divisor=32), dict(type='ImageToTensor', keys=['img']),
        dict(type='Collect', keys=['img'])])]
data = dict(samples_per_gpu=2, test=dict(type='CocoDataset', pipeline=test_pipeline))
"""


def of_mmdetection(folder, detector, config):
    state = from_ours(detector.state_dict(), "mmdetection")
    torch.save({"meta": {"mmdet_version": "2.0.0", "config": config}, "state_dict": state}, folder / "net.pth")
    return folder / "net.pth"


def test_published_configs_of_mmdetection_load_without_arguments(small, tmp_path, caplog):
    config = load_detector(of_mmdetection(tmp_path, small, MMDETECTION_3)).config
    assert (config.variant, config.rpn_post_nms_top_n_test, config.box_nms_thresh) == ("fpn", 1000, 0.5)
    c4 = build_faster_rcnn(build_resnet_backbone(18, levels=["c4", "c5"]), 3, variant="c4")
    back = load_detector(of_mmdetection(tmp_path, c4, MMDETECTION_2_C4))
    assert back.backbone.config.stride_in_1x1
    config = back.config
    assert (config.variant, config.rpn_pre_nms_top_n_test, config.rpn_post_nms_top_n_test) == ("c4", 6000, 1000)
    assert (config.rpn_nms_thresh, config.box_nms_thresh, config.min_size, config.max_size) == (0.7, 0.5, 800, 1333)
    assert "assuming" not in caplog.text


@pytest.mark.parametrize(
    "old, new, settings",
    [
        ("iou_threshold=0.7), min", "iou_threshold=0.6), min", {"rpn_nms_thresh": 0.6}),
        ("nms=dict(type='nms', iou_threshold=0.7), min", "nms_thr=0.6, min", {"rpn_nms_thresh": 0.6}),
        ("max_per_img=1000, nms=dict(type='nms', iou_threshold=0.7), min", "nms_post=9, max_num=9, min", {}),
        ("(1333, 800)", "(1000, 600)", {"min_size": 600, "max_size": 1000}),
        (
            "anchor_generator=dict(type='AnchorGenerator', scales=[8], ratios=[0.5, 1.0, 2.0], "
            "strides=[4, 8, 16, 32, 64])",
            "anchor_scales=[4], anchor_ratios=[0.5, 1.0, 2.0], anchor_strides=[4, 8, 16, 32, 64]",
            {"anchor_scale": 4.0},
        ),
        (
            "bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[0., 0., 0., 0.], "
            "target_stds=[0.1, 0.1, 0.2, 0.2])",
            "target_means=[0., 0., 0., 0.], target_stds=[0.05, 0.05, 0.1, 0.1]",
            {"bbox_reg_weights": (20.0, 20.0, 10.0, 10.0)},
        ),
    ],
)
def test_settings_of_mmdetection_are_applied(small, tmp_path, old, new, settings):
    config = load_detector(of_mmdetection(tmp_path, small, MMDETECTION_3.replace(old, new))).config
    assert MMDETECTION_3.count(old) == 1
    for name, value in (settings or {"rpn_post_nms_top_n_test": 9}).items():
        assert getattr(config, name) == value


@pytest.mark.parametrize(
    "old, new, named",
    [
        ("'FasterRCNN'", "'CascadeRCNN'", "model.type 'CascadeRCNN'"),
        ("'RPNHead'", "'GARPNHead'", "rpn_head.type 'GARPNHead'"),
        ("'DeltaXYWHBBoxCoder'", "'LegacyDeltaXYWHBBoxCoder'", "rpn_head.bbox_coder.type 'LegacyDeltaXYWHBBoxCoder'"),
        ("num_classes=80", "dropout=0.5", "bbox_head.dropout 0.5"),
        ("target_stds=[0.1,", "add_ctr_clamp=True, target_stds=[0.1,", "bbox_head.bbox_coder.add_ctr_clamp True"),
        ("target_stds=[1.0,", "clip_border=False, target_stds=[1.0,", "rpn_head.bbox_coder.clip_border False"),
        ("'SingleRoIExtractor'", "'GenericRoIExtractor'", "bbox_roi_extractor.type 'GenericRoIExtractor'"),
        ("'RoIAlign'", "'RoIPool'", "roi_layer.type 'RoIPool'"),
        ("sampling_ratio=0", "pool_mode='max'", "roi_layer.pool_mode 'max'"),
        ("output_size=7", "output_size=14", "roi_layer.output_size 14"),
        ("[4, 8, 16, 32])", "[4, 8, 16])", "featmap_strides [4, 8, 16]"),
        ("'Shared2FCBBoxHead'", "'DoubleConvFCBBoxHead'", "bbox_head.type 'DoubleConvFCBBoxHead'"),
        ("num_classes=80", "cls_predictor_cfg=dict(type='NormedLinear')", "cls_predictor_cfg {'type': 'NormedLinear'}"),
        ("'CrossEntropyLoss', use_sigmoid=False", "'SeesawLoss'", "loss_cls.type 'SeesawLoss'"),
        ("'nms', iou_threshold=0.5", "'soft_nms', iou_threshold=0.5", "test_cfg.rcnn.nms.type 'soft_nms'"),
        ("iou_threshold=0.5", "iou_threshold=0.5, max_num=9", "test_cfg.rcnn.nms.max_num 9"),
        ("max_per_img=100)", "max_per_img=-1)", "test_cfg.rcnn.max_per_img -1"),
        ("min_bbox_size=0", "min_bbox_size=16", "test_cfg.rpn.min_bbox_size 16"),
        ("min_bbox_size=0", "nms_across_levels=True", "test_cfg.rpn.nms_across_levels True"),
        ("min_bbox_size=0", "max_num=300", "test_cfg.rpn.max_num 300 and test_cfg.rpn.max_per_img 1000"),
        ("keep_ratio=True", "keep_ratio=False", "pipeline's Resize.keep_ratio False"),
        ("dict(type='Resize', scale=(1333, 800), keep_ratio=True)", "dict(type='Crop')", "pipeline's Crop"),
        ("dict(type='Resize', scale=(1333, 800), keep_ratio=True),", "", "pipeline without the size of a Resize"),
    ],
)
def test_parts_of_mmdetections_detector_that_none_here_has_are_refused_by_name(small, tmp_path, old, new, named):
    assert old in MMDETECTION_3
    path = of_mmdetection(tmp_path, small, MMDETECTION_3.replace(old, new, 1))
    with pytest.raises(ValueError, match=f"are of a detector with .*{re.escape(named)}.* in its mmengine config"):
        load_detector(path)
    assert build_resnet_backbone(weights=path, fpn=True).config.depth == 18


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    backbone = build_resnet_backbone(18, fpn=True, fpn_channels=16, levels=["p2", "p3", "p4", "p5", "p6"])
    return lively(build_faster_rcnn(backbone, 3, representation_size=8, min_size=64, geometry="detectron2"))


@pytest.mark.parametrize("format", ["torchvision", "detectron2", "mmdetection"])
def test_a_detector_of_ours_comes_back_from_every_format(small, format, tmp_path):
    save_detector(small, tmp_path / "ours.safetensors")
    path = tmp_path / ("theirs.pkl" if format == "detectron2" else "theirs.pth")
    write_as(path, read_weights(tmp_path / "ours.safetensors"), format)
    back = load_detector(path)
    image = torch.rand(3, 65, 97)
    with torch.inference_mode():
        got, expected = back([image])[0], small([image])[0]
    if format != "torchvision":  # plain state dicts say nothing of sizes and geometry
        assert back.config == small.config
        assert got["labels"].tolist() == expected["labels"].tolist()
        assert (got["boxes"] - expected["boxes"]).abs().max() < 1e-3
    assert back.num_classes == 3 and back.backbone.fpn is not None


@pytest.mark.parametrize("format, geometry", [("torchvision", "torchvision"), ("mmdetection", "detectron2")])
def test_the_format_tells_the_geometry_and_the_shapes_the_rest(small, format, geometry):
    weights = read_weights(from_ours(small.state_dict(), format), given_input="rgb")
    described = describe_detector(weights)
    assert described["detector"]["geometry"] == geometry and described["detector"]["representation_size"] == 8
    assert described["detector"]["categories"] == [(1, "class 1"), (2, "class 2"), (3, "class 3")]
    assert described["backbone"]["fpn_channels"] == 16 and described["backbone"]["depth"] == 18


@pytest.mark.parametrize("anchors", [5, 15])
def test_anchors_that_a_file_does_not_state_are_refused(small, anchors):
    state = from_ours(small.state_dict(), "torchvision")
    state |= {"rpn.head.cls_logits.weight": torch.zeros(anchors, 16, 1, 1)}
    with pytest.raises(
        ValueError, match=rf"have {anchors} anchors at each place .* have 3, .* load them with torchvision"
    ):
        describe_detector(read_weights(state))


@pytest.mark.parametrize("name", ["box_head.0.0.weight", "box_head.5.weight", "box_head.fc6.weight"])
def test_a_head_without_a_shape_is_refused(small, name, tmp_path):
    state = from_ours(small.state_dict(), "torchvision") | {f"roi_heads.{name}": torch.tensor(0.0)}
    torch.save(state, tmp_path / "damaged.pth")
    with pytest.raises(ValueError, match=r"damaged.pth"):
        load_detector(tmp_path / "damaged.pth")


@pytest.mark.parametrize(
    "builder, kind",
    [
        ("maskrcnn_resnet50_fpn", "Mask R-CNN"),
        ("keypointrcnn_resnet50_fpn", "Keypoint R-CNN"),
        ("retinanet_resnet50_fpn_v2", "RetinaNet"),
        ("fcos_resnet50_fpn", "FCOS"),
    ],
)
def test_another_detector_of_torchvision_is_refused_with_its_builder_and_its_trunk_is_read(builder, kind, tmp_path):
    state = getattr(torchvision.models.detection, builder)(weights=None, weights_backbone=None).state_dict()
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(ValueError) as error:
        load_detector(tmp_path / "other.pth")
    said = str(error.value)
    assert f"other.pth are of a {kind} (" in said and "\n" not in said
    assert f"load them with torchvision.models.detection.{builder}, or train" in said
    assert f"torchvision's {kind.replace(' ', '').replace('-', '')} on their trunk" in said
    assert build_resnet_backbone(weights=tmp_path / "other.pth", fpn=True).config.depth == 50


@pytest.mark.parametrize(
    "format, name, says",
    [
        ("detectron2", "roi_heads.mask_head.mask_fcn1.weight", "a Mask R-CNN .* with detectron2, .*as_torchvision"),
        ("detectron2", "head.cls_subnet.0.weight", "a RetinaNet .* load them with detectron2, "),
        ("detectron2", "roi_heads.keypoint_head.conv_fcn1.weight", "a Keypoint R-CNN "),
        ("detectron2", "sem_seg_head.p2.0.weight", "a Panoptic FPN .* with detectron2, .*adapters.detectron2"),
        ("mmdetection", "roi_head.mask_head.convs.0.conv.weight", "a Mask R-CNN .* load them with mmdetection, "),
        (
            "mmdetection",
            "roi_head.bbox_head.0.shared_fcs.0.weight",
            "a Cascade R-CNN that averages logits .* mmdetection, or train this .*--recipe cascade --weights FILE",
        ),
        ("mmdetection", "bbox_head.retina_cls.weight", "a RetinaNet "),
        (
            "mmdetection",
            "roi_head.other.weight",
            "1 tensors that no Faster R-CNN of this package has .*: roi_head.other",
        ),
    ],
)
def test_other_detectors_of_other_packages_are_refused_by_their_kind(small, format, name, says):
    weights = read_weights({**from_ours(small.state_dict(), format), name: torch.zeros(1)}, given_input="rgb")
    with pytest.raises(ValueError, match=says):
        describe_detector(weights)


def test_a_cascade_with_a_mask_head_is_refused_as_one(small):
    state = from_ours(small.state_dict(), "detectron2") | {"roi_heads.mask_head.mask_fcn1.weight": torch.zeros(1)}
    state = {key.replace("box_predictor.", "box_predictor.0."): tensor for key, tensor in state.items()}
    with pytest.raises(ValueError, match="of a Cascade Mask R-CNN .* with detectron2, or train this .*recipe cascade"):
        describe_detector(read_weights(state, given_input="rgb"))


def test_a_classifier_is_no_detector(tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    with pytest.raises(ValueError, match="hold no Faster R-CNN: roi_heads.box_predictor is missing"):
        load_detector(tmp_path / "resnet18.pth")


def test_detector_settings_that_no_file_states_are_announced_and_can_be_given(small, tmp_path, caplog):
    torch.save(from_ours(small.state_dict(), "torchvision"), path := tmp_path / "mine.pth")
    load_detector(path)
    assert "assuming anchors of 8 times the stride" in caplog.text and "torchvision's RoIAlign" in caplog.text
    caplog.clear()
    found = load_detector(path, anchor_scale=4.0, geometry="detectron2", box_nms_thresh=0.3).config
    assert (found.anchor_scale, found.geometry, found.box_nms_thresh) == (4.0, "detectron2", 0.3)
    assert "how their detector was built" not in caplog.text
    names = {label: f"thing {label}" for label in range(1, small.num_classes + 1)}
    assert load_detector(path, categories=names).categories == names
    for wrong in ({1: "thing"}, ["thing"] * small.num_classes):
        with pytest.raises(
            ValueError, match=rf"categories=.*: give {{id: name}} for each of the {small.num_classes} cl"
        ):
            load_detector(path, categories=wrong)
    with pytest.raises(ValueError, match="takes no device: give the device to .to"):
        load_detector(path, device="gpu")
    with pytest.raises(ValueError, match="unknown setting of a detector in a foreign file 'anchors'; choose from"):
        load_detector(path, anchors=4)
    save_detector(small, tmp_path / "ours.safetensors")
    with pytest.raises(ValueError, match="state their detector; leave out anchor_scale"):
        load_detector(tmp_path / "ours.safetensors", anchor_scale=4.0)
