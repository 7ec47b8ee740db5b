import pytest
import torch
from torchvision.models.detection import _utils
from torchvision.ops import (
    clip_boxes_to_image,
    complete_box_iou_loss,
    distance_box_iou_loss,
    generalized_box_iou_loss,
)

from detection.boxes import BoxCoder, box_loss, clip, gather_boxes, iou_loss, is_large

IOU_LOSSES = {"giou": generalized_box_iou_loss, "diou": distance_box_iou_loss, "ciou": complete_box_iou_loss}


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


@pytest.mark.parametrize("kind", IOU_LOSSES)
def test_iou_losses_and_their_gradients_are_torchvisions(kind):
    boxes, truth = some_boxes(500).double().requires_grad_(), some_boxes(500).double()  # many do not overlap
    values = iou_loss(boxes.view(2, 250, 4), truth.view(2, 250, 4), kind), IOU_LOSSES[kind](boxes, truth)
    torch.testing.assert_close(values[0].flatten(), values[1], rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(x.sum(), boxes)[0] for x in values]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["smooth_l1", *IOU_LOSSES])
def test_boxes_without_a_size_count_nothing_and_leave_the_loss_finite(kind):
    around = torch.tensor([[[3.0, 4, 40, 50], [0, 0, 0, 0], [5, 5, 5, 9], [10, 10, 30, 20]]])
    truth = torch.tensor([[[5.0, 5, 41, 48], [0, 0, 0, 0], [1, 1, 7, 9], [50, 60, 70, 80]]])
    deltas = (
        torch.zeros(1, 4, 4).index_fill(1, torch.tensor([3]), -2e4).requires_grad_()
    )  # of a box as thin as fp32 has
    positive = torch.tensor([[True, False, False, True]])
    loss = box_loss(BoxCoder((10.0, 10.0, 5.0, 5.0)), deltas, around, truth, positive, kind)
    loss.backward()
    assert loss.isfinite() and deltas.grad.isfinite().all()
    assert deltas.grad[0, 0].abs().sum() > 0 and not deltas.grad[0, 1:3].any()
