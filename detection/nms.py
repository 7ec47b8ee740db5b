"""Non-maximum suppression of many lists of boxes at once, exact; on a GPU without a wait (Triton)."""

import torch
from torch import Tensor
from torchvision.ops import boxes as box_ops

from resbackbone.compat import gpu_kernels


def nms_sorted(boxes: Tensor, real: Tensor, iou_threshold: float) -> Tensor:
    """Whether each box survives in its list, [P, N], for P lists [P, N, 4], x1 y1 x2 y2, sorted by falling score.

    Of two boxes whose IoU is above `iou_threshold`, the first one suppresses the second unless it is suppressed itself.
    Boxes that are not `real`, [P, N], neither suppress nor survive. Each list is as with torchvision.ops.nms; on a GPU
    one kernel goes through all lists side by side. Without Triton and for lists beyond `nms_kernel.MOST_BOXES`,
    torchvision's kernel goes through one list after the other, and the host waits for each.
    """
    return torch.ops.resbackbone.nms_sorted(boxes.detach().contiguous(), real.contiguous(), iou_threshold)


def _one_by_one(boxes: Tensor, real: Tensor, iou_threshold: float) -> Tensor:
    kept = torch.zeros_like(real)
    falling = -torch.arange(real.shape[1], dtype=boxes.dtype, device=boxes.device)
    for i, count in enumerate(real.sum(1).tolist()):
        if count:
            here = real[i].nonzero().squeeze(1)
            kept[i, here[box_ops.nms(boxes[i, here], falling[: len(here)], iou_threshold)]] = True
    return kept


_nms = torch.library.custom_op("resbackbone::nms_sorted", _one_by_one, mutates_args=())


@_nms.register_fake
def _(boxes, real, iou_threshold):
    return torch.empty_like(real)


@_nms.register_kernel("cuda")
def _nms_on_gpu(boxes: Tensor, real: Tensor, iou_threshold: float) -> Tensor:
    if gpu_kernels() is None:
        return _one_by_one(boxes, real, iou_threshold)
    from detection import nms_kernel  # only here: Triton comes with torch for GPUs alone

    at_once = boxes.dtype in (torch.float32, torch.float64) and real.shape[1] <= nms_kernel.MOST_BOXES
    return (nms_kernel.greedy if at_once else _one_by_one)(boxes, real, iou_threshold)
