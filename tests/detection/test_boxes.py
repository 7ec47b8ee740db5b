import pytest
import torch
from torchvision.models.detection import _utils
from torchvision.ops import clip_boxes_to_image

from detection.boxes import BoxCoder, clip, gather_boxes, is_large


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


def test_boxes_of_each_image_are_cut_at_its_own_borders_as_by_torchvision():
    sizes, boxes = [(200, 310), (90, 41)], torch.stack([some_boxes(9) - 40, some_boxes(9) - 40])
    found = clip(boxes, torch.tensor(sizes)[:, None])
    for of_image, given, size in zip(found, boxes, sizes, strict=True):
        assert torch.equal(of_image, clip_boxes_to_image(given, size))


def test_boxes_are_picked_and_measured_image_by_image():
    boxes = torch.tensor([[[0.0, 0, 2, 3], [1, 1, 9, 1.5]], [[5, 5, 5, 9], [0, 0, 1, 1]]])
    assert is_large(boxes, 1).tolist() == [[True, False], [False, True]]
    assert torch.equal(gather_boxes(boxes, torch.tensor([[1], [0]])), boxes[[0, 1], [1, 0]][:, None])
