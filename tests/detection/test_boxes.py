import pytest
import torch
from torchvision.models.detection import _utils
from torchvision.ops import batched_nms

from detection import boxes
from detection.boxes import BoxCoder, Matcher, nms_in_groups


def some_boxes(count, side=300.0):
    corners = torch.rand(count, 2) * side
    return torch.cat((corners, corners + 0.1 + torch.rand(count, 2) * side), 1)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)])
@pytest.mark.parametrize("count, classes", [(7, 1), (5, 3), (0, 2)])
def test_offsets_and_boxes_are_torchvisions_bit_for_bit(weights, count, classes):
    ours, theirs = BoxCoder(weights), _utils.BoxCoder(weights)
    truth, proposals = some_boxes(count), some_boxes(count)
    assert torch.equal(ours.encode_single(truth, proposals), theirs.encode_single(truth, proposals))
    offsets = 4 * torch.randn(count, 4 * classes)  # some beyond what exp is given
    assert torch.equal(ours.decode_single(offsets, proposals), theirs.decode_single(offsets, proposals))


@pytest.mark.parametrize("truth, anchors", [(1, 9), (6, 40), (3, 1)])
def test_matches_are_torchvisions_low_quality_ones_and_ties_too(truth, anchors):
    quality = (torch.rand(truth, anchors) * 8).round() / 8  # with ties
    matchers = (kind(0.7, 0.3, allow_low_quality_matches=True) for kind in (Matcher, _utils.Matcher))
    ours, theirs = (matcher(quality) for matcher in matchers)
    assert torch.equal(ours, theirs)


def test_boxes_of_other_groups_are_not_suppressed(monkeypatch):
    found, scores = some_boxes(300), torch.rand(300)
    groups = torch.randint(0, 4, (300,))
    wanted = batched_nms(found, scores, groups, 0.5)
    assert len(wanted) < 300 and torch.equal(nms_in_groups(found, scores, groups, 0.5), wanted)
    # The GPU's way, on tensors that say they are elsewhere.
    monkeypatch.setattr(boxes.box_ops, "batched_nms", None)
    monkeypatch.setattr(boxes, "is_patched", lambda: False)
    monkeypatch.setattr(boxes, "_on_cpu", lambda tensor: False)
    assert torch.equal(nms_in_groups(found, scores, groups, 0.5), wanted)
