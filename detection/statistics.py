"""What a data set holds, in numbers: the sizes of its objects, and whether anchors reach them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from detection.anchors import ASPECT_RATIOS
from detection.coco import CocoImages

DIVISIBLE = 32  # pixels: a detector pads an image to multiples of this


def object_sizes(dataset: CocoImages, shorter_side: int, max_size: int) -> Tensor:
    """sqrt(width * height) of every box, float [boxes], in pixels of the images as a detector resizes them."""
    boxes, _ = _resized(dataset, shorter_side, max_size)
    return (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt()


def unreached(
    dataset: CocoImages,
    shorter_side: int,
    max_size: int,
    anchor_scale: float,
    levels: Sequence[str] = ("p2", "p3", "p4", "p5"),
    ratios: Sequence[float] = ASPECT_RATIOS,
    iou: float = 0.5,
) -> Tensor:
    """Boxes that every anchor overlaps with an IoU below `iou`, bool [boxes], in the image resized as by a detector.

    The anchors of p_k lie around the multiples of 2^k pixels and are squares of `anchor_scale` * 2^k pixels a side,
    stretched to each of `ratios` (height over width; Ren et al. 2015, Sec. 3.1.1). For a given shape the nearest anchor
    overlaps most, so one per level and ratio is compared.
    """
    boxes, sizes = _resized(dataset, shorter_side, max_size)
    sides, centres = boxes[:, 2:] - boxes[:, :2], (boxes[:, :2] + boxes[:, 2:]) / 2
    padded = (sizes / DIVISIBLE).ceil() * DIVISIBLE
    best = torch.zeros(len(boxes))
    for level in levels:
        stride = 2 ** int(level[1:])
        last = (padded / stride).ceil() - 1  # the last anchor of a row or column
        offsets = (centres - (centres / stride).round().minimum(last) * stride).abs()
        for ratio in ratios:
            anchor = anchor_scale * stride * torch.tensor([ratio**-0.5, ratio**0.5])  # width, height
            overlap = ((sides + anchor) / 2 - offsets).minimum(sides).minimum(anchor).clamp(min=0).prod(1)
            best = best.maximum(overlap / (sides.prod(1) + anchor.prod() - overlap))
    return best < iou


def _resized(dataset: CocoImages, shorter_side: int, max_size: int) -> tuple[Tensor, Tensor]:
    """Boxes, x1 y1 x2 y2, and the widths and heights of their images, float [boxes, 4] and [boxes, 2], when resized.

    The shorter side becomes `shorter_side` pixels, or less where the longer would exceed `max_size`; sides are rounded
    down, to at least one pixel (`transforms.InputTransform.resize`).
    """
    old = dataset.widths_heights.double()
    scales = (shorter_side / old.amin(1)).minimum(max_size / old.amax(1))
    new = (old * scales[:, None]).floor().clamp(min=1)
    of_boxes = dataset.offsets.diff()
    ratios = (new / old).repeat_interleave(of_boxes, 0)
    return dataset.boxes * ratios.repeat(1, 2).float(), new.float().repeat_interleave(of_boxes, 0)
