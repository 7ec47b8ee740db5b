"""Simple copy-paste for data with boxes alone (Ghiasi et al. 2021, Sec. 3): rectangles instead of masks."""

import torch
from torch import Tensor
from torchvision.ops import clip_boxes_to_image, remove_small_boxes

from detection.boxes import MIN_BOX_SIDE

HIDDEN = 0.7  # share of an object's box that is covered from which it no longer counts as visible


def paste_objects(image: Tensor, target: dict, other: Tensor, other_target: dict) -> tuple[Tensor, dict]:
    """Paste about half of the objects of `other` on a copy of `image` where they are, and their boxes with them.

    Images are uint8 [3, H, W] of any two sizes; what lies outside `image` is cut off. A rectangle also shows its
    object's neighbours: those of which it shows 30 % or more are pasted whole, so that no visible object goes without
    a box. Objects of `image` covered by more than 70 % lose their box, others keep it as it was.
    """
    size = tuple(min(sides) for sides in zip(image.shape[-2:], other.shape[-2:], strict=True))
    boxes = clip_boxes_to_image(other_target["boxes"], size)
    large = remove_small_boxes(boxes, MIN_BOX_SIDE)
    boxes, labels = boxes[large], other_target["labels"][large]
    chosen, before = torch.rand(len(boxes)) < 0.5, None
    shown = shares_covered(boxes, boxes) >= 1 - HIDDEN  # [n, n]: by the rectangle of the row, of that in the column
    while before is None or not torch.equal(chosen, before):  # a neighbour has neighbours
        before, chosen = chosen, chosen | shown[chosen].any(0)
    boxes, labels = boxes[chosen], labels[chosen]

    image, free = image.clone(), torch.ones(image.shape[-2:])
    for x1, y1, x2, y2 in corners(boxes):
        image[:, y1:y2, x1:x2] = other[:, y1:y2, x1:x2]
        free[y1:y2, x1:x2] = 0
    left = [free[y1:y2, x1:x2].mean() >= 1 - HIDDEN for x1, y1, x2, y2 in corners(target["boxes"])]
    visible = torch.tensor(left, dtype=torch.bool)
    pasted = {"boxes": torch.cat((target["boxes"][visible], boxes))}
    return image, {**target, **pasted, "labels": torch.cat((target["labels"][visible], labels))}


def corners(boxes: Tensor) -> list[list[int]]:
    """The whole pixels, x1 y1 x2 y2 (exclusive), that boxes [n, 4] touch."""
    return torch.cat((boxes[:, :2].floor(), boxes[:, 2:].ceil()), 1).int().tolist()


def shares_covered(covering: Tensor, covered: Tensor) -> Tensor:
    """[n, m]: the share, 0..1, of the area of each of `covered` [m, 4] that each of `covering` [n, 4] covers."""
    low = torch.maximum(covering[:, None, :2], covered[:, :2])
    high = torch.minimum(covering[:, None, 2:], covered[:, 2:])
    return (high - low).clamp(min=0).prod(2) / (covered[:, 2:] - covered[:, :2]).prod(1)
