import copy
import operator

import pytest
import torch
from made import FEW, SOME_BOXES, TWO_IMAGES, V2, lively, small_detector, target, two_images, with_masks_and_keypoints
from torch import nn
from torchvision.models import detection as torchvision_detection
from torchvision.models.detection import _utils as detection_utils
from torchvision.models.detection import fasterrcnn_resnet50_fpn, fasterrcnn_resnet50_fpn_v2
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import boxes as box_ops
from torchvision.ops import poolers

from detection.config import BACKBONE_OF
from detection.data import open_split
from detection.faster_rcnn import build_faster_rcnn, prepare_for_detection
from detection.saved import load_detector, retarget_detector, save_detector
from resbackbone import build_resnet_backbone
from resbackbone.adapters.torchvision import as_torchvision
from resbackbone.checks import UserError
from resbackbone.weights import MEAN, STD, read_weights
from resbackbone.weights.write import write_as

# Beside torchvision


@pytest.fixture(scope="module", params=["v1", pytest.param("v2", marks=pytest.mark.slow)])
def torchvisions_and_ours(request):
    """torchvision's R50-FPN with weights under which boxes, classes and scores vary, and ours with its state dict."""
    torch.manual_seed(0)
    options = {"min_size": 128, "max_size": 213, "box_score_thresh": 0.0, "rpn_post_nms_top_n_test": 200}
    build, fpn_norm, heads = fasterrcnn_resnet50_fpn, None, {}
    if request.param == "v2":
        build, fpn_norm, heads = fasterrcnn_resnet50_fpn_v2, "BN", V2
    theirs = build(weights=None, weights_backbone=None, box_batch_size_per_image=64, **options)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # statistics of what is seen now, so that activations keep their size
            nn.init.uniform_(module.weight, 0.4, 0.8)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    theirs.train()
    with torch.no_grad():
        theirs([torch.rand(3, 200, 301)], [target((5, 5, 90, 90))])
        for layer in (theirs.rpn.head.bbox_pred, theirs.rpn.head.cls_logits, theirs.roi_heads.box_predictor.cls_score):
            layer.weight.mul_(5)
    backbone = build_resnet_backbone(50, fpn=True, fpn_norm=fpn_norm)
    ours = build_faster_rcnn(backbone, 90, box_batch_size_per_image=64, **options, **heads)
    ours.load_state_dict(theirs.state_dict())
    return theirs.eval(), ours.eval()


def assert_same_detections(theirs, ours, images, tolerance=1e-4):
    with torch.inference_mode():
        for wanted, found in zip(theirs(images), ours(images), strict=True):
            assert len(wanted["boxes"]) == 100 and len(wanted["labels"].unique()) > 1
            assert torch.equal(found["labels"], wanted["labels"])
            torch.testing.assert_close(found["boxes"], wanted["boxes"], atol=tolerance, rtol=tolerance)
            torch.testing.assert_close(found["scores"], wanted["scores"], atol=tolerance, rtol=tolerance)


def test_r50_fpn_detects_what_torchvisions_does_given_its_state_dict(torchvisions_and_ours):
    assert_same_detections(*torchvisions_and_ours, [torch.rand(3, 211, 317)])


def test_r50_fpn_detects_what_torchvisions_does_on_real_images(torchvisions_and_ours, data):
    dataset = open_split(data / "coco_tiny", "val")
    detectors = [detector.double() for detector in torchvisions_and_ours]  # in fp32 rounding orders equal scores
    assert_same_detections(*detectors, [dataset[index][0].double() / 255 for index in (0, 1)], 1e-9)
    for detector in detectors:
        detector.float()


def test_r50_fpn_has_torchvisions_losses_and_gradients(torchvisions_and_ours, torchvisions_samples):
    images = [torch.rand(3, *size, dtype=torch.float64) for size in ((130, 197), (101, 99))]
    targets = [target((10, 20, 90, 100), (100, 5, 190, 60)), target()]
    targets = [{**t, "boxes": t["boxes"].double()} for t in targets]
    losses, gradients = [], []
    for detector in torchvisions_and_ours:
        detector.double().train()  # in fp32 rounding decides which of two close proposals is kept
        torch.manual_seed(3)
        losses.append(detector(images, targets))
        sum(losses[-1].values()).backward()
        gradients.append({name: parameter.grad for name, parameter in detector.named_parameters()})
        detector.zero_grad()
        detector.float().eval()
    assert losses[0].keys() == losses[1].keys()
    for name, wanted in losses[0].items():
        torch.testing.assert_close(losses[1][name], wanted, atol=1e-9, rtol=1e-9)
    same = gradients[0].keys() & gradients[1].keys()  # all but the trunk's, which theirs calls `body`
    assert len(same) == len([name for name in gradients[0] if "backbone.body." not in name])
    for name in same:
        torch.testing.assert_close(gradients[1][name], gradients[0][name], atol=1e-9, rtol=1e-9)


def test_by_default_images_are_resized_and_regions_chosen_as_torchvision_does():
    theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    ours = build_faster_rcnn(build_resnet_backbone(50, fpn=True), 90)
    for name in ("min_size", "max_size", "image_mean", "image_std", "size_divisible"):
        assert getattr(ours.transform, name) == getattr(theirs.transform, name)
    for name in ("score_thresh", "nms_thresh", "detections_per_img"):
        assert getattr(ours.roi_heads, name) == getattr(theirs.roi_heads, name)
    for name in ("sizes", "aspect_ratios"):
        assert tuple(getattr(ours.rpn.anchor_generator, name)) == getattr(theirs.rpn.anchor_generator, name)


def test_options_of_the_proposal_network_reach_it():
    options = {"pre_nms_top_n_train": 11, "pre_nms_top_n_test": 12, "post_nms_top_n_train": 13}
    options |= {"post_nms_top_n_test": 14, "nms_thresh": 0.15, "fg_iou_thresh": 0.66, "bg_iou_thresh": 0.17}
    options |= {"batch_size_per_image": 18, "positive_fraction": 0.19, "score_thresh": 0.2}
    rpn = small_detector(**{f"rpn_{name}": value for name, value in options.items()}).rpn
    assert rpn._pre_nms_top_n == {"training": 11, "testing": 12}
    assert rpn._post_nms_top_n == {"training": 13, "testing": 14}
    assert (rpn.proposal_matcher.high_threshold, rpn.proposal_matcher.low_threshold) == (0.66, 0.17)
    assert (rpn.fg_bg_sampler.batch_size_per_image, rpn.fg_bg_sampler.positive_fraction) == (18, 0.19)
    assert (rpn.nms_thresh, rpn.score_thresh) == (0.15, 0.2)


def over_the_same_backbone():
    """A detector of torchvision and one of ours, in fp64, with the same weights."""
    ours = lively(small_detector()).double()
    heads = {"box_head": TwoMLPHead(16 * 7 * 7, 16), "box_predictor": FastRCNNPredictor(16, 4)}
    few = {name: value for name, value in FEW.items() if name != "representation_size"}
    theirs = torchvision_detection.FasterRCNN(as_torchvision(copy.deepcopy(ours.backbone)), **few, **heads).double()
    for part in ("rpn", "roi_heads"):
        getattr(theirs, part).load_state_dict(getattr(ours, part).state_dict())
    return theirs.eval(), ours


def exchanged(name, value):
    """Set an attribute of a detector's part, `name` with dots, to a value."""
    part, _, attribute = name.rpartition(".")
    return lambda detector: setattr(operator.attrgetter(part)(detector), attribute, value)


def moved(detector):
    anchors = detector.rpn.anchor_generator
    theirs = anchors.grid_anchors
    anchors.grid_anchors = lambda *given: [boxes + 4 for boxes in theirs(*given)]


def bins(detector):
    detector.roi_heads.box_roi_pool.output_size = (7, 5)
    detector.roi_heads.box_head.fc6 = nn.Linear(16 * 7 * 5, 16, dtype=torch.float64)
    nn.init.constant_(detector.roi_heads.box_head.fc6.weight, 0.01)
    nn.init.zeros_(detector.roi_heads.box_head.fc6.bias)


@pytest.mark.parametrize("after_a_call", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        moved,
        lambda detector: [boxes.data.mul_(2) for boxes in detector.rpn.anchor_generator.cell_anchors],
        exchanged("roi_heads.box_roi_pool.canonical_scale", 20),
        exchanged("roi_heads.box_roi_pool.sampling_ratio", 0),
        exchanged("roi_heads.box_roi_pool.sampling_ratio", -1),
        bins,
        exchanged("rpn.box_coder.decode", lambda codes, boxes: boxes[0].to(codes)[:, None] + 1),
    ],
)
def test_what_is_changed_in_a_detector_counts_as_in_torchvisions(change, after_a_call):
    image, found = torch.rand(3, 64, 97, dtype=torch.float64), []
    for detector in over_the_same_backbone():
        if after_a_call:
            detector([image])
        change(detector)
        found.append(detector([image])[0])
    assert len(found[0]["boxes"]) > 5
    for name in ("boxes", "scores"):
        torch.testing.assert_close(found[1][name], found[0][name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "place, name, change",
    [
        (box_ops, "batched_nms", lambda theirs: lambda *given: theirs(*given)[:7]),
        (box_ops, "clip_boxes_to_image", lambda theirs: lambda boxes, size: theirs(boxes, size) / 2),
        (detection_utils.BoxCoder, "decode_single", lambda theirs: lambda *given: theirs(*given) + 1),
        (detection_utils.BoxCoder, "encode_single", lambda theirs: lambda *given: theirs(*given) + 1),
        (detection_utils.Matcher, "set_low_quality_matches_", lambda theirs: lambda *given: None),
        (torchvision_detection.rpn.RPNHead, "forward", lambda theirs: lambda *given: [2 * x for x in theirs(*given)]),
        (poolers, "roi_align", lambda theirs: lambda *given, **named: 2 * theirs(*given, **named)),
        (GeneralizedRCNNTransform, "normalize", lambda theirs: lambda self, image: image),
    ],
)
def test_patches_of_torchvision_are_followed(place, name, change, monkeypatch):
    pair, image = over_the_same_backbone(), torch.rand(3, 64, 97, dtype=torch.float64)
    monkeypatch.setattr(place, name, change(getattr(place, name)))
    boxes = {"boxes": torch.tensor([SOME_BOXES[0]]).double(), "labels": torch.tensor([1])}
    results = []
    for detector in pair:
        [found] = detector([image])
        torch.manual_seed(3)
        results.append((found["boxes"], found["scores"], *detector.train()([image], [boxes]).values()))
    for found, wanted in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


# Training


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("variant", ["fpn", "c4", "dc5"])
def test_every_variant_trains_on_both_kinds_of_block_also_on_images_without_objects(variant, depth):
    detector = small_detector(variant, depth=depth, resize_in_training=False).train()
    optimizer = torch.optim.SGD(detector.parameters(), lr=1e-4)
    for targets in ([target(*SOME_BOXES), target()], [target(), target()]):
        losses = detector(two_images(), targets)
        assert losses.keys() == {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
        assert all(torch.isfinite(loss) for loss in losses.values())
        optimizer.zero_grad()
        sum(losses.values()).backward()
        without = [name for name, p in detector.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        assert without == []  # DDP would wait for them
        optimizer.step()


def test_losses_in_eval_mode_leave_modes_and_statistics_as_they_were():
    detector = small_detector().eval()
    detector.roi_heads.box_head.train()  # whatever modes the parts have
    modes = {name: module.training for name, module in detector.named_modules()}
    state = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    losses = detector.losses(two_images(), [target(*SOME_BOXES), target()])
    assert len(losses) == 4 and all(torch.isfinite(loss) for loss in losses.values())
    assert {name: module.training for name, module in detector.named_modules()} == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in detector.state_dict().items())
    assert set(detector(two_images())[0]) == {"boxes", "labels", "scores"}


def test_losses_are_those_of_training_where_no_norm_tells_the_modes_apart():
    detector, images, targets = small_detector(norm="GN"), two_images(), [target(*SOME_BOXES), target((5, 5, 40, 40))]
    torch.manual_seed(3)
    trained = detector.train().losses(images, targets)
    torch.manual_seed(3)
    direct = detector(images, targets)
    torch.manual_seed(3)
    detector.eval()
    for _ in images:
        torch.empty(1).uniform_()  # in training each size is drawn too, from a choice of one
    evaluated = detector.losses(images, targets)
    for name, loss in trained.items():
        assert torch.equal(direct[name], loss)
        torch.testing.assert_close(evaluated[name], loss)


@pytest.mark.parametrize("label", [0, 4, -1])
@pytest.mark.parametrize("training", [True, False])
def test_a_label_that_is_not_a_category_is_refused_with_the_image_and_the_range(label, training):
    detector = small_detector().train(training)
    bad = {**target((1, 1, 9, 9), (2, 2, 30, 30), labels=[1, label]), "image_id": 42}
    with pytest.raises(ValueError, match=rf"image 42: labels \[.*{label}.*\]: a label is 1..3 .*0 is background"):
        detector.losses(two_images(), [target(), bad])
    assert all(module.training == training for module in detector.modules())


@pytest.mark.parametrize("box", [(1, 1, float("nan"), 9), (1, 1, float("inf"), 9), (5, 5, 5, 9)])
def test_a_box_that_is_none_is_refused_in_words(box):
    with pytest.raises(ValueError, match="image 7: a box x1 y1 x2 y2 is not finite, or has no width or height"):
        small_detector().train()(two_images(), [{**target(box), "image_id": 7}, target()])


def test_boxes_in_parts_of_the_image_are_refused():
    with pytest.raises(ValueError, match="all boxes lie in 0 to 1, .* give pixels: .0.25, 0.5, 0.75, 1.0."):
        small_detector().train()(two_images(), [target((0.25, 0.5, 0.75, 1)), target()])


# Images


def normalized(image):
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (image - mean) / std


@pytest.mark.parametrize("training", [True, False])
def test_images_that_are_normalized_already_are_warned_about_once_and_others_never(caplog, training):
    detector, images = small_detector().train(training), two_images()
    targets = [target(*SOME_BOXES), target()]
    for given in (images, [1.2 * images[0] - 0.1, images[1]], [torch.zeros(3, 40, 30), torch.ones(3, 40, 30)]):
        detector(given, targets)
    assert not caplog.messages
    for _ in range(2):
        detector([images[0], normalized(images[1])], targets)
    [message] = caplog.messages
    assert message.startswith(
        "images hold values from -2.12 to 2.64, and a detector takes RGB floats in 0..1, which it"
    )


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda image: image * 255, r"images hold values up to 25\d.*; they are floats in 0..1: divide them by 255"),
        (lambda image: (image * 255).byte(), "images are floats in 0..1, not torch.uint8: divide uint8 images by 255"),
        (lambda image: (image * 255).long(), "images are floats in 0..1, not torch.int64"),
        (lambda image: image.fill_(float("nan")), "images hold values from nan to nan"),
        (lambda image: image[0], r"a tensor \[3, H, W\] of floats in 0..1, not \[50, 61\]"),
        (lambda image: image.permute(1, 2, 0), r"a tensor \[3, H, W\] of floats in 0..1, not \[50, 61, 3\]"),
        (lambda image: torch.cat([image, image[:1]]), r"\[3, H, W\] of floats in 0..1, not \[4, 50, 61\]"),
        (lambda image: "photo.png", r"a tensor \[3, H, W\] of floats in 0..1, not str"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_images_of_another_range_kind_or_shape_are_refused_in_words(change, says, training):
    detector, (first, second) = small_detector().train(training), two_images()
    detector([first, second], [target(*SOME_BOXES), target()])
    with pytest.raises(UserError, match=says):
        detector([first, change(second)], [target(*SOME_BOXES), target()])


def test_a_grey_image_serves_as_three_equal_colours_as_in_torchvision():
    detector, image = small_detector().eval(), torch.rand(1, 50, 61)
    with torch.inference_mode():
        [grey], [colours] = detector([image]), detector([image.expand(3, -1, -1)])
    assert len(grey["boxes"]) > 0 and torch.equal(grey["boxes"], colours["boxes"])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_a_gpu_the_pixels_of_the_first_batch_alone_are_looked_at():
    detector = small_detector().eval().cuda()
    with torch.inference_mode():
        detector([image.cuda() for image in two_images()])
        assert detector.transform.looked
        detector([255 * image.cuda() for image in two_images()])
        with pytest.raises(UserError, match="divide them by 255"):
            small_detector().eval().cuda()([255 * image.cuda() for image in two_images()])


FOUR = {"image_mean": [0.5, 0.4, 0.3, 2.0], "image_std": [0.2, 0.3, 0.4, 1.5]}


def test_a_backbone_of_four_channels_gets_its_mean_and_deviation_and_keeps_them(tmp_path):
    backbone = build_resnet_backbone(18, in_channels=4, fpn=True, fpn_channels=16)
    detector = build_faster_rcnn(backbone, 3, **FEW, **FOUR)
    images = [torch.cat([image, 9 * image[:1]]) for image in two_images()]  # of a range of its own
    sum(detector(images, [target(*SOME_BOXES), target()]).values()).backward()
    assert backbone.conv1.weight.grad[:, 3].abs().sum() > 0
    plain = (images[0] - torch.tensor(FOUR["image_mean"])[:, None, None]) / torch.tensor(FOUR["image_std"])[
        :, None, None
    ]
    assert torch.equal(detector.transform.normalize(images[0]), plain)
    save_detector(detector.eval(), tmp_path / "model.safetensors")
    with torch.inference_mode():
        for wanted, found in zip(detector(images), load_detector(tmp_path / "model.safetensors")(images), strict=True):
            assert len(wanted["boxes"]) > 0 and torch.equal(found["boxes"], wanted["boxes"])
    with pytest.raises(UserError, match=r"a tensor \[4, H, W\] of floats in 0..1, not \[3, 64, 97\]"):
        detector(two_images())
    with pytest.raises(UserError, match="image_mean and image_std: torchvision's files hold none"):
        write_as(tmp_path / "theirs.pth", read_weights(tmp_path / "model.safetensors"), "torchvision")
    built, _ = retarget_detector(read_weights(tmp_path / "model.safetensors"), {1: "a"}, backbone={})
    assert built.transform.image_mean == FOUR["image_mean"]


def test_a_convolution_of_four_channels_in_the_place_of_the_first_counts_and_is_kept(tmp_path):
    backbone = build_resnet_backbone(18, fpn=True, fpn_channels=16)
    backbone.conv1 = nn.Conv2d(4, 64, 7, 2, 3, bias=False)
    with pytest.raises(UserError, match="takes images of 4 channels: give image_mean and image_std with 4 numbers"):
        build_faster_rcnn(backbone, 3)
    save_detector(build_faster_rcnn(backbone, 3, **FEW, **FOUR), tmp_path / "model.safetensors")
    loaded = load_detector(tmp_path / "model.safetensors")
    assert torch.equal(loaded.backbone.conv1.weight, backbone.conv1.weight)


@pytest.mark.parametrize(
    "channels, settings, says",
    [
        (4, {}, "takes images of 4 channels: give image_mean and image_std with 4 numbers each, not None and None"),
        (4, {**FOUR, "image_std": [1, 1, 1]}, r"4 numbers each, not \[0.5, 0.4, 0.3, 2.0\] and \[1, 1, 1\]"),
        (1, {"image_mean": [0.5]}, r"1 channels: .* not \[0.5\] and None"),
        (3, FOUR, "takes images of 3 channels"),
        (3, {"image_std": [1, 0, 1]}, r"image_std is \(1, 0, 1\); it must be above 0"),
    ],
)
def test_a_mean_or_deviation_that_does_not_fit_is_refused_when_the_detector_is_built(channels, settings, says):
    backbone = build_resnet_backbone(18, in_channels=channels, fpn=True, fpn_channels=16)
    with pytest.raises(UserError, match=says):
        build_faster_rcnn(backbone, 2, **settings)


HALVES = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def test_images_and_a_mean_of_other_ranges_are_refused_or_warned_about(caplog):
    with pytest.raises(UserError, match="divide them by 255"):
        small_detector(**HALVES).eval()([255 * image for image in two_images()])
    of_bytes = small_detector(image_mean=[123.0] * 3, image_std=[58.0] * 3).eval()
    assert len(of_bytes([255 * image for image in two_images()])) == 2 and not caplog.messages
    for _ in range(2):
        of_bytes(two_images())
    assert [message[:42] for message in caplog.messages] == ["images hold values up to 1, and image_mean"]


@pytest.mark.parametrize("images, weights", [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_images_of_another_type_than_the_weights_are_refused_unless_the_callers_code_casts(images, weights):
    detector, image = small_detector().to(weights).eval(), torch.rand(3, 64, 97, dtype=images)
    says = rf"are {images} and the detector's weights {weights}: convert the images with .to\({weights}\), or the"
    with pytest.raises(UserError, match=says):
        detector([image])
    detector.backbone.register_forward_pre_hook(lambda module, inputs: (inputs[0].to(weights),))
    assert len(detector([image])[0]["boxes"]) > 0


@pytest.mark.parametrize(
    "images, says",
    [
        ([], "the list of images is empty"),
        (None, r"images are a list of tensors \[3, H, W\], not NoneType"),
        ((image for image in two_images()), r"images are a list of tensors \[3, H, W\], not generator"),
        (torch.rand(3, 40, 50), r"not one tensor \[3, 40, 50\]"),
        ([torch.rand(3, 0, 50)], r"an image of \[3, 0, 50\] has no pixels"),
    ],
)
def test_what_is_no_list_of_images_is_refused_in_words(images, says):
    with pytest.raises(UserError, match=says):
        small_detector().eval()(images)


def test_training_without_targets_is_refused_in_words():
    with pytest.raises(UserError, match='training needs targets: a dict {"boxes"'):
        small_detector().train()(two_images())


def test_targets_that_do_not_fit_the_images_are_refused_in_words():
    with pytest.raises(UserError, match="2 images need a list of 2 targets, not 1"):
        small_detector().train()(two_images(), [target()])


def test_torchvisions_transform_can_take_the_place_of_ours():
    detector, images = lively(small_detector()), two_images()
    with torch.inference_mode():
        wanted = detector(images)
        detector.transform = GeneralizedRCNNTransform(64, 97, list(MEAN), list(STD)).eval()
        for found, expected in zip(detector(images), wanted, strict=True):
            torch.testing.assert_close(found["boxes"], expected["boxes"], atol=1e-3, rtol=1e-4)
    with pytest.raises(UserError, match="the list of images is empty"):
        detector([])


# What fits together


@pytest.mark.parametrize(
    "build, says",
    [
        (
            lambda b: build_faster_rcnn(as_torchvision(b), 2),
            "not TorchvisionBackbone; a backbone of torchvision's kind",
        ),
        (lambda b: build_faster_rcnn(nn.Sequential(), 2), "build_resnet_backbone or from_timm gave, not Sequential"),
        (lambda b: build_faster_rcnn(b, 2, categories=["a", "b"]), r"categories are \{id: name\}, .* not \['a', 'b'\]"),
    ],
)
def test_what_is_no_backbone_or_no_categories_is_refused_in_words(build, says):
    with pytest.raises(UserError, match=says):
        build(build_resnet_backbone(18, fpn=True))


@pytest.mark.parametrize(
    "variant, backbone, says",
    [
        ("fpn", {"levels": ["c2", "c5"]}, "of c2 at stride 4, c5 at stride 32: build it with fpn=True"),
        ("c4", {"fpn": True}, r"build it with levels=\('c4', 'c5'\)"),
        ("c4", {"levels": ["c4"]}, r"of c4 at stride 16: build it with levels=\('c4', 'c5'\)"),
        ("dc5", {"levels": ["c4"]}, r"build it with levels=\('c5',\), dilate_c5=True"),
        ("dc5", {"levels": ["c5"]}, "of c5 at stride 32: build it with"),
        ("vgg16", {"fpn": True}, r"build it with levels=\('c4',\)"),
        ("c6", {}, "unknown variant 'c6'; choose from fpn, c4, dc5"),
    ],
)
def test_a_backbone_that_does_not_fit_the_variant_is_refused_in_words(variant, backbone, says):
    with pytest.raises(ValueError, match=says):
        build_faster_rcnn(build_resnet_backbone(18, **backbone), 3, variant=variant)


@pytest.mark.parametrize("num_classes", [0, -1, "3", 2.0, None, 3])
def test_a_class_count_that_is_none_or_contradicts_the_categories_is_refused(num_classes):
    says = "is 3, but there are 2 categories" if num_classes == 3 else "number of real categories, at least 1"
    with pytest.raises(ValueError, match=says):
        build_faster_rcnn(build_resnet_backbone(18, fpn=True), num_classes, categories={1: "a", 7: "b"})


@pytest.mark.parametrize(
    "settings, says",
    [
        (
            {"rpn_anchor_generator": object()},
            r"here give anchor_scale .*FasterRCNN\(as_torchvision\(backbone\), rpn",
        ),
        ({"box_head": object()}, "box_head is an argument of torchvision's FasterRCNN; here give box_conv_layers"),
        ({"box_norm": "FrozenBN", "box_conv_layers": (8,)}, "box_norm='FrozenBN' without weights would freeze random"),
        ({"trainable_backbone_layers": 3}, r"=3 is torchvision's; .*frozen_through='c2'\) trains 3 layers"),
        ({"min_sise": 640}, "unknown setting min_sise; help"),
        ({"box_norm": "BN"}, "only a box head with box_conv_layers has norms; give both"),
        ({"box_norm": "LN"}, "unknown norm of the box head 'LN'; choose from None, BN"),
        ({"box_conv_layers": (8, 0)}, "must be at least 1"),
        ({"rpn_conv_depth": 0}, "must be at least 1"),
    ],
)
def test_heads_that_cannot_be_built_are_refused_in_words(settings, says):
    with pytest.raises(ValueError, match=says):
        build_faster_rcnn(build_resnet_backbone(18, fpn=True), 3, **settings)


def test_only_a_box_head_of_fully_connected_layers_can_have_convolutions():
    with pytest.raises(ValueError, match="box_conv_layers are for fpn and dc5: the box head of c4 has its own layers"):
        small_detector("c4", box_conv_layers=(8,))


@pytest.mark.parametrize("levels, scale", [(None, 8.0), (["p3", "p4", "p5", "p6", "p7"], 4.0), (["p2", "p3"], 2.0)])
def test_anchors_and_regions_follow_the_levels_and_the_scale(levels, scale):
    backbone = build_resnet_backbone(18, fpn=True, levels=levels, fpn_channels=16)
    detector = build_faster_rcnn(backbone, 3, anchor_scale=scale, **FEW).eval()
    images = torch.zeros(1, 3, 256, 384)
    maps = backbone(images)
    anchors = detector.rpn.anchor_generator(ImageList(images, [(256, 384)]), list(maps.values()))[0]
    at = 0
    for level, map in maps.items():
        stride = backbone.features[level].stride
        of_level = anchors[at : at + map.shape[-2] * map.shape[-1] * 3]
        at += len(of_level)
        sides = ((of_level[:, 2] - of_level[:, 0]) * (of_level[:, 3] - of_level[:, 1])).sqrt()
        torch.testing.assert_close(sides, torch.full_like(sides, scale * stride), rtol=0.05, atol=1.0)
        centres = (of_level[::3, :2] + of_level[::3, 2:]) / 2
        assert centres[1, 0] - centres[0, 0] == stride
    assert at == len(anchors)
    pool = detector.roi_heads.box_roi_pool
    assert pool.featmap_names == [level for level in maps if level not in ("p6", "p7")]
    assert pool.strides == [backbone.features[level].stride for level in pool.featmap_names]
    pool(maps, [torch.ones(1, 4)], [(256, 384)])
    side = scale * 7  # of a canonical box, which goes to stride 16 for 224 pixels at a scale of 8
    chosen = pool.map_levels([torch.tensor([[0, 0, side * 4, side * 4], [0, 0, side * 2.1, side * 2.1]])])
    wanted = [max(0, min(k - int(pool.featmap_names[0][1]), len(pool.strides) - 1)) for k in (4, 3)]
    assert chosen.tolist() == wanted


@pytest.mark.parametrize("variant, level", [("c4", "c4"), ("dc5", "c5")])
def test_a_single_map_has_all_anchor_sides_and_stride_16(variant, level):
    detector = small_detector(variant, anchor_scale=4.0)
    pool = detector.roi_heads.box_roi_pool
    assert detector.rpn.anchor_generator.sizes == [(16, 32, 64, 128, 256)] and pool.strides == [16]
    assert list(detector.backbone.features) == [level]
    if variant == "c4":  # stage 5 runs on regions and nowhere else
        assert not any(name.startswith("backbone.layer4") for name, _ in detector.named_parameters())
        assert detector.roi_heads.box_head(torch.rand(5, 256, 14, 14)).shape == (5, 512)
        assert pool.output_size == (14, 14)


# Torchvision's heads


def test_masks_and_keypoints_train_and_are_found_on_the_images_as_with_torchvisions_transform():
    detector, images, targets = with_masks_and_keypoints(lively(small_detector())), two_images(), []
    detector.roi_heads.detections_per_img = 5
    for size, boxes in zip(TWO_IMAGES, (SOME_BOXES, SOME_BOXES[:1]), strict=True):
        masks = (torch.rand(len(boxes), *size) < 0.5).byte()
        keypoints = torch.cat((40 * torch.rand(len(boxes), 5, 2), torch.ones(len(boxes), 5, 1)), 2)
        targets.append({**target(*boxes), "masks": masks, "keypoints": keypoints})
    results = []
    for transform in (detector.transform, GeneralizedRCNNTransform(130, 200, list(MEAN), list(STD))):
        transform.min_size, transform.max_size = (130,), 200
        detector.transform = transform.eval()
        torch.manual_seed(3)
        with torch.no_grad():
            results.append((detector.losses(images, targets), detector(images)))
    (losses, found), (wanted_losses, wanted) = results
    assert losses.keys() == wanted_losses.keys() >= {"loss_mask", "loss_keypoint"}
    for name, loss in wanted_losses.items():
        torch.testing.assert_close(losses[name], loss, atol=1e-4, rtol=1e-4)
    for image, of_image, expected in zip(images, found, wanted, strict=True):
        assert of_image["masks"].shape == (5, 1, *image.shape[1:])
        for name in ("boxes", "masks", "keypoints"):
            torch.testing.assert_close(of_image[name], expected[name], atol=1e-2, rtol=1e-3)


def test_classes_are_counted_from_the_box_predictor():
    detector = small_detector(categories={3: "car", 13: "stop sign", 90: "cat"}).train()
    detector.roi_heads.box_predictor = FastRCNNPredictor(16, 8)
    assert detector.num_classes == 7 and detector.categories[7] == "class 7"
    losses = detector(two_images(), [target(*SOME_BOXES, labels=[1, 7]), target()])
    assert all(loss.isfinite() for loss in losses.values())
    with pytest.raises(UserError, match=r"labels \[8\]: a label is 1..7"):
        detector(two_images(), [target((1, 1, 9, 9), labels=[8]), target()])


@pytest.mark.parametrize("heads", [V2, {**V2, "box_norm": "GN"}, {**V2, "box_norm": None}])
def test_a_detector_prepared_for_inference_has_no_batch_norm_left_and_the_same_boxes(heads):
    detector = lively(small_detector(**heads))
    fused = prepare_for_detection(copy.deepcopy(detector))
    assert not any(hasattr(module, "running_var") for module in fused.modules())
    image = torch.rand(3, 64, 97)
    with torch.inference_mode():
        [wanted], [found] = (network([image]) for network in (detector, fused))
    torch.testing.assert_close(found["boxes"], wanted["boxes"], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("variant", BACKBONE_OF)
def test_under_bf16_autocast_boxes_scores_and_losses_stay_fp32(variant):
    detector = small_detector(variant).eval()
    images, proposals = [torch.rand(3, 301, 517)], []
    detector.rpn.register_forward_hook(lambda module, inputs, output: proposals.extend(output[0]))
    with torch.autocast("cpu", torch.bfloat16):
        with torch.inference_mode():
            [found] = detector(images)
        losses = detector.train()(two_images(), [target(*SOME_BOXES), target()])
    assert found["boxes"].dtype == found["scores"].dtype == torch.float32
    assert len(found["boxes"]) > 5
    for boxes in (found["boxes"], *proposals):
        assert boxes.dtype == torch.float32 and not torch.equal(boxes, boxes.bfloat16().float())
    assert all(loss.dtype == torch.float32 and torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in detector.parameters())


def test_after_inference_mode_a_detector_trains_and_passes_gradients_to_its_images():
    detector = small_detector().eval()
    images = two_images()
    with torch.inference_mode():
        detector([x.clone() for x in images])
    images = [x.requires_grad_() for x in images]
    sum(detector.train()(images, [target(*SOME_BOXES[:1])] * 2).values()).backward()
    assert all(x.grad.abs().sum() > 0 for x in images)


def test_a_change_of_the_mean_counts_from_the_next_image_on():
    transform = small_detector().transform
    image = torch.rand(3, 5, 7)
    transform.normalize(image)
    transform.image_mean, transform.image_std = [0.0] * 3, [2.0] * 3
    assert torch.equal(transform.normalize(image), image / 2)


@torch.inference_mode()
def test_an_image_in_a_batch_of_one_may_have_any_size():
    detector = small_detector().eval()
    for height, width in [(1, 1), (7, 3), (33, 97), (400, 50)]:
        boxes = detector([torch.rand(3, height, width)])[0]["boxes"]
        assert (boxes >= 0).all() and (boxes[:, 2] <= width).all() and (boxes[:, 3] <= height).all()


def test_anchors_are_exact_where_the_maps_are_bf16():
    detector = build_faster_rcnn(build_resnet_backbone(18, fpn=True), 3)
    sizes = [(1, 8, -(-320 // s), -(-1312 // s)) for s in (4, 8, 16, 32, 64)]
    images = ImageList(torch.zeros(1, 3, 320, 1312), [(320, 1312)])
    low, full = (
        detector.rpn.anchor_generator(images, [torch.zeros(size, dtype=dtype) for size in sizes])[0]
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert low.dtype == torch.float32 and torch.equal(low, full)


@pytest.mark.parametrize("variant, options", [("c4", {"levels": ["c4", "c5"]}), ("dc5", {"dilate_c5": True})])
def test_a_detector_leaves_its_backbone_as_it_was(variant, options):
    backbone = build_resnet_backbone(18, **options).eval()
    images = torch.rand(1, 3, 64, 80)
    keys, features, expected = list(backbone.state_dict()), backbone.features, backbone(images)
    detector = build_faster_rcnn(backbone, 3, variant=variant, min_size=64)
    assert detector.backbone.conv1 is backbone.conv1  # the layers are shared
    assert list(backbone.state_dict()) == keys and backbone.features == features
    assert all(torch.equal(x, expected[level]) for level, x in backbone(images).items())
