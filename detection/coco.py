"""The images and targets of a split, of whatever format: the only module that turns category ids into labels."""

import contextlib
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from detection.annotations import Annotations, CocoFile, leaves_its_folder, packed, select_images
from detection.boxes import MIN_BOX_SIDE
from detection.copy_paste import paste_objects
from detection.file_names import match_names, unclear
from detection.layouts import held_out
from detection.splits import Reader, report_bad
from detection.yolo import YoloImages
from resbackbone.checks import UserError
from resbackbone.image_io import BadImage, read_image

SMALL_SET = 64_000_000  # bytes
CLIPPED = "boxes clipped to their image"


class OtherClasses(UserError):
    """Data whose classes are not those of the detector or the training set."""


class ImageRequest(NamedTuple):
    """One training sample to load: which image, and the seed of its augmentation."""

    index: int  # type: ignore[assignment]  # shadows a tuple's method
    seed: int


class CocoImages(Dataset):
    """The images of one split with their boxes; category ids become contiguous labels 1..N (0 is background).

    Images are sorted by file name. Boxes are clipped to their image. Those that are not finite or keep less than a
    pixel a side are left out, and so are crowds; `report` counts both. `annotations` keeps every box as it is in the
    file. `reader` reads the annotations; without one, `annotations` is a COCO file. `part` "train" or "val" takes this
    part of annotations that hold both (`layouts.held_out`).

    An item is (image, target): uint8 [3, H, W] RGB, and {"boxes": float [n, 4] x1 y1 x2 y2 in pixels, "labels":
    int64 [n], "image_id": int}. An index gives the image as it is, an `ImageRequest` the image augmented by `transform`
    with its seed and, at the probability `transform.copy_paste`, with objects of another image, drawn and augmented
    with the same seed. The item of a broken image is its BadImage (an exception raised in a worker would lose its
    message). With `skip_bad_images` an ImageRequest gives the next readable image, and target["skipped"] holds the
    messages; `broken` holds those of the reader and those that `check_files` found.

    File names with other folders, backslashes, percent-encoding or another Unicode form mean the file below `images`
    that they or that ends in them (`file_names.match_names`); `summary` counts them. Nothing outside is read.

    `categories` are those of a detector or a training set: with other ids, or fewer classes, the data's classes take
    the ids of the same names. Raises UserError if they lack a class that has boxes, if no image is left, if no image
    file exists or if one lies outside the folder, and BadImage if some are missing and `skip_bad_images` is off.
    """

    def __init__(
        self,
        images: Path,
        annotations: Path,
        *,
        transform=None,
        keep_empty: bool = True,
        skip_bad_images: bool = False,
        categories: Mapping[int, str] | None = None,
        part: str | None = None,
        reader: Reader | None = None,
    ):
        self.folder, self.annotation_file = Path(images), Path(annotations)
        self.transform, self.skip_bad_images = transform, skip_bad_images
        self.report: Counter[str] = Counter()
        self.broken: list[str] = []
        self.undecodable: set[str] = set()  # names of images that `check_files` found
        self.annotations = (reader or CocoFile(self.annotation_file)).read(self.broken if skip_bad_images else None)
        if self.broken and not len(self.annotations.image_ids):
            raise UserError(f"{annotations}: no image in it can be used; the first: {self.broken[0]}")
        names = self.annotations.file_names()
        matched, several, missing = self._find_files(names)
        if matched:
            self.annotations = self.annotations._replace(names=packed([matched.get(name, name) for name in names]))
        self.annotations = self.annotations.by_name()
        if part is not None:
            for_validation = held_out(self.annotations.file_names())
            self.annotations = select_images(self.annotations, for_validation == (part == "val"))
        classes = Counter(self.annotations.categories.values())
        for label, (i, name) in enumerate(self.annotations.categories.items(), 1):
            if not name.strip() and (self.annotations.labels == label).any():
                raise UserError(f"{annotations}: the class {i}, which boxes have, has an empty name; give it one")
        shared = [f"classes that share the name {name!r}: {n}" for name, n in classes.items() if n > 1]
        self.annotations = self.annotations._replace(notes=(*self.annotations.notes, *shared))
        for name in self.annotations.grouping.values():
            self.report[f"category without boxes that only groups the others, {name!r}"] += 1
        if categories is not None:
            self.annotations = with_categories(self.annotations, categories, annotations)
        self.categories = self.annotations.categories

        if reader is None or isinstance(reader, CocoFile | YoloImages):  # VOC's are corners
            _refuse_corners(annotations, self.annotations, centers=isinstance(reader, YoloImages))
        boxes, rows = usable_boxes(self.annotations, self.report)  # rows of the annotations, by image
        total = len(self.annotations.image_ids)
        counts = np.bincount(self.annotations.image_indices.numpy()[rows], minlength=total)
        kept = np.flatnonzero(counts) if not keep_empty else np.arange(total)
        self.report["images without a usable box"] = total - len(kept)
        if not len(kept):
            why = f" ({reasons})" if (reasons := self._counts()) else ""
            raise UserError(f"{annotations}: no image{'' if keep_empty else ' with a usable box'} in it{why}")
        names = self.annotations.file_names()
        names = [names[i] for i in kept.tolist()]
        self._refuse_missing(names, missing, several)
        there = set(names)
        self.matched = {name: file for name, file in matched.items() if file in there}

        self.kept = torch.from_numpy(kept)  # int64 [n]: which of the split's images these are
        self.image_ids = self.annotations.image_ids[self.kept]  # int64 [n]
        self.widths_heights = self.annotations.widths_heights[self.kept]  # int32 [n, 2]
        self.offsets = torch.from_numpy(np.concatenate([[0], counts[kept].cumsum()]))  # image i: [i] to [i + 1]
        self.boxes = torch.from_numpy(boxes)  # float32 [boxes, 4]: x1, y1, x2, y2
        self.labels = self.annotations.labels[torch.from_numpy(rows)]  # int32 [boxes]

    @property
    def fingerprint(self) -> str:
        """The hash of the images' names and sizes and of all boxes and categories."""
        return self.annotations.digest()

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, item: int | ImageRequest):
        if not isinstance(item, ImageRequest):
            return self._load(item)
        skipped = []
        for step in range(len(self)):
            index = (item.index + step) % len(self)
            sample = self._load(index)
            if not isinstance(sample, BadImage):
                break
            if not self.skip_bad_images:
                return sample
            skipped.append(str(sample))
        else:
            return BadImage(f"none of the {len(self)} images in {self.folder} can be read; the first: {skipped[0]}")
        image, target = sample
        if self.transform is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(item.seed)
                image, target = self.transform(image, target)
                if torch.rand(()) < getattr(self.transform, "copy_paste", 0) and len(self) > 1:  # the last draws
                    other = self._load((index + int(torch.randint(1, len(self), ()))) % len(self))
                    if not isinstance(other, BadImage):
                        image, target = paste_objects(image, target, *self.transform(*other))
                    elif self.skip_bad_images:
                        skipped.append(str(other))
                    else:
                        return other
        return image, {**target, "skipped": skipped}

    def path(self, index: int) -> Path:
        return self.folder / self.annotations.file_name(int(self.kept[index]))

    def target(self, index: int) -> dict:
        start, end = self.offsets[index : index + 2].tolist()
        return {
            "boxes": self.boxes[start:end].clone(),
            "labels": self.labels[start:end].long(),
            "image_id": int(self.image_ids[index]),
        }

    def check_files(self) -> None:
        """Find broken images before training: empty files, and in a set of up to 64 MB those that cannot be decoded.

        Raises BadImage with the first message and the number of the others; with `skip_bad_images`, counts them in
        `report` instead, and `broken` gets their messages and, in a small set, those of missing
        files. Decoding a larger set would take minutes.
        """
        sizes = {i: self.path(i).stat().st_size for i in range(len(self)) if self.path(i).is_file()}
        small = sum(sizes.values()) <= SMALL_SET
        suspects = [i for i, size in sizes.items() if small or size == 0]  # missing files were counted before
        bad = {i: sample for i in suspects if isinstance(sample := self._load(i), BadImage)}
        report_bad([*bad.values()], self.broken if self.skip_bad_images else None)
        self.undecodable = {self.annotations.file_name(int(self.kept[i])) for i in bad}
        self.report["images that cannot be used"] = len(bad)
        lost = [f"{self.path(i)}: no such file" for i in range(len(self)) if small and i not in sizes]
        self.broken = sorted({*self.broken, *lost})

    def summary(self) -> str:
        """One line: images, boxes and classes, and what was dropped or clipped."""
        done = self._counts()
        line = f"{len(self)} images, {len(self.boxes)} boxes, {len(self.categories)} classes in {self.folder}"
        for name, file in list(self.matched.items())[:1]:
            line += f"; file names found by their ends: {len(self.matched)} ({name} is {file})"
        line = "; ".join([line, *self.annotations.notes])
        return f"{line}; dropped or clipped: {done}" if done else line

    def _counts(self) -> str:
        return ", ".join(f"{what} ({count})" for what, count in self.report.items() if count)

    def _load(self, index: int):
        try:
            image = read_image(self.path(index), tuple(self.widths_heights[index].tolist()))
        except BadImage as error:
            return error
        return image, self.target(index)

    def _find_files(self, names: list[str]) -> tuple[dict[str, str], dict[str, list[str]], set[str]]:
        """(the names that mean a file of another name, and that file; those of which it is not clear; all without)."""
        there = set()
        inside = [name for name in names if not leaves_its_folder(name)]
        for below in {os.path.dirname(name) for name in inside}:  # checking 118,000 files one by one is slow
            with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(self.folder / below) as entries:
                there |= {f"{below}/{entry.name}" if below else entry.name for entry in entries}
        known = there.intersection(inside)
        missing = [name for name in names if name not in known]
        if not missing:
            return {}, {}, set()
        files = {
            Path(path, file).relative_to(self.folder).as_posix() for path, _, of in os.walk(self.folder) for file in of
        }
        matched, several = match_names(missing, files - known)
        return matched, several, {name for name in missing if name not in matched}

    def _refuse_missing(self, names: list[str], unknown: set[str], several: dict[str, list[str]]) -> None:
        """Check that the images `names` are there, as none of `unknown` is."""
        missing = [name for name in names if name in unknown]
        hint = next((f"; {name}{unclear(name, several)}" for name in missing if name in several), "")
        if missing and len(missing) == len(names):
            raise UserError(
                f"{self.annotation_file}: none of its {len(names)} images (the first is {names[0]}) is in "
                f"{self.folder}{hint or '; check that both belong to the same split'}"
            )
        if outside := [name for name in missing if leaves_its_folder(name)]:
            raise UserError(
                f"{self.annotation_file}: {outside[0]} is outside {self.folder} and is not read; put the image there, "
                "or remove it from the annotations"
            )
        if missing and not self.skip_bad_images:
            raise BadImage(
                f"{self.folder} lacks {len(missing)} of {len(names)} images that {self.annotation_file} names: "
                f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}{hint}"
            )
        self.report["images missing"] = len(missing)


def _refuse_corners(path: str | Path, annotations: Annotations, *, centers: bool) -> None:
    """Raise UserError if boxes are x1, y1, x2, y2: 99 % fit their images so, and as they are read many reach out.

    They are read as COCO's x, y, width, height, or as YOLO's `centers` and sides.
    """
    boxes, sizes = annotations.boxes_xywh, annotations.widths_heights[annotations.image_indices.long()]
    first, sides = boxes[:, :2], boxes[:, 2:]
    start = first + sides / 2 if centers else first  # as the file has it
    corners = int(((start >= -0.5) & (sides > start) & (sides <= sizes + 0.5)).all(1).sum())
    outside = int(((first + sides > 1.05 * sizes) | centers & (first < -0.05 * sizes)).any(1).sum())
    if len(boxes) >= 10 and corners >= 0.99 * len(boxes) and outside * 10 > len(boxes):
        given = "YOLO's x_center, y_center, width, height" if centers else "COCO's x, y, width, height"
        correct = "write centers and sides" if centers else "subtract the first two numbers from the last two"
        raise UserError(
            f"{path}: {outside} of {len(boxes)} boxes reach out of their image as {given}, and {corners} lie in it as "
            f"x1, y1, x2, y2: {correct}"
        )


def usable_boxes(annotations: Annotations, report: Counter) -> tuple[np.ndarray, np.ndarray]:
    """The boxes to train on, clipped to their images: (float32 [n, 4] x1 y1 x2 y2, int64 [n] rows of `annotations`).

    They are sorted by image, then by the file's order. `report` counts what was left out or clipped.
    """
    faults, clipped = box_faults(annotations)
    report.update({what: int(mask.sum()) for what, mask in faults.items()})
    rows = np.flatnonzero(~np.any([mask for what, mask in faults.items() if what != CLIPPED], axis=0))
    rows = rows[np.argsort(annotations.image_indices.numpy()[rows], kind="stable")]
    return clipped[rows].astype(np.float32), rows


def box_faults(annotations: Annotations) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(what is wrong with boxes: bool [M] masks by kind, each box of the first kind that it fits; all boxes clipped to
    their images, float64 [M, 4] x1 y1 x2 y2). Only CLIPPED boxes are usable."""
    xywh = annotations.boxes_xywh.numpy()
    sizes = annotations.widths_heights.numpy()[annotations.image_indices.numpy()]
    with np.errstate(invalid="ignore", over="ignore"):  # boxes with infinities or 1e308 + 1e308 are left out
        corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
        clipped = np.concatenate([np.maximum(corners[:, :2], 0), np.minimum(corners[:, 2:], sizes)], axis=1)
        large = (clipped[:, 2:] - clipped[:, :2] >= MIN_BOX_SIDE).all(1)
        moved = (np.abs(clipped - corners) > 0.5).any(1)  # up to half a pixel is rounding
    left = np.ones(len(xywh), bool)
    faults = {}
    for what, wrong in {
        "crowds": annotations.crowds.numpy(),
        "boxes that are not finite": ~np.isfinite(xywh).all(1),
        "boxes of zero or negative size": (xywh[:, 2:] <= 0).any(1),
        "boxes under a pixel or outside their image": ~large,
        CLIPPED: moved,
    }.items():
        faults[what] = left & wrong
        left &= ~wrong
    return faults, clipped


def with_categories(annotations: Annotations, wanted: Mapping[int, str], path: str | Path) -> Annotations:
    """The same annotations with the categories `wanted`, which take those of the same names and may be more.

    Raises UserError if a class that has boxes is not among them, or if names repeat and ids differ.
    """
    found = annotations.categories
    if found == dict(wanted):
        return annotations
    by_name = {name: label for label, name in enumerate(dict(sorted(wanted.items())).values(), 1)}
    used = np.bincount(annotations.labels.numpy(), minlength=len(found) + 1)[1:]
    unknown = [name for name, boxes in zip(found.values(), used.tolist(), strict=True) if boxes and name not in by_name]
    if unknown or len(by_name) < len(wanted) or len({*found.values()}) < len(found):
        what = f"its classes {', '.join(map(repr, unknown[:5]))} are not among" if unknown else "its ids differ from"
        why = ": remove their boxes, or train with them" if unknown else ", and repeated names are ambiguous"
        raise OtherClasses(
            f"{path}: {what} the {len(wanted)} of the detector or the training set "
            f"({', '.join(list(by_name)[:5])}{', ..' if len(by_name) > 5 else ''}){why}"
        )
    notes = []
    table = torch.tensor([0, *(by_name.get(name, 0) for name in found.values())], dtype=torch.int32)
    absent = [name for name in by_name if name not in found.values()]
    extra = [name for name in found.values() if name not in by_name]
    if any(wanted.get(i) != name for i, name in found.items() if name in by_name):
        notes.append("category ids differ and are matched by name")
    lists = {"classes that are not in these annotations": absent, "classes without a box left out": extra}
    for says, names in lists.items():
        if names:
            notes.append(f"{says}: {len(names)} ({', '.join(names[:3])}{', ..' if len(names) > 3 else ''})")
    labels = table[annotations.labels.long()]
    return annotations._replace(
        categories=dict(sorted(wanted.items())), labels=labels, notes=(*annotations.notes, *notes)
    )
