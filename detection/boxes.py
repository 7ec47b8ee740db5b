"""torchvision's box arithmetic and box losses with the same results, but without sending constants to the GPU."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detection.patches import is_patched, utils

MIN_BOX_SIDE = 1.0  # pixels; smaller boxes teach a detector nothing and vanish when the image is resized
TorchvisionBoxCoder: Any = utils.BoxCoder
EPS = 1e-7  # torchvision's, in its IoU losses


class BoxCoder(TorchvisionBoxCoder):
    """Boxes to offsets from reference boxes and back (Ren et al. 2015, eq. 2)."""

    def encode_single(self, reference_boxes: Tensor, proposals: Tensor) -> Tensor:
        """Ground truth and proposals, [n, 4] x1 y1 x2 y2 each -> offsets [n, 4]."""
        if is_patched():
            return super().encode_single(reference_boxes, proposals)
        return utils.encode_boxes(reference_boxes, proposals, self.weights)

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """Offsets [n, 4 k] from boxes [n, 4] -> boxes [n, 4 k]."""
        if is_patched():
            return super().decode_single(rel_codes, boxes)
        boxes = boxes.to(rel_codes.dtype)
        sizes = boxes[:, 2:] - boxes[:, :2]
        centres, sizes = (boxes[:, :2] + 0.5 * sizes)[:, None], sizes[:, None]  # [n, 1, 2]
        x, y, w, h = (rel_codes[:, i::4] / weight for i, weight in enumerate(self.weights))
        centres = torch.stack((x, y), 2) * sizes + centres  # [n, k, 2]
        halves = 0.5 * (torch.stack((w, h), 2).clamp(max=self.bbox_xform_clip).exp() * sizes)
        return torch.cat((centres - halves, centres + halves), 2).flatten(1)


def box_loss(
    coder: BoxCoder, deltas: Tensor, around: Tensor, truth: Tensor, positive: Tensor, kind: str = "smooth_l1"
) -> Tensor:
    """How far `deltas` from the boxes `around` lead from `truth`, [B, n, 4] each, summed over the `positive` [B, n].

    kind: smooth L1 of the offsets (Girshick 2015, eq. 3, from 1/9), or one of the IoU losses of the boxes. What is not
    positive may have boxes without a size, even in `truth`.
    """
    if kind == "smooth_l1":
        offsets = coder.encode_single(truth.flatten(0, 1), around.flatten(0, 1)).view_as(truth)
        offsets = offsets.where(positive[..., None], 0)  # they may not be finite
        deviation = F.smooth_l1_loss(deltas, offsets, beta=1 / 9, reduction="none")
        return deviation.where(positive[..., None], 0).sum()
    boxes = coder.decode_single(deltas.flatten(0, 1), around.flatten(0, 1)).view_as(deltas)
    unit = F.pad(torch.ones_like(boxes[..., 2:]), (2, 0))  # the box 0, 0, 1, 1
    boxes, truth = (x.where(positive[..., None], unit) for x in (boxes, truth))
    return iou_loss(boxes, truth, kind).where(positive, 0).sum()


def iou_loss(boxes: Tensor, truth: Tensor, kind: str) -> Tensor:
    """1 - IoU and a penalty, of boxes and ground truth [.., 4], x1 y1 x2 y2 -> [..].

    kind: "giou" (Rezatofighi et al. 2019), "diou" or "ciou" (Zheng et al. 2020). Values and gradients are those of
    torchvision.ops.generalized_box_iou_loss, .., which make the host wait for the GPU.
    """
    (low, high), (true_low, true_high) = (x.split(2, -1) for x in (boxes, truth))
    sides, true_sides = high - low, true_high - true_low
    inner = _area((high.minimum(true_high) - low.maximum(true_low)).clamp(min=0))
    union = _area(sides) + _area(true_sides) - inner
    iou = inner / (union + EPS)
    hull = high.maximum(true_high) - low.minimum(true_low)
    if kind == "giou":
        return 1 - iou + (_area(hull) - union) / (_area(hull) + EPS)
    apart = (0.5 * (low + high - true_low - true_high)).square().sum(-1)
    loss = 1 - iou + apart / (hull.square().sum(-1) + EPS)
    if kind == "diou":
        return loss
    angle, true_angle = ((x[..., 0] / x[..., 1]).atan() for x in (sides.clamp(min=EPS), true_sides))
    shape = (angle - true_angle).square() * (4 / math.pi**2)
    weight = (shape / (1 - iou + shape + EPS)).detach()
    return loss + weight * shape


def _area(sides: Tensor) -> Tensor:
    return sides[..., 0] * sides[..., 1]


def best_of(scores: Tensor, count: int, *, in_order: bool = False) -> tuple[Tensor, Tensor]:
    """The `count` highest scores of each row [B, N], falling, and their indices, [B, count] each.

    Where N is less than `count`, the places left over have a score of -inf and the indices from N on. in_order: of
    equal scores the first one comes first, as in torchvision's NMS; a compiled or exported graph leaves it open.
    """
    compiled = torch.compiler.is_compiling()
    if compiled or count > scores.shape[1]:  # in a graph for any N, without a case of its own
        scores = F.pad(scores, (0, count), value=-torch.inf)
    if in_order and not compiled:
        falling, index = scores.sort(dim=1, descending=True, stable=True)
        return falling[:, :count], index[:, :count]
    return scores.topk(count, 1)


def gather_boxes(boxes: Tensor, index: Tensor) -> Tensor:
    """boxes [B, N, 4] at index [B, n] -> [B, n, 4]."""
    return boxes.gather(1, index[..., None].expand(-1, -1, 4))


def clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Boxes [.., 4], x1 y1 x2 y2, cut at the borders of their images, whose heights and widths are `sizes` [.., 2]."""
    width_height = sizes.flip(-1)
    return boxes.clamp(min=0).minimum(torch.cat((width_height, width_height), -1))


def is_large(boxes: Tensor, side: float) -> Tensor:
    """Whether both sides of boxes [.., 4] have at least `side` pixels."""
    return (boxes[..., 2:] - boxes[..., :2] >= side).all(-1)
