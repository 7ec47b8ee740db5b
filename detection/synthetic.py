"""Images and boxes of random numbers, made once on the device: what training costs without loading data."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

SYNTHETIC = Path("synthetic")  # in place of a folder
IMAGES, CLASSES, BOXES = 118_000, 80, 7  # about COCO's: images to train on, classes, boxes of an image


class SyntheticImages:
    """What a training asks of its images, with those of `synthetic_batches`."""

    broken = ()
    fingerprint = "synthetic"
    categories = {i: f"class {i}" for i in range(1, CLASSES + 1)}

    def __len__(self) -> int:
        return IMAGES


def synthetic_batches(
    batch_size: int, *, height: int, width: int, device: torch.device
) -> Iterator[tuple[list[Tensor], list[dict]]]:
    """The same (images, targets) again and again, as `data.train_batches` yields them; sizes are in pixels."""
    random = torch.Generator().manual_seed(0)
    size = torch.tensor([width, height] * 2)
    images, targets = [], []
    for index in range(batch_size):
        sides = 0.03 + 0.5 * torch.rand(BOXES, 2, generator=random)
        corners = torch.rand(BOXES, 2, generator=random) * (1 - sides)
        boxes = torch.cat([corners, corners + sides], 1) * size
        labels = torch.randint(1, CLASSES + 1, (BOXES,), generator=random)
        images.append(torch.rand(3, height, width, generator=random).to(device))
        targets.append({"boxes": boxes.to(device), "labels": labels.to(device), "image_id": index, "skipped": []})
    while True:
        yield images, targets
