"""COCO instances files, checked and held in flat arrays: the only place that reads annotation files."""

import json
import math
import mmap
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor

from resbackbone.checks import UserError


class Annotations(NamedTuple):
    """What an instances file of N images and M annotations says: 49 bytes an annotation, 24 an image beside its name.

    Nothing here is an object an image or a box, so processes that are forked share it; tensors, so that those
    that are spawned do (torch hands them over in shared memory).
    """

    image_ids: Tensor  # int64 [N], in the file's order
    widths_heights: Tensor  # int32 [N, 2], pixels
    names: Tensor  # uint8: the file names in UTF-8, one after another
    name_offsets: Tensor  # int64 [N + 1]: where in `names` each begins, and the last ends
    categories: dict[int, str]  # names by id, in the order of the ids
    image_indices: Tensor  # int32 [M]: which of the N images an annotation is of
    labels: Tensor  # int32 [M]: its category's place in `categories`, from 1
    boxes_xywh: Tensor  # float64 [M, 4] as the file has them: x, y, width, height in pixels; may not be finite
    areas: Tensor  # float64 [M]: the file's, or width * height where it gives none
    crowds: Tensor  # bool [M]
    grouping: dict[int, str]  # categories that are left out, for they only group the others

    def file_name(self, index: int) -> str:
        start, end = self.name_offsets[index : index + 2].tolist()
        return self.names[start:end].numpy().tobytes().decode()

    def file_names(self) -> list[str]:
        names, offsets = self.names.numpy().tobytes(), self.name_offsets.tolist()
        return [names[start:end].decode() for start, end in zip(offsets, offsets[1:], strict=False)]


def read_annotations(path: str | os.PathLike) -> Annotations:
    """Read a COCO instances file and check its form; missing `iscrowd` and `area` are filled in (0, and w * h).

    Fields that are not used, such as segmentations, are skipped, and so is the category 0 that Roboflow puts before the
    real ones: it has no boxes, and its name is their supercategory. Raises ValueError in one sentence for what is not
    JSON, lacks a key, repeats an id, or refers to an image or category that is not in the file.
    """
    path = Path(path)
    try:
        return _flat(*_decoded(path))
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError, OSError):
        pass  # the careful way says what is wrong, or takes what JSON proper has not: NaN, Infinity, UTF-16
    return _flat(*_checked(path))


class _Image(msgspec.Struct, gc=False):
    id: int
    file_name: str
    width: int
    height: int


class _Annotation(msgspec.Struct, gc=False):
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    id: int | msgspec.UnsetType = msgspec.UNSET
    iscrowd: bool | int | float | None = 0
    area: float | None = None


class _Category(msgspec.Struct, gc=False):
    id: int
    name: str
    supercategory: object = None


class _Count(msgspec.Struct):
    images: list[msgspec.Raw]


class _File(msgspec.Struct):
    images: list[_Image]
    annotations: list[msgspec.Raw]  # decoded one at a time: 860,000 at once would take 250 MB more
    categories: list[_Category]


_ROW = np.dtype(
    [
        ("id", np.int64),
        ("image_id", np.int64),
        ("category_id", np.int64),
        ("box", np.float64, 4),
        ("area", np.float64),
        ("crowd", np.bool_),
    ]
)


def _decoded(path: Path) -> tuple[list[_Image], Iterable[_Annotation], int, list[_Category]]:
    """The file's three lists and the number of annotations, types checked; an exception for what is not as wanted."""
    read = msgspec.json.decode(_mapped(path), type=_File)
    decode = msgspec.json.Decoder(_Annotation).decode
    return read.images, map(decode, read.annotations), len(read.annotations), read.categories


def _mapped(path: str | os.PathLike) -> mmap.mmap:
    """The file's bytes, mapped and not read: processes that start together share its pages."""
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _flat(
    images: list[_Image], annotations: Iterable[_Annotation], count: int, categories: list[_Category]
) -> Annotations:
    """Arrays of what was read; an exception, without words for a user, for what `_checked` has words for."""
    numbers = np.array([(image.id, image.width, image.height) for image in images], np.int64).reshape(-1, 3)
    sizes, names = numbers[:, 1:], [image.file_name for image in images]
    if ((sizes <= 0) | (sizes >= 2**31)).any() or any(map(_leaves_its_folder, names)) or not categories:
        raise ValueError
    encoded = [name.encode() for name in names]
    rows = np.fromiter(map(_row, range(1, count + 1), annotations), _ROW, count)
    _positions(rows["id"], wanted=rows["id"][:0])  # none comes twice
    by_id = {category.id: category.name for category in sorted(categories, key=lambda category: category.id)}
    _positions(np.array([category.id for category in categories], np.int64), wanted=rows["id"][:0])
    grouping = {0: by_id.pop(0)} if _only_groups(0, categories, rows["category_id"]) else {}
    labels = _positions(np.array(list(by_id), np.int64), rows["category_id"]) + 1
    image_ids = numbers[:, 0].copy()
    return Annotations(
        torch.from_numpy(image_ids),
        torch.from_numpy(sizes.astype(np.int32)),
        torch.from_numpy(np.array(bytearray(b"".join(encoded)))),
        torch.from_numpy(np.cumsum([0, *map(len, encoded)], dtype=np.int64)),
        by_id,
        torch.from_numpy(_positions(image_ids, rows["image_id"]).astype(np.int32)),
        torch.from_numpy(labels.astype(np.int32)),
        torch.from_numpy(rows["box"].copy()),
        torch.from_numpy(rows["area"].copy()),
        torch.from_numpy(rows["crowd"].copy()),
        grouping,
    )


def select_images(annotations: Annotations, chosen: np.ndarray) -> Annotations:
    """Some of the images, bool [N], with their annotations and all the categories, in the same order."""
    rows = torch.from_numpy(chosen)[annotations.image_indices.long()]
    places = torch.from_numpy(np.cumsum(chosen, dtype=np.int32) - 1)  # among the chosen
    names = [name.encode() for name, there in zip(annotations.file_names(), chosen, strict=True) if there]
    return annotations._replace(
        image_ids=annotations.image_ids[chosen],
        widths_heights=annotations.widths_heights[chosen],
        names=torch.from_numpy(np.array(bytearray(b"".join(names)))),
        name_offsets=torch.from_numpy(np.cumsum([0, *map(len, names)], dtype=np.int64)),
        image_indices=places[annotations.image_indices[rows].long()],
        labels=annotations.labels[rows],
        boxes_xywh=annotations.boxes_xywh[rows],
        areas=annotations.areas[rows],
        crowds=annotations.crowds[rows],
    )


def count_images(path: str | os.PathLike) -> int:
    """How many images an instances file lists; the rest of it is looked at only if it is not quite as wanted."""
    try:
        return len(msgspec.json.decode(_mapped(path), type=_Count).images)
    except (msgspec.MsgspecError, ValueError, OSError):  # ValueError: an empty file cannot be mapped
        return len(read_annotations(path).image_ids)


def _only_groups(category_id: int, categories: list[_Category], used: np.ndarray) -> bool:
    names = {category.name for category in categories if category.id == category_id}
    others = [category for category in categories if category.id != category_id]
    return not (used == category_id).any() and any(other.supercategory in names for other in others)


def _row(number: int, annotation: _Annotation) -> tuple:
    box, area = annotation.bbox, annotation.area
    return (
        number if annotation.id is msgspec.UNSET else annotation.id,
        annotation.image_id,
        annotation.category_id,
        box,
        box[2] * box[3] if area is None else area,
        bool(annotation.iscrowd),
    )


def _positions(ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where in `ids` each of `wanted` is; ValueError if an id comes twice or a wanted one not at all."""
    order = np.argsort(ids, kind="stable")
    ordered = ids[order]
    if (ordered[1:] == ordered[:-1]).any() or (len(wanted) and not len(ids)):
        raise ValueError
    if not len(wanted):
        return np.zeros(0, np.int64)
    places = np.minimum(np.searchsorted(ordered, wanted), len(ids) - 1)
    if (ordered[places] != wanted).any():
        raise ValueError
    return order[places]


def _leaves_its_folder(name: str) -> bool:
    return os.path.isabs(name) or "\0" in name or (".." in name and ".." in Path(name).parts)


def _checked(path: Path) -> tuple[list[_Image], Iterable[_Annotation], int, list[_Category]]:
    """As `_decoded`, by Python's own JSON and entry by entry; ValueError says what is wrong, and where."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"annotations {path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"annotations {path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"annotations {path}: a JSON object with images, annotations, categories is wanted")
    needed = {
        "images": {"id": int, "file_name": str, "width": int, "height": int},
        "annotations": {"id": int, "image_id": int, "category_id": int, "bbox": list},
        "categories": {"id": int, "name": str},
    }
    found: dict[str, set] = {}
    for section, keys in needed.items():
        entries = content.get(section)
        if not isinstance(entries, list):
            raise UserError(f"annotations {path}: no list {section!r}; wanted are {', '.join(needed)}")
        seen = set()
        for i, entry in enumerate(entries):
            if section == "annotations" and isinstance(entry, dict):
                entry.setdefault("id", i + 1)
            for key, kind in keys.items():
                value = entry.get(key) if isinstance(entry, dict) else None
                if not isinstance(value, kind) or isinstance(value, bool):
                    raise UserError(f"annotations {path}: {section}[{i}] has no {key!r} of type {kind.__name__}")
            if not -(2**63) <= entry["id"] < 2**63:
                raise UserError(f"annotations {path}: {section}[{i}] has the id {entry['id']}, over 64 bits")
            if entry["id"] in seen:
                raise UserError(f"annotations {path}: {section}[{i}] repeats the id {entry['id']}")
            seen.add(entry["id"])
        found[section] = seen
    for i, image in enumerate(content["images"]):
        if not (0 < image["width"] < 2**31 and 0 < image["height"] < 2**31):
            raise UserError(f"annotations {path}: images[{i}] has size {image['width']} x {image['height']}")
        if _leaves_its_folder(image["file_name"]):
            raise UserError(f"annotations {path}: images[{i}] file_name {image['file_name']!r} leaves its folder")
    if not content["categories"]:
        raise UserError(f"annotations {path}: the list of categories is empty")
    known = sorted(found["categories"])
    for i, annotation in enumerate(content["annotations"]):
        if annotation["image_id"] not in found["images"]:
            raise UserError(f"annotations {path}: annotations[{i}] is of image {annotation['image_id']}, not in images")
        if annotation["category_id"] not in found["categories"]:
            raise UserError(
                f"annotations {path}: annotations[{i}] has category_id {annotation['category_id']}, which is not in "
                f"categories ({len(known)} ids, {known[0]}..{known[-1]})"
            )
        box = annotation["bbox"]
        if len(box) != 4 or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in box):
            raise UserError(f"annotations {path}: annotations[{i}] bbox {box} is not four numbers x, y, width, height")
    return (
        [_Image(*(entry[key] for key in _Image.__struct_fields__)) for entry in content["images"]],
        map(_converted, content["annotations"]),
        len(content["annotations"]),
        [_Category(entry["id"], entry["name"], entry.get("supercategory")) for entry in content["categories"]],
    )


def _converted(entry: dict) -> _Annotation:
    area = _as_float(entry["area"]) if isinstance(entry.get("area"), int | float) else None
    box: Any = tuple(map(_as_float, entry["bbox"]))  # four of them
    return _Annotation(entry["image_id"], entry["category_id"], box, entry["id"], bool(entry.get("iscrowd")), area)


def _as_float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:  # JSON has integers of any length
        return math.inf if value > 0 else -math.inf
