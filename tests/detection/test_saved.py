"""A detector in a file: bit-equal when it is loaded, and the start of one for other classes."""

import pytest
import torch
from made import SOME_BOXES, V2, lively, small_detector, target, two_images, with_masks_and_keypoints
from torch import nn
from torchvision.models.detection import FasterRCNN as TorchvisionFasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from detection.config import BACKBONE_OF
from detection.faster_rcnn import build_faster_rcnn, prepare_for_detection
from detection.saved import (
    PREDICTOR,
    detector_file,
    load_detector,
    read_described_weights,
    retarget_detector,
    save_detector,
)
from resbackbone import build_resnet_backbone
from resbackbone.checks import UserError
from resbackbone.engine.checkpoints import save_checkpoint
from resbackbone.layers import NORMS, FrozenBatchNorm2d

FROZEN = {"norm": "FrozenBN", "frozen_through": "c2"}
PETS = {3: "cat", 7: "dog", 9: "fish"}


def test_several_shorter_sides_are_kept_and_the_last_is_that_of_inference(tmp_path):
    detector = lively(small_detector(min_size=(40, 64)))
    save_detector(detector, tmp_path / "model.safetensors")
    loaded, image = load_detector(tmp_path / "model.safetensors"), torch.rand(3, 64, 97)
    assert loaded.config.min_size == loaded.transform.min_size == (40, 64)
    assert detector.transform([image])[0].image_sizes == loaded.transform([image])[0].image_sizes == [(64, 97)]
    sizes = {detector.train().transform([image])[0].image_sizes[0][0] for _ in range(20)}
    assert sizes == {40, 64}


@pytest.mark.parametrize("variant, heads", [*((variant, {}) for variant in BACKBONE_OF), ("fpn", V2), ("dc5", V2)])
def test_a_saved_detector_loads_to_bit_equal_outputs(tmp_path, variant, heads):
    categories = {3: "car", 13: "stop sign", 90: "[b]猫[/b]"}
    detector = small_detector(variant, categories=categories, **heads).train()
    detector(two_images(), [target(*SOME_BOXES), target()])  # moves the statistics
    save_detector(detector.eval(), tmp_path / "model.safetensors")
    loaded = load_detector(tmp_path / "model.safetensors")
    assert not loaded.training and loaded.categories == categories and loaded.config == detector.config
    images = two_images()
    with torch.inference_mode():
        for wanted, found in zip(detector(images), loaded(images), strict=True):
            assert len(wanted["boxes"]) > 0
            assert all(torch.equal(found[name], wanted[name]) for name in ("boxes", "labels", "scores"))


def test_a_saved_detector_keeps_the_settings_that_its_parts_have_now(tmp_path):
    detector = lively(small_detector(categories={3: "car", 13: "stop sign", 90: "cat"}))
    detector.transform = GeneralizedRCNNTransform(80, 120, [0.4] * 3, [0.3] * 3).eval()
    detector.roi_heads.box_predictor = FastRCNNPredictor(16, 8)
    detector.roi_heads.score_thresh, detector.roi_heads.nms_thresh = 0.02, 0.4
    detector.rpn._post_nms_top_n["testing"] = 20
    detector.rpn.proposal_matcher.high_threshold = 0.6
    save_detector(detector, tmp_path / "model.safetensors")
    loaded = load_detector(tmp_path / "model.safetensors")
    assert loaded.num_classes == 7 and loaded.config.rpn_fg_iou_thresh == 0.6
    assert loaded.config.image_mean == (0.4,) * 3 and loaded.config.box_nms_thresh == 0.4
    with torch.inference_mode():
        [wanted], [found] = (network([torch.full((3, 64, 97), 0.3)]) for network in (detector, loaded))
    assert len(wanted["boxes"]) > 0
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    "change, says",
    [
        (
            lambda d: setattr(d.backbone.bn1, "eps", 0.1),
            "backbone.bn1.eps is 0.1, and load_detector would make it 1e-05",
        ),
        (
            lambda d: setattr(d.backbone.conv1, "padding_mode", "circular"),
            "conv1.padding_mode is circular, .* zeros",
        ),
        (lambda d: setattr(d.rpn.head.conv[0], "1", nn.GELU()), r"rpn.head.conv.0.1 is GELU, .* make it ReLU"),
        (with_masks_and_keypoints, "roi_heads.mask_roi_pool is MultiScaleRoIAlign, .* make it None"),
        (lambda d: d.rpn.anchor_generator.cell_anchors[0].mul_(2), "rpn.anchor_generator.cell_anchors is"),
        (lambda d: setattr(d.roi_heads.box_roi_pool, "canonical_scale", 100), "canonical_scale is 100, .* make it 224"),
        (lambda d: nn.utils.spectral_norm(d.rpn.head.cls_logits), "rpn.head.cls_logits.weight_orig is .* make it None"),
        (prepare_for_detection, "is .*, and load_detector would make it"),
    ],
)
def test_a_change_that_the_file_cannot_state_is_refused_when_a_detector_is_saved(tmp_path, change, says):
    detector = small_detector()
    change(detector)
    with pytest.raises(UserError, match=says):
        save_detector(detector, tmp_path / "model.safetensors")
    assert not (tmp_path / "model.safetensors").exists()


def test_a_runs_detector_is_its_final_one_or_that_of_its_last_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such run folder or file"):
        detector_file(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no detector"):
        detector_file(tmp_path)
    for step in (900, 10_000_000, 1000):
        save_checkpoint(tmp_path, step, lambda folder: (folder / "model.safetensors").write_text("weights"), nbytes=7)
    assert detector_file(tmp_path).parent.name == "step_10000000"
    (tmp_path / "checkpoints" / "step_10000000" / "model.safetensors").write_text("weight")
    assert detector_file(tmp_path).parent.name == "step_0001000"
    (tmp_path / "model.safetensors").touch()
    assert detector_file(tmp_path) == tmp_path / "model.safetensors"
    assert detector_file(tmp_path / "model.safetensors") == tmp_path / "model.safetensors"


@pytest.fixture(scope="module")
def file(module_path):
    """A detector of two classes whose parts are none of the defaults."""
    torch.manual_seed(1)
    backbone = build_resnet_backbone(18, fpn=True, levels=["p2", "p3"], fpn_channels=8)
    numbers = {"anchor_scale": 4.0, "representation_size": 16, "min_size": 64, "box_score_thresh": 0.3}
    detector = build_faster_rcnn(backbone, 2, categories={1: "car", 2: "bus"}, **numbers)
    path = module_path / "model.safetensors"
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
