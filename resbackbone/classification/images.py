"""Labelled images of one split, in folders of classes or synthetic, and the order in which a training sees them."""

import hashlib
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from resbackbone.checks import UserError, some
from resbackbone.image_io import SUFFIXES, BadImage, open_rgb, read_file

SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "test")}


class Images:
    """The images of one split: `classes` are their names, `labels` int64 [n] the class of each, from 0.

    A subclass defines `file` and `name`.
    """

    def __init__(self, classes: list[str], labels: np.ndarray, *, skip_bad_images: bool = False):
        self.classes, self.labels, self.skip_bad_images = classes, labels, skip_bad_images
        self.skipped: set[str] = set()  # the message of each image that was skipped

    def __len__(self) -> int:
        return len(self.labels)

    def file(self, index: int) -> bytes:
        """The encoded image. Raises BadImage if it cannot be read."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """Where the image is, for messages."""
        raise NotImplementedError

    def read(self, index: int) -> Image.Image:
        """The image in RGB, decoded by PIL as in torchvision's evaluation. Raises BadImage, naming it."""
        return open_rgb(self.file(index), self.name(index))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of the classes and the labels in their order; a resumed run compares it."""
        return hashlib.sha256("\n".join(self.classes).encode() + self.labels.tobytes()).hexdigest()

    def summary(self) -> str:
        """One line with the number of images and classes."""
        return f"{len(self)} images of {len(self.classes)} classes"


class FolderImages(Images):
    """Images in folders named after their class, in the order of torchvision's ImageFolder.

    Raises UserError for missing or empty class folders and, unless `skip_bad_images`, BadImage for files
    without an image suffix. Their content is checked when they are read.
    """

    def __init__(self, folder: Path, *, skip_bad_images: bool = False):
        self.folder = folder
        names = class_folders(folder)
        files = [_files_below(folder / name) for name in names]
        empty = [name for name, inside in zip(names, files, strict=True) if not inside]
        if not names or empty:
            what = f"class folders without images: {some(empty)}" if names else "no class folders"
            raise UserError(f"{folder}: {what}; it should hold a folder of images for each class")
        pairs = [(file, label) for label, inside in enumerate(files) for file in inside]
        others = [file for file, _ in pairs if not file.lower().endswith(SUFFIXES)]
        if others and not skip_bad_images:
            raise BadImage(f"{folder}: files that are not images: {some(others)}; images end in {', '.join(SUFFIXES)}")
        pairs = [(file, label) for file, label in pairs if file.lower().endswith(SUFFIXES)]
        self._files = np.array([os.fsencode(file) for file, _ in pairs])  # flat: workers share it
        super().__init__(names, np.array([label for _, label in pairs]), skip_bad_images=skip_bad_images)

    def file(self, index: int) -> bytes:
        return read_file(self.name(index))

    def name(self, index: int) -> str:
        return os.path.join(self.folder, os.fsdecode(self._files[index]))

    def summary(self) -> str:
        return f"{super().summary()} in {self.folder}"


class SyntheticImages(Images):
    """As many images and classes as ImageNet, all the same noise: training on them measures the network's speed."""

    def __init__(self, split: str):
        super().__init__([str(i) for i in range(1000)], np.arange({"train": 1_281_167, "val": 50_000}[split]) % 1000)

    def summary(self) -> str:
        return f"{super().summary()}, synthetic: no file is read or decoded, and nothing is learnt"


def shuffled(
    count: int, *, seed: int, rank: int, ranks: int, start: int, repeats: int = 1
) -> Iterator[tuple[int, int]]:
    """Yield samples of `count` images without end, reordered each epoch: this rank's share, from its `start`-th on.

    A sample is an image's index and the seed of its augmentation. Each image comes `repeats` times in a row; an epoch
    then has fewer images.
    """
    position = start * ranks + rank
    while True:
        epoch, first = divmod(position, count)
        random = np.random.default_rng((seed, epoch))
        order = np.repeat(random.permutation(count), repeats)[first:count:ranks]
        seeds = random.integers(0, 2**62, count)[first::ranks]
        yield from zip(order.tolist(), seeds.tolist(), strict=True)
        position += ranks * len(order)


def split_folder(data: str | os.PathLike, split: str) -> Path | None:
    """The folder of `split`, "train" or "val", in `data`, or None."""
    return next((Path(data) / name for name in SPLIT_FOLDERS[split] if (Path(data) / name).is_dir()), None)


def find_split(data: str | os.PathLike, split: str, layout: str) -> Path:
    """The folder of `split`, "train" or "val", in `data`, which should hold `layout`.

    Raises UserError if one of them is missing, or if the class folders of the two splits differ.
    """
    if not Path(data).is_dir():
        what = "a file, not a folder" if Path(data).is_file() else "no such folder"
        raise UserError(f"{data}: {what}; it should hold {layout}")
    folder = split_folder(data, split)
    if folder is None:
        raise UserError(f"{data}: no folder {' or '.join(SPLIT_FOLDERS[split])} in it; it should hold {layout}")
    train, val = (split_folder(data, name) for name in SPLIT_FOLDERS)
    if train and val and (differing := sorted(set(class_folders(train)) ^ set(class_folders(val)))):
        raise UserError(f"{data}: {train.name} and {val.name} hold different class folders: {some(differing)}")
    return folder


def class_folders(folder: Path) -> list[str]:
    """The names of the folders in `folder`, sorted, without hidden ones."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")


def _files_below(folder: Path) -> list[str]:
    """Paths of the files in `folder` and below, relative to its parent, sorted, without hidden ones."""
    found = []
    for where, _, files in sorted(os.walk(folder, followlinks=True)):
        inside = os.path.relpath(where, folder.parent)
        found += [os.path.join(inside, name) for name in sorted(files) if name[0] != "."]
    return found
