"""The data of a run (a folder, COCO in its usual places, or the built-in set) and their batches."""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from detection.coco import CocoImages
from detection.layouts import Data, find_split
from detection.sampler import TrainBatches
from detection.shapes import make_shapes
from detection.transforms import to_model_input
from resbackbone.checks import usual_folder
from resbackbone.engine.termination import worker_processes
from resbackbone.engine.transfer import moved
from resbackbone.image_io import BadImage

EMBEDDED = Path("datasets/shapes")
EMBEDDED_SET = {"train_images": 3000, "val_images": 200, "size": 128}


def find_coco() -> Path | None:
    """$DETECTRON2_DATASETS/coco, $COCO_DIR, without these ./datasets/coco, or None. Raises as `usual_folder` does."""
    return usual_folder({"DETECTRON2_DATASETS": "coco", "COCO_DIR": ""}, "datasets/coco")


def embedded_data() -> Path:
    """The folder of the built-in data set, drawn now if it is missing. Raises UserError as `make_shapes` does."""
    return make_shapes(EMBEDDED, **EMBEDDED_SET)


def open_split(data: Data, split: str, **options) -> CocoImages:
    """The images of `split`, "train", "val" or "test", of data in a known layout; `options` are those of CocoImages."""
    found = find_split(data, split)
    return CocoImages(found.images, found.annotations, part=found.part, reader=found.reader, **options)


def open_checked(data: Data, split: str, **options) -> CocoImages:
    """`open_split`, and a check of the image files (`CocoImages.check_files`)."""
    opened = open_split(data, split, **options)
    opened.check_files()
    return opened


class Packed(NamedTuple):
    """The samples of a batch, those of all images in a tensor each: few copies to a GPU."""

    pixels: Tensor  # uint8, image after image
    shapes: list[tuple[int, int, int]]
    boxes: Tensor  # float32 [n, 4]
    labels: Tensor  # int64 [n]
    targets: list[dict]  # the rest of each target
    counts: list[int]  # boxes of each image


def pack(samples: list) -> Packed | BadImage:
    """Samples of `CocoImages`, (uint8 [3, H, W], target) each, as one batch; or the first BadImage among them."""
    bad = next((sample for sample in samples if isinstance(sample, BadImage)), None)
    if bad is not None:
        return bad
    images, targets = zip(*samples, strict=True)
    return Packed(
        torch.cat([image.flatten() for image in images]),
        [tuple(image.shape) for image in images],
        torch.cat([target["boxes"] for target in targets]),
        torch.cat([target["labels"] for target in targets]),
        [{name: value for name, value in t.items() if name not in ("boxes", "labels")} for t in targets],
        [len(target["boxes"]) for target in targets],
    )


def unpack(batch: Packed | BadImage, device: torch.device) -> tuple[list[Tensor], list[dict]]:
    """Images and targets on `device`, as the detector takes them. Raises the batch if it is a BadImage."""
    if isinstance(batch, BadImage):
        raise batch
    pixels = to_model_input(batch.pixels, device)
    boxes, labels = (part.to(device, non_blocking=True) for part in (batch.boxes, batch.labels))
    images = pixels.split([math.prod(shape) for shape in batch.shapes])
    of_images = zip(batch.targets, boxes.split(batch.counts), labels.split(batch.counts), strict=True)
    return (
        [image.view(shape) for image, shape in zip(images, batch.shapes, strict=True)],
        [{**target, "boxes": of_image, "labels": classes} for target, of_image, classes in of_images],
    )


def train_batches(
    dataset: CocoImages, batches: TrainBatches, *, workers: int, device: torch.device
) -> Iterator[tuple[list[Tensor], list[dict]]]:
    """Endless (images, targets) on `device` for the detector: [3, H, W] floats in 0..1, {"boxes", "labels", ...}."""
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=pack,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        **worker_processes(workers),
    )
    return moved(loader, partial(unpack, device=device), device)
