"""The ground truth and the sizes of a batch of images in one tensor each, and checks of the targets given."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from detection.cells import at_least_fp32
from resbackbone.checks import UserError

FEWEST_BOXES = 16  # that there is room for
A_TARGET = 'a dict {"boxes": [n, 4] x1 y1 x2 y2, "labels": [n]}'
BOX_TYPES = (torch.float32, torch.float64, torch.float16)  # that torchvision takes


class Targets(NamedTuple):
    """Ground truth of B images, padded to the same number of boxes: at least 16, and a power of two."""

    boxes: Tensor  # [B, G, 4], x1 y1 x2 y2 in pixels
    labels: Tensor  # int64 [B, G]; 1 and above, 0 is padding
    each: Sequence[Mapping[str, Any]] = ()  # what was given for each image, which may hold masks and keypoints too

    @property
    def real(self) -> Tensor:  # [B, G]
        return self.labels > 0

    @classmethod
    def of(cls, targets: "Sequence[Mapping[str, Any]] | Targets") -> "Targets":
        """{"boxes": [n, 4], "labels": [n]} of each image, or what this has made of them."""
        if isinstance(targets, Targets):
            return targets
        most = max(len(target["boxes"]) for target in targets)
        of_images = [at_least_fp32(target["boxes"]) for target in targets]  # fp16 areas end at 256 x 256 pixels
        blank = of_images[0].new_zeros(max(FEWEST_BOXES, 1 << (most - 1).bit_length()), 4)
        boxes = pad_sequence([*of_images, blank], batch_first=True)
        labels = pad_sequence([t["labels"] for t in targets] + [blank[:, 0].long()], batch_first=True)
        return cls(boxes[:-1], labels[:-1], targets)

    def as_list(self) -> list[dict[str, Any]]:
        """Each image's, as torchvision's modules take them."""
        return [dict(target) for target in self.each]


def pad_boxes(boxes: Sequence[Tensor] | Tensor) -> Tensor:
    """Boxes [n, 4] of each image -> [B, K, 4], K at least 1; those that fill up have no size."""
    if isinstance(boxes, Tensor):
        return boxes
    return pad_sequence([*boxes, boxes[0].new_zeros(1, 4)], batch_first=True)[:-1]


def needed(counts: Tensor, limit: int) -> int:
    """The largest of the `counts` [B], at least 1, on a CPU, where unused places would cost time.

    On a GPU, which would have to be waited for, and in a compiled or exported graph it is `limit`.
    """
    if counts.device.type != "cpu" or torch.compiler.is_compiling():
        return limit
    return min(limit, max(1, int(counts.numpy().max())))


def sizes_of(image_sizes: Sequence[tuple[int, int]] | Tensor, like: Tensor) -> Tensor:
    """Heights and widths of images in pixels, (H, W) each or [B, 2], as a tensor [B, 2] of the type of `like`."""
    if isinstance(image_sizes, Tensor):
        return image_sizes.to(like)
    return torch.tensor(image_sizes, dtype=like.dtype).to(like.device, non_blocking=True)


def check_form(targets: Any, images: int) -> None:
    """Raise UserError unless `targets` has a dict of boxes and labels, tensors that fit together, for each image."""
    if not isinstance(targets, list | tuple) or len(targets) != images:
        given = f"{len(targets)}" if isinstance(targets, list | tuple) else type(targets).__name__
        raise UserError(f"{images} images need a list of {images} targets, not {given}: {A_TARGET} for each image")
    for i, target in enumerate(targets):
        if not isinstance(target, Mapping):
            raise UserError(f"targets[{i}] is {A_TARGET}, not {type(target).__name__}")
        boxes, labels = target.get("boxes"), target.get("labels")
        name = f"image {target['image_id']}" if "image_id" in target else f"targets[{i}]"
        if not isinstance(boxes, Tensor) or boxes.shape[1:] != (4,) or boxes.dtype not in BOX_TYPES:
            raise UserError(
                f"{name}: boxes are a float tensor [n, 4] x1 y1 x2 y2 in pixels, not {_form(boxes)} (none: "
                "torch.zeros(0, 4))"
            )
        if not isinstance(labels, Tensor) or labels.shape != boxes.shape[:1] or labels.dtype != torch.int64:
            raise UserError(
                f"{name}: labels of {len(boxes)} boxes are an int64 tensor [{len(boxes)}], not {_form(labels)}"
            )


def _form(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def check_targets(targets: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> None:
    """Raise UserError unless labels are of the classes `names` and boxes in pixels, finite, with a width and height.

    Waits once for a GPU.
    """

    def labels_fit(labels: Tensor) -> Tensor:
        return ((labels >= 1) & (labels <= len(names))).all()

    def boxes_fit(boxes: Tensor) -> Tensor:
        return boxes.isfinite().all() & (boxes[:, 2:] > boxes[:, :2]).all()

    labels, boxes = (torch.cat([t[name] for t in targets]) for name in ("labels", "boxes"))
    in_pixels = (boxes > 1).any() | (boxes[:, 2:] - boxes[:, :2] >= 1).all()
    if numbers_of(labels_fit(labels) & boxes_fit(boxes) & in_pixels):
        return
    for target in targets:
        name = f"image {target['image_id']}: " if "image_id" in target else ""
        if not labels_fit(target["labels"]):
            raise UserError(
                f"{name}labels {sorted(set(target['labels'].tolist()))}: a label is 1..{len(names)} "
                f"({', '.join(names[:3])} ..), 0 is background"
            )
        if not boxes_fit(target["boxes"]):
            raise UserError(
                f"{name}a box x1 y1 x2 y2 is not finite, or has no width or height: {target['boxes'].tolist()}"
            )
    raise UserError(f"all boxes lie in 0 to 1, as in parts of the image; give pixels: {boxes[0].tolist()}")


def numbers_of(tensor: Tensor) -> np.ndarray:
    """The tensor's numbers on the CPU; of a CPU's own without an operation that anyone would count as a wait."""
    return tensor.cpu().numpy()
