"""The one index of a data set's images and boxes, in flat arrays, and COCO instances files read into it."""

import contextlib
import hashlib
import json
import math
import mmap
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor

from resbackbone.checks import UserError


class Annotations(NamedTuple):
    """N images and M annotations, of whatever format: 49 bytes per annotation, 16 per image plus the longest name.

    Flat tensors instead of objects, so that forked and spawned workers share one copy.
    """

    image_ids: Tensor  # int64 [N], in the file's order
    widths_heights: Tensor  # int32 [N, 2], pixels
    names: Tensor  # uint8 [N, longest]: the file names in UTF-8, zeros behind shorter ones
    categories: dict[int, str]  # names by id, sorted by id
    image_indices: Tensor  # int32 [M]: the index of each annotation's image
    labels: Tensor  # int32 [M]: the position of its category in `categories`, from 1
    boxes_xywh: Tensor  # float64 [M, 4] as in the file: x, y, width, height in pixels; may hold NaN or infinity
    areas: Tensor  # float64 [M]: the file's, or else width * height
    crowds: Tensor  # bool [M]
    grouping: dict[int, str]  # categories left out because they only group the others
    notes: tuple[str, ...] = ()  # what a reader assumed or passed over

    def file_name(self, index: int) -> str:
        return self.names[index].numpy().tobytes().rstrip(b"\0").decode()

    def file_names(self) -> list[str]:
        return [name.decode() for name in self._bytes().tolist()]

    def by_name(self) -> "Annotations":
        """The same sorted by file name: the same set in another format then has the same order, and draws the same."""
        order = np.argsort(self._bytes(), kind="stable")
        places = torch.from_numpy(np.argsort(order).astype(np.int32))
        image_indices = places[self.image_indices.long()]
        rows = torch.argsort(image_indices, stable=True)
        if (np.diff(order) == 1).all() and (rows.diff() == 1).all():
            return self
        return self._replace(
            **{name: getattr(self, name)[torch.from_numpy(order)] for name in OF_IMAGES},
            **{name: getattr(self, name)[rows] for name in OF_BOXES},
            image_indices=image_indices[rows],
        )

    def digest(self) -> str:
        """The hash of all that is trained on and evaluated against, in hexadecimal digits."""
        digest = hashlib.sha256(repr(self.categories).encode())
        for name in (*OF_IMAGES, "image_indices", *OF_BOXES):
            digest.update(np.ascontiguousarray(getattr(self, name).numpy()).data)
        return digest.hexdigest()

    def _bytes(self) -> np.ndarray:
        return np.ascontiguousarray(self.names.numpy()).view(f"S{self.names.shape[1]}")[:, 0]


OF_IMAGES = ("image_ids", "widths_heights", "names")
OF_BOXES = ("labels", "boxes_xywh", "areas", "crowds")


class CocoFile(NamedTuple):
    """The reader of a COCO instances file; its images are opened later."""

    path: Path

    def read(self, bad: list[str] | None) -> Annotations:
        return read_annotations(self.path)

    def count_images(self) -> int:
        return count_images(self.path)


def read_annotations(path: str | os.PathLike) -> Annotations:
    """Read and check a COCO instances file. Missing `iscrowd` and `area` become 0 and width * height.

    Unused fields such as segmentations are skipped, and so is the category 0 that Roboflow puts first: it has no boxes,
    and its name is the others' supercategory. Numbers may be spelled as text ("3"), ids with leading zeros
    ("000000000131" is 131), whole numbers as floats (3.0), and names of categories as numbers. File names are as in the
    file and may lead out of a folder (`leaves_its_folder`).

    Raises UserError, with the path, the place in the file, the id and the value, if the file is not JSON, lacks a
    field, has a value of another type, an `iscrowd` besides 0 and 1, a `bbox_mode` (detectron2's) besides 1 or an
    `area` that is not finite, repeats an id, or refers to an unknown image or category.
    """
    try:
        return _flat(*_decoded(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, msgspec.DecodeError) as error:
        raise UserError(f"{path}: not JSON in UTF-8 ({error}); save it in UTF-8") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def count_images(path: str | os.PathLike) -> int:
    """The number of images in an instances file, without parsing the rest. Raises as `read_annotations` does."""
    try:
        return len(msgspec.json.decode(_mapped(path), type=_Sections).images)
    except (msgspec.DecodeError, UnicodeDecodeError, OSError):
        return len(read_annotations(path).image_ids)


def first_image(path: str | os.PathLike) -> str | None:
    """The first image's name in an instances file, "" without an image, None if it is no instances file."""
    try:
        text = _mapped(path)
        try:
            records = [json.loads(bytes(image)) for image in msgspec.json.decode(text, type=_Sections).images[:1]]
        except (msgspec.DecodeError, UnicodeDecodeError):  # NaN, Infinity or UTF-16, or no instances file
            records = msgspec.convert(json.loads(bytes(text)), type=_Sections).images[:1]
        return str(records[0]["file_name"]) if records else ""
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def select_images(annotations: Annotations, chosen: np.ndarray) -> Annotations:
    """The images where `chosen`, bool [N], is True, with their annotations and all categories, in the same order."""
    rows = torch.from_numpy(chosen)[annotations.image_indices.long()]
    places = torch.from_numpy(np.cumsum(chosen, dtype=np.int32) - 1)  # among the chosen
    of_images = {name: getattr(annotations, name)[chosen] for name in OF_IMAGES}
    of_boxes = {name: getattr(annotations, name)[rows] for name in OF_BOXES}
    image_indices = places[annotations.image_indices[rows].long()]
    return annotations._replace(**of_images, image_indices=image_indices, **of_boxes)


def indexed(
    names: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    categories: dict[int, str],
    objects: Sequence[np.ndarray],
    notes: Sequence[str] = (),
    *,
    digits: int,
) -> Annotations:
    """The index of images that have names and (width, height) but no ids: these count from 1 in the order of names.

    objects: for each image float [n, 6], category id, box x y width height in pixels, and 1 for a crowd. Boxes are
    rounded to `digits` decimals, which removes what is left of computing them.
    """
    rows = np.concatenate([np.empty((0, 6)), *objects])
    images = np.repeat(np.arange(len(names), dtype=np.int32), [len(of_image) for of_image in objects])
    boxes_xywh = torch.from_numpy(np.round(rows[:, 1:5], digits))
    labels = np.searchsorted(sorted(categories), rows[:, 0]) + 1
    index = Annotations(
        torch.zeros(len(names), dtype=torch.int64),
        torch.tensor(sizes, dtype=torch.int32).reshape(-1, 2),
        packed(names),
        dict(sorted(categories.items())),
        torch.from_numpy(images),
        torch.from_numpy(labels.astype(np.int32)),
        boxes_xywh,
        boxes_xywh[:, 2] * boxes_xywh[:, 3],
        torch.from_numpy(rows[:, 5] == 1),
        {},
        tuple(notes),
    ).by_name()
    return index._replace(image_ids=torch.arange(1, len(names) + 1))


def packed(names: Sequence[str]) -> Tensor:
    """`Annotations.names` of these names. Raises UserError if one is not in UTF-8."""
    try:
        return torch.from_numpy(np.array([name.encode() for name in names], bytes)[:, None].view(np.uint8))
    except UnicodeEncodeError as error:
        raise UserError(
            f"{error.object!r}: this file's name is not in UTF-8; rename it, or set PYTHONUTF8=1 if it is"
        ) from None


def leaves_its_folder(name: str) -> bool:
    """Whether a file name is absolute or leads upwards, so that it must not be opened as it stands."""
    return os.path.isabs(name) or (".." in name and ".." in Path(name).parts)


_Id = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
_Side = Annotated[int, msgspec.Meta(gt=0, lt=2**31)]
_Name = Annotated[str, msgspec.Meta(max_length=1000)]  # one long name would take its bytes for every image


class _Image(msgspec.Struct, gc=False):
    id: _Id
    file_name: _Name
    width: _Side
    height: _Side


class _Annotation(msgspec.Struct, gc=False):
    image_id: _Id
    category_id: _Id
    bbox: tuple[float, float, float, float]
    id: _Id | msgspec.UnsetType = msgspec.UNSET
    iscrowd: bool | int | float | None = 0
    area: float | None = None
    bbox_mode: int | str | None = None


class _Category(msgspec.Struct, gc=False):
    id: _Id
    name: str | int
    supercategory: object = None


class _Sections(msgspec.Struct):
    images: list[msgspec.Raw]
    annotations: msgspec.Raw
    categories: msgspec.Raw


class _File(msgspec.Struct):
    images: list[_Image]
    categories: list[_Category]
    annotations: list[msgspec.Raw]  # decoded one by one: COCO's 860,000 at once take 250 MB more


class _LenientFile(_File):
    annotations: list[_Annotation]  # type: ignore[assignment]


_ROW = np.dtype(
    [("id", "i8"), ("image_id", "i8"), ("category_id", "i8"), ("box", "f8", 4), ("area", "f8"), ("crowd", "?")]
)


def _decoded(path: str | os.PathLike) -> tuple[list[_Image], list[_Category], Iterable[_Annotation], int]:
    """The file's three lists, types checked, and the number of annotations. Raises UserError without the path."""
    text = _mapped(path)
    try:
        file = msgspec.json.decode(text, type=_File, strict=False)
        return file.images, file.categories, _one_by_one(file.annotations), len(file.annotations)
    except msgspec.ValidationError as error:
        refused: msgspec.ValidationError | None = error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        refused = None  # strict JSON has no NaN, Infinity or UTF-16; Python's reader accepts them or names the error
    try:
        content = json.loads(bytes(text))
        if isinstance(content, dict):
            for section in ("images", "categories", "annotations"):
                if isinstance(records := content.get(section), list):
                    content[section] = [_with_plain_ids(record) for record in records]
        lenient = msgspec.convert(content, type=_LenientFile, strict=False)
    except msgspec.ValidationError as error:
        raise _refusal(refused or error, text) from None
    except (ValueError, RecursionError) as error:  # JSON and Unicode errors, integers of over 4300 digits
        if refused is not None:
            raise _refusal(refused, text) from None
        if isinstance(error, UnicodeDecodeError):
            raise
        raise UserError(f"not JSON ({error}); export or download it again") from None
    return lenient.images, lenient.categories, lenient.annotations, len(lenient.annotations)


def _one_by_one(annotations: list[msgspec.Raw]) -> Iterator[_Annotation]:
    decode = msgspec.json.Decoder(_Annotation, strict=False).decode
    for i, text in enumerate(annotations):
        try:
            yield decode(text)
        except msgspec.ValidationError as error:
            with contextlib.suppress(msgspec.ValidationError, ValueError, RecursionError):
                record = json.loads(bytes(text))
                if (plain := _with_plain_ids(record)) is not record:
                    yield msgspec.convert(plain, _Annotation, strict=False)
                    continue
            what, _, inside = str(error).partition(" - at `$")
            raise _refusal(f"{what} - at `$.annotations[{i}]{inside or '`'}", text) from None


def _with_plain_ids(record: object) -> object:
    """The record with its ids' leading zeros dropped, which no JSON number has: "000000000131" as 131."""
    if not isinstance(record, dict):
        return record
    zeros = {
        key: record[key].lstrip("0") or "0"
        for key in ("id", "image_id", "category_id")
        if isinstance(record.get(key), str) and re.fullmatch("0[0-9]+", record[key])
    }
    return {**record, **zeros} if zeros else record


_SIZE = "; add each image's width and height in pixels, as PIL.Image.open(FILE).size gives them"
INSTEAD = {  # what to write for a field that is missing or of another type
    "width": _SIZE,
    "height": _SIZE,
    "bbox": "; a bbox is [x, y, width, height] in pixels from the image's upper left corner",
    "iscrowd": "; iscrowd is 0 or 1, and 0 where it is left out",
    "area": "; area is a number, and width * height where it is left out",
}


def _refusal(error: object, text: bytes | mmap.mmap | msgspec.Raw) -> UserError:
    """The error for a value of another type. `text`, of the file or of the record alone, shows its id and value."""
    message = f"not a COCO instances file: {error}"
    if place := re.search(r"`\$\.(\w+)\[(\d+)\]\.?(\w*)", message):
        section, i, key = place.groups()
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            record = json.loads(bytes(text))
            record = record if isinstance(text, msgspec.Raw) else record[section][int(i)]
            named = {name: record[name] for name in dict.fromkeys(("id", key)) if name in record}
            message += f" ({', '.join(f'{name} {repr(value)[:100]}' for name, value in named.items())})"
        if "got `str`" in message and key in ("id", "image_id", "category_id"):
            listed = {"image_id": "images", "category_id": "categories"}.get(key, section)
            message += f"; ids are whole numbers: number the {listed} 1, 2, .. and refer to them by these numbers"
    field = re.search(r"missing required field `(\w+)`|\[\d+\]\.(\w+)", message)
    message += INSTEAD.get(field[1] or field[2], "") if field else ""
    return UserError(message)


def _mapped(path: str | os.PathLike) -> mmap.mmap | bytes:
    """The file's bytes, mapped rather than read: processes that start together share its pages."""
    with open(path, "rb") as file:
        empty = os.fstat(file.fileno()).st_size == 0  # an empty file cannot be mapped
        return b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _flat(
    images: list[_Image], categories: list[_Category], annotations: Iterable[_Annotation], count: int
) -> Annotations:
    for i, image in enumerate(images):
        if re.search("[\0\ud800-\udfff]", image.file_name):
            raise UserError(f"images[{i}] has the file_name {image.file_name!r}, which no file can have")
    if not categories:
        raise UserError("the list of categories is empty")
    numbers = np.array([(image.id, image.width, image.height) for image in images], np.int64).reshape(-1, 3)
    image_ids, category_ids = numbers[:, 0].copy(), np.array([category.id for category in categories], np.int64)
    rows = np.fromiter(map(_row, range(1, count + 1), annotations), _ROW, count)
    for section, ids in (("images", image_ids), ("categories", category_ids), ("annotations", rows["id"])):
        _check_unique(section, ids)
    by_id = {category.id: str(category.name) for category in sorted(categories, key=lambda category: category.id)}
    image_indices = _places("image_id", rows["image_id"], "images", image_ids)
    _places("category_id", rows["category_id"], "categories", category_ids)
    groups = [category.supercategory for category in categories if category.id != 0]
    grouping = {}
    if 0 in by_id and by_id[0] in groups and not (rows["category_id"] == 0).any():
        grouping[0] = by_id.pop(0)
    labels = np.searchsorted(list(by_id), rows["category_id"]) + 1
    boxes, areas, crowds = (torch.from_numpy(rows[name].copy()) for name in ("box", "area", "crowd"))
    return Annotations(
        torch.from_numpy(image_ids),
        torch.from_numpy(numbers[:, 1:].astype(np.int32)),
        packed([image.file_name for image in images]),
        by_id,
        torch.from_numpy(image_indices.astype(np.int32)),
        torch.from_numpy(labels.astype(np.int32)),
        boxes,
        areas,
        crowds,
        grouping,
    )


def _row(number: int, annotation: _Annotation) -> tuple:
    box, area, crowd = annotation.bbox, annotation.area, annotation.iscrowd
    identity = number if annotation.id is msgspec.UNSET else annotation.id
    if crowd not in (0, 1, None):
        raise UserError(f"annotations[{number - 1}] (id {identity}) has the iscrowd {crowd}, which is 0 or 1")
    if annotation.bbox_mode is not None and annotation.bbox_mode not in (1, "1"):  # detectron2's; 0 is x1, y1, x2, y2
        raise UserError(
            f"annotations[{number - 1}] (id {identity}) has the bbox_mode {annotation.bbox_mode!r}, and COCO's boxes "
            "are x, y, width, height: convert them and write bbox_mode 1, or leave it out"
        )
    if area is not None and not math.isfinite(area):  # pycocotools ignores boxes of negative areas
        raise UserError(
            f"annotations[{number - 1}] (id {identity}) has the area {area}; give a number, or leave it out for "
            "width * height"
        )
    return (
        identity,
        annotation.image_id,
        annotation.category_id,
        box,
        box[2] * box[3] if area is None else area,
        bool(crowd),
    )


def _check_unique(section: str, ids: np.ndarray) -> None:
    order = np.argsort(ids, kind="stable")
    repeats = order[1:][ids[order[1:]] == ids[order[:-1]]]
    if len(repeats):
        raise UserError(f"{section}[{repeats.min()}] repeats the id {ids[repeats.min()]}")


def _places(key: str, wanted: np.ndarray, section: str, ids: np.ndarray) -> np.ndarray:
    """The index in `ids` of each of `wanted`, the annotations' `key`. Raises UserError if one is missing."""
    known = np.isin(wanted, ids)
    if not known.all():
        i = np.argmin(known)
        raise UserError(f"annotations[{i}] has the {key} {wanted[i]}, which is not in {section} ({len(ids)} ids)")
    order = np.argsort(ids)
    return order[np.searchsorted(ids, wanted, sorter=order)]
