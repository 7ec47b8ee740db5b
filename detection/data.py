"""Which data a run uses: a folder in a known layout, one found in the usual places, or the embedded set."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from detection.coco import BadImage, CocoImages
from detection.layouts import find_split
from detection.sampler import TrainBatches
from detection.shapes import make_shapes
from detection.transforms import to_model_input

EMBEDDED = Path("datasets/shapes")
EMBEDDED_SET = {"train_images": 3000, "val_images": 200, "size": 128}


def find_coco() -> Path | None:
    """COCO where its users keep it: $DETECTRON2_DATASETS/coco, $COCO_DIR, ./datasets/coco; None if in none of them."""
    places = [Path("datasets/coco")]
    if os.environ.get("COCO_DIR"):
        places.insert(0, Path(os.environ["COCO_DIR"]))
    if os.environ.get("DETECTRON2_DATASETS"):
        places.insert(0, Path(os.environ["DETECTRON2_DATASETS"]) / "coco")
    return next((place for place in places if place.is_dir()), None)


def embedded_data() -> Path:
    """The folder of the embedded data set, drawn now if it is not there."""
    EMBEDDED.parent.mkdir(exist_ok=True)
    try:
        return make_shapes(EMBEDDED, **EMBEDDED_SET)
    except ValueError as error:  # drawn by another version, or not ours
        raise ValueError(f"{error}; or remove {EMBEDDED}, and it is drawn anew") from None


def open_split(data: Path, split: str, **options) -> CocoImages:
    """The images of `split`, "train" or "val", of a folder in a known layout; options as CocoImages takes them."""
    found = find_split(data, split)
    return CocoImages(found.images, found.annotations, part=found.part, **options)


def open_checked(data: Path, split: str, **options) -> CocoImages:
    """The same, and its image files looked at (`CocoImages.check_files`)."""
    opened = open_split(data, split, **options)
    opened.check_files()
    return opened


def train_batches(
    dataset: CocoImages, batches: TrainBatches, *, workers: int, device: torch.device
) -> Iterator[tuple[list, list[dict]]]:
    """Endless (images, targets) on `device` for the detector: [3, H, W] floats in 0..1, {"boxes", "labels", ...}."""
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=list,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
    )
    for samples in loader:
        for sample in samples:
            if isinstance(sample, BadImage):
                raise sample
        images = [to_model_input(image, device) for image, _ in samples]
        yield (
            images,
            [
                {**target, "boxes": target["boxes"].to(device), "labels": target["labels"].to(device)}
                for _, target in samples
            ],
        )
