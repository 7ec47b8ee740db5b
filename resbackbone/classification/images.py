"""Labelled images: folders of classes, shards or synthetic ones, checked before training, and batches to train on."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from resbackbone.checks import UserError, one_of
from resbackbone.classification.decode import SUFFIXES, BadImage, decode, open_rgb
from resbackbone.classification.transforms import TrainAugment
from resbackbone.engine.termination import worker_processes
from resbackbone.engine.transfer import moved

SYNTHETIC = "synthetic"
LAYOUT = "train/<class>/ and val/<class>/ (or test/<class>/) with images in them"
SPLITS = {"train": ("train",), "val": ("val", "test")}  # and the folders that hold them
SMALL_SET = 64_000_000  # bytes; decoded before training starts
LOOKED_AT = 100_000  # images; of sets up to this size the first and last bytes are read before training starts


class CropRequest(NamedTuple):
    """One training sample to make: which image, the seed of its augmentation, and its file where that is read here."""

    index: int
    seed: int
    file: bytes | None = None


class Images:
    """The images of one split: `classes` are their names, `labels` int64 [n] the class of each, from 0.

    A subclass gives `file` and `name`.
    """

    def __init__(self, classes: list[str], labels: np.ndarray, *, skip_bad_images: bool = False):
        self.classes, self.labels, self.skip_bad_images = classes, labels, skip_bad_images
        self.skipped: set[str] = set()  # what was wrong with each image that training went on without

    def __len__(self) -> int:
        return len(self.labels)

    def file(self, index: int) -> bytes:
        """The encoded image. Raises BadImage if it cannot be read."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """Where the image is, for messages."""
        raise NotImplementedError

    def read(self, index: int) -> Image.Image:
        """The image in RGB, decoded by PIL, as torchvision's evaluation does. Raises BadImage, naming it."""
        return open_rgb(self.file(index), self.name(index))

    def draws(self, *, seed: int, rank: int, ranks: int, start: int, repeats: int) -> Iterator[CropRequest]:
        """This rank's training samples without end, from the `start`-th on: see `train_batches`."""
        position = start * ranks + rank
        while True:
            epoch, first = divmod(position, len(self))
            random = np.random.default_rng((seed, epoch))
            order = np.repeat(random.permutation(len(self)), repeats)[first : len(self) : ranks]
            seeds = random.integers(0, 2**62, len(self))[first::ranks]
            yield from map(CropRequest, order.tolist(), seeds.tolist())
            position += ranks * len(order)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of the classes and the labels in their order: tells a run that is resumed from others."""
        return hashlib.sha256("\n".join(self.classes).encode() + self.labels.tobytes()).hexdigest()

    def summary(self) -> str:
        """One line: what there is."""
        return f"{len(self)} images of {len(self.classes)} classes"


class FolderImages(Images):
    """Images in folders named by their class, in the order of torchvision's ImageFolder."""

    def __init__(self, folder: Path, *, skip_bad_images: bool = False):
        self.folder = folder
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
        files = [_files_below(folder / name) for name in names]
        empty = [name for name, inside in zip(names, files, strict=True) if not inside]
        if not names or empty:
            what = f"class folders without images: {_some(empty)}" if names else "no class folders"
            raise BadImage(f"{folder}: {what}; it should hold a folder of images for each class")
        strange = [file for inside in files for file in inside if not file.lower().endswith(SUFFIXES)]
        if strange and not skip_bad_images:
            raise BadImage(
                f"{folder}: files that are no images: {_some(strange)}; images end in {', '.join(SUFFIXES)}; "
                "--skip-bad-images goes on without them"
            )
        pairs = [(f, label) for label, inside in enumerate(files) for f in inside if f.lower().endswith(SUFFIXES)]
        self._files = np.array([os.fsencode(file) for file, _ in pairs])  # flat: workers share it
        super().__init__(names, np.array([label for _, label in pairs]), skip_bad_images=skip_bad_images)
        self._leave_out_broken()

    def file(self, index: int) -> bytes:
        try:
            with open(self.name(index), "rb", buffering=0) as file:
                return file.read()
        except OSError as error:
            raise BadImage(f"image {self.name(index)}: cannot be read ({error.strerror})") from None

    def name(self, index: int) -> str:
        return os.path.join(self.folder, os.fsdecode(self._files[index]))

    def summary(self) -> str:
        without = f", without {len(self.skipped)} files that cannot be read" if self.skipped else ""
        return f"{super().summary()} in {self.folder}{without}"

    def _leave_out_broken(self) -> None:
        """Raise for images that are broken, or leave them out: all those of a small set, truncated ones of a larger.

        Beyond LOOKED_AT images that would take minutes, and training names what it meets.
        """
        if len(self) > LOOKED_AT:
            return
        size = 0
        for i in range(len(self)):
            with contextlib.suppress(OSError):  # links may lead nowhere
                size += os.path.getsize(self.name(i))
        small = size <= SMALL_SET
        broken = {}
        for i in range(len(self)):
            if small or not _looks_whole(self.name(i)):
                try:
                    self.read(i)
                except BadImage as error:
                    broken[i] = str(error)
        if not broken:
            return
        first = next(iter(broken.values()))
        if not self.skip_bad_images or len(broken) == len(self):
            others = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
            raise BadImage(f"{first}{others}; --skip-bad-images goes on without")
        self.skipped.update(broken.values())
        kept = np.setdiff1d(np.arange(len(self)), list(broken))
        self._files, self.labels = self._files[kept], self.labels[kept]


class SyntheticImages(Images):
    """As many images and classes as ImageNet, all the same noise: training on them shows what the network can take."""

    def __init__(self, split: str):
        super().__init__([str(i) for i in range(1000)], np.arange({"train": 1_281_167, "val": 50_000}[split]) % 1000)

    def name(self, index: int) -> str:
        return f"{SYNTHETIC} {index}"

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8))

    def summary(self) -> str:
        return f"{super().summary()}, synthetic: not read, not decoded, and nothing is learnt from them"


def open_images(data: str | os.PathLike, split: str, *, skip_bad_images: bool = False) -> Images:
    """The images of `split`, "train" or "val".

    data: a folder with train/<class>/ and val/<class>/ (or test/<class>/); shards, as `shards.open_shards` takes them
    ('path/train-{000000..000146}.tar'); or "synthetic". What is wrong with them is found here, as far as it can be in
    seconds, and is a ValueError of one sentence: no such folder, class folders that differ between the splits or are
    empty, files that are no images, images that are broken, shards without labels. With `skip_bad_images` the files
    among these are left out and counted in `skipped`; the same goes for what turns out to be broken in training.
    """
    one_of("split", split, SPLITS)
    if data == SYNTHETIC:
        return SyntheticImages(split)
    if ".tar" in str(data) and not Path(data).is_dir():
        from resbackbone.classification.shards import open_shards

        return open_shards(str(data), split, skip_bad_images=skip_bad_images)
    if not Path(data).is_dir():
        what = "a file, not a folder" if Path(data).is_file() else "no such folder"
        raise UserError(f"--data {data}: {what}; it should hold {LAYOUT}, or be shards, or {SYNTHETIC!r}")
    folders = {name: split_folder(data, name) for name in SPLITS}
    if folders[split] is None:
        raise UserError(f"--data {data}: no folder {' or '.join(SPLITS[split])} in it; it should hold {LAYOUT}")
    if all(folders.values()):
        train, val = ({e.name for e in os.scandir(f) if e.is_dir() and e.name[0] != "."} for f in folders.values())
        if train != val:
            sides = [f"only in {folders['train'].name}: {_some(sorted(train - val))}"] if train - val else []
            sides += [f"only in {folders['val'].name}: {_some(sorted(val - train))}"] if val - train else []
            raise UserError(f"--data {data}: class folders differ between the splits, {' and '.join(sides)}")
    return FolderImages(folders[split], skip_bad_images=skip_bad_images)


def split_folder(data: str | os.PathLike, split: str) -> Path | None:
    """The folder of `split` in `data`, or None."""
    return next((Path(data) / name for name in SPLITS[split] if (Path(data) / name).is_dir()), None)


def train_batches(
    images: Images,
    *,
    batch_size: int,
    transform: TrainAugment,
    seed: int,
    rank: int = 0,
    ranks: int = 1,
    start: int = 0,
    workers: int = 0,
    repeats: int = 1,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (uint8 [batch_size, 3, size, size] RGB, int64 labels [batch_size]) on `device`, for this rank.

    Every epoch is a permutation of the images, a function of seed and epoch, which the ranks share out image by image;
    an image's augmentation is a function of the same and its place. So batch `start`, the first that is given, is what
    it would have been in a run that was not interrupted, whatever the number of `workers` (processes that load).

    repeats: how often an image stands in a row, each time augmented anew, so that it falls to different ranks; an
    epoch still has as many samples as there are images, so not all of them are in it (Hoffer et al. 2020; as in timm).

    A broken image raises BadImage, a ValueError that names it. With `images.skip_bad_images` another image of its batch
    takes its place, and `images.skipped` says what was wrong.
    """
    if isinstance(images, SyntheticImages):
        yield from _synthetic_batches(images, batch_size, transform.size, device)
    draws = images.draws(seed=seed, rank=rank, ranks=ranks, start=start * batch_size, repeats=repeats)
    loader = DataLoader(
        _Samples(images, transform),
        batch_sampler=_batched(draws, batch_size),
        collate_fn=_as_it_is,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        **worker_processes(workers),
        generator=torch.Generator(),  # it draws a seed that nothing here uses, and not from the global one
    )

    def move(batch: tuple[Tensor, Tensor, list[str]] | BadImage) -> tuple[Tensor, Tensor]:
        if isinstance(batch, BadImage):
            raise batch
        pixels, labels, skipped = batch
        images.skipped.update(skipped)
        return pixels.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    yield from moved(loader, move, device)


class _Samples(Dataset):
    """Makes a batch of draws at once."""

    def __init__(self, images: Images, transform: TrainAugment):
        self.images, self.transform = images, transform

    def __getitems__(self, draws: list[CropRequest]) -> tuple[Tensor, Tensor, list[str]] | BadImage:
        size = self.transform.size
        # The pixels of an image lie together, as decoders and networks in channels_last want them.
        pixels = torch.empty(len(draws), size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        labels = torch.from_numpy(self.images.labels[[draw.index for draw in draws]])
        good, bad, messages = [], [], []
        for place, draw in enumerate(draws):
            try:
                file = self.images.file(draw.index) if draw.file is None else draw.file
                pixels[place] = self.transform(decode(file, self.images.name(draw.index)), draw.seed)
                good.append(place)
            except BadImage as error:  # given back, as a worker's exception would lose its message
                if not self.images.skip_bad_images:
                    return BadImage(f"{error}; --skip-bad-images goes on without")
                bad.append(place)
                messages.append(str(error))
        if not good:
            return BadImage(f"none of the {len(draws)} images of a batch can be read; the first: {messages[0]}")
        for place, other in zip(bad, good * len(bad), strict=False):
            pixels[place], labels[place] = pixels[other], labels[other]
        return pixels, labels, messages


def _as_it_is(batch):
    return batch


def _batched(draws: Iterator[CropRequest], size: int) -> Iterator[list[CropRequest]]:
    while True:
        yield [next(draws) for _ in range(size)]


def _synthetic_batches(images: Images, batch_size: int, size: int, device: torch.device) -> Iterator[tuple]:
    random = torch.Generator().manual_seed(0)
    shape = (batch_size, size, size, 3)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=random).permute(0, 3, 1, 2).to(device)
    labels = torch.from_numpy(images.labels[np.arange(batch_size) % len(images)]).to(device)
    while True:
        yield pixels, labels


def _files_below(folder: Path) -> list[str]:
    """Paths of the files in `folder` and below, from the folder above it, sorted; hidden ones are passed over."""
    found = []
    for where, _, files in sorted(os.walk(folder, followlinks=True)):
        inside = os.path.relpath(where, folder.parent)
        found += [os.path.join(inside, name) for name in sorted(files) if name[0] != "."]
    return found


def _looks_whole(path: str) -> bool:
    """Whether a file begins and ends as a JPEG does; others are looked at more closely."""
    try:
        with open(path, "rb") as file:
            if file.read(2) != b"\xff\xd8" or file.seek(0, os.SEEK_END) < 4:
                return False
            file.seek(-2, os.SEEK_END)
            return file.read() == b"\xff\xd9"
    except OSError:
        return False


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
