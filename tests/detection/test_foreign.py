"""Faster R-CNN weights of torchvision and detectron2 detect here what they detect there."""

import pickle

import pytest
import torch
import torchvision
from made import lively

from detection import build_faster_rcnn
from detection.faster_rcnn import load_detector, save_detector
from detection.foreign import describe_detector
from resbackbone import build_resnet_backbone
from resbackbone.weights import Weights, read_weights
from resbackbone.weights.translate import from_ours
from resbackbone.weights.write import write_as


def assert_same_detections(got, scores, boxes, labels):
    assert len(got["scores"]) == len(scores) == 100
    assert (got["scores"] - scores).abs().max() < 1e-5
    top = scores > scores[20]  # further down equal scores may change places
    assert (got["boxes"][top] - boxes[top]).abs().max() < 1e-3
    assert torch.equal(got["labels"][top], labels[top])


@torch.inference_mode()
def test_a_torchvision_checkpoint_is_a_detector_with_the_classes_of_its_ninety_ids(tmp_path):
    theirs = torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, box_score_thresh=0.0, min_size=160
    )
    lively(theirs)
    torch.save({"model": theirs.state_dict(), "epoch": 25}, tmp_path / "model_25.pth")
    ours = load_detector(tmp_path / "model_25.pth")
    assert (ours.categories[1], ours.categories[90], ours.categories[12]) == ("person", "toothbrush", "N/A")
    ours.roi_heads.score_thresh, ours.transform.min_size = 0.0, (160,)
    image = torch.rand(3, 140, 210)  # 160 x 240, padded to 160 x 256: p6 is 3 x 4, and its stride is taken for 53
    expected = theirs([image])[0]
    assert_same_detections(ours([image])[0], expected["scores"], expected["boxes"], expected["labels"])


@pytest.mark.parametrize(
    "config",
    ["faster_rcnn_R_50_FPN_1x", "faster_rcnn_R_50_C4_1x", "faster_rcnn_R_50_DC5_1x", "faster_rcnn_X_101_32x8d_FPN_3x"],
)
@torch.inference_mode()
def test_a_detectron2_checkpoint_gives_detectron2s_boxes(config, tmp_path):
    pytest.importorskip("detectron2", reason="detectron2 is not installed")
    from detectron2 import model_zoo
    from detectron2.modeling import build_model

    settings = model_zoo.get_config(f"COCO-Detection/{config}.yaml")
    settings.MODEL.DEVICE, settings.MODEL.WEIGHTS, settings.MODEL.ROI_HEADS.SCORE_THRESH_TEST = "cpu", "", 0.0
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
    weights = read_weights(from_ours(small.state_dict(), format))
    described = describe_detector(weights)
    assert described["detector"]["geometry"] == geometry and described["detector"]["representation_size"] == 8
    assert described["detector"]["categories"] == [(1, "class 1"), (2, "class 2"), (3, "class 3")]
    assert described["backbone"]["fpn_channels"] == 16 and described["backbone"]["depth"] == 18


def test_classes_that_a_file_names_are_the_detectors(small):
    weights = read_weights(from_ours(small.state_dict(), "mmdetection"))
    named = Weights(weights.state, {"classes": ["cat", "dog", "cow"]}, "a file", format="mmdetection")
    assert dict(describe_detector(named)["detector"]["categories"]) == {1: "cat", 2: "dog", 3: "cow"}


@pytest.mark.parametrize("kind", ["maskrcnn_resnet50_fpn", "retinanet_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2"])
def test_a_detector_of_another_kind_is_refused_by_the_names_of_its_heads(kind, tmp_path):
    state = getattr(torchvision.models.detection, kind)(weights=None, weights_backbone=None).state_dict()
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"tensors that no Faster R-CNN of this package has .*head"):
        load_detector(tmp_path / "other.pth")
    assert build_resnet_backbone(weights=tmp_path / "other.pth", fpn=True).config.depth == 50


def test_a_classifier_is_no_detector(tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    with pytest.raises(ValueError, match="hold no Faster R-CNN: roi_heads.box_predictor is missing"):
        load_detector(tmp_path / "resnet18.pth")
