"""Which labelled images a run uses (folders, shards or synthetic ones), and batches of them to train on."""

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from resbackbone.checks import one_of
from resbackbone.classification.images import SPLIT_FOLDERS, FolderImages, Images, SyntheticImages, find_split, shuffled
from resbackbone.classification.shards import open_shards
from resbackbone.classification.transforms import TrainAugment
from resbackbone.engine.termination import worker_processes
from resbackbone.engine.transfer import moved
from resbackbone.image_io import BadImage, decode

SYNTHETIC = "synthetic"
LAYOUT = "train/<class>/ and val/<class>/ (or test/<class>/) with images in them"


def open_images(data: str | os.PathLike, split: str, *, skip_bad_images: bool = False) -> Images:
    """Open the images of `split`, "train" or "val".

    data: a folder of LAYOUT; shards, as `shards.open_shards` takes them ('path/train-{000000..000146}.tar'); or
    "synthetic". Raises UserError if the folder is missing, if class folders are empty or differ between the splits, if
    file names have no image suffix, and if shards do not match their index. With `skip_bad_images` training and
    evaluation skip files that cannot be read, and `skipped` holds their messages.
    """
    one_of("split", split, SPLIT_FOLDERS)
    if data == SYNTHETIC:
        return SyntheticImages(split)
    if ".tar" in Path(data).name and not Path(data).is_dir():
        return open_shards(str(data), split, skip_bad_images=skip_bad_images)
    folder = find_split(data, split, f"{LAYOUT}, or be shards, or {SYNTHETIC!r}")
    return FolderImages(folder, skip_bad_images=skip_bad_images)


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
    """Yield (uint8 [batch_size, 3, size, size] RGB, int64 labels [batch_size]) on `device`, for this rank, without end.

    Seed and epoch determine a permutation of the images, which the ranks share image by image; seed, epoch and position
    determine an image's augmentation. So batches from `start` on equal those of an uninterrupted run, whatever the
    number of `workers` (processes that load).

    repeats: how often an image appears in a row, augmented differently each time, so that it falls to different ranks;
    an epoch still has as many samples as there are images, so some images are left out (Hoffer et al. 2020; as in
    timm).

    Raises BadImage for a broken image. With `images.skip_bad_images` another image of its batch replaces it, and its
    message joins `images.skipped`.
    """
    if isinstance(images, SyntheticImages):
        yield from _synthetic_batches(images, batch_size, transform.size, device)
    order = {"seed": seed, "rank": rank, "ranks": ranks, "start": start * batch_size, "repeats": repeats}
    draws = shuffled(len(images), **order)
    loader = DataLoader(
        _Batches(images, transform),
        batch_size=None,
        sampler=iter(lambda: list(islice(draws, batch_size)), []),
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        **worker_processes(workers),
        generator=torch.Generator(),  # the loader draws an unused seed; not from the global generator
    )

    def move(batch: tuple[Tensor, Tensor, list[str]] | BadImage) -> tuple[Tensor, Tensor]:
        if isinstance(batch, BadImage):
            raise batch
        pixels, labels, skipped = batch
        images.skipped.update(skipped)
        return pixels.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    yield from moved(loader, move, device)


class _Batches(Dataset):
    """Makes a whole batch at once."""

    def __init__(self, images: Images, transform: TrainAugment):
        self.images, self.transform = images, transform

    def __getitem__(self, draws: list[tuple[int, int]]) -> tuple[Tensor, Tensor, list[str]] | BadImage:
        size = self.transform.size
        # The pixels of an image are adjacent, as decoders and networks in channels_last want them.
        pixels = torch.empty(len(draws), size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        labels = torch.from_numpy(self.images.labels[[index for index, _ in draws]])
        bad: dict[int, str] = {}
        for place, (index, seed) in enumerate(draws):
            try:
                image = decode(self.images.file(index), self.images.name(index))
                pixels[place] = self.transform(image, seed)
            except BadImage as error:
                if not self.images.skip_bad_images:
                    return error  # returned: an exception raised in a worker would lose its message
                bad[place] = str(error)
        if len(bad) == len(draws):
            return BadImage(f"none of the {len(draws)} images of a batch can be read; the first: {bad[0]}")
        good = [place for place in range(len(draws)) if place not in bad]
        for place, other in zip(bad, good * len(bad), strict=False):
            pixels[place], labels[place] = pixels[other], labels[other]
        return pixels, labels, list(bad.values())


def _synthetic_batches(images: Images, batch_size: int, size: int, device: torch.device) -> Iterator[tuple]:
    random = torch.Generator().manual_seed(0)
    shape = (batch_size, size, size, 3)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=random).permute(0, 3, 1, 2).to(device)
    labels = torch.from_numpy(images.labels[np.arange(batch_size) % len(images)]).to(device)
    while True:
        yield pixels, labels
