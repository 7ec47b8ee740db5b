"""The folder layouts of COCO-format data that are recognised, and where each keeps its splits."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from resbackbone.checks import UserError

LAYOUT = (
    "annotations/instances_{train,val}2017.json with train2017/ and val2017/ (COCO's layout), "
    "{train,valid}/_annotations.coco.json beside the images (Roboflow's), "
    "annotations/instances_{train,val}.json with train/ and val/, annotations/instances_default.json with images/ "
    "(CVAT's), result.json with images/ (Label Studio's), or labels.json with data/ (FiftyOne's)"
)
SPLIT_NAMES = {  # CVAT's single split is "default", and the splits that it suggests have capitals
    "train": ("train", "Train", "default"),
    "val": ("val", "valid", "validation", "Validation"),
}
DRAWN = "shapes.json"  # in a folder of `make_shapes`: what it was drawn with
HELD_OUT = 10  # without a validation split, one image in this many is held out


class Layout(NamedTuple):
    """Paths below the data folder, with {} for the split's name; of several, the first that exists counts.

    An annotation file without a split's name in its path is that of "train".
    """

    title: str
    annotations: tuple[str, ...]
    images: tuple[str, ...]

    def paths(self, folder: Path, split: str) -> tuple[Path | None, Path | None]:
        """(image folder, annotation file) of "train" or "val", None for a missing one."""
        half: tuple[Path | None, Path | None] = (None, None)
        for name in SPLIT_NAMES[split]:
            files = [folder / path.format(name) for path in self.annotations if "{}" in path or split == "train"]
            file = next((path for path in files if path.is_file()), None)
            # If all splits share a folder of images, only the annotation file shows that a split exists.
            folders = [folder / path.format(name) for path in self.images if file or "{}" in path]
            images = next((path for path in folders if path.is_dir()), None)
            if images and file:
                return images, file
            half = half if any(half) else (images, file)
        return half

    def fit(self, folder: Path) -> tuple[bool, bool, bool]:
        """Whether the folder has a whole split to train on, a whole one to validate on, any part of one."""
        train, val = (self.paths(folder, split) for split in SPLIT_NAMES)
        return all(train), all(val), any((*train, *val))


LAYOUTS = (
    Layout("COCO's layout", ("annotations/instances_{}2017.json",), ("{}2017", "images/{}2017")),
    Layout("Roboflow's layout", ("{}/_annotations.coco.json",), ("{}",)),
    Layout(
        "the layout of annotations/instances_train.json",
        ("annotations/instances_{}.json", "annotations/{}.json"),
        ("{}", "images/{}", "images"),
    ),
    Layout("Label Studio's layout", ("{}/result.json", "result.json", "result_coco.json"), ("{}/images", "images")),
    Layout("FiftyOne's layout", ("{}/labels.json", "labels.json"), ("{}/data", "data")),
)


class Split(NamedTuple):
    """The files of one split. `part` is None, or "train" or "val" if the annotation file holds both (`held_out`)."""

    layout: str
    images: Path
    annotations: Path
    part: str | None


def find_split(data: str | os.PathLike, split: str) -> Split:
    """Find "train" or "val" in the folder `data`, by the first of LAYOUTS that fits.

    Without any trace of a validation split, a tenth of the training images serves as one: both splits are then parts
    of one file. Raises UserError if the folder is missing, has no known layout, or holds half a split.
    """
    folder = Path(data)
    if not folder.is_dir():
        raise UserError(f"{data}: no such folder; it should contain {LAYOUT}")
    layout = max(LAYOUTS, key=lambda layout: layout.fit(folder))  # the first of several that fit alike
    if not any(layout.fit(folder)):
        raise UserError(f"{data}: no known data layout; it should contain {LAYOUT}")
    train, val = (layout.paths(folder, name) for name in SPLIT_NAMES)
    part = split if all(train) and not any(val) else None
    images, annotations = train if part or split == "train" else val
    if images is None or annotations is None:
        name = SPLIT_NAMES[split][0]
        wanted = {layout.annotations[0].format(name): annotations, layout.images[0].format(name): images}
        missing = " and no ".join(path for path, at in wanted.items() if at is None)
        raise UserError(f"{data}: {layout.title}, but no {missing}; it should contain {LAYOUT}")
    return Split(layout.title, images, annotations, part)


def describe_layout(data: str | os.PathLike) -> str:
    """One line on `data`: its layout, the annotation files that are read, those beside them, in `data` and of the
    same name in another folder that are not, and whether a part is held out. Raises as `find_split`."""
    train, val = (find_split(data, split) for split in SPLIT_NAMES)
    read = [split.annotations for split in ((train,) if val.part else (train, val))]
    line = f"{data} in {train.layout}: {' and '.join(_below(data, read))}"
    if val.part:
        line += f"; there is no validation split, so one image in {HELD_OUT} is held out for it"
    folder = Path(data)
    beside = {path for file in read for path in (*file.parent.glob("*.json"), *folder.glob(f"*/{file.name}"))}
    if unread := sorted(beside.union(folder.glob("*.json")) - {*read, folder / DRAWN}):
        others = f" and {len(unread) - 3} more" if len(unread) > 3 else ""
        line += f"; not read: {', '.join(_below(data, unread[:3]))}{others}"
    return line


def _below(data: str | os.PathLike, paths: Sequence[Path]) -> list[str]:
    return [str(path.relative_to(data)) for path in paths]


def held_out(file_names: Sequence[str]) -> np.ndarray:
    """Which images to validate on if the data have no validation split: bool [n], one in ten, at least one.

    The names alone decide: those with the lowest hashes are held out. Names that differ only after ".rf.", as in
    Roboflow's augmented copies of an image, stay together: copies on both sides would inflate the AP. Raises UserError
    if there are fewer than two images.
    """
    originals = np.array([name.partition(".rf.")[0] for name in file_names])
    distinct = sorted(set(originals.tolist()), key=lambda name: hashlib.sha256(name.encode()).digest())
    if len(distinct) < 2:
        raise UserError(
            f"there is no validation split, and holding one out takes at least 2 images, not {len(distinct)}; "
            "add images or a second annotation file"
        )
    return np.isin(originals, distinct[: -(-len(distinct) // HELD_OUT)])
