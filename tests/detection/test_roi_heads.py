"""The detector over a batch beside torchvision's own code, which the same modules run where a part has been changed."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from made import lively, small_detector
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork

from detection.roi_heads import BatchedRoIHeads, is_real
from detection.rpn import SampledRPN

SIZES = (64, 97), (50, 61), (33, 90)
BOXES = [[3.0, 4, 40, 50], [20, 10, 96, 60], [5, 5, 12, 14]], [], [[10, 3, 80, 30]]
LOSSES = {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
NETWORKS = {
    "fpn": {},
    "fpn in detectron2's geometry": {"geometry": "detectron2"},
    "c4": pytest.param({"variant": "c4"}, marks=pytest.mark.slow),
    "c4 in detectron2's geometry": {"variant": "c4", "geometry": "detectron2", "rpn_post_nms_top_n_test": 8},
    "dc5": {"variant": "dc5"},
    "global context": {"global_context": True},
    "convolutions with norms": {"box_conv_layers": (16, 16), "box_norm": "BN", "rpn_conv_depth": 2},
    "more proposals than there are": {"rpn_pre_nms_top_n_train": 3000, "rpn_post_nms_top_n_train": 3000},
    "more samples than there are": {"rpn_batch_size_per_image": 90_000, "box_batch_size_per_image": 90},
    "a score threshold": {"rpn_score_thresh": 0.5, "box_score_thresh": 0.3},
    "few detections": {"box_detections_per_img": 4},
}


def images_and_targets(dtype=torch.float64, images=3):
    pictures = [torch.rand(3, *SIZES[i % 3], dtype=dtype) for i in range(images)]
    boxes = [torch.tensor(BOXES[i % 3], dtype=dtype).reshape(-1, 4) for i in range(images)]
    labels = [torch.arange(len(of_image)) % 3 + 1 for of_image in boxes]
    return pictures, [{"boxes": b, "labels": n} for b, n in zip(boxes, labels, strict=True)]


@pytest.fixture
def by_torchvision(monkeypatch):
    """Runs torchvision's own code in a detector."""

    def run(detector, *given):
        with monkeypatch.context() as patch:
            for kind in (SampledRPN, BatchedRoIHeads):
                patch.setattr(kind, "is_as_built", lambda self: False)
            return detector(*given)

    return run


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, expected in wanted.items():
        torch.testing.assert_close(found[name], expected, atol=1e-9, rtol=1e-9)


def losses_and_gradients(detector, run, images, targets):
    torch.manual_seed(3)
    losses = run(detector, images, targets)
    sum((i + 1) * loss for i, loss in enumerate(losses.values())).backward()
    gradients = {name: parameter.grad for name, parameter in detector.named_parameters()}
    detector.zero_grad()
    return losses, gradients


def plain(detector, *given):
    return detector(*given)


@pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)
def test_losses_gradients_and_detections_are_torchvisions(options, by_torchvision, torchvisions_samples):
    detector = lively(small_detector(**options)).double()
    images, targets = images_and_targets()
    wanted, found = by_torchvision(detector, images), detector(images)
    assert sum(len(of_image["boxes"]) for of_image in wanted) > 5
    for ours, theirs in zip(found, wanted, strict=True):
        assert_same(ours, theirs)
    state = copy.deepcopy(detector.train().state_dict())  # training moves the statistics of norms
    results = []
    for run in (by_torchvision, plain):
        detector.load_state_dict(state)
        results.append(losses_and_gradients(detector, run, images, targets))
    (wanted_losses, wanted_gradients), (losses, gradients) = results
    assert losses.keys() == LOSSES
    assert_same(losses, wanted_losses)
    assert_same(gradients, wanted_gradients)


def test_a_training_of_eight_steps_follows_torchvisions(by_torchvision, torchvisions_samples):
    start = lively(small_detector()).double().train()
    histories = []
    for run in (by_torchvision, plain):
        detector, history = copy.deepcopy(start), []
        optimizer = torch.optim.SGD(detector.parameters(), lr=0.01, momentum=0.9)
        torch.manual_seed(0)
        for _ in range(8):
            losses = run(detector, *images_and_targets(images=2))
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            history.append(torch.stack([loss.detach() for loss in losses.values()]))
        histories.append(torch.stack(history))
    wanted, found = histories
    assert wanted[-1].sum() < 0.9 * wanted[0].sum()
    torch.testing.assert_close(found, wanted, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("part", ["rpn", "roi_heads"])
def test_torchvisions_own_part_may_take_the_place_of_ours(part, torchvisions_samples):
    detector = lively(small_detector()).double()
    changed, images, targets = copy.deepcopy(detector), *images_and_targets()
    own = getattr(changed, part)
    theirs = copy.copy(own)
    theirs.__class__ = RegionProposalNetwork if part == "rpn" else RoIHeads
    setattr(changed, part, theirs)
    for found, wanted in zip(changed(images), detector(images), strict=True):
        assert_same(found, wanted)
    results = [losses_and_gradients(network.train(), plain, images, targets) for network in (detector, changed)]
    for found, wanted in zip(*results, strict=True):
        assert_same(found, wanted)


@pytest.mark.parametrize("options", [{}, {"variant": "c4"}])
def test_without_a_single_proposal_nothing_is_found_and_training_goes_on(options):
    detector = lively(small_detector(rpn_score_thresh=1.0, **options))
    images, targets = images_and_targets(torch.float32)
    assert [len(found["boxes"]) for found in detector(images)] == [0, 0, 0]
    for given in (targets, [targets[1]] * 3):  # the second without a box either
        losses = detector.losses(images, given)
        assert all(loss.isfinite() for loss in losses.values())
        sum(losses.values()).backward()
    with torch.no_grad():
        detector.rpn.head.cls_logits.bias.fill_(torch.nan)
    assert [len(found["boxes"]) for found in detector(images)] == [0, 0, 0]


def test_a_detector_in_bf16_trains_and_detects():
    detector = lively(small_detector()).bfloat16()
    images, targets = images_and_targets(torch.float32)
    images = [image.bfloat16() for image in images]
    assert len(detector(images)[0]["boxes"]) > 0
    assert all(loss.isfinite() for loss in detector.losses(images, targets).values())


def test_modules_take_torchvisions_lists_too():
    detector = lively(small_detector()).double().train()
    images, targets = images_and_targets()
    batch, _ = detector.transform(images)
    maps = detector.backbone(batch.tensors)
    proposals, losses = detector.rpn(batch, maps, targets)
    of_images = [boxes[is_real(boxes)] for boxes in proposals]
    assert len(losses) == 2 and len(detector.roi_heads(maps, of_images, batch.image_sizes, targets)[1]) == 2
    detections, _ = detector.eval().roi_heads(maps, of_images, batch.image_sizes)
    assert len(detections) == 3


def test_images_of_a_batch_do_not_see_each_other():
    detector = lively(small_detector()).double()
    images, _ = images_and_targets()
    images = [image[:, :33, :61] for image in images]  # of one size: padding would change the boxes
    for found, image in zip(detector(images), images, strict=True):
        assert_same(found, detector([image])[0])


def test_places_that_no_image_uses_change_nothing(monkeypatch, torchvisions_samples):
    """On a GPU they are computed, since their number is not known on the host."""
    detector = lively(small_detector(rpn_post_nms_top_n_train=500, box_batch_size_per_image=90))
    images, targets = images_and_targets()
    detector.double()
    detections = detector(images)
    for module in detector.train().modules():  # the statistics of norms in the head are of all places
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    results = [losses_and_gradients(detector, plain, images, targets)]
    for module in ("detection.rpn", "detection.roi_heads"):
        monkeypatch.setattr(f"{module}.needed", lambda counts, limit: limit)
    results.append(losses_and_gradients(detector, plain, images, targets))
    for found, wanted in zip(results[1], results[0], strict=True):
        assert_same(found, wanted)
    for found, wanted in zip(detector.eval()(images), detections, strict=True):
        assert_same(found, wanted)


WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "nms"}


OF_A_CPU = {"anchors.py", "cells.py", "nms.py"}  # these ask tensors that are on the CPU of every run, or only on a CPU


class Waits(TorchDispatchMode):
    """What would wait for a GPU while it is open, in `found`."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.found: list[str] = []
        for name in ("tolist", "cpu"):
            monkeypatch.setattr(torch.Tensor, name, self.counted(name, getattr(torch.Tensor, name)))

    def counted(self, name, theirs):
        def count(tensor, *given, **options):
            if Path(sys._getframe(1).f_code.co_filename).name not in OF_A_CPU:
                self.found.append(name)
            return theirs(tensor, *given, **options)

        return count

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        indices = args[1] if name.startswith("index") and isinstance(args[1], list) else []
        if name in WAITING or any(x is not None and x.dtype == torch.bool for x in indices):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"geometry": "detectron2"},
        {"variant": "c4"},
        {"global_context": True},
        {"cascade_ious": (0.5, 0.6, 0.7), "box_loss": "ciou"},
    ],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False])
def test_the_host_waits_once_however_many_images_there_are(options, training, monkeypatch):
    detector = small_detector(resize_in_training=False, **options).train(training)
    for module in ("detection.rpn", "detection.roi_heads"):
        monkeypatch.setattr(f"{module}.needed", lambda counts, limit: limit)
    monkeypatch.setattr(type(detector.transform), "check_range", lambda *given: None)  # of a CPU's pixels alone
    for images in (2, 5):
        pictures, targets = images_and_targets(torch.float32, images)
        with monkeypatch.context() as patch, Waits(patch) as waits:
            found = detector(pictures, targets) if training else detector(pictures)
            if training:
                sum(found.values()).backward()
        assert waits.found == ["cpu" if training else "tolist"]  # the check of the targets; the number of detections
