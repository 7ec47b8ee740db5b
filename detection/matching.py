"""Which ground truth box an anchor or a region is to find (Ren et al. 2015, Sec. 3.1.2), over a batch."""

from typing import Any

import torch
from torch import Tensor

from detection.batch import Targets, needed

BACKGROUND, IGNORED = -1, -2
MOST_AT_ONCE = 2**27  # pairs of a ground truth box and an anchor whose IoU is in memory at once


def match(boxes: Tensor, real: Tensor, candidates: Tensor, low: float, high: float, *, every_box: bool) -> Tensor:
    """Assign ground truth boxes to candidates as torchvision's Matcher does: the box of the highest IoU.

    boxes: ground truth [B, G, 4], x1 y1 x2 y2, G at least 1. real: [B, G], False where it is padding. candidates:
    [B, N, 4], or [1, N, 4] for the same in every image.
    low, high: candidates whose highest IoU is below `low` are background, and from there to below `high` ignored.
    every_box: a box also gets the candidates that overlap it most, whatever their IoU; each of these goes to the box
        that it itself overlaps most.

    Returns [B, N]: 0..G-1, BACKGROUND or IGNORED. It is one operation to torch.compile, which could
    round the IoU differently in its two uses.
    """
    return torch.ops.resbackbone.match_boxes(boxes, real, candidates, low, high, every_box)


def match_with(matcher: Any, targets: Targets, candidates: Tensor) -> Tensor:
    """`match` with the settings of torchvision's Matcher."""
    low, high, every_box = matcher.low_threshold, matcher.high_threshold, matcher.allow_low_quality_matches
    return match(targets.boxes, targets.real, candidates, low, high, every_box=every_box)


@torch.library.custom_op("resbackbone::match_boxes", mutates_args=())
def _match(boxes: Tensor, real: Tensor, candidates: Tensor, low: float, high: float, every_box: bool) -> Tensor:
    at_once, matches = images_at_once(boxes, boxes.shape[1] * candidates.shape[1]), []
    for i in range(0, len(boxes), at_once):
        some = slice(i, i + at_once)
        here = candidates if len(candidates) == 1 else candidates[some]
        places = needed(real[some].sum(1), boxes.shape[1])  # padding is at the end
        truth, is_box = boxes[some, :places], real[some, :places, None]
        iou = box_iou(truth, here).masked_fill_(~is_box, -1)
        best, box = iou.max(1)
        matched = box.masked_fill(best < high, IGNORED).masked_fill_(best < low, BACKGROUND)
        if every_box:
            of_box = iou.amax(2, keepdim=True)
            matched = torch.where(((iou == of_box) & is_box).any(1), box, matched)
        matches.append(matched)
    return torch.cat(matches)


def images_at_once(boxes: Tensor, pairs: int) -> int:
    """The number of images that are matched at once: on a CPU one, for its cache."""
    return 1 if boxes.device.type == "cpu" else max(1, MOST_AT_ONCE // max(1, pairs))


@_match.register_fake
def _(boxes, real, candidates, low, high, every_box):
    return real.new_empty((boxes.shape[0], candidates.shape[1]), dtype=torch.int64)


def box_iou(boxes: Tensor, anchors: Tensor) -> Tensor:
    """[B, n, 4] and [B or 1, m, 4], x1 y1 x2 y2 -> IoU [B, n, m], bit-identical to torchvision's.

    On a CPU row by row, to stay in its cache.
    """
    x1, y1, x2, y2 = (side[:, None] for side in anchors.movedim(-1, 0).contiguous())
    areas = (x2 - x1) * (y2 - y1)
    parts = []
    for some in boxes.split(2 if boxes.device.type == "cpu" else max(1, boxes.shape[1]), 1):
        left, top, right, bottom = some[..., None].unbind(2)
        overlap = torch.minimum(right, x2).sub_(torch.maximum(left, x1)).clamp_(min=0)
        overlap *= torch.minimum(bottom, y2).sub_(torch.maximum(top, y1)).clamp_(min=0)
        union = ((right - left) * (bottom - top) + areas).sub_(overlap)
        parts.append(overlap.div_(union))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
