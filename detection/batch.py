"""The ground truth and the sizes of a batch of images in one tensor each."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from detection.cells import at_least_fp32

FEWEST_BOXES = 16  # that there is room for


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
