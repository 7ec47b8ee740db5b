"""Labelled images in webdataset's shards: tar files of `key.jpg` and `key.cls` (the label) beside each other.

Shards that are files are read at random, image by image, by their offset in the tar. Shards behind a URL are streamed,
one after the other, with webdataset's openers (http, gs, hf, `pipe:aws s3 cp ... -`): each rank takes every n-th shard
of the epoch's order, and shuffles the images within a window.

An index beside the shards, train.json for train-000000.tar and so on, lists their contents; `tools/make_shards.py`
writes it. Files without one are read through before training starts; URLs need one.
"""

import io
import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from resbackbone.checks import UserError, require
from resbackbone.classification.images import CropRequest, Images
from resbackbone.image_io import SUFFIXES, BadImage

WINDOW = 5000  # images among which a stream is shuffled; 0.2 to 0.5 GB of files a rank
SHARD = re.compile(r"[^/\s]*\.tar(?!.*\.tar)")  # a shard's file name, in a path, a URL or a command
NUMBERS = re.compile(r"\{(\d+)\.\.(\d+)\}")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4")
ENTRY = ("name", "bytes", "labels", "offsets", "sizes")  # a shard's fields in an index


class ShardImages(Images):
    """Images in tar files, read at random."""

    def __init__(self, pattern: str, index: dict, *, skip_bad_images: bool = False):
        shards = index["shards"]
        super().__init__(index["classes"], _column(shards, "labels"), skip_bad_images=skip_bad_images)
        if not len(self) or self.labels.max() >= len(self.classes):
            raise UserError(f"{pattern}: labels up to {self.labels.max(initial=-1)} of {len(self.classes)} classes")
        self.pattern, self.shards = pattern, [shard["name"] for shard in shards]
        self.firsts = np.cumsum([0, *(len(shard["labels"]) for shard in shards)])  # each shard's, and the end
        self.offsets, self.sizes = (_column(shards, name) for name in ("offsets", "sizes"))

    def shard_of(self, index: int) -> int:
        return int(np.searchsorted(self.firsts, index, side="right")) - 1

    def name(self, index: int) -> str:
        shard = self.shard_of(index)
        return f"{index - self.firsts[shard]} of {beside(self.pattern, self.shards[shard])}"

    def file(self, index: int) -> bytes:
        try:
            with open(beside(self.pattern, self.shards[self.shard_of(index)]), "rb") as shard:
                shard.seek(self.offsets[index])
                return shard.read(self.sizes[index])
        except OSError as error:
            raise BadImage(f"image {self.name(index)}: cannot be read ({error.strerror})") from None

    def summary(self) -> str:
        return f"{super().summary()} in {len(self.shards)} shards, {self.pattern}"


class StreamedImages(ShardImages):
    """Images in tar files behind URLs, streamed; `file` is quick in the order of the index."""

    _files: Iterator[bytes] = iter(())
    _shard, _next = -1, 0  # the shard that `file` streams, its next image and those to come

    def draws(self, *, seed: int, rank: int, ranks: int, start: int, repeats: int) -> Iterator[CropRequest]:
        if len(self.shards) < ranks:
            raise UserError(f"{self.pattern}: {len(self.shards)} shards are too few for {ranks} processes")
        if repeats > 1:
            raise UserError(f"{self.pattern}: streamed images cannot be repeated; download the shards first")
        counts = np.diff(self.firsts)
        for epoch in range(2**62):
            random = np.random.default_rng((seed, epoch))
            shards = random.permutation(len(self.shards))[rank::ranks]
            comes = np.concatenate([np.arange(self.firsts[s], self.firsts[s + 1]) for s in shards])
            # An image leaves at most a window later than it comes, so no more than a window waits at any time.
            leaves = np.argsort(np.arange(len(comes)) + random.uniform(0, WINDOW, len(comes)), kind="stable")
            seeds = random.integers(0, 2**62, len(comes))
            if start >= len(comes):
                start -= len(comes)
                continue
            wanted = np.zeros(len(comes), dtype=bool)
            wanted[leaves[start:]] = True
            ends = np.cumsum(counts[shards])
            files = self._files_of(shards, ends, wanted)
            waiting: dict[int, bytes] = {}
            for place in leaves[start:].tolist():
                while place not in waiting:
                    at, file = next(files)
                    waiting[at] = file
                yield CropRequest(int(comes[place]), int(seeds[place]), waiting.pop(place))
            start = 0

    def _files_of(self, shards: np.ndarray, ends: np.ndarray, wanted: np.ndarray) -> Iterator[tuple[int, bytes]]:
        """(place, file) of the wanted images of these shards in turn; shards without any are not opened."""
        place = 0
        for shard, end in zip(shards.tolist(), ends.tolist(), strict=True):
            if wanted[place:end].any():
                for i, file in enumerate(self._stream(shard)):
                    if wanted[place + i]:
                        yield place + i, file
            place = end

    def _stream(self, shard: int) -> Iterator[bytes]:
        """The files of a shard. Raises UserError if they are not those of the index."""
        url, first = beside(self.pattern, self.shards[shard]), int(self.firsts[shard])
        expected, count = self.labels[first : self.firsts[shard + 1]].tolist(), 0
        with open_url(url) as stream:
            for image, label in zip(tar_images(stream, url), expected, strict=False):
                if image.label != label:
                    break
                count += 1
                assert image.file is not None  # images are read whole by default
                yield image.file
        if count < len(expected):
            raise UserError(f"{url}: image {count} is not the one in the index; was the shard replaced?")

    def file(self, index: int) -> bytes:
        shard = self.shard_of(index)
        if self._shard != shard or self._next > index:
            self._shard, self._next, self._files = shard, int(self.firsts[shard]), self._stream(shard)
        skipped, self._next = index - self._next, index + 1
        return next(itertools.islice(self._files, skipped, None))


def _column(shards: list[dict], name: str) -> np.ndarray:
    return np.concatenate([np.array(shard[name], dtype=np.int64) for shard in shards])


def open_shards(data: str, split: str, *, skip_bad_images: bool = False) -> ShardImages:
    """The images of the shards that `data` names: 'path/train-{000000..000146}.tar', a path, URL or `pipe:` command.

    For the split "val", the shards beside them with "val" in place of "train" in their names. Raises UserError if
    shards are missing, do not match their index, or hold an image without a label.
    """
    found = SHARD.search(data)
    assert found is not None  # callers pass only what contains .tar
    if data[found.end() :].startswith(COMPRESSED):
        raise UserError(f"{data}: shards must be plain tar files, not compressed")
    pattern = found[0]
    if split == "val" and "val" not in pattern:
        if "train" not in pattern:
            raise UserError(f"{data}: names of shards should contain 'train', so that those for val can be found")
        pattern = pattern.replace("train", "val")
    data = beside(data, pattern)
    index = _read_index(data, pattern) or index_shards(_find_shards(data, pattern, split))
    if split == "train":
        known = {shard["name"]: shard for shard in index["shards"]}
        names = expand(pattern)
        if unknown := [name for name in names if name not in known]:
            raise UserError(f"{data}: {unknown[0]} is not in the index, which has {len(known)} shards")
        index["shards"] = [known[name] for name in names]
    if is_url(data):
        return StreamedImages(data, index, skip_bad_images=skip_bad_images)
    for shard in index["shards"]:
        path = Path(beside(data, shard["name"]))
        if not path.is_file():
            raise UserError(f"{path}: no such file, but the index lists it; copy or write it again")
        if (size := path.stat().st_size) != shard["bytes"]:
            raise UserError(f"{path}: has {size:,} bytes, the index says {shard['bytes']:,}; copy or write it again")
    return ShardImages(data, index, skip_bad_images=skip_bad_images)


def _read_index(data: str, pattern: str) -> dict | None:
    """The index beside the shards, or None if there is none and the shards are files."""
    name = index_name(pattern)
    try:
        with open_url(beside(data, name)) as file:
            index = json.loads(file.read())
    except FileNotFoundError:
        return None
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{data}: cannot read the index {name}, which tools/make_shards.py writes ({reason})") from None
    if not isinstance(index, dict) or not {"classes", "shards"} <= index.keys():
        raise UserError(f"{data}: the index {name} lacks classes or shards; tools/make_shards.py --index writes one")
    for i, shard in enumerate(index["shards"]):
        if not isinstance(shard, dict) or not set(ENTRY) <= shard.keys():
            raise UserError(f"{data}: shard {i} in the index {name} should have {', '.join(ENTRY)}")
    return index


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
    """A shard's entry in an index: {"name", "bytes", and for each image "labels", "offsets", "sizes"}."""
    images = [(image.label, image.offset, image.size) for image in tar_images(file, str(path), whole=False)]
    labels, offsets, sizes = (list(column) for column in zip(*images, strict=True)) if images else ([], [], [])
    return {"name": path.name, "bytes": file.seek(0, os.SEEK_END), "labels": labels, "offsets": offsets, "sizes": sizes}


class TarImage(NamedTuple):
    """An image in a shard: its class, its offset and size in bytes, and the file itself if it was read."""

    label: int
    offset: int
    size: int
    file: bytes | None


def tar_images(stream: BinaryIO, name: str, *, whole: bool = True) -> Iterator[TarImage]:
    """Every image of a tar file. Unless `whole`, image files are skipped over, and `stream` must be seekable.

    Raises UserError for an image without a label, a label without an image, and a truncated tar file.
    """
    key: tuple[str, str] = ("", "")  # folder and name without suffix of the files in `parts`
    parts: dict[str, Any] = {}
    try:
        with tarfile.open(fileobj=stream, mode="r|" if whole else "r:") as tar:
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                if not member.isfile() or not stem:
                    continue
                if (folder, stem) != key:
                    if parts:
                        yield _labelled(name, key, parts)
                    key, parts = (folder, stem), {}
                if f".{suffix.lower()}".endswith(SUFFIXES):
                    file = tar.extractfile(member).read() if whole else None  # type: ignore[union-attr]  # a file
                    parts["image"] = (member.offset_data, member.size, file)
                elif suffix == "cls":
                    parts["cls"] = tar.extractfile(member).read()  # type: ignore[union-attr]
                tar.members = []  # type: ignore[attr-defined]  # or tarfile keeps them all
            if parts:
                yield _labelled(name, key, parts)
    except tarfile.TarError as error:
        raise UserError(f"{name}: not a whole tar file ({error})") from None


def _labelled(name: str, key: tuple[str, str], parts: dict) -> TarImage:
    entry = "/".join(filter(None, key))
    if "image" not in parts:
        raise UserError(f"{name}: {entry} has no image; there should be an image and its label, .jpg and .cls")
    label = parts.get("cls", b"").decode(errors="replace").strip()
    if not label.isdecimal():
        raise UserError(f"{name}: {entry} has no label; {entry}.cls should hold the number of its class")
    return TarImage(int(label), *parts["image"])


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


def beside(data: str, name: str) -> str:
    """`data`, a path, URL or command, with the name of another file beside the shards."""
    return SHARD.sub(lambda _: name, data, count=1)


def is_url(data: str) -> bool:
    return re.match(r"[a-z][a-z0-9+.-]*:", data) is not None


def open_url(data: str) -> BinaryIO:
    """A file or URL to read from. Raises UserError if a URL is given and webdataset is not installed."""
    if not is_url(data):
        return open(data, "rb")
    require("scale", "webdataset", user="reading shards behind a URL")
    from webdataset import gopen

    return gopen(data)


def _find_shards(data: str, pattern: str, split: str) -> list[Path]:
    """The files of a pattern without an index; for val, whose number is unknown, those with fitting names."""
    folder = Path(data).parent
    found = sorted(folder.glob(NUMBERS.sub("*", pattern)))
    paths = found if split == "val" else [folder / name for name in expand(pattern)]
    if not paths:
        raise UserError(f"{data}: no such shard")
    if missing := [path.name for path in paths if not path.is_file()]:
        raise UserError(f"{data}: {len(missing)} of {len(paths)} shards are missing, {missing[0]} the first")
    return paths
