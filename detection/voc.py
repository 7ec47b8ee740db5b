"""Pascal VOC's XML annotations: of VOCdevkit, CVAT, Roboflow, labelImg, with the images in JPEGImages/ or beside them.

VOC's boxes name their first and last pixel, counted from 1. Other exporters write edges, counted from 0. The whole data
set decides which is meant: edges, if a corner is 0 or most are written with a decimal point.
"""

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np

from detection.annotations import Annotations, indexed, leaves_its_folder
from detection.splits import SPLIT_NAMES, SPLIT_OF, Found, Split, folders_in, read_lines, report_bad
from resbackbone.checks import UserError
from resbackbone.image_io import SUFFIXES, BadImage, image_sizes

TITLE = "Pascal VOC's layout"
LISTS = {**SPLIT_NAMES, "train": (*SPLIT_NAMES["train"], "trainval")}  # in ImageSets/Main; the first that exists counts
XML_FOLDERS, IMAGE_FOLDERS = ("Annotations", "annotations", "xml", "labels", ""), ("JPEGImages", "images", "Images", "")
THREADS = 8


class Place(NamedTuple):
    """A folder of XML files, and the folder of their images."""

    folder: Path  # whose ImageSets are its lists, and whose name may be a split's
    annotations: Path
    images: Path

    def names(self) -> list[str]:
        """The names of all annotated images, without suffix."""
        found = self.annotations.glob("*.xml" if self.annotations == self.folder else "**/*.xml")
        return sorted(path.relative_to(self.annotations).with_suffix("").as_posix() for path in found)


def find_voc(folder: Path, lists: Mapping[str, Sequence[str]] = LISTS) -> Found | None:
    """The splits of a folder of VOC's layout, or of several years' such folders in it, by lists or folders' names.

    Without lists, all annotated images are for training, except those in folders below that are called after a split.
    `lists` names those of each split.
    """
    below = folders_in(folder)
    deeper = [path for of in below for path in folders_in(of)]
    deepest = (path for of in deeper for path in folders_in(of))  # archives of VOC in one folder
    places: list[Place] = []
    for path in (folder, *below, *deeper, *deepest):
        if not any(path.is_relative_to(of.folder) for of in places) and (place := _place(path)):
            places.append(place)
    if not places:
        return None
    images: dict[str, list[tuple[Place, str]]] = {split: [] for split in SPLIT_NAMES}
    empty: dict[str, str] = {}
    sources: dict[str, Path] = {}  # for messages
    for place in places:
        if folder_of_lists := _folder_of_lists(place.folder, lists):
            for split, names in lists.items():
                file = next((file for name in names if (file := folder_of_lists / f"{name}.txt").is_file()), None)
                of_list = _listed(file, place) if file else []
                images[split] += [(place, name) for name in of_list]
                sources.setdefault(split, file or place.annotations)
                empty |= {split: f"no image in {file.name}"} if file and not of_list else {}
        else:
            around = place.folder.relative_to(folder).parts[::-1]
            for name in place.names():
                called = (SPLIT_OF[part] for part in (*name.split("/")[:-1], *around) if part in SPLIT_OF)
                images[next(called, "train")].append((place, name))
    splits = {}
    for split, of_split in images.items():
        if of_split:
            root = Path(os.path.commonpath({place.images for place, _ in of_split}))
            reader = VocImages(root, tuple(of_split), tuple(places))
            splits[split] = Split(TITLE, root, sources.get(split, of_split[0][0].annotations), reader)
    without = f"no image in ImageSets/Main/{lists['train'][0]}.txt" if sources else "no folder named train"
    missing = {"train": without, **empty}
    return Found(TITLE, splits, {split: says for split, says in missing.items() if split not in splits})


class VocImages(NamedTuple):
    """The reader of the listed images: (place, name) of each; `places` are all of the data set's."""

    root: Path
    images: tuple[tuple[Place, str], ...]
    places: tuple[Place, ...]

    def count_images(self) -> int:
        return len(self.images)

    def read(self, bad: list[str] | None) -> Annotations:
        """See `splits.Reader`. Categories count from 1 over the sorted names in all splits; `difficult` is a crowd."""
        names = {place: place.names() for place in self.places}
        every = dict.fromkeys([*self.images, *((place, name) for place in self.places for name in names[place])])
        files = {place: _image_files(place.images) for place in self.places}
        with ThreadPoolExecutor(THREADS) as pool:
            parsed = dict(zip(every, pool.map(parse, every), strict=True))
        usable = [objects for objects in parsed.values() if not isinstance(objects, BadImage)]
        classes = sorted({name for objects in usable for name in objects.names})
        if not classes:
            why = next((f" ({found})" for found in parsed.values() if isinstance(found, BadImage)), "")
            raise UserError(f"{self.places[0].annotations}: no object in any of the annotations{why}")
        edges = any((objects.corners == 0).any() for objects in usable)
        written = sum(objects.decimals for objects in usable)
        edges = edges or 2 * written > sum(objects.corners.size for objects in usable)

        read: dict[str, tuple[tuple[int, int], np.ndarray]] = {}
        broken: list[BadImage] = []
        other_sizes = 0
        for at in dict.fromkeys(self.images):
            try:
                objects = parsed[at]
                if isinstance(objects, BadImage):
                    raise objects
                image = _image_of(at, objects, files[at[0]])
                size, name = _size(image, objects), image.relative_to(self.root).as_posix()
                if name in read:
                    raise BadImage(f"image {image}: has two annotations; one is {_annotation(*at)}")
            except BadImage as error:
                broken.append(error)
                continue
            other_sizes += objects.size is not None and objects.size not in (size, size[::-1])
            ids = np.array([classes.index(name) + 1 for name in objects.names], np.float64)
            first, sides = objects.corners[:, :2], objects.corners[:, 2:] - objects.corners[:, :2]
            if not edges:
                first, sides = first - 1, np.where(sides > 0, sides + 1, sides)  # of no size, as in BCCD, stays so
            read[name] = size, np.column_stack([ids, first, sides, objects.difficult])
        report_bad(broken, bad)
        counts = {
            "images that cannot be used": len(broken),
            "images of another size than their annotation says": other_sizes,
            "images without an XML file, not used": self._without(names, files, read),
        }
        notes = [f"{what}: {count}" for what, count in counts.items() if count]
        notes.append(f"corners are {'edges, counted from 0' if edges else 'pixels, counted from 1'}")
        sizes, rows = zip(*read.values(), strict=True) if read else ((), ())
        return indexed(list(read), sizes, dict(enumerate(classes, 1)), rows, notes, digits=6)

    def _without(
        self, names: Mapping[Place, list[str]], files: Mapping[Place, Mapping[str, Path]], used: Iterable[str]
    ) -> int:
        """The number of images without an XML file, in folders that have no list of images."""
        listed, found, count = {*self.images}, {self.root / name for name in used}, 0
        for place in {place for place, _ in self.images}:
            own, flat = {*names[place]}, place.annotations == place.folder
            if all((place, name) in listed for name in own):
                here = ((name, image) for name, image in files[place].items() if not (flat and "/" in name))
                count += len({image for name, image in here if own.isdisjoint((name, image.stem))} - found)
        return count


class Objects(NamedTuple):
    """What is read of an XML file."""

    names: list[str]
    corners: np.ndarray  # float [n, 4]: xmin, ymin, xmax, ymax as they are written
    difficult: list[bool]
    decimals: int  # corners written with a decimal point
    size: tuple[int, int] | None  # width, height; None where none is given
    file_name: str


def parse(at: tuple[Place, str]) -> Objects | BadImage:
    """An XML file's objects, or why it cannot be used."""
    place, name = at
    path = _annotation(place, name)
    if leaves_its_folder(name):
        return BadImage(f"image {name!r} in a list of {place.folder}: not the name of an image")
    try:
        root = ElementTree.fromstring(path.read_bytes(), ElementTree.XMLParser(target=WithoutDoctype()))
        if root.tag != "annotation":
            raise UserError(f"its root is <{root.tag}>, where VOC's is <annotation>; export as COCO, YOLO or VOC")
        return _objects(root)
    except OSError as error:
        return BadImage(f"image {path}: cannot be read ({error.strerror})")
    except UserError as error:
        return BadImage(f"image {path}: {error}")
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # LookupError: an unknown encoding
        return BadImage(f"image {path}: not an annotation ({error})")


def _objects(root: ElementTree.Element) -> Objects:
    names, rows, difficult, decimals = [], [], [], 0
    for number, element in enumerate(root.findall("object"), 1):
        name = (element.findtext("name") or "").strip()
        words = [element.findtext(f"bndbox/{corner}") for corner in ("xmin", "ymin", "xmax", "ymax")]
        try:
            left, top, right, bottom = corners = [float(word) for word in words]  # type: ignore[arg-type]
        except (TypeError, ValueError):
            raise UserError(f"object {number} has the corners {words}; they must be four numbers") from None
        if not name or not all(map(math.isfinite, corners)) or right < left or bottom < top:
            raise UserError(f"object {number}, {name!r}, has the corners {words}: no box of a class")
        names.append(name)
        rows.append(corners)
        difficult.append((element.findtext("difficult") or "0").strip() in ("1", "true", "True"))
        decimals += sum("." in str(word) for word in words)
    size = None
    width, height = (root.findtext(f"size/{side}") or "" for side in ("width", "height"))
    if width.strip().isdecimal() and height.strip().isdecimal() and int(width) and int(height):
        size = int(width), int(height)
    file_name = (root.findtext("filename") or "").strip()
    return Objects(names, np.array(rows, np.float64).reshape(-1, 4), difficult, decimals, size, file_name)


class WithoutDoctype(ElementTree.TreeBuilder):
    """Refuses a DOCTYPE, because its entities could expand without bound or read other files."""

    def doctype(self, name: str, public: str | None, system: str | None) -> None:
        raise UserError("it has a DOCTYPE, which VOC files never have")


def _size(image: Path, objects: Objects) -> tuple[int, int]:
    """(width, height) that the boxes refer to: the image's as it is shown, unless the file says as it is stored."""
    shown, stored = image_sizes(image)
    if objects.size is None or objects.size in (shown, stored):
        return objects.size or shown
    reach = objects.corners.reshape(-1, 2).max(0, initial=0)
    if (reach > np.array(shown) + 1).any():
        said, is_ = (f"{width} x {height}" for width, height in (objects.size, shown))
        raise BadImage(f"image {image}: is {is_}, its annotation is of {said}, and its boxes reach out of the image")
    return shown


def _image_of(at: tuple[Place, str], objects: Objects, files: Mapping[str, Path]) -> Path:
    place, name = at
    stems = (name, os.path.splitext(objects.file_name)[0], name.rpartition("/")[2], f"*/{name}")
    if found := next((files[stem] for stem in stems if stem in files), None):
        return found
    raise BadImage(f"image {_annotation(place, name)}: no image {name} in {place.images}")


def _image_files(folder: Path) -> dict[str, Path]:
    """{path below the folder without suffix: image}; one in a folder below that is no split's also as */NAME, if no
    other has its name."""
    found: dict[str, Path] = {}
    for path, _, files in os.walk(folder):
        for file in sorted(files):
            if file.lower().endswith(SUFFIXES):
                image = Path(path, file)
                found.setdefault(image.relative_to(folder).with_suffix("").as_posix(), image)
    last = {name: name.rpartition("/")[2] for name in found}
    counts = Counter(last.values())
    single = (name for name in found if "/" in name and counts[last[name]] == 1)
    return found | {f"*/{last[name]}": found[name] for name in single if SPLIT_OF.keys().isdisjoint(name.split("/"))}


def _place(folder: Path) -> Place | None:
    """The XML files and images of a folder, if it has both."""
    annotations = _folder_with((".xml",), SUFFIXES, folder, XML_FOLDERS)
    images = _folder_with(SUFFIXES, (".xml",), folder, IMAGE_FOLDERS)
    return Place(folder, annotations, images) if annotations and images else None


def _folder_with(suffixes: tuple[str, ...], others: tuple[str, ...], folder: Path, usual: Sequence[str]) -> Path | None:
    """The first of the `usual` names in `folder` with such files, or its only folder with such and none of `others`."""
    for name in usual:
        if _has(folder / name, suffixes, below=bool(name)):
            return folder / name
    rest = [path for path in folders_in(folder) if _has(path, suffixes, below=True)]
    rest = [path for path in rest if not _has(path, others, below=True)]
    return rest[0] if len(rest) == 1 else None


def _has(folder: Path, suffixes: tuple[str, ...], *, below: bool) -> bool:
    """Whether a file with one of these suffixes is in a folder or, if `below`, in a folder in it."""
    if not folder.is_dir():
        return False
    entries = list(os.scandir(folder))
    return any(entry.name.lower().endswith(suffixes) and entry.is_file() for entry in entries) or (
        below and any(_has(Path(entry), suffixes, below=False) for entry in entries if entry.is_dir())
    )


def _folder_of_lists(folder: Path, lists: Mapping[str, Sequence[str]]) -> Path | None:
    """VOC's ImageSets/Main, or where else there is a list of the images to train on."""
    if any((folder / "ImageSets/Main").glob("*.txt")):
        return folder / "ImageSets/Main"
    places = (folder / "ImageSets", folder)
    return next((place for place in places if any((place / f"{name}.txt").is_file() for name in lists["train"])), None)


def _listed(file: Path, place: Place) -> list[str]:
    """The images in a list: each line may end in 1, 0 or -1, as in VOC's lists of a class, and in an image's suffix.

    PaddleDetection's lines are the paths of an image and its annotation.
    """
    names = []
    for line in read_lines(file):
        word = re.sub(r"\s+-?[01]$", "", line)
        word = word.split()[-1] if word.endswith(".xml") else word
        stem = os.path.splitext(word)[0] if word.lower().endswith((*SUFFIXES, ".xml")) else word
        stem = re.sub(rf"^((.*/)?({re.escape(place.annotations.name)}|{re.escape(place.images.name)})/|\./)", "", stem)
        names.append(next((name for name in (line, word) if _annotation(place, name).is_file()), stem))
    return names


def _annotation(place: Place, name: str) -> Path:
    return place.annotations / f"{name}.xml"
