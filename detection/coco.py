"""COCO-format images and targets: the only place that reads annotation files and knows category ids."""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import pil_to_tensor

from resbackbone.classification.decode import BadImage, to_rgb

LAYOUT = "annotations/instances_train2017.json, annotations/instances_val2017.json, train2017/ and val2017/"
EXIF_ORIENTATION = 0x0112
SMALL_SET = 64_000_000  # bytes
MAX_ASPECT = 200  # longer side over shorter; resized to at most max_size, a narrower image would have no width left
MIN_BOX_SIDE = 1.0  # pixels; a smaller box teaches a detector nothing and turns into nothing when it is resized


class Draw(NamedTuple):
    """One training sample to load: which image, and the seed of its augmentation."""

    index: int
    seed: int


def coco_paths(data: str | os.PathLike, split: str) -> tuple[Path, Path]:
    """(image folder, annotation file) of `split`, "train" or "val", in the official layout; ValueError if not there."""
    folder = Path(data)
    if not folder.is_dir():
        raise ValueError(f"--data {data}: no such folder; it should hold {LAYOUT}")
    images, annotations = folder / f"{split}2017", folder / "annotations" / f"instances_{split}2017.json"
    missing = [str(path.relative_to(folder)) for path in (annotations, images) if not path.exists()]
    if missing:
        raise ValueError(f"--data {data}: not COCO's layout, no {' and no '.join(missing)}; it should hold {LAYOUT}")
    return images, annotations


def read_annotations(path: str | os.PathLike) -> dict:
    """Read a COCO instances file and check its form; missing `iscrowd` and `area` are filled in (0, and w * h).

    Returns the file's dictionary. Raises ValueError in one sentence for what is not JSON, lacks a key, repeats an
    id, or refers to an image or category that is not in the file.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"annotations {path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"annotations {path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"annotations {path}: a JSON object with images, annotations, categories is wanted")
    needed = {
        "images": {"id": int, "file_name": str, "width": int, "height": int},
        "annotations": {"id": int, "image_id": int, "category_id": int, "bbox": list},
        "categories": {"id": int, "name": str},
    }
    for section, keys in needed.items():
        entries = content.get(section)
        if not isinstance(entries, list):
            raise ValueError(f"annotations {path}: no list {section!r}; wanted are {', '.join(needed)}")
        seen = set()
        for i, entry in enumerate(entries):
            if section == "annotations" and isinstance(entry, dict):
                entry.setdefault("id", i + 1)
            for key, kind in keys.items():
                value = entry.get(key) if isinstance(entry, dict) else None
                if not isinstance(value, kind) or isinstance(value, bool):
                    raise ValueError(f"annotations {path}: {section}[{i}] has no {key!r} of type {kind.__name__}")
            if not -(2**63) <= entry["id"] < 2**63:
                raise ValueError(f"annotations {path}: {section}[{i}] has the id {entry['id']}, over 64 bits")
            if entry["id"] in seen:
                raise ValueError(f"annotations {path}: {section}[{i}] repeats the id {entry['id']}")
            seen.add(entry["id"])
        needed[section] = seen
    for i, image in enumerate(content["images"]):
        if not (0 < image["width"] < 2**31 and 0 < image["height"] < 2**31):
            raise ValueError(f"annotations {path}: images[{i}] has size {image['width']} x {image['height']}")
        if os.path.isabs(image["file_name"]) or ".." in Path(image["file_name"]).parts or "\0" in image["file_name"]:
            raise ValueError(f"annotations {path}: images[{i}] file_name {image['file_name']!r} leaves its folder")
    if not content["categories"]:
        raise ValueError(f"annotations {path}: the list of categories is empty")
    known = sorted(needed["categories"])
    for i, annotation in enumerate(content["annotations"]):
        if annotation["image_id"] not in needed["images"]:
            raise ValueError(
                f"annotations {path}: annotations[{i}] is of image {annotation['image_id']}, not in images"
            )
        if annotation["category_id"] not in needed["categories"]:
            raise ValueError(
                f"annotations {path}: annotations[{i}] has category_id {annotation['category_id']}, which is not in "
                f"categories ({len(known)} ids, {known[0]}..{known[-1]})"
            )
        box = annotation["bbox"]
        if len(box) != 4 or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in box):
            raise ValueError(f"annotations {path}: annotations[{i}] bbox {box} is not four numbers x, y, width, height")
        annotation["bbox"] = box = [_as_float(value) for value in box]
        annotation["iscrowd"] = 1 if annotation.get("iscrowd") else 0
        if not isinstance(annotation.get("area"), int | float):
            annotation["area"] = box[2] * box[3]
    return content


def _as_float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:  # JSON has integers of any length
        return math.inf


class CocoImages(Dataset):
    """The images of one split with their boxes, category ids made contiguous labels 1..N (0 is background).

    Boxes are checked once, here: clipped to their image, and left out where a coordinate is not finite or less than
    a pixel a side remains; crowds are left out too. `report` counts what was done. Everything an image needs lies
    in flat arrays, so workers share one copy.

    An item is (image, target): uint8 [3, H, W] RGB, and {"boxes": float [n, 4] x1 y1 x2 y2 in pixels, "labels":
    int64 [n], "image_id": int}. An index gives the image as it is; a `Draw` gives it through `transform` under the
    draw's seed. A broken image gives a BadImage in place of the pair (a worker's exception would lose its message);
    with `skip_bad_images` a Draw gives the next readable image instead, the failures named in target["skipped"].
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
    ):
        content = read_annotations(annotations)
        self.folder, self.annotation_file = Path(images), Path(annotations)
        self.transform, self.skip_bad_images = transform, skip_bad_images
        self.categories = {c["id"]: c["name"] for c in sorted(content["categories"], key=lambda c: c["id"])}
        if categories is not None and dict(categories) != self.categories:
            raise ValueError(_category_difference(annotations, self.categories, categories))
        self.report = Counter()

        labels = {category: i + 1 for i, category in enumerate(self.categories)}
        sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
        boxes: dict[int, list] = {image["id"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            if annotation["iscrowd"]:
                self.report["crowds"] += 1
                continue
            box = self._checked_box(annotation["bbox"], *sizes[annotation["image_id"]])
            if box is not None:
                boxes[annotation["image_id"]].append((*box, labels[annotation["category_id"]]))
        kept = [image for image in content["images"] if keep_empty or boxes[image["id"]]]
        self.report["images without a usable box"] = len(content["images"]) - len(kept)
        if not kept:
            raise ValueError(f"annotations {annotations}: no image {'' if keep_empty else 'with a usable box '}in it")
        self._check_files_exist([image["file_name"] for image in kept])

        self.file_names = np.array([image["file_name"].encode() for image in kept])
        self.image_ids = np.array([image["id"] for image in kept], dtype=np.int64)
        self.widths_heights = np.array([sizes[image["id"]] for image in kept], dtype=np.int32)
        self.offsets = np.cumsum([0, *(len(boxes[image["id"]]) for image in kept)])
        rows = [row for image in kept for row in boxes[image["id"]]]
        self.rows = np.array(rows, dtype=np.float32).reshape(-1, 5)  # x1, y1, x2, y2, label

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the annotation file, in hex: tells a run that is resumed whether its data are the same."""
        return hashlib.sha256(self.annotation_file.read_bytes()).hexdigest()

    @property
    def class_names(self) -> list[str]:
        """Names by label, label 1 first."""
        return list(self.categories.values())

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, item: int | Draw):
        if not isinstance(item, Draw):
            return self._load(item)
        skipped = []
        for step in range(len(self)):
            sample = self._load((item.index + step) % len(self))
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
        return image, {**target, "skipped": skipped}

    def path(self, index: int) -> Path:
        return self.folder / self.file_names[index].decode()

    def target(self, index: int) -> dict:
        rows = torch.from_numpy(self.rows[self.offsets[index] : self.offsets[index + 1]])
        return {"boxes": rows[:, :4].clone(), "labels": rows[:, 4].long(), "image_id": int(self.image_ids[index])}

    def check_files(self) -> None:
        """Find broken images before training does: empty files, and in a small set whatever cannot be decoded.

        Raises BadImage that names the first of them and their number; with `skip_bad_images` they are only counted
        in `report`. A set over 64 MB is not decoded: that would take minutes, and training names what it meets.
        """
        sizes = {i: p.stat().st_size for i in range(len(self)) if (p := self.path(i)).is_file()}
        empty = [i for i, size in sizes.items() if size == 0]
        suspects = sizes if sum(sizes.values()) <= SMALL_SET else empty
        bad = [sample for i in suspects if isinstance(sample := self._load(i), BadImage)]
        if bad and not self.skip_bad_images:
            others = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
            raise BadImage(f"{bad[0]}{others}; --skip-bad-images goes on without")
        if bad:
            self.report["images that cannot be read"] = len(bad)

    def summary(self) -> str:
        """One line: what there is, and what was clipped or left out."""
        done = ", ".join(f"{count} {what}" for what, count in self.report.items() if count)
        line = f"{len(self)} images, {len(self.rows)} boxes, {len(self.categories)} classes in {self.folder}"
        return f"{line}; left out or mended: {done}" if done else line

    def _load(self, index: int):
        try:
            image = read_image(self.path(index), tuple(self.widths_heights[index]))
        except BadImage as error:
            return error
        return image, self.target(index)

    def _checked_box(self, xywh: list, width: int, height: int) -> tuple[float, float, float, float] | None:
        x, y, w, h = xywh
        if not all(map(math.isfinite, xywh)):
            self.report["boxes that are not finite"] += 1
            return None
        if w <= 0 or h <= 0:
            self.report["boxes of zero or negative size"] += 1
            return None
        x1, y1 = max(x, 0.0), max(y, 0.0)
        x2, y2 = min(x + w, float(width)), min(y + h, float(height))
        if x2 - x1 < MIN_BOX_SIDE or y2 - y1 < MIN_BOX_SIDE:
            self.report["boxes under a pixel or outside their image"] += 1
            return None
        if max(x1 - x, y1 - y, x + w - x2, y + h - y2) > 0.5:  # half a pixel beyond is rounding
            self.report["boxes clipped to their image"] += 1
        return x1, y1, x2, y2

    def _check_files_exist(self, names: list[str]) -> None:
        if any("/" in name for name in names):
            missing = [name for name in names if not (self.folder / name).is_file()]
        else:
            with os.scandir(self.folder) as entries:  # one listing: 118,000 single look-ups are slow on a network
                there = {entry.name for entry in entries}
            missing = [name for name in names if name not in there]
        if len(missing) == len(names):
            raise ValueError(
                f"annotations {self.annotation_file}: none of its {len(names)} images (the first is {names[0]}) is in "
                f"{self.folder}; is it the file of another split?"
            )
        if missing and not self.skip_bad_images:
            raise BadImage(
                f"{self.folder} lacks {len(missing)} of {len(names)} images that {self.annotation_file} names: "
                f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}; --skip-bad-images goes on without them"
            )
        if missing:
            self.report["images missing"] = len(missing)


def _category_difference(path, found: Mapping[int, str], wanted: Mapping[int, str]) -> str:
    differing = [i for i in sorted({*found, *wanted}) if found.get(i) != wanted.get(i)]
    first = differing[0]
    return (
        f"annotations {path}: categories differ from those the detector was made for in {len(differing)} of "
        f"{len({*found, *wanted})}; id {first} is {found.get(first)!r} here, {wanted.get(first)!r} there"
    )


def read_image(path: str | os.PathLike, size: tuple[int, int] | None = None) -> Tensor:
    """Read an image file of any colour mode as uint8 [3, H, W], RGB; 16 bits are brought to 8, alpha is dropped.

    size: (width, height) the annotations give, if any. An image with an EXIF orientation is turned upright unless
    it is the stored, unturned image that has this size: boxes are in the coordinates the annotator saw. Raises
    BadImage, naming the file, if it is missing, empty, truncated, no image, or of another size.
    """
    try:
        with Image.open(path) as image:
            turn = image.getexif().get(EXIF_ORIENTATION, 1) != 1
            if turn and size is not None and image.size == size != image.size[::-1]:
                turn = image.getexif().get(EXIF_ORIENTATION) < 5  # 5..8 swap width and height, and size says no
            pixels = to_rgb(ImageOps.exif_transpose(image) if turn else image)
    except FileNotFoundError:
        raise BadImage(f"image {path}: no such file") from None
    except UnidentifiedImageError:
        empty = os.path.isfile(path) and os.path.getsize(path) == 0
        raise BadImage(f"image {path}: {'empty file' if empty else 'not an image'}") from None
    except Exception as error:  # whatever its decoders raise: OSError, SyntaxError, RuntimeError, struct.error, ..
        raise BadImage(f"image {path}: cannot be decoded ({error})") from None
    if max(pixels.size) > MAX_ASPECT * min(pixels.size):
        raise BadImage(f"image {path}: {pixels.size[0]} x {pixels.size[1]} is too narrow to be resized")
    if size is not None and pixels.size != tuple(size):
        raise BadImage(f"image {path}: is {pixels.size[0]} x {pixels.size[1]}, annotations say {size[0]} x {size[1]}")
    return pil_to_tensor(pixels)
