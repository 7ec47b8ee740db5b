"""YOLO's labels, a text file for each image, as Ultralytics, Roboflow, CVAT, Label Studio and darknet write them."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import yaml

from detection.annotations import Annotations, indexed
from detection.file_names import match_names
from detection.splits import SPLIT_NAMES, Found, Split, folders_in, read_lines, report_bad
from resbackbone.checks import UserError
from resbackbone.image_io import SUFFIXES, BadImage, image_sizes

TITLE = "YOLO's layout"
CLASSES = "classes.txt"  # labelImg's and Label Studio's
NAMES_FILES = (CLASSES, "obj.names", "_darknet.labels")  # the last is Roboflow's
FOLDERS = ("images/{}", "{}/images", "{}", "images/{}2017")  # of a split's images, without a description
CLASSES_IN = ("", "labels", "labels/train", "train/labels", "train", "images", "images/train")
KEYS = {"train": ("train",), "val": ("val", "valid"), "test": ("test",)}
EXCESS = 0.01  # of the image's side by which a coordinate may be out of it
LINE = "a line is: class x_center y_center width height, in parts of the image from 0 to 1, or class x1 y1 x2 y2 x3 .."
THREADS = 8


def find_yolo(folder: Path, file: Path | None = None) -> Found | None:
    """The splits that data.yaml (or `file`, or darknet's obj.data) names, or those of the folders images/ and labels/.

    Paths in it that lead nowhere mean the longest end of them that is in `folder`: Roboflow writes ../train/images for
    train/images. Raises UserError if the classes have no names.
    """
    file = file or _described(folder)
    if file is not None:
        content = _content(file)
        names, notes = _names(content, file)
        bases = [file.parent / content["path"]] if isinstance(content.get("path"), str) else []
        bases.append(file.parent)
    else:
        files = (folder / at / name for at in CLASSES_IN for name in NAMES_FILES)
        file = next(filter(Path.is_file, files), None)
        content = _folders(folder)
        train = folder / content.get("train", "")
        if "train" not in content or not _has_labels(train, folder, below=file is not None and not _has_splits(train)):
            if file and _label_files(folder / "labels"):
                raise UserError(
                    f"no image in {train} has a label file: put the images in images/, or beside their labels"
                )
            return None
        if file is None:
            names_in = folder / CLASSES
            raise UserError(f"no {names_in}: write the names of the labels' classes in it, one a line, from class 0")
        names, notes, bases = dict(enumerate(read_lines(file))), [], [folder]
    splits: dict[str, Split] = {}
    broken: dict[str, str] = {}
    given: list[tuple[str, str, Path | None, bool]] = []
    for split, keys in KEYS.items():
        value: Any = next((content[key] for key in keys if content.get(key)), [])
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise UserError(f"{file}: {split} is neither a path nor a list of paths")
        given += [(split, value, *_resolved(value, bases, folder)) for value in values]
    taken: list[tuple[str, str, Path]] = []
    for split, value, place, exact in sorted(given, key=lambda each: not each[3]):  # exact ones first
        if place is None or (not exact and _is_anothers(split, value, place, taken)):
            broken.setdefault(split, f"no {value}, its {split} in {file.name}: correct the path, or leave it out")
        else:
            taken.append((split, value, place))
    for split in KEYS:
        places = tuple(place for of, _, place in taken if of == split)
        if split == "test" and places and not any(not at.is_dir() or _has_labels(at, folder) for at in places):
            broken["test"] = f"no image in {places[0]} has a label file"
        elif places and split not in broken:
            pose = "kpt_shape" in content
            reader = YoloImages(_root(places, folder), places, names, file, folder, pose, tuple(notes))
            splits[split] = Split(TITLE, reader.root, file, reader)
    if "train" not in splits and "train" not in broken:
        broken["train"] = f"{file.name} has no train: write the folder of the images to train on"
    return Found(TITLE, splits, broken)


class YoloImages(NamedTuple):
    """The reader of the images in `places`, folders or .txt lists of them, and of their labels."""

    root: Path
    places: tuple[Path, ...]
    names: dict[int, str]
    file: Path  # what names the classes
    folder: Path  # the data's
    pose: bool  # key points follow the box in a line
    notes: tuple[str, ...]

    def count_images(self) -> int:
        return len(self.images())

    def images(self) -> list[str]:
        """Every image once, in the order of names."""
        found = {image for place in self.places for image in images_in(place, self.folder)}
        if not found:
            raise UserError(f"{self.places[0]}: no images in it")
        return sorted(found)

    def read(self, bad: list[str] | None) -> Annotations:
        """See `splits.Reader`. Missing and empty label files are images without objects; polygons become their boxes.

        Images cannot be used whose label file has a line that is neither, a class that has no name or a coordinate
        outside 0..1 (by up to 1 % it is clipped). Raises UserError if no image at all has a label file.
        """
        images = self.images()
        folders = [os.path.dirname(image) for image in images]
        labels = {folder: label_folder(Path(folder), self.folder) for folder in {*folders}}
        files = [os.path.join(labels[of], f"{_stem(image)}.txt") for of, image in zip(folders, images, strict=True)]
        pairs = list(zip(images, files, strict=True))
        tasks = [pairs[i : i + 200] for i in range(0, len(pairs), 200)]  # one for each image would cost as much again
        with ThreadPoolExecutor(THREADS) as pool:
            read = [*chain(*pool.map(lambda task: [self._read_image(*pair) for pair in task], tasks))]
        broken = [found for found in read if isinstance(found, BadImage)]
        report_bad(broken, bad)
        kept = [(image, found) for image, found in zip(images, read, strict=True) if not isinstance(found, BadImage)]
        without = sum(found.without for _, found in kept)
        if kept and without == len(kept):
            raise UserError(f"{self.file}: none of {len(kept)} images has a label file; the first would be {files[0]}")
        counts = {
            "images that cannot be used": len(broken),
            "images without a label file, taken as without objects": without,
            "polygons, taken as their boxes": sum(found.polygons for _, found in kept),
        }
        if all(place.is_dir() for place in self.places):  # a list may leave images out
            there = {os.path.join(folder, file) for folder in {*labels.values()} for file in _label_files(folder)}
            counts["label files without an image"] = len(there - {*files})
        # Six decimals of a side make out a hundredth of a pixel, which gives back what they were made of.
        longest = max((found.longest for _, found in kept), default=0)
        return indexed(
            [os.path.relpath(image, self.root).replace(os.sep, "/") for image, _ in kept],
            [found.size for _, found in kept],
            self.names,
            [found.objects for _, found in kept],
            [*self.notes, *(f"{what}: {count}" for what, count in counts.items() if count)],
            digits=2 if longest <= len("-0.123456") else 6,
        )

    def _read_image(self, image: str, labels: str) -> "Image | BadImage":
        try:
            (width, height), _ = image_sizes(image)
        except BadImage as error:
            return error
        try:
            with open(labels, encoding="utf-8-sig") as file:
                text = file.read()
        except FileNotFoundError:
            return Image((width, height), np.empty((0, 6)), 0, 0, True)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{labels}: cannot be read ({error})") from None
        try:
            objects, polygons = self._parsed(text, labels)
        except BadImage as error:
            return error
        objects[:, 1:5] *= width, height, width, height
        return Image((width, height), objects, polygons, max(map(len, text.split()), default=0), False)

    def _parsed(self, text: str, path: str) -> tuple[np.ndarray, int]:
        """(float [n, 6]: class, x, y, width, height in parts of the image, 0; how many are polygons)."""
        rows: list[tuple[float, ...]] = []
        polygons = 0
        for number, line in enumerate(text.splitlines(), 1):
            words = line.split()
            if not words:
                continue
            at = f"{path}, line {number}"
            try:
                category, *values = map(float, words)
            except ValueError:
                raise BadImage(f"{at}: {line[:80]!r} is not all numbers; {LINE}") from None
            if category not in self.names:
                known = f"{self.file} names {min(self.names)} to {max(self.names)}"
                raise BadImage(f"{at}: class {words[0]} has no name; {known}: add its name, or correct the line")
            if self.pose:
                values = values[:4]
            if len(values) == 5:
                raise BadImage(f"{at}: 6 numbers, as predictions have with a confidence; {LINE}")
            if len(values) != 4 and (len(values) < 6 or len(values) % 2):
                raise BadImage(f"{at}: {len(words)} numbers; {LINE}")
            if outside := [value for value in values if not -EXCESS <= value <= 1 + EXCESS]:
                pixels = ", as pixels are" if abs(outside[0]) > 2 else ""
                raise BadImage(f"{at}: {outside[0]:g} is outside 0 to 1{pixels}; {LINE}")
            values = [min(max(value, 0.0), 1.0) for value in values]
            if len(values) == 4:
                x, y, w, h = values
                rows.append((category, x - w / 2, y - h / 2, w, h, 0))
            else:
                left, top = min(values[::2]), min(values[1::2])
                rows.append((category, left, top, max(values[::2]) - left, max(values[1::2]) - top, 0))
                polygons += 1
        return np.array(rows, float).reshape(-1, 6), polygons


class Image(NamedTuple):
    """What is read of an image and its label file."""

    size: tuple[int, int]  # width, height
    objects: np.ndarray  # float [n, 6]: class, x, y, width, height in pixels, 0
    polygons: int
    longest: int  # characters of its longest number
    without: bool  # there is no label file


def images_in(place: Path, folder: Path) -> Iterator[str]:
    """The images in a folder and below it, or of a .txt list; those of another machine are found by their ends."""
    if place.is_dir():
        for path, _, files in os.walk(place, followlinks=True):
            yield from (os.path.join(path, file) for file in files if file.lower().endswith(SUFFIXES))
        return
    lost = []
    for line in read_lines(place):
        found = next((base / line for base in (place.parent, folder) if (base / line).is_file()), None)
        if found is None:
            lost.append(line)
        else:
            yield os.path.normpath(found)
    if lost:
        there = {os.path.relpath(path, folder).replace(os.sep, "/"): path for path in images_in(folder, folder)}
        matched, _ = match_names(lost, there)
        for line in lost:
            nowhere = os.path.join(folder, line.replace("\\", "/").lstrip("./"))  # reported when it is read
            yield there[matched[line]] if line in matched else nowhere


def label_folder(images: Path, folder: Path) -> Path:
    """Where the labels of the images in a folder are: `labels` for the last `images` of its path, it, or beside it."""
    usual = usual_label_folder(images)
    places = [usual, images] if images == folder else [usual, images, images.parent / "labels"]
    return next((place for place in places if place.is_dir() and _label_files(place)), places[0])


def usual_label_folder(images: Path) -> Path:
    """The path of a folder of images, with `labels` for its last `images`, if it has one."""
    parts = images.parts
    last = max((i for i, part in enumerate(parts) if part.lower() == "images"), default=None)
    return images if last is None else Path(*parts[:last], "labels", *parts[last + 1 :])


def _described(folder: Path) -> Path | None:
    """The file that describes the data: data.yaml, another .yaml that names classes, or obj.data."""
    files = sorted({*folder.glob("*.yaml"), *folder.glob("*.yml")})
    usual = [file for file in files if file.stem in ("data", "dataset")]
    if not usual:
        for file in files:
            with suppress(UserError):  # it is of something else
                usual += [file] if {"names", "nc"} & _content(file).keys() else []
    if len(usual) > 1:
        raise UserError(f"{' and '.join(file.name for file in usual)} describe data; give one of them as --data FILE")
    return usual[0] if usual else next((file for file in [folder / "obj.data"] if file.is_file()), None)


def _content(file: Path) -> dict:
    """The keys of a .yaml file, all values as text, or of darknet's obj.data."""
    try:
        text = file.read_text("utf-8-sig")
        if file.suffix == ".data":
            pairs = (line.partition("=") for line in text.splitlines() if "=" in line)
            return {key.strip(): value.strip() for key, _, value in pairs}
        content = yaml.BaseLoader(text).get_single_data()  # text, lists and keys only: "no" is a name, not False
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: no keys in it; it should have names, train and val")
    return content


def _names(content: Mapping, file: Path) -> tuple[dict[int, str], list[str]]:
    """({class: name}, what to say about them)."""
    names = content.get("names")
    if isinstance(names, str) and names and (place := _resolved(names, [file.parent], file.parent)[0]):
        names = read_lines(place)
    if isinstance(names, list):
        names = dict(enumerate(names))
    try:
        by_class = {int(key): name for key, name in (names or {}).items()}
    except (AttributeError, ValueError):
        by_class = {}
    if not by_class or not all(isinstance(name, str) for name in by_class.values()):
        raise UserError(f"{file}: names must list the names of the classes, as in [cat, dog]")
    own = str(len(by_class))
    count = content.get("nc", content.get("classes", own))
    return by_class, [] if count == own else [f"{file.name} has {own} names, and another number as nc"]


def _folders(folder: Path) -> dict[str, str]:
    """The splits of a folder without a description, by the names of its folders; one without splits is for training."""
    found = {}
    for split, names in SPLIT_NAMES.items():
        for place in (path.format(name) for name in names for path in FOLDERS):
            if split not in found and (folder / place).is_dir() and any(images_in(folder / place, folder)):
                found[split] = place
    rest = "images" if (folder / "images").is_dir() else "."
    if "train" not in found and not any(rest == "." or place.startswith(f"{rest}/") for place in found.values()):
        found["train"] = rest
    return found


def _has_splits(images: Path) -> bool:
    """Whether a folder up to two levels below is called as a split's are: its images would be trained on."""
    below = folders_in(images)
    return any(at.name.lower().startswith(tuple(SPLIT_NAMES)) for of in below for at in (of, *folders_in(of)))


def _has_labels(images: Path, folder: Path, *, below: bool = True) -> bool:
    """Whether an image in a folder, or in one below it, has a label file."""
    for path, folders, files in os.walk(images):
        stems = {_stem(file) for file in files if file.lower().endswith(SUFFIXES)}
        if stems and any(_stem(file) in stems for file in _label_files(label_folder(Path(path), folder))):
            return True
        folders[:] = folders if below else []
    return False


def _resolved(value: str, bases: Sequence[Path], folder: Path) -> tuple[Path | None, bool]:
    """(the path that a value of the description means, whether it is there as it is written)."""
    value = value.replace("\\", "/")
    inside = folder / re.sub(r"^(\.\./)+", "", value)
    if value.startswith("../") and inside.exists():  # Roboflow's; what is outside may be another set that lies beside
        return inside, True
    for base in bases:
        if (base / value).exists():
            return Path(os.path.normpath(base / value)), True
    parts = [part for part in PurePosixPath(value).parts if part not in ("/", "..", ".") and not part.endswith(":")]
    ends = (folder.joinpath(*parts[i:]) for i in range(len(parts)))
    return next((end for end in ends if end.exists()), None), False


def _is_anothers(split: str, value: str, place: Path, taken: Sequence[tuple[str, str, Path]]) -> bool:
    """Whether a place is that of another path, or contains or lies in another split's: its images would be in both."""
    at = place.resolve()
    others = [(of, path.resolve()) for of, written, path in taken if written != value]
    return any(
        at == other or (of != split and (at.is_relative_to(other) or other.is_relative_to(at))) for of, other in others
    )


def _root(places: Sequence[Path], folder: Path) -> Path:
    """The folder that holds all images of these folders and lists."""
    folders = {str(place) for place in places if place.is_dir()}
    folders |= {os.path.dirname(image) for place in places if not place.is_dir() for image in images_in(place, folder)}
    if len({*map(os.path.isabs, folders)}) > 1:
        folders = {*map(os.path.abspath, folders)}
    return Path(os.path.commonpath(folders)) if folders else folder


def _label_files(folder: Path) -> list[str]:
    return [file for file in os.listdir(folder) if file.endswith(".txt") and file != CLASSES] if folder.is_dir() else []


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]
