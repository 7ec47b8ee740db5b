"""Convert Pascal VOC's XML annotations to COCO's JSON, for tools/train_coco.py.

python tools/voc_to_coco.py VOCdevkit/VOC2007 voc2007
python tools/voc_to_coco.py VOCdevkit voc0712 --train trainval --val test         all years that have these lists
python tools/train_coco.py --data voc2007

VOC boxes name their first and last pixel, counted from 1; COCO boxes are x, y, width and height, counted from 0.
Objects marked `difficult` become crowds (iscrowd 1): they are not trained on, and their detections count neither as
right nor as wrong, as in VOC. Unlike VOC's scorer, COCO's lets several detections match a crowd. Images are hard links
where the file system supports them, else copies.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from resbackbone.cli.command import console, main_of, parse, progress_console, track

import tyro

from resbackbone.atomic import folder_atomically
from resbackbone.checks import UserError
from resbackbone.image_io import SUFFIXES, image_sizes

LAYOUT = "Annotations/, JPEGImages/ and ImageSets/Main/*.txt"
Image = tuple[Path, dict, list[dict]]  # the file; its name and size, and its objects, in COCO's words


@dataclass(frozen=True)
class Options:
    """Convert Pascal VOC's XML annotations to COCO's JSON."""

    root: tyro.conf.Positional[Path]
    """Folder with Annotations/, JPEGImages/ and ImageSets/Main/*.txt (VOC2007), or with several such (VOCdevkit)."""
    output: tyro.conf.Positional[Path]
    """New folder to write: annotations/instances_{train,val}.json, train/ and val/."""
    train: str = "train"
    """The list in ImageSets/Main to train on. Without any lists, all annotated images are used."""
    val: str = "val"
    """The list to validate on. Without it, train_coco.py holds out a tenth of the training images."""
    skip_bad_files: bool = False
    """Leave out annotations and images that cannot be used; their names and the reasons are printed."""
    quiet: bool = False
    """Print only warnings, errors and the path of the result."""


def main(argv: list[str] | None = None) -> None:
    """Lists of images -> an instances file and a folder of images for each; writes everything or nothing."""
    options = parse(Options, argv)
    if options.output.exists():
        raise UserError(f"{options.output} already exists; give a new folder")
    below = sorted(options.root.glob("*")) if options.root.is_dir() else []
    years = [folder for folder in (options.root, *below) if (folder / "Annotations").is_dir()]
    if not years:
        raise UserError(f"{options.root}: no folder Annotations in it or one level below; it should hold {LAYOUT}")
    splits = {"train": listed(years, options.train), "val": listed(years, options.val)}
    if not splits["train"] and not any((year / "ImageSets" / "Main").is_dir() for year in years):
        splits["train"] = [(year, path.stem) for year in years for path in sorted((year / "Annotations").glob("*.xml"))]
    if not splits["train"]:
        raise UserError(f"{options.root}: no image in ImageSets/Main/{options.train}.txt; --train names another list")

    found = {split: list(readable(names, split, skip=options.skip_bad_files)) for split, names in splits.items()}
    classes = sorted({box["name"] for images in found.values() for _, _, boxes in images for box in boxes})
    if not classes:
        raise UserError(f"{options.root}: no object in any of the annotations")
    with folder_atomically(options.output) as folder:
        (folder / "annotations").mkdir()
        for split, images in found.items():
            if images:
                write_split(folder, split, images, classes)
    progress_console.print(f"{len(classes)} classes: {', '.join(classes)}")
    console.print(f"written: {options.output}; train on it with tools/train_coco.py --data {options.output}")


def listed(years: list[Path], name: str) -> list[tuple[Path, str]]:
    """(year's folder, image's name) of every image in the lists of this name; empty if there are none."""
    lists = [(year, year / "ImageSets" / "Main" / f"{name}.txt") for year in years]
    lines = [(year, line.split()) for year, path in lists if path.is_file() for line in path.read_text().splitlines()]
    return [(year, words[0]) for year, words in lines if words]


def readable(names: list[tuple[Path, str]], split: str, *, skip: bool) -> Iterator[Image]:
    """Yield the usable images and print the others. Raises UserError at the end if there are others, unless `skip`."""
    bad = 0
    for year, name in track(names, len(names), split):
        try:
            yield read(year, name)
        except UserError as error:
            console.print(f"bad: {error}")
            bad += 1
    if bad and not skip:
        raise UserError(f"{bad} of {len(names)} images of {split} cannot be used; --skip-bad-files skips them")


def read(year: Path, name: str) -> Image:
    """One image and its objects. Raises UserError if its files are missing or damaged."""
    if Path(name).name != name:
        raise UserError(f"{name!r} in a list of {year}: not the name of an image")
    path = year / "Annotations" / f"{name}.xml"
    try:
        root = ElementTree.fromstring(path.read_bytes(), ElementTree.XMLParser(target=WithoutDoctype()))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # LookupError: an unknown encoding
        raise UserError(f"{path}: not an annotation ({error})") from None
    files = (year / "JPEGImages" / f"{name}{suffix}" for suffix in (*SUFFIXES, *map(str.upper, SUFFIXES)))
    image = next((file for file in files if file.is_file()), None)
    if image is None:
        raise UserError(f"{path}: no image {name} in {year / 'JPEGImages'}")
    boxes = [read_box(path, number, element) for number, element in enumerate(root.findall("object"), 1)]
    (width, height), _ = image_sizes(image)
    return image, {"file_name": image.name, "width": width, "height": height}, boxes


def read_box(path: Path, number: int, element: ElementTree.Element) -> dict:
    """One <object> in COCO's words, and its class. Raises UserError if it has no class or no valid corners."""
    name = (element.findtext("name") or "").strip()
    corners = [element.findtext(f"bndbox/{corner}") for corner in ("xmin", "ymin", "xmax", "ymax")]
    try:
        left, top, right, bottom = (float(corner) for corner in corners)
    except (TypeError, ValueError):
        raise UserError(f"{path}: object {number} has the corners {corners}; they must be four numbers") from None
    if not name or not all(map(math.isfinite, (left, top, right, bottom))) or right < left or bottom < top:
        raise UserError(f"{path}: object {number}, {name!r}, has the corners {corners}: no box of a class")
    width, height = right - left + 1, bottom - top + 1
    difficult = (element.findtext("difficult") or "0").strip() == "1"
    return {
        "name": name,
        "bbox": [left - 1, top - 1, width, height],
        "area": width * height,
        "iscrowd": int(difficult),
    }


class WithoutDoctype(ElementTree.TreeBuilder):
    """Refuses a DOCTYPE, because its entities could expand without bound or read other files."""

    def doctype(self, name: str, public: str | None, system: str | None) -> None:
        raise UserError("it has a DOCTYPE, which VOC files never have")


def write_split(folder: Path, split: str, images: list[Image], classes: list[str]) -> None:
    """Write a split's instances file, and link its images into a folder named after it."""
    (folder / split).mkdir()
    annotations: list[dict] = []
    for image_id, (file, _, boxes) in enumerate(images, 1):
        target = folder / split / file.name
        if target.exists():
            raise UserError(f"{file}: {split} already has an image of this name")
        try:
            os.link(file, target)
        except OSError:  # another file system, or no links there
            shutil.copyfile(file, target)
        for box in boxes:
            category_id = classes.index(box.pop("name")) + 1
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, "category_id": category_id, **box})
    content = {
        "images": [{"id": image_id, **image} for image_id, (_, image, _) in enumerate(images, 1)],
        "annotations": annotations,
        "categories": [{"id": i, "name": name, "supercategory": ""} for i, name in enumerate(classes, 1)],
    }
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    crowds = sum(box["iscrowd"] for box in annotations)
    progress_console.print(
        f"{split}: {len(images)} images, {len(annotations)} boxes, {crowds} of them difficult, now crowds"
    )


if __name__ == "__main__":
    main_of(main)
