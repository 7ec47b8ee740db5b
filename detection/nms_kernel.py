"""Greedy non-maximum suppression of many lists of boxes on a GPU (Triton), a program for each list."""

from contextlib import nullcontext

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_BOXES = 2**14  # in a list; they are in a program's registers
BOXES_A_WARP = 256


@triton.jit
def _greedy(boxes, real, kept, count, threshold: tl.float64, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    inside = at < count
    first = tl.program_id(0).to(tl.int64) * count
    boxes += first * 4
    left, top = tl.load(boxes + at * 4, inside, 0), tl.load(boxes + at * 4 + 1, inside, 0)
    right, bottom = tl.load(boxes + at * 4 + 2, inside, 0), tl.load(boxes + at * 4 + 3, inside, 0)
    areas = (right - left) * (bottom - top)
    limit = tl.full((1,), threshold, areas.dtype)
    alive = tl.load(real + first + at, inside, 0).to(tl.int32)
    last = tl.max(tl.where(alive != 0, at, -1), 0)
    for i in range(last + 1):
        if tl.sum(tl.where(at == i, alive, 0), 0) != 0:
            x1, y1 = tl.load(boxes + i * 4), tl.load(boxes + i * 4 + 1)
            x2, y2 = tl.load(boxes + i * 4 + 2), tl.load(boxes + i * 4 + 3)
            width = tl.maximum(tl.minimum(x2, right) - tl.maximum(x1, left), 0)
            height = tl.maximum(tl.minimum(y2, bottom) - tl.maximum(y1, top), 0)
            overlap = width * height
            union = (x2 - x1) * (y2 - y1) + areas - overlap
            # In fp32 only `div_rn` rounds correctly, as a CPU does.
            iou = tl.div_rn(overlap, union) if areas.dtype == tl.float32 else overlap / union
            alive = tl.where((at > i) & (iou > limit), 0, alive)
    tl.store(kept + first + at, alive != 0, inside)


def greedy(boxes: Tensor, real: Tensor, iou_threshold: float) -> Tensor:
    """`nms.nms_sorted` of fp32 or fp64 boxes [P, N, 4], N at most MOST_BOXES; it decides as a CPU does."""
    kept = torch.zeros_like(real)
    lists, count = real.shape
    if lists == 0 or count == 0:
        return kept
    if boxes.dtype == torch.float32:
        # A CPU compares the fp32 IoU with the threshold in fp64: the same as with the next lower fp32 number.
        nearest = np.float32(iou_threshold)
        lower = nearest if float(nearest) <= iou_threshold else np.nextafter(nearest, np.float32(-1))
        iou_threshold = float(lower)
    block = max(16, 1 << (count - 1).bit_length())
    with nullcontext() if boxes.device.index == torch.cuda.current_device() else torch.cuda.device_of(boxes):
        _greedy[(lists,)](boxes, real, kept, count, iou_threshold, BLOCK=block, **options_of(block))
    return kept


def options_of(block: int) -> dict[str, int | bool]:
    return {
        "num_warps": min(32, max(1, block // BOXES_A_WARP)),
        "enable_fp_fusion": False,  # a fused product and sum is rounded once
    }
