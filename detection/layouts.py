"""The folder layouts that are recognised, COCO's and others', and where each keeps its splits."""

import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from detection.annotations import CocoFile, first_image, leaves_its_folder, read_annotations
from detection.splits import SPLIT_NAMES, SPLIT_OF, Found, Split, folders_in
from detection.voc import find_voc
from detection.yolo import find_yolo, usual_label_folder
from resbackbone.checks import UserError, sibling, some
from resbackbone.image_io import SUFFIXES

LAYOUT = (
    "annotations/instances_{train,val}2017.json with train2017/ and val2017/ (COCO's layout), "
    "{train,valid}/_annotations.coco.json beside the images (Roboflow's), "
    "annotations/instances_{train,val}.json with train/ and val/, annotations/instances_default.json with images/ "
    "(CVAT's), result.json with images/ (Label Studio's), labels.json with data/ (FiftyOne's), data.yaml with images/ "
    "and labels/ (YOLO's), Annotations/*.xml with JPEGImages/ (Pascal VOC's), or one COCO .json and images"
)
DRAWN = "shapes.json"  # in a folder of `make_shapes`: what it was drawn with
HELD_OUT = 10  # without a validation split, one image in this many is held out
DEPTH = 2  # levels of folders that hold nothing but one folder, as archives unpack


class Layout(NamedTuple):
    """Paths below the data folder, with {} for the split's name; of several, the first that exists counts.

    An annotation file without a split's name in its path is that of "train".
    """

    title: str
    annotations: tuple[str, ...]
    images: tuple[str, ...]

    def paths(self, folder: Path, split: str) -> tuple[Path | None, Path | None]:
        """(image folder, annotation file) of a split, None for a missing one."""
        half: tuple[Path | None, Path | None] = (None, None)
        for name in SPLIT_NAMES[split]:
            files = [folder / path.format(name) for path in self.annotations if "{}" in path or split == "train"]
            file = next((path for path in files if path.is_file()), None)
            # If all splits share a folder of images, only the annotation file shows that a split exists.
            folders = [folder / path.format(name) for path in self.images if file or "{}" in path]
            images = next((path for path in folders if path.is_dir()), None)
            if images and file:
                return images, file
            half = half if any(half) else (images, file)
        return half

    def find(self, folder: Path) -> Found:
        """The splits of a folder; a split is broken if it has images or annotations only."""
        splits, broken, annotated = {}, {}, False
        for split, (name, *_) in SPLIT_NAMES.items():
            images, file = self.paths(folder, split)
            annotated |= file is not None
            if images and file:
                splits[split] = Split(self.title, images, file, CocoFile(file))
            elif images or file:
                wanted = {self.annotations[0].format(name): file, self.images[0].format(name): images}
                broken[split] = "no " + " and no ".join(path for path, at in wanted.items() if at is None)
        if set(broken) == {"test"}:
            broken = {}
        if (splits or broken) and "train" not in {**splits, **broken}:
            missing = self.annotations[0], min(self.images, key=len)
            broken["train"] = " and ".join(f"no {path.format('train')}" for path in missing)
        return Found(self.title, splits, broken, annotated)


LAYOUTS = (
    Layout("COCO's layout", ("annotations/instances_{}2017.json",), ("{}2017", "images/{}2017")),
    Layout("Roboflow's layout", ("{}/_annotations.coco.json",), ("{}/images", "{}")),
    Layout(
        "the layout of annotations/instances_train.json",
        ("annotations/instances_{}.json", "annotations/{}.json"),
        ("{}", "images/{}", "images"),
    ),
    Layout("Label Studio's layout", ("{}/result.json", "result.json", "result_coco.json"), ("{}/images", "images")),
    Layout("FiftyOne's layout", ("{}/labels.json", "labels.json"), ("{}/data", "data")),
)
FINDERS: dict[str, Callable[[Path], Found | None]] = {
    **{layout.title: layout.find for layout in LAYOUTS},
    "YOLO's layout": find_yolo,
    "Pascal VOC's layout": find_voc,
}


class Files(NamedTuple):
    """COCO files in places of their own, as --train-json, --train-images, --val-json and --val-images give them."""

    train_json: Path
    train_images: Path | None = None
    val_json: Path | None = None
    val_images: Path | None = None

    def __str__(self) -> str:
        return str(self.train_json)

    def find(self) -> Found:
        given = {"train": (self.train_json, self.train_images)}
        if self.val_json is not None:
            given["val"] = (self.val_json, self.val_images or self.train_images)
        return _of_files(given, self.train_json.parent)


Data = Path | Files  # where data are: a folder, its data.yaml or only .json file, or several files
FILES = Files._fields


def data_of(values: Mapping[str, str | Path | None]) -> Data | None:
    """The data that options, or a run's config.yaml, name as "data" or as FILES; None if neither is given.

    Raises UserError if both are, or other files without that of the training.
    """
    files = {name: Path(path) for name in FILES if (path := values.get(name)) is not None}
    data = Path(path) if (path := values.get("data")) is not None else None
    if not files:
        return data
    if "train_json" not in files:
        [name, *_] = files
        raise UserError(f"--{name.replace('_', '-')} {files[name]}: give --train-json too")
    if data not in (None, files["train_json"]):
        raise UserError(f"--data {data} and --train-json {files['train_json']} exclude each other: give one of them")
    return Files(**files)


def find_split(data: Data, split: str) -> Split:
    """Find "train", "val" or "test" in `data`, by the one of FINDERS that has most of train and val, or the first.

    Without any trace of a validation split, a tenth of the training images serves as one: both splits are then parts
    of the same annotations, and "all" is the whole. Raises UserError if the data are missing, have no known layout, or
    hold half a split.
    """
    return _split(data, split, _find(data)[0])


def _split(data: Data, split: str, found: Found) -> Split:
    held = [*found.splits, *found.broken]
    if "train" in found.splits and "val" not in held and split != "test":
        return found.splits["train"]._replace(part=None if split == "all" else split)
    if split == "all":
        raise UserError(f"{data}: has splits; name one of them: {', '.join(held)}")
    if split in found.splits:
        return found.splits[split]
    if not found.annotated and isinstance(data, Path) and (lacks := _lacking(data)):
        raise UserError(f"{data}: {lacks}{_about_tables(data)}")
    says = found.broken.get(split, f"there is no folder, list or data.yaml key named {split}")
    layouts = f"; it should contain {LAYOUT}" if any(found.title == layout.title for layout in LAYOUTS) else ""
    layouts += "" if found.annotated else _about_tables(data)
    raise UserError(f"{data}: {found.title}, but {says}{layouts}")


def whole_splits(data: Data) -> dict[str, Split]:
    """{name: split} of train and of those of val and test that there are, nothing held out. Raises as `find_split`."""
    found, _ = _find(data)
    names = {"train", *found.splits} | ({*found.broken} - {"test"})  # one that data.yaml names may not exist
    return {name: _split(data, name, found)._replace(part=None) for name in SPLIT_NAMES if name in names}


def describe_layout(data: Data) -> str:
    """One line on `data`: its layout, what is read, annotations in it that are not, whether a part is held out.

    Raises as `find_split`.
    """
    found, folder = _find(data)
    train, val = (_split(data, split, found) for split in ("train", "val"))
    read = list(dict.fromkeys((train.annotations, val.annotations)))
    names = map(str, read) if isinstance(data, Files) else _below(folder, read)
    line = f"{data} in {train.layout}: {' and '.join(names)}"
    if val.part:
        line += f"; there is no validation split, so one image in {HELD_OUT} is held out for it"
    if test := found.splits.get("test"):
        line += "; the test split is for evaluate_coco.py --split test"
        read.append(test.annotations)
    if isinstance(data, Files):
        return line
    unread: set[Path] = set()
    if isinstance(train.reader, CocoFile):
        unread.update(*(file.parent.glob("*.json") for file in read), *(folder.glob(f"*/{file.name}") for file in read))
        unread.update(folder.glob("*.json"))
    for other in (_attempt(title, find, folder) for title, find in FINDERS.items() if title != found.title):
        unread.update(split.annotations for split in (other.splits if other else {}).values())
    if others := sorted(unread - {*read, folder / DRAWN}):
        line += f"; not read: {some(_below(folder, others))}"
    return line


def _find(data: Data) -> tuple[Found, Path]:
    """(what is found in the layout that fits best, the folder that has it)."""
    if isinstance(data, Files):
        return data.find(), data.train_json.parent
    folder = Path(data)
    if folder.is_file() and folder.suffix in (".yaml", ".yml", ".data"):
        return find_yolo(folder.parent, folder) or Found("", {}, {}), folder.parent
    if folder.is_file() and folder.suffix == ".json":
        return Files(folder).find(), folder.parent
    if not folder.exists():
        raise UserError(f"{data}: no such folder{sibling(data)}; give the data's folder, its data.yaml or a COCO .json")
    if not folder.is_dir():
        raise UserError(f"{data}: a file, but neither data.yaml nor a COCO .json; give one, or a folder with {LAYOUT}")
    for _ in range(DEPTH + 1):
        if any((best := _best(folder)).fit):
            if not best.splits:
                _refuse_part(folder)
            return best, folder
        if len(below := folders_in(folder)) != 1:
            break
        [folder] = below
    _refuse_part(Path(data))
    says = _lacking(folder) or f"no known data layout; it should contain {LAYOUT}"
    raise UserError(f"{data}: {says}{_about_tables(data)}")


def _refuse_part(folder: Path) -> None:
    """Raise UserError if a folder is a part of data in a known layout."""
    for around in folder.resolve().parents[:2]:
        for title, find in FINDERS.items():
            with suppress(OSError):  # a folder that may not be read
                found = None if find is find_voc else _attempt(title, find, around)  # which looks into all below
                for split in found.splits.values() if found else ():
                    places = split.images, usual_label_folder(split.images), split.annotations.parent
                    if any(folder.resolve() in (at.resolve(), *at.resolve().parents) for at in places):
                        raise UserError(f"{folder}: a part of data in {title}; give the whole, {around}")


def _lacking(folder: Path) -> str:
    """What a folder without a known layout lacks, as far as its files tell, or ""."""
    files: dict[str, list[Path]] = {}
    for path in sorted(path for pattern in ("*", "*/*", "*/*/*") for path in folder.glob(pattern)):
        suffix = path.suffix.lower()
        files.setdefault("images" if suffix in SUFFIXES else suffix, []).append(path)
    for file in files.get(".json", [])[:1]:
        try:
            read_annotations(file)
        except UserError as error:
            return f"its .json is not a COCO annotation file ({error})"
    boxes = files.get(".xml") or [path for path in files.get(".txt", []) if "labels" in path.parts]
    if "images" in files and not boxes and ".txt" not in files:
        says = f"{len(files['images'])} images without annotations; add a COCO .json, YOLO's .txt or Pascal VOC's .xml"
        by_class = len({path.parent.name for path in files["images"]} - {folder.name, "images", *SPLIT_OF}) > 1
        return says + ("; to classify whole images, use tools/pretrain.py" if by_class else "")
    if boxes and "images" not in files:
        return f"{len(boxes)} {boxes[0].suffix} files without images; add the images that they describe"
    return ""


def _about_tables(data: Data) -> str:
    tables = sorted({*data.glob("*.csv"), *data.glob("*/*.csv")}) if isinstance(data, Path) else []
    return f"; {tables[0]} cannot be read: export the boxes as COCO, YOLO or VOC" if tables else ""


def _best(folder: Path) -> Found:
    best = Found("", {}, {})
    for title, find in FINDERS.items():
        found = _attempt(title, find, folder)
        best = found if found and found.fit > best.fit else best
        if all(best.fit):
            break
    return (not best.splits and find_json(folder)) or best


def _attempt(title: str, find: Callable[[Path], Found | None], folder: Path) -> Found | None:
    try:
        return find(folder)
    except UserError as error:
        return Found(title, {}, dict.fromkeys(SPLIT_NAMES, str(error)))


def find_json(folder: Path) -> Found | None:
    """COCO files under any names in a folder or one level below it, told apart by the split's name in theirs.

    Without such names, one file is for training.
    """
    files = sorted({*folder.glob("*.json"), *folder.glob("*/*.json")} - {folder / DRAWN})
    by_split: dict[str, list[Path]] = {split: [] for split in SPLIT_NAMES}
    plain: list[Path] = []
    for file in files:
        if first_image(file) is None:
            continue
        words = re.findall("[a-z]+", file.relative_to(folder).with_suffix("").as_posix().lower())
        named = [SPLIT_OF[word] for word in words if word in SPLIT_OF and word != "default"]
        (by_split[named[-1]] if named else plain).append(file)
    by_split["train"] = by_split["train"] or plain
    if not any(by_split.values()):
        return None
    found = _of_files({split: (of[0], None) for split, of in by_split.items() if len(of) == 1}, folder)
    several = {
        split: f"{of[0].relative_to(folder)} and {of[1].relative_to(folder)} could both be the {split} split: "
        "name yours with --train-json and --val-json"
        for split, of in by_split.items()
        if len(of) > 1
    }
    return found._replace(broken=several)


def _of_files(files: dict[str, tuple[Path, Path | None]], folder: Path) -> Found:
    """Splits of COCO files, each with its folder of images, if it is known: else where the first image is."""
    title, splits = "the layout of a COCO file", {}
    for split, (file, images) in files.items():
        name = first_image(file) if images is None else None
        tops = (folder, folder / "images", file.parent.parent, file.parent.parent / "images")
        below = (top / of for top in tops for of in (*SPLIT_NAMES[split], f"{split}2017"))
        places = [file.parent, file.parent / "images", *below, *tops]
        found = (place for place in places if name and not leaves_its_folder(name) and (place / name).is_file())
        splits[split] = Split(title, images or next(found, folder), file, CocoFile(file))
    return Found(title, splits, {})


def _below(folder: Path, paths: Sequence[Path]) -> list[str]:
    return [os.path.relpath(path, folder) for path in paths]


def held_out(file_names: Sequence[str]) -> np.ndarray:
    """Which images to validate on if the data have no validation split: bool [n], one in ten, at least one.

    The names alone decide, without folders if they differ without: those with the lowest hashes are held out. Names
    that differ only after ".rf.", as in Roboflow's augmented copies of an image, stay together: copies on both sides
    would inflate the AP. Raises UserError if there are fewer than two images.
    """
    last = [name.rpartition("/")[2] for name in file_names]
    originals = np.array([name.partition(".rf.")[0] for name in (last if len({*last}) == len(last) else file_names)])
    distinct = sorted(set(originals.tolist()), key=lambda name: hashlib.sha256(name.encode()).digest())
    if len(distinct) < 2:
        raise UserError(
            f"there is no validation split, and holding one out takes at least 2 images, not {len(distinct)}; "
            "add images or a second annotation file"
        )
    return np.isin(originals, distinct[: -(-len(distinct) // HELD_OUT)])
