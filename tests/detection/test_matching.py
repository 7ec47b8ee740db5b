import pytest
import torch
from torchvision.models.detection import _utils
from torchvision.ops import box_iou as torchvisions_box_iou

from detection import matching
from detection.batch import Targets
from detection.matching import box_iou, match, match_with


def on_a_grid(images, count):
    """Boxes with whole coordinates, so that many overlaps are equal."""
    corners = torch.randint(0, 12, (images, count, 2))
    return torch.cat((corners, corners + torch.randint(1, 9, (images, count, 2))), 2).float()


def torchvisions(boxes, candidates, low, high, every_box):
    if not len(boxes):
        return torch.full((len(candidates),), -1)
    return _utils.Matcher(high, low, every_box)(torchvisions_box_iou(boxes, candidates))


@pytest.mark.parametrize("every_box", [False, True])
@pytest.mark.parametrize("low, high", [(0.3, 0.7), (0.5, 0.5), (0.0, 1.0)])
@pytest.mark.parametrize("counts, candidates", [((3, 0, 5), 40), ((0, 0), 7), ((1,), 1), ((4, 2), 3)])
@pytest.mark.parametrize("shared", [False, True])
def test_matches_are_torchvisions_ties_and_boxes_that_overlap_nothing_too(
    every_box, low, high, counts, candidates, shared
):
    most = max(1, *counts)
    boxes, real = on_a_grid(len(counts), most), torch.arange(most) < torch.tensor(counts)[:, None]
    boxes[0, 0] += 100  # overlaps no candidate
    boxes = boxes.where(real[..., None], 0)
    given = on_a_grid(1 if shared else len(counts), candidates)
    found = match(boxes, real, given, low, high, every_box=every_box)
    for i, count in enumerate(counts):
        here = given[0 if shared else i]
        assert torch.equal(found[i], torchvisions(boxes[i, :count], here, low, high, every_box))


def test_the_images_of_a_batch_may_be_matched_in_parts(monkeypatch):
    boxes, candidates = on_a_grid(5, 4), on_a_grid(5, 30)
    real = torch.ones(5, 4, dtype=torch.bool)
    wanted = match(boxes, real, candidates, 0.3, 0.7, every_box=True)
    monkeypatch.setattr(matching, "images_at_once", lambda boxes, pairs: 2)
    assert torch.equal(match(boxes, real, candidates, 0.3, 0.7, every_box=True), wanted)


def test_settings_are_those_of_the_matcher():
    targets = Targets.of([{"boxes": on_a_grid(1, 3)[0], "labels": torch.tensor([1, 2, 3])}])
    candidates, matcher = on_a_grid(1, 20), _utils.Matcher(0.6, 0.2, allow_low_quality_matches=True)
    wanted = match(targets.boxes, targets.real, candidates, 0.2, 0.6, every_box=True)
    assert torch.equal(match_with(matcher, targets, candidates), wanted)


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_iou_is_torchvisions_to_the_bit(count):
    corner, size = torch.rand(2, 2, 40, 2)
    anchors = torch.cat((corner, corner + size), 2)
    boxes = anchors[:, :count] + 0.1 * torch.rand(2, count, 4)
    found = box_iou(boxes, anchors)
    assert found.shape == (2, count, 40)
    for i in (0, 1):
        assert torch.equal(found[i], torchvisions_box_iou(boxes[i], anchors[i]))
