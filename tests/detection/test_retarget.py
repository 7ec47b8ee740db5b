"""A detector's weights as the start of one for other classes."""

import pytest
import torch
from torchvision.models.detection import FasterRCNN as TorchvisionFasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from detection.faster_rcnn import (
    PREDICTOR,
    build_faster_rcnn,
    load_detector,
    read_described_weights,
    retarget_detector,
    save_detector,
)
from resbackbone import build_resnet_backbone
from resbackbone.layers import NORMS, FrozenBatchNorm2d

FROZEN = {"norm": "FrozenBN", "frozen_through": "c2"}
PETS = {3: "cat", 7: "dog", 9: "fish"}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A detector of two classes whose parts are none of the defaults."""
    torch.manual_seed(1)
    backbone = build_resnet_backbone(18, fpn=True, levels=["p2", "p3"], fpn_channels=8)
    numbers = {"anchor_scale": 4.0, "representation_size": 16, "min_size": 64, "box_score_thresh": 0.3}
    detector = build_faster_rcnn(backbone, 2, categories={1: "car", 2: "bus"}, **numbers)
    path = tmp_path_factory.mktemp("detector") / "model.safetensors"
    save_detector(detector, path)
    return path


def test_all_but_the_box_predictor_starts_from_a_detector_of_other_classes(file, tmp_path):
    weights = read_described_weights(file)
    built, new = retarget_detector(weights, PETS, backbone=FROZEN, min_size=96, max_size=128)
    state = built.state_dict()
    assert sorted(new) == sorted(key for key in state if key.startswith(PREDICTOR)) and len(new) == 4
    assert state[f"{PREDICTOR}cls_score.weight"].shape == (4, 16) and state[f"{PREDICTOR}bbox_pred.bias"].shape == (16,)
    for key in state.keys() - set(new):
        assert torch.equal(state[key], weights.state[key]), key
    assert built.categories == PETS and built.transform.min_size == (96,) and built.roi_heads.score_thresh == 0.05
    assert isinstance(built.backbone.bn1, FrozenBatchNorm2d) and not built.backbone.layer1[0].conv1.weight.requires_grad
    save_detector(built, tmp_path / "again.safetensors")
    assert load_detector(tmp_path / "again.safetensors").categories == PETS


def test_a_detector_of_the_same_classes_is_started_from_whole(file):
    weights = read_described_weights(file)
    built, new = retarget_detector(weights, {1: "car", 2: "bus"}, backbone=FROZEN)
    assert new == [] and all(torch.equal(tensor, weights.state[key]) for key, tensor in built.state_dict().items())
    _, new = retarget_detector(weights, {1: "car", 3: "bus"}, backbone=FROZEN)
    assert len(new) == 4


@pytest.mark.parametrize(
    "other", [{"anchor_scale": 8.0}, {"bbox_reg_weights": (1.0,) * 4}, {"cascade_ious": (0.5, 0.6)}]
)
def test_settings_that_the_weights_determine_are_theirs_and_others_are_refused(file, other):
    same = {"anchor_scale": 4.0, "image_mean": None, "cascade_ious": []}
    built, _ = retarget_detector(read_described_weights(file), PETS, backbone=FROZEN, **same)
    assert (built.config.anchor_scale, built.config.canonical_scale) == (4.0, 112)
    assert built.roi_heads.box_head.fc7.out_features == 16
    [name] = other
    with pytest.raises(ValueError, match=f"of a detector with {name}=.*, but you asked for {name}=.*leave {name} out"):
        retarget_detector(read_described_weights(file), PETS, backbone=FROZEN, **other)


def test_a_torchvision_detector_of_other_classes_is_started_from(tmp_path):
    theirs = TorchvisionFasterRCNN(resnet_fpn_backbone(backbone_name="resnet18", weights=None), num_classes=3)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    built, new = retarget_detector(read_described_weights(tmp_path / "theirs.pth"), PETS, backbone=FROZEN)
    assert len(new) == 4 and torch.equal(built.backbone.conv1.weight, theirs.backbone.body.conv1.weight)
    assert torch.equal(built.roi_heads.box_head.fc6.weight, theirs.roi_heads.box_head.fc6.weight)
    assert torch.equal(built.rpn.head.cls_logits.weight, theirs.rpn.head.cls_logits.weight)
    assert tuple(built.rpn.anchor_generator.sizes) == tuple(theirs.rpn.anchor_generator.sizes)


@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "SyncBN"])
def test_batch_norms_of_trunk_pyramid_and_box_head_are_all_frozen_or_all_trainable(norm, tmp_path):
    backbone = build_resnet_backbone(18, fpn=True, fpn_channels=8, fpn_norm="BN")
    heads = {"rpn_conv_depth": 2, "box_conv_layers": (8, 4), "box_norm": "BN", "representation_size": 16}
    save_detector(build_faster_rcnn(backbone, 3, **heads), tmp_path / "v2.safetensors")
    weights = read_described_weights(tmp_path / "v2.safetensors")
    built, new = retarget_detector(weights, PETS, backbone={"norm": norm, "frozen_through": "c2"})
    assert len(new) == 4 and (built.config.rpn_conv_depth, built.config.box_conv_layers) == (2, (8, 4))
    norms = [built.backbone.layer4[0].bn1, built.backbone.fpn.layer_blocks["0"][1], built.roi_heads.box_head[1][1]]
    assert {type(module) for module in norms} == {NORMS[norm]}
    assert isinstance(built.backbone.bn1, FrozenBatchNorm2d)  # below c2
    again = load_detector(tmp_path / "v2.safetensors")  # as it was saved
    assert again.config.box_norm == again.backbone.config.fpn_norm == again.backbone.config.norm == "BN"
    maps = build_resnet_backbone(weights=tmp_path / "v2.safetensors", fpn=True, norm=norm, frozen_through=None)
    assert maps.config.fpn_norm == norm


def test_a_backbones_weights_describe_no_detector(tmp_path):
    torch.save(build_resnet_backbone(18, levels=["c2"]).state_dict(), tmp_path / "trunk.pth")
    assert "detector" not in read_described_weights(tmp_path / "trunk.pth").metadata
