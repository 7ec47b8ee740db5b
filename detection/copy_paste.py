"""Simple copy-paste for data with boxes alone (Ghiasi et al. 2021, Sec. 3): rectangles instead of masks."""

import torch
from torch import Tensor
from torchvision.ops import clip_boxes_to_image, remove_small_boxes

from detection.boxes import MIN_BOX_SIDE

HIDDEN = 0.7  # covered share above which an object loses its box


def paste_objects(image: Tensor, target: dict, other: Tensor, other_target: dict) -> tuple[Tensor, dict]:
    """Paste about half of the objects of `other` on a copy of `image` where they are, and their boxes with them.

    Images are uint8 [3, H, W] of any two sizes; what lies outside `image` is cut off. Rectangles also show
    their objects' neighbours: those of which they show 30 % or more together are pasted whole, so that no visible
    object goes without a box. Objects of `image` covered by more than 70 % lose their box, others keep it as it was.
    """
    size = tuple(min(sides) for sides in zip(image.shape[-2:], other.shape[-2:], strict=True))
    boxes = clip_boxes_to_image(other_target["boxes"], size)
    large = remove_small_boxes(boxes, MIN_BOX_SIDE)
    boxes, labels = boxes[large], other_target["labels"][large]
    image, pasted = image.clone(), torch.zeros(image.shape[-2:])  # 1 where it is of `other`
    chosen, before = torch.rand(len(boxes)) < 0.5, None
    while before is None or not torch.equal(chosen, before):  # a neighbour has neighbours
        for x1, y1, x2, y2 in corners(boxes[chosen]):
            image[:, y1:y2, x1:x2] = other[:, y1:y2, x1:x2]
            pasted[y1:y2, x1:x2] = 1
        before, chosen = chosen, shares(pasted, boxes) >= 1 - HIDDEN
    visible = shares(pasted, target["boxes"]) <= HIDDEN
    boxes = torch.cat((target["boxes"][visible], boxes[chosen]))
    return image, {**target, "boxes": boxes, "labels": torch.cat((target["labels"][visible], labels[chosen]))}


def corners(boxes: Tensor) -> list[list[int]]:
    """The whole pixels, x1 y1 x2 y2 (exclusive), that boxes [n, 4] touch."""
    return torch.cat((boxes[:, :2].floor(), boxes[:, 2:].ceil()), 1).int().tolist()


def shares(mask: Tensor, boxes: Tensor) -> Tensor:
    """[n]: the share, 0..1, of the pixels of each of `boxes` [n, 4] where `mask` [H, W] is 1, and not 0."""
    return torch.tensor([mask[y1:y2, x1:x2].mean().item() for x1, y1, x2, y2 in corners(boxes)])
