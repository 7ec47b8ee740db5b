"""What a layout finds in a folder: for each split its images, and what reads its annotations into the one index.

Also what the readers share.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from detection.annotations import Annotations
from resbackbone.checks import UserError
from resbackbone.image_io import BadImage

SPLIT_NAMES = {  # of folders and lists; CVAT's single split is "default"
    "train": ("train", "Train", "TRAIN", "training", "Training", "default"),
    "val": ("val", "Val", "VAL", "valid", "Valid", "validation", "Validation"),
    "test": ("test", "Test", "TEST", "testing", "Testing"),
}
SPLIT_OF = {name: split for split, names in SPLIT_NAMES.items() for name in names}


class Reader(Protocol):
    def read(self, bad: list[str] | None) -> Annotations:
        """The index, with file names relative to the split's folder of images.

        Images that cannot be used are left out and their messages appended to `bad`, or raised if it is None.
        """

    def count_images(self) -> int:
        """The number of images."""


class Split(NamedTuple):
    """One split. `part` is None, or "train" or "val" if the annotations hold both (`layouts.held_out`)."""

    layout: str
    images: Path  # the folder that file names are relative to
    annotations: Path  # COCO's file, YOLO's data.yaml or the folder of VOC's XML files, for messages
    reader: Reader
    part: str | None = None


class Found(NamedTuple):
    """What a folder holds in one layout: its whole splits, and for each that is not whole what is wrong with it."""

    title: str
    splits: dict[str, Split]
    broken: dict[str, str]
    annotated: bool = True  # whether it has annotations of this layout, and not just images

    @property
    def fit(self) -> tuple[bool, bool, bool, bool]:
        """Whether there is a whole split to train on, a whole one to validate on, annotations, any part of a split."""
        found = bool(self.splits or self.broken)
        return "train" in self.splits, "val" in self.splits, found and self.annotated, found


def folders_in(folder: Path) -> list[Path]:
    """The folders in a folder, without hidden ones and those that archives of macOS add (__MACOSX)."""
    return sorted(Path(entry) for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] not in "._")


def report_bad(broken: Sequence[BadImage], bad: list[str] | None) -> None:
    """Append the messages of images that cannot be used to `bad`. If it is None, raise the first one."""
    if bad is not None:
        bad += map(str, broken)
    elif broken:
        raise BadImage(f"{broken[0]}{f' (and {len(broken) - 1} more)' if len(broken) > 1 else ''}")


def read_lines(file: Path) -> list[str]:
    """The lines of a text file without the spaces around them and without empty lines."""
    try:
        return [line.strip() for line in file.read_text("utf-8-sig").splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not text in UTF-8 ({error}); save it in UTF-8") from None
