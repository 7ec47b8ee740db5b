"""Training augmentation of an image and its boxes: flip and multi-scale resize, with torchvision's transforms v2."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2


class TrainTransform:
    """Flip with probability one half, then resize the shorter side to one of `short_sides`, the longer at most
    `max_size` (Faster R-CNN's test size is 800 x 1333; Detectron trains at 640..800). Boxes follow.

    (uint8 [3, H, W], {"boxes": float [n, 4] x1 y1 x2 y2 in pixels, "labels": int64 [n], ...}) to the same. It draws
    from torch's global random state, which `CocoImages` seeds for every sample.
    """

    def __init__(self, short_sides: Sequence[int], max_size: int):
        self.transforms = v2.Compose(
            [
                v2.RandomHorizontalFlip(0.5),
                v2.RandomShortestSize(list(short_sides), max_size),
                v2.ClampBoundingBoxes(),
            ]
        )

    def __call__(self, image: Tensor, target: dict) -> tuple[Tensor, dict]:
        boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=tuple(image.shape[-2:]))
        image, boxes = self.transforms(tv_tensors.Image(image), boxes)
        boxes = boxes.as_subclass(Tensor)
        kept = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)  # a box of one pixel can vanish in a small copy of the image
        return image.as_subclass(Tensor), {**target, "boxes": boxes[kept], "labels": target["labels"][kept]}


def to_model_input(image: Tensor, device: torch.device) -> Tensor:
    """uint8 [3, H, W] to what every detector here takes: float [3, H, W] in 0..1 on `device`."""
    return image.to(device, non_blocking=True).float().div_(255)
