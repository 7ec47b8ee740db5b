import json
import shutil
from dataclasses import replace

import made
import pytest
import torch
import yaml
from made import FEW
from safetensors.torch import save_file
from torch import nn

from detection import paper
from detection.config import BACKBONE_OF
from detection.data import open_split
from detection.evaluate import evaluate
from detection.faster_rcnn import build_faster_rcnn, prepare_for_detection
from detection.paper import ImprovedTesting, VGGHead, build_vgg16_backbone, load_vgg16, nms_and_vote, select_and_vote
from detection.recipes import RECIPES, Augmentation
from detection.saved import load_detector, save_detector
from detection.scoring import entries
from detection.shapes import make_shapes
from resbackbone import build_resnet_backbone
from resbackbone.adapters.from_timm import from_timm
from resbackbone.cli.command import main_of
from resbackbone.engine.distributed import Rank
from resbackbone.tools import evaluate_coco, train_coco


def small_detector(variant="c4", **options):
    return lively(made.small_detector(variant, **options))


def small_vgg16(**options):
    return lively(build_faster_rcnn(build_vgg16_backbone(), 3, variant="vgg16", **{**FEW, **options}))


def lively(detector):
    """With classes, boxes and scores that vary; in eval mode."""
    with torch.no_grad():
        heads = detector.roi_heads.box_predictor, detector.rpn.head
        for layer in (heads[0].cls_score, heads[0].bbox_pred, heads[1].cls_logits, heads[1].bbox_pred):
            layer.weight.normal_(0, 1 / layer.weight[0].numel() ** 0.5)
    return detector.eval()


IMAGE = 51, 70


@torch.inference_mode()
def found_by(detector, image):
    return detector([image])[0]


def assert_same(a, b):
    assert a.keys() == b.keys() and len(a["boxes"]) > 0
    assert all(torch.equal(a[name], b[name]) for name in a)


def targets():
    return [{"boxes": torch.tensor([[3.0, 4, 40, 50]]), "labels": torch.tensor([2])}]


# VGG-16


@pytest.fixture(scope="module")
def vgg16():
    return small_vgg16()


TIMMS = "pre_logits.fc1", "pre_logits.fc2", "head.fc"  # timm's names of the fully connected layers
TORCHVISIONS = "classifier.0", "classifier.3", "classifier.6"


def classifier_state(width=16, *, torchvision=False):
    """VGG-16's tensors, with narrow fully connected layers; timm's names and shapes, or torchvision's."""
    torch.manual_seed(1)
    network = build_vgg16_backbone().network.state_dict()
    state = {key.replace("features_", "features."): torch.randn_like(tensor) for key, tensor in network.items()}
    fc = torch.randn(width, 512, 7, 7), torch.randn(width), torch.randn(width, width, 1, 1), torch.randn(width)
    *names, last = TORCHVISIONS if torchvision else TIMMS
    for i, name in enumerate(names):
        state[f"{name}.weight"] = fc[2 * i].flatten(1) if torchvision else fc[2 * i]
        state[f"{name}.bias"] = fc[2 * i + 1]
    return state | {f"{last}.weight": torch.randn(5, width), f"{last}.bias": torch.randn(5)}


def test_vgg16_shares_its_convolutions_up_to_conv5_3_at_stride_16():
    backbone = build_vgg16_backbone(frozen_through="stem")
    assert {level: tuple(feature) for level, feature in backbone.features.items()} == {"c4": (512, 16)}
    layers = [module for module in backbone.modules() if isinstance(module, nn.Conv2d | nn.MaxPool2d)]
    assert [type(layer) for layer in layers[-3:]] == [nn.Conv2d] * 3  # not pool5, in whose place regions are pooled
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    assert len(convolutions) == 13
    assert [layer.weight.requires_grad for layer in convolutions] == [False] * 4 + [True] * 9  # conv3_1 and up


def test_vgg16_regions_go_through_fc6_and_fc7_with_dropout_in_training_alone(vgg16):
    head = vgg16.roi_heads.box_head
    regions = torch.rand(6, 512, 7, 7)
    assert vgg16.roi_heads.box_roi_pool.output_size == (7, 7)
    wanted = (head.fc7(head.fc6(regions.flatten(1)).relu())).relu()
    assert torch.equal(head.eval()(regions), wanted)
    head = VGGHead(512 * 7 * 7, 16)
    with torch.no_grad():
        head.fc7.weight.copy_(torch.eye(16))  # so that both dropouts are seen: a quarter stays, four times as large
        head.fc7.bias.zero_()
        regions = torch.rand(60, 512, 7, 7)
        whole, dropped = head.eval()(regions), head.train()(regions)
    stayed = dropped != 0
    assert stayed[whole > 0].float().mean().item() == pytest.approx(0.25, abs=0.07)
    torch.testing.assert_close(dropped[stayed], 4 * whole[stayed])
    with torch.device("meta"):
        whole = build_faster_rcnn(build_vgg16_backbone(), 3, variant="vgg16")
    assert whole.roi_heads.box_head.fc7.weight.shape == (4096, 4096)


@pytest.mark.parametrize("torchvision", [False, True])
@pytest.mark.parametrize("context", [False, True])
def test_vgg16_starts_from_a_classifiers_convolutions_and_fully_connected_layers(tmp_path, torchvision, context):
    state = classifier_state(torchvision=torchvision)
    save_file(state, tmp_path / "vgg16.safetensors")
    detector = small_vgg16(global_context=context)
    load_vgg16(detector, str(tmp_path / "vgg16.safetensors"))
    loaded = detector.state_dict()
    prefix = "roi_heads.box_head.head." if context else "roi_heads.box_head."
    for ours, theirs in zip(("fc6", "fc7"), (TORCHVISIONS if torchvision else TIMMS)[:2], strict=True):
        assert torch.equal(loaded[f"{prefix}{ours}.weight"], state[f"{theirs}.weight"].flatten(1))
        assert torch.equal(loaded[f"{prefix}{ours}.bias"], state[f"{theirs}.bias"])
    for key in (key for key in state if key.startswith("features.")):
        assert torch.equal(loaded["backbone.network." + key.replace("features.", "features_")], state[key])


def test_given_its_weights_the_detectors_head_computes_what_the_classifier_does(tmp_path):
    """timm's own network on one image is the trunk, a max pooling where regions are pooled, fc6 and fc7."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(2)
    network = timm.create_model("vgg16", mlp_ratio=1.0).eval()
    network.pre_logits = timm.models.vgg.ConvMlp(512, 16, 7, drop_rate=0.0)
    state = {key: tensor for key, tensor in network.state_dict().items() if not key.startswith("head.")}
    save_file(state, tmp_path / "vgg16.safetensors")
    detector = small_vgg16()
    load_vgg16(detector, str(tmp_path / "vgg16.safetensors"))
    image = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        conv5_3 = detector.backbone(image)["c4"]
        ours = detector.roi_heads.box_head(nn.functional.max_pool2d(conv5_3, 2))
        theirs = network.pre_logits(network.forward_features(image)).flatten(1)
    assert theirs.abs().max() > 0
    torch.testing.assert_close(ours, theirs)


def without_a_bias():
    return {key: tensor for key, tensor in classifier_state().items() if key != "features.28.bias"}


@pytest.mark.parametrize(
    "state, says",
    [
        (without_a_bias, "other.safetensors do not fit: 1 missing: trunk.features_28.bias"),
        (
            lambda: {**classifier_state(torchvision=True), "classifier.0.weight": torch.full((16, 25088), torch.nan)},
            "1 with values that are not finite: head.fc6.weight",
        ),
        (lambda: classifier_state(width=8), r"fc6.weight is \[8, 25088\], not \[16, 25088\]"),
    ],
)
def test_weights_that_are_not_of_a_vgg16_are_refused_in_words(tmp_path, vgg16, state, says):
    save_file(state(), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=says):
        load_vgg16(vgg16, str(tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match="'timm:vgg16': give torchvision:VGG16_Weights.IMAGENET1K_V1 or hf:timm/vgg16"):
        load_vgg16(vgg16, "timm:vgg16")


def test_a_backbone_of_several_levels_is_refused_for_vgg16():
    with pytest.raises(ValueError, match=r"variant 'vgg16' does not fit .*: build it with levels=\('c4',\)"):
        build_faster_rcnn(from_timm("resnet10t"), 3, variant="vgg16")


# Recipes


def test_the_papers_detectors_have_its_anchors_proposals_and_nms():
    options = vars(RECIPES["paper-r101-c4-context"].detector)
    detector = build_faster_rcnn(build_resnet_backbone(18, levels=["c4", "c5"]), 3, **options)
    assert detector.rpn.anchor_generator.sizes == [(64, 128, 256, 512)]
    assert detector.rpn.anchor_generator.num_anchors_per_location() == [12]
    detector.eval()
    assert detector.rpn.post_nms_top_n() == 300 and detector.roi_heads.nms_thresh == 0.3
    assert isinstance(detector.roi_heads.box_head, paper.ContextHead)
    with pytest.raises(ValueError, match="anchor_sides are a single map's"):
        build_faster_rcnn(build_resnet_backbone(18, fpn=True), 3, anchor_sides=(64, 128))


# Global context


@pytest.mark.parametrize("variant", ["c4", "fpn"])
def test_a_regions_feature_has_that_of_its_whole_image_behind_it(variant):
    plain, detector = small_detector(variant), small_detector(variant, global_context=True)
    pool, head = detector.roi_heads.box_roi_pool, detector.roi_heads.box_head
    head.head.load_state_dict(plain.roi_heads.box_head.state_dict())
    detector.backbone.load_state_dict(plain.backbone.state_dict())
    with torch.no_grad():
        maps = detector.backbone(torch.randn(2, 3, 64, 96))
        sizes = [(64, 90), (50, 96)]
        boxes = [torch.tensor([[3.0, 4, 40, 50], [8, 8, 30, 60], [1, 2, 88, 33]]), torch.tensor([[5.0, 5, 20, 45]])]
        features = head(pool(maps, boxes, sizes))

        def of(*regions):
            return plain.roi_heads.box_head(plain.roi_heads.box_roi_pool(maps, list(regions), sizes))

        wholes = of(torch.tensor([[0.0, 0, 90, 64]]), torch.tensor([[0.0, 0, 96, 50]]))
        wanted = torch.cat((of(*boxes), wholes[[0, 0, 0, 1]]), 1)
    assert not torch.allclose(wholes[0], wholes[1])
    torch.testing.assert_close(features, wanted)
    assert detector.roi_heads.box_predictor.cls_score.in_features == wanted.shape[1]


def test_global_context_is_trained_end_to_end():
    detector = small_detector(global_context=True)
    pool, heads = detector.roi_heads.box_roi_pool, detector.roi_heads
    given = []
    pool.register_forward_hook(lambda *call: (given.append(call[2]), call[2][1].retain_grad())[0])
    losses = detector.losses([torch.rand(3, *IMAGE)], targets())  # in eval mode: norms pass no gradient between regions
    sum(losses.values()).backward()
    [(_, images, image_of_region)] = given
    assert len(images) == 1 and (image_of_region == 0).all()
    assert images.grad.abs().max() > 0  # of the image's own feature
    half = heads.box_predictor.cls_score.in_features // 2
    assert heads.box_predictor.cls_score.weight.grad[:, half:].abs().max() > 0
    assert [name for name, p in detector.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("make, context", [(small_detector, True), (small_vgg16, False), (small_vgg16, True)])
def test_a_saved_detector_of_the_paper_loads_to_bit_equal_outputs(tmp_path, make, context):
    detector = make(global_context=context, anchor_sides=(16, 24, 32, 64), categories={3: "a", 5: "b", 9: "c"})
    save_detector(detector, tmp_path / "model.safetensors")
    loaded = load_detector(tmp_path / "model.safetensors")
    assert loaded.config == detector.config
    image = torch.rand(3, *IMAGE)
    assert_same(found_by(detector, image), found_by(loaded, image))
    options = {"box_refinement": True, "scales": (48, 64)}
    assert_same(*(found_by(ImprovedTesting(each, **options), image) for each in (detector, loaded)))


# Testing: several scales


@pytest.mark.parametrize("variant", BACKBONE_OF)
@pytest.mark.parametrize("options", [{}, {"scales": (64,)}])
def test_without_improvements_it_detects_what_the_detector_does_bit_for_bit(variant, options):
    detector, image = small_detector(variant), torch.rand(3, *IMAGE)
    assert_same(found_by(ImprovedTesting(detector, **options), image), found_by(detector, image))


class FirstNumbers(nn.Module):
    """In the place of a box head: the first features, pooled as they are."""

    def forward(self, regions):
        return regions[:, :5].mean((2, 3))


@torch.inference_mode()
def test_features_are_the_larger_of_those_on_the_two_scales_nearest_to_224_pixels():
    detector = small_detector(anchor_scale=2.0)  # so "224" is 56
    heads = detector.roi_heads
    heads.box_head, heads.box_predictor = FirstNumbers(), nn.Identity()
    testing = ImprovedTesting(detector, scales=(32, 64, 96, 160))
    image = torch.rand(3, 64, 80)  # min_size is 64, so that boxes on it are those at the detector's own size
    levels = [testing._level(image, resize, (64, 80)) for resize in testing.resizes]
    assert [level.size for level in levels] == [(32, 40), (64, 80), (96, 120), (160, 200)]
    # sides 20, 40, 60 and 100 on the four levels; the nearest to 56 x 56 in area are 60 and 40. Then 8 .. 40, 27 .. 139
    boxes = torch.tensor([[10.0, 10, 50, 50], [2, 3, 18, 19], [4, 2, 59.6, 57.6]])
    pairs = (1, 2), (2, 3), (0, 1)
    features = testing._predict(levels, boxes)
    for box, feature, (a, b) in zip(boxes, features, pairs, strict=True):
        both = []
        for level in (levels[a], levels[b]):
            on_level = box * level.size[0] / 64
            both.append(heads.box_head(heads.box_roi_pool(level.maps, [on_level[None]], [level.size]))[0])
        assert not torch.equal(both[0], both[1])
        torch.testing.assert_close(feature, torch.maximum(*both))
    others = [testing._predict([levels[a], levels[b]], boxes[:1]) for a, b in ((0, 1), (2, 3))]
    assert not any(torch.allclose(other[0], features[0]) for other in others)


def test_several_scales_change_the_features_and_leave_the_proposals():
    detector, image = small_detector(), torch.rand(3, *IMAGE)
    proposed, passes = [], []
    detector.backbone.register_forward_hook(lambda _, given, __: passes.append(given[0].shape[-2:]))
    detector.rpn.register_forward_hook(lambda _, __, output: proposed.append(output[0][0]))
    alone = found_by(detector, image)
    together = found_by(ImprovedTesting(detector, scales=(40, 64, 90)), image)
    assert len(proposed) == 2 and torch.equal(*proposed)
    assert len(passes) == 1 + 3  # at the detector's own size once
    assert not torch.equal(alone["scores"][:5], together["scores"][:5])
    height, width = IMAGE
    assert (together["boxes"] >= 0).all() and (together["boxes"] <= torch.tensor([width, height] * 2) + 1e-3).all()


def test_boxes_follow_each_axis_of_an_image_as_it_is_rounded():
    detector, image = small_detector(), torch.rand(3, *IMAGE)
    testing = ImprovedTesting(detector, scales=(90,))
    own = detector.transform([image])[0].image_sizes[0]
    level = testing._level(image, testing.resizes[0], own)
    assert (own, level.size) == ((64, 87), (90, 123))
    torch.testing.assert_close(level.scale * torch.tensor([87.0, 64, 87, 64]), torch.tensor([123.0, 90, 123, 90]))


def test_scales_that_make_no_sense_are_refused_in_words():
    for scales in ((64, 64), (0,), (-3, 5)):
        with pytest.raises(ValueError, match="must be distinct sizes in pixels"):
            ImprovedTesting(small_detector(), scales=scales)


# Testing: box refinement


@torch.inference_mode()
def test_refinement_pools_again_from_the_likeliest_regressed_box_and_joins_both_predictions(monkeypatch):
    detector = small_detector()
    heads, image = detector.roi_heads, torch.rand(3, *IMAGE)
    pooled, predicted, selected = [], [], []
    heads.box_roi_pool.register_forward_hook(lambda _, given, __: pooled.append(given[1][0]))
    heads.box_predictor.register_forward_hook(lambda _, __, output: predicted.append(output))

    def select(boxes, scores, **options):
        selected.append((boxes, scores, options))
        return select_and_vote(boxes, scores, **options)

    monkeypatch.setattr(paper, "select_and_vote", select)
    found = ImprovedTesting(detector, box_refinement=True)([image])[0]
    first, second = pooled
    n = len(first)
    assert n > 5 and len(second) == n
    [size] = detector.transform([image])[0].image_sizes  # which boxes are clipped to
    [(boxes, scores, options)] = selected
    assert boxes.shape == (2 * n, 3, 4) and scores.shape == (2 * n, 3)
    assert options == {"score_thresh": heads.score_thresh, "count": heads.detections_per_img}
    for i, (rois, (logits, deltas)) in enumerate(zip((first, second), predicted, strict=True)):
        decoded = heads.box_coder.decode(deltas, [rois])
        decoded[..., 0::2].clamp_(0, size[1])
        decoded[..., 1::2].clamp_(0, size[0])
        assert torch.equal(boxes[i * n : (i + 1) * n], decoded[:, 1:])
        assert torch.equal(scores[i * n : (i + 1) * n], logits.softmax(1)[:, 1:])
    best = scores[:n].argmax(1)
    assert len(best.unique()) > 1
    assert torch.equal(second, boxes[torch.arange(n), best])
    assert not torch.equal(second, first)
    assert 0 < len(found["boxes"]) <= heads.detections_per_img


def test_the_union_is_thinned_at_an_overlap_of_0_3_by_class_and_what_is_left_voted_on():
    a, b, c, far = [0.0, 0, 10, 10], [0.0, 2, 10, 12], [0.0, 5, 10, 15], [50.0, 50, 60, 60]
    boxes = torch.tensor([a, b, c, far])[:, None].expand(4, 2, 4)  # of two classes
    scores = torch.tensor([[0.8, 0.1], [0.4, 0.0], [0.6, 0.0], [0.05, 0.3]])
    found = select_and_vote(boxes, scores, score_thresh=0.01, count=5)
    # Class 1: a against b overlaps 8/12, against c 5/15 = 0.33 > 0.3: both fall; far is left. b votes on a, c does not
    # (0.33 < 0.5): y1 = (0.8 * 0 + 0.4 * 2) / 1.2, y2 = (0.8 * 10 + 0.4 * 12) / 1.2. Class 2: each is alone.
    wanted = [[0, 2 / 3, 10, 32 / 3], far, a, far]
    assert found["labels"].tolist() == [1, 2, 2, 1]
    torch.testing.assert_close(found["scores"], torch.tensor([0.8, 0.3, 0.1, 0.05]))
    torch.testing.assert_close(found["boxes"], torch.tensor(wanted))
    assert select_and_vote(boxes, scores, score_thresh=0.01, count=2)["labels"].tolist() == [1, 2]
    assert select_and_vote(boxes, scores, score_thresh=0.2, count=5)["labels"].tolist() == [1, 2]
    b_fell = select_and_vote(boxes, scores, score_thresh=0.5, count=5)  # and those under the threshold have no vote
    torch.testing.assert_close(b_fell["boxes"], torch.tensor([a]))


def test_boxes_vote_by_score_from_an_overlap_of_one_half_and_only_in_their_class():
    kept, half, less = [0.0, 0, 10, 10], [0.0, 0, 10, 5], [0.0, 0, 10, 4.9]
    boxes = torch.tensor([kept, half, less])[:, None].expand(3, 2, 4)
    scores = torch.tensor([[0.6, 0.0], [0.2, 0.0], [0.3, 0.5]])
    with torch.autocast("cpu", torch.bfloat16):  # does not round the boxes
        found = select_and_vote(boxes, scores, score_thresh=0.01, count=1)
    torch.testing.assert_close(found["boxes"], torch.tensor([[0, 0, 10, (0.6 * 10 + 0.2 * 5) / 0.8]]))


def test_a_box_without_extent_is_none_and_nothing_found_an_empty_answer():
    boxes = torch.tensor([[[5.0, 5, 5, 9]], [[0.0, 0, 3, 3]]])
    found = select_and_vote(boxes, torch.tensor([[0.9], [0.1]]), score_thresh=0.0, count=5)
    assert found["boxes"].tolist() == [[0, 0, 3, 3]]
    found = nms_and_vote(boxes[:, 0], torch.tensor([0.9, 0]), torch.ones(2), nms_iou=0.5, voting_iou=0.5, count=5)
    assert found["boxes"].tolist() == [[0, 0, 3, 3]]  # though its vote weighs nothing
    found = select_and_vote(torch.rand(4, 3, 4), torch.zeros(4, 3), score_thresh=0.0, count=5)
    assert found["boxes"].shape == (0, 4) and found["labels"].shape == found["scores"].shape == (0,)
    detector = small_detector(box_score_thresh=0.999)
    assert found_by(ImprovedTesting(detector, box_refinement=True), torch.rand(3, *IMAGE))["boxes"].shape == (0, 4)


# The commands


@pytest.fixture(scope="module")
def shapes(module_path):
    return make_shapes(module_path / "shapes", train_images=2, val_images=2, size=64)


@pytest.fixture
def small_recipes(monkeypatch):
    """The paper's recipes on small images with few regions, and with few layers where they are built from scratch."""
    for name in [name for name in RECIPES if name.startswith("paper-")]:
        recipe = RECIPES[name]
        settings = {**FEW, "anchor_sides": (16, 32), "min_size": 64, "max_size": 97}
        backbone = replace(recipe.backbone, depth=18) if recipe.detector.variant == "c4" else recipe.backbone
        small = {"detector": replace(recipe.detector, **settings), "backbone": backbone}
        augmentation = Augmentation(short_sides=(64,), max_size=97)
        monkeypatch.setitem(RECIPES, name, replace(recipe, augmentation=augmentation, **small))


def trained(shapes, folder, *argv, steps=2):
    argv = [*argv, "--data", shapes, "--output", folder, "--device", "cpu", "--batch-size", 1, "--max-steps", steps]
    train_coco.main([str(word) for word in [*argv, "--checkpoint-period", 1, "--pictures", 0, "--precision", "fp32"]])
    return load_detector(folder / "model.safetensors")


def error_of(command):
    with pytest.raises(SystemExit) as exit:
        main_of(command)
    assert len(exit.value.code.splitlines()) == 1
    return exit.value.code


def test_the_papers_resnet_trains_from_weights_with_its_norms_alone_frozen(small_recipes, shapes, tmp_path):
    name = "paper-r101-c4-context"
    weights = build_resnet_backbone(18).state_dict()
    save_file(weights, tmp_path / "r18.safetensors")
    detector = trained(shapes, tmp_path / "run", "--recipe", name, "--weights", tmp_path / "r18.safetensors")
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (config["variant"], config["recipe"]) == ("c4", name)
    assert detector.config.global_context
    assert (detector.backbone.config.norm, detector.backbone.config.frozen_through) == ("FrozenBN", None)
    assert not torch.equal(detector.backbone.conv1.weight, weights["conv1.weight"])
    assert torch.equal(detector.backbone.bn1.weight, weights["bn1.weight"])


def test_the_papers_vgg16_trains_from_weights_and_resumes_to_the_same_bits(small_recipes, shapes, tmp_path):
    recipe = ["--recipe", "paper-vgg16-c5"]
    argv = [*recipe, "--weights", tmp_path / "vgg16.safetensors"]
    state = {key: tensor * 0.01 for key, tensor in classifier_state().items()}  # so that activations stay small
    save_file(state, tmp_path / "vgg16.safetensors")
    straight = trained(shapes, tmp_path / "straight", *argv)
    loaded = straight.state_dict()
    for layer, trains in ((0, False), (7, False), (10, True), (28, True)):  # conv1_1, conv2_2, conv3_1, conv5_3
        same = torch.equal(loaded[f"backbone.network.features_{layer}.weight"], state[f"features.{layer}.weight"])
        assert same != trains
    fc6, given = loaded["roi_heads.box_head.fc6.weight"], state["pre_logits.fc1.weight"].flatten(1)
    assert not torch.equal(fc6, given)
    torch.testing.assert_close(fc6, given, atol=1e-2, rtol=0)

    trained(shapes, tmp_path / "resumed", *argv, steps=1)
    resumed = trained(shapes, tmp_path / "resumed", "--resume", *recipe)  # dropout draws as it would have
    assert [key for key, tensor in resumed.state_dict().items() if not torch.equal(tensor, loaded[key])] == []


def test_vgg16_trains_from_scratch_and_refuses_what_it_has_not_got(small_recipes, shapes, tmp_path):
    argv = ["--recipe", "paper-vgg16-c5"]
    detector = trained(shapes, tmp_path / "run", *argv, steps=1)
    assert detector.backbone.config.frozen_through is None

    def refusal(*more):
        return error_of(lambda: trained(shapes, tmp_path / "other", *argv, *more))

    assert "--norm GN: VGG-16 has no norms" in refusal("--norm", "GN")
    assert "--frozen-through stem without --weights freezes random layers" in refusal("--frozen-through", "stem")
    assert "unknown depth 50; choose from 16" in refusal("--depth", "50")


@pytest.fixture(scope="module")
def run(shapes, module_path):
    """The folder of a run, as far as it matters to evaluate it."""
    folder = module_path / "run"
    folder.mkdir()
    categories = open_split(shapes, "val").categories
    arguments = {"fpn_channels": 16, "fpn": True}
    options = {**FEW, "anchor_scale": 4.0, "categories": categories}
    detector = build_faster_rcnn(build_resnet_backbone(18, **arguments), len(categories), **options)
    save_detector(lively(detector), folder / "model.safetensors")
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": str(shapes), "precision": "fp32"}))
    return folder


def prepared(run):
    """The detector as the command has it: folded convolutions round otherwise."""
    return prepare_for_detection(load_detector(run / "model.safetensors").to(memory_format=torch.channels_last))


def evaluated(run, tmp_path, *argv):
    shutil.copytree(run, tmp_path / "run")
    evaluate_coco.main([str(tmp_path / "run"), "--device", "cpu", *map(str, argv)])
    return [json.loads(path.read_text()) for path in (tmp_path / "run").rglob("detections.json")]


def test_evaluation_without_options_is_the_detectors_own_bit_for_bit(run, shapes, tmp_path):
    detector = prepared(run)
    _, wanted = evaluate(detector, open_split(shapes, "val"), Rank(0, 1, torch.device("cpu")))
    assert len(wanted) > 10
    assert evaluated(run, tmp_path) == [list(entries(wanted))]
    assert (tmp_path / "run" / "results.json").is_file()


def test_evaluation_with_improvements_is_that_of_the_improved_detector_in_a_folder_of_its_own(run, shapes, tmp_path):
    improved = ImprovedTesting(prepared(run), box_refinement=True, scales=(48, 64, 80))
    _, wanted = evaluate(improved, open_split(shapes, "val"), Rank(0, 1, torch.device("cpu")))
    assert len(wanted) > 10
    assert evaluated(run, tmp_path, "--box-refinement", "--scales", 48, 64, 80) == [list(entries(wanted))]
    assert (tmp_path / "run" / "eval-refined-48-64-80" / "results.json").is_file()
    assert not (tmp_path / "run" / "results.json").exists()  # the run's own are not written over
    line = error_of(lambda: evaluate_coco.main([str(run), "--device", "cpu", "--scales", "0"]))
    assert "scales 0: must be distinct sizes in pixels" in line
