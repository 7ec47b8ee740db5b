"""Labelled images in webdataset's shards: tar files of `key.jpg` and `key.cls` (the label) beside each other.

Images are read at random, by their offset in the tar. An index beside the shards, train.json for train-000000.tar and
so on, lists their contents; `tools/make_shards.py` writes it.
"""

import io
import json
import os
import re
import tarfile
from pathlib import Path
from typing import BinaryIO

import numpy as np

from resbackbone.checks import UserError
from resbackbone.classification.images import Images
from resbackbone.image_io import SUFFIXES, BadImage

NUMBERS = re.compile(r"\{(\d+)\.\.(\d+)\}")
ENTRY = ("name", "bytes", "labels", "offsets", "sizes")  # a shard's fields in an index


class ShardImages(Images):
    """Images in tar files, read at random; `index` as `index_shards` returns it."""

    def __init__(self, folder: Path, index: dict, *, skip_bad_images: bool = False):
        def column(name: str) -> np.ndarray:
            return np.concatenate([np.array(shard[name], dtype=np.int64) for shard in index["shards"]])

        super().__init__(index["classes"], column("labels"), skip_bad_images=skip_bad_images)
        if not len(self) or self.labels.max() >= len(self.classes):
            raise UserError(f"{folder}: labels up to {self.labels.max(initial=-1)} of {len(self.classes)} classes")
        self.shards = [str(folder / shard["name"]) for shard in index["shards"]]
        self.firsts = np.cumsum([0, *(len(shard["labels"]) for shard in index["shards"])])  # of each shard, and the end
        self.offsets, self.sizes = column("offsets"), column("sizes")

    def shard_of(self, index: int) -> int:
        return int(np.searchsorted(self.firsts, index, side="right")) - 1

    def name(self, index: int) -> str:
        shard = self.shard_of(index)
        return f"{index - self.firsts[shard]} of {self.shards[shard]}"

    def file(self, index: int) -> bytes:
        try:
            with open(self.shards[self.shard_of(index)], "rb") as shard:
                shard.seek(self.offsets[index])
                return shard.read(self.sizes[index])
        except OSError as error:
            raise BadImage(f"image {self.name(index)}: cannot be read ({error.strerror})") from None

    def summary(self) -> str:
        return f"{super().summary()} in {len(self.shards)} shards, {self.shards[0]} the first"


def open_shards(data: str, split: str, *, skip_bad_images: bool = False) -> ShardImages:
    """The images of the shards that `data` names: 'path/train-{000000..000146}.tar'.

    For the split "val", those of the index with "val" in place of "train" in its name. Raises UserError if there is no
    index, and if shards are missing or do not match it.
    """
    folder, pattern = Path(data).parent, Path(data).name
    if not pattern.endswith(".tar"):
        raise UserError(f"{data}: shards must be plain tar files, not compressed")
    if split == "val" and "val" not in pattern:
        if "train" not in pattern:
            raise UserError(f"{data}: names of shards should contain 'train', so that those for val can be found")
        pattern = pattern.replace("train", "val")
    path = folder / index_name(pattern)
    try:
        index = json.loads(path.read_bytes())
        shards = {shard["name"]: {field: shard[field] for field in ENTRY} for shard in index["shards"]}
        classes = list(index["classes"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not an index, {type(error).__name__}: {error}"
        raise UserError(f"{path}: {reason}; tools/make_shards.py --index SHARDS writes the index of shards") from None
    names = list(shards) if split == "val" else expand(pattern)
    for name in names:
        if name not in shards:
            raise UserError(f"{data}: {name} is not in the index {path.name}, which has {len(shards)} shards")
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: no such file, but the index lists it; copy or write it again")
        size, expected = (folder / name).stat().st_size, shards[name]["bytes"]
        if size != expected:
            raise UserError(f"{folder / name}: has {size:,} bytes, the index says {expected:,}; copy or write it again")
    chosen = {"classes": classes, "shards": [shards[name] for name in names]}
    return ShardImages(folder, chosen, skip_bad_images=skip_bad_images)


def index_shards(paths: list[Path]) -> dict:
    """An index, read from the shards themselves; classes are named by their numbers."""
    shards = []
    for path in paths:
        with open(path, "rb") as file:
            shards.append(describe_shard(path, file))
    highest = max((label for shard in shards for label in shard["labels"]), default=-1)
    if highest < 0:
        raise UserError(f"{paths[0]}: no image in it and {len(paths) - 1} more shards")
    return {"classes": [str(i) for i in range(highest + 1)], "shards": shards}


def describe_shard(path: Path, file: BinaryIO) -> dict:
    """A shard's entry in an index: {"name", "bytes", and for each image "labels", "offsets", "sizes"}.

    Raises UserError for an image without a label, a label without an image, and a truncated tar file.
    """
    images: dict[str, tuple[int, int]] = {}  # by name without suffix
    labels: dict[str, str] = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if not member.isfile() or not stem:
                    continue
                if f".{suffix.lower()}".endswith(SUFFIXES):
                    if key in images:
                        raise UserError(f"{path}: {key} has two images; each should have a name of its own")
                    images[key] = member.offset_data, member.size
                elif suffix == "cls":
                    content = tar.extractfile(member)
                    assert content is not None  # it is a file
                    labels[key] = content.read().decode(errors="replace").strip()
    except tarfile.TarError as error:
        raise UserError(f"{path}: not a whole tar file ({error})") from None
    for key in images.keys() | labels.keys():
        if key not in images:
            raise UserError(f"{path}: {key} has no image; there should be an image and its label, .jpg and .cls")
        if not labels.get(key, "").isdecimal():
            raise UserError(f"{path}: {key} has no label; {key}.cls should hold the number of its class")
    return {
        "name": path.name,
        "bytes": file.seek(0, os.SEEK_END),
        "labels": [int(labels[key]) for key in images],
        "offsets": [offset for offset, _ in images.values()],
        "sizes": [size for _, size in images.values()],
    }


def write_shard(images: list[tuple[bytes, int]]) -> bytes:
    """A tar file of (file, label) pairs in webdataset's format, the same for the same images."""
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for i, (file, label) in enumerate(images):
            for suffix, content in (("jpg", file), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{i:08d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return written.getvalue()


def expand(pattern: str) -> list[str]:
    """The file names of a pattern with {000000..000146}."""
    numbers = NUMBERS.search(pattern)
    if numbers is None:
        return [pattern]
    first, last = numbers.groups()
    if int(first) > int(last):
        raise UserError(f"{pattern}: names no shard, because its numbers go down")
    return [pattern.replace(numbers[0], f"{i:0{len(first)}d}") for i in range(int(first), int(last) + 1)]


def index_name(pattern: str) -> str:
    """The index of train-{000000..000146}.tar is train.json."""
    return re.sub(r"[-_.]*(\{.*\}|\d+)?\.tar$", "", pattern) + ".json"
