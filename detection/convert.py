"""The splits of a data set in files of COCO's, YOLO's or Pascal VOC's format; reading them gives the same index.

Images are hard links where the file system supports them, else copies.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

import numpy as np
import yaml

from detection.annotations import Annotations
from detection.coco import CocoImages
from detection.yolo import usual_label_folder
from resbackbone.checks import UserError

OBJECT = (
    "<object><name>{}</name><difficult>{}</difficult>"
    "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)


class Image(NamedTuple):
    id: int
    name: str  # relative to its folder
    size: tuple[int, int]  # width, height
    rows: slice  # its annotations


def write_coco(folder: Path, splits: dict[str, CocoImages]) -> None:
    """annotations/instances_SPLIT.json and SPLIT/, with every box as it was read."""
    for split, images in splits.items():
        found, ids, index = list(_images(images)), list(images.categories), images.annotations
        annotations: list[dict] = []
        for image in found:
            columns = (index.labels, index.boxes_xywh, index.areas, index.crowds.int())
            for label, box, area, crowd in zip(*(column[image.rows].tolist() for column in columns), strict=True):
                of_image = {"id": len(annotations) + 1, "image_id": image.id, "category_id": ids[label - 1]}
                annotations.append({**of_image, "bbox": box, "area": area, "iscrowd": crowd})
        content = {
            "images": [
                {"id": image.id, "file_name": image.name, "width": image.size[0], "height": image.size[1]}
                for image in found
            ],
            "annotations": annotations,
            "categories": [{"id": i, "name": name} for i, name in images.categories.items()],
        }
        _write(folder / "annotations" / f"instances_{split}.json", json.dumps(content))
        _link(images, found, folder / split)


def write_yolo(folder: Path, splits: dict[str, CocoImages]) -> None:
    """data.yaml, images/SPLIT/ and labels/SPLIT/; crowds are left out: YOLO cannot mark them."""
    for split, images in splits.items():
        found, below = list(_images(images)), Path("images", split)
        boxes, kept = _clipped(images.annotations, crowds=False)
        paths = [below / image.name for image in found]
        files = [str(usual_label_folder(path.parent) / f"{path.stem}.txt") for path in paths]
        _refuse_shared(found, files)
        for image, file in zip(found, files, strict=True):
            lines = []
            for row in range(image.rows.start, image.rows.stop):
                if kept[row]:
                    (x, y, w, h), (width, height) = boxes[row].tolist(), image.size
                    numbers = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
                    label = int(images.annotations.labels[row]) - 1
                    lines.append(" ".join([str(label), *(f"{number:.12f}" for number in numbers)]))
            _write(folder / file, "".join(f"{line}\n" for line in lines))
        _link(images, found, folder / below)
    names = next(iter(splits.values())).categories.values()
    content = {**{split: f"images/{split}" for split in splits}, "names": dict(enumerate(names))}
    _write(folder / "data.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def write_voc(folder: Path, splits: dict[str, CocoImages]) -> None:
    """Annotations/, JPEGImages/ and ImageSets/Main/SPLIT.txt; crowds become difficult objects.

    Corners are VOC's, which count from 1, if all boxes are of whole pixels and none is one wide, which is read as of no
    size; else they are edges that count from 0, written with a decimal point, by which `detection.voc` tells them.
    """
    names = list(next(iter(splits.values())).categories.values())
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two classes have the name {twice!r}, by which VOC tells them apart; rename one of them")
    found = {split: list(_images(images)) for split, images in splits.items()}
    boxes = {split: _clipped(images.annotations, crowds=True) for split, images in splits.items()}
    used = np.concatenate([of_split[kept] for of_split, kept in boxes.values()])
    whole = bool((used == used.round()).all() and (used[:, 2:] != 1).all())
    stems = [stem for of_split in found.values() for stem in _stems(of_split)]
    apart = len({*stems}) < len(stems)  # splits have images of the same name
    for split, images in splits.items():
        below = split if apart else ""
        of_split, kept = boxes[split]
        listed = [os.path.join(below, stem) for stem in _stems(found[split])]
        for image, stem in zip(found[split], listed, strict=True):
            text = f"<annotation><filename>{escape(Path(image.name).name)}</filename>"
            text += "<size><width>{}</width><height>{}</height><depth>3</depth></size>".format(*image.size)
            for row in range(image.rows.start, image.rows.stop):
                if kept[row]:
                    x, y, w, h = of_split[row].tolist()
                    edges = (x + 1, y + 1, max(x + w, x + 1), max(y + h, y + 1)) if whole else (x, y, x + w, y + h)
                    name = escape(names[int(images.annotations.labels[row]) - 1])
                    numbers = (f"{edge:.0f}" if whole else f"{edge:.6f}" for edge in edges)
                    text += OBJECT.format(name, int(images.annotations.crowds[row]), *numbers)
            _write(folder / "Annotations" / f"{stem}.xml", f"{text}</annotation>\n")
        _write(folder / "ImageSets" / "Main" / f"{split}.txt", "".join(f"{stem}\n" for stem in listed))
        _link(images, found[split], folder / "JPEGImages" / below)


FORMATS: dict[str, Callable[[Path, dict[str, CocoImages]], None]] = {
    "coco": write_coco,
    "yolo": write_yolo,
    "voc": write_voc,
}


def _images(images: CocoImages) -> Iterator[Image]:
    """The images of a split whose files are there and not known to be broken."""
    index = images.annotations
    ends = np.searchsorted(index.image_indices.numpy(), np.arange(len(index.image_ids) + 1)).tolist()
    ids, sizes, names = index.image_ids.tolist(), index.widths_heights.tolist(), index.file_names()
    for i, name in enumerate(names):
        if name not in images.undecodable and (images.folder / name).is_file():
            yield Image(ids[i], name, tuple(sizes[i]), slice(ends[i], ends[i + 1]))


def _clipped(annotations: Annotations, *, crowds: bool) -> tuple[np.ndarray, np.ndarray]:
    """(float64 [M, 4] boxes x, y, width, height clipped to their image; bool [M] whether something of them is in it).

    Boxes of zero size are kept, because they count in AP; crowds only if asked for.
    """
    xywh, of_image = annotations.boxes_xywh.numpy(), annotations.image_indices.long()
    first = np.maximum(xywh[:, :2], 0)
    last = np.minimum(xywh[:, :2] + xywh[:, 2:], annotations.widths_heights[of_image].numpy())
    there = (xywh[:, 2:] >= 0).all(1) & (last >= first).all(1)  # False for NaN
    return np.concatenate([first, last - first], axis=1), there & (crowds | ~annotations.crowds.numpy())


def _stems(images: list[Image]) -> list[str]:
    """The images' names without suffix, all different."""
    stems = [os.path.splitext(image.name)[0] for image in images]
    _refuse_shared(images, stems)
    return stems


def _refuse_shared(images: list[Image], files: list[str]) -> None:
    """Raise UserError if two images would have the same label file of `files`."""
    of_file: dict[str, str] = {}
    for image, file in zip(images, files, strict=True):
        if (other := of_file.setdefault(file, image.name)) != image.name:
            raise UserError(f"{other} and {image.name} would have one label file; rename one of them")


def _link(images: CocoImages, found: list[Image], folder: Path) -> None:
    for image in found:
        target = folder / image.name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(images.folder / image.name, target)
        except OSError:  # another file system, or no links there
            shutil.copyfile(images.folder / image.name, target)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
