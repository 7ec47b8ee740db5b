"""CIFAR-10 in memory, and the paper's training batches: per-pixel mean, padded crops, flips (Sec. 4.2)."""

import hashlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.datasets import CIFAR10

from resbackbone.checks import UserError
from resbackbone.classification.images import FolderImages, find_split, shuffled
from resbackbone.image_io import BadImage, decode

SYNTHETIC = "synthetic"
SYNTHETIC_IMAGES = {"train": 2000, "test": 500}
LAYOUT = "cifar-10-batches-py/, or train/<class>/ and test/<class>/ (or val/<class>/) with 32 x 32 images"
HELD_OUT = 0.1  # of the training images are held out for validation: 5,000 of 50,000, as in the paper
PADDING = 4  # pixels on each side


class Split(NamedTuple):
    """`images` uint8 [N, 3, 32, 32] in RGB, `labels` int64 [N], from 0."""

    images: Tensor
    labels: Tensor


class Cifar10(NamedTuple):
    """Training and test images; `classes` names the labels."""

    train: Split
    test: Split
    classes: list[str]

    def summary(self) -> str:
        """One line with the numbers of images and classes."""
        return f"{len(self.train.labels)} training and {len(self.test.labels)} test images, {len(self.classes)} classes"

    def fingerprint(self) -> str:
        """SHA-256, in hex, of classes, training images and labels; a resumed run compares it."""
        digest = hashlib.sha256("\n".join(self.classes).encode())
        for tensor in self.train:
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    def held_out(self) -> "Cifar10":
        """The training images split in two: a fixed random tenth of them to test on (the paper's 45k/5k)."""
        order = torch.randperm(len(self.train.labels), generator=torch.Generator().manual_seed(0))
        held, kept = (part.sort().values for part in order.tensor_split([round(HELD_OUT * len(order))]))
        train, test = (Split(self.train.images[part], self.train.labels[part]) for part in (kept, held))
        return self._replace(train=train, test=test)


def open_cifar10(data: str | os.PathLike) -> Cifar10:
    """CIFAR-10, or another set of 32 x 32 images, as tensors.

    data: a folder of LAYOUT, or "synthetic": random patterns of ten classes that can be learnt. Raises UserError if the
    folder is missing or has another layout, if batches are damaged, if classes are empty or differ between the splits,
    and, naming the file, if an image cannot be read or has another size.
    """
    if str(data) == SYNTHETIC:
        return make_synthetic()
    root = Path(data).parent if Path(data).name == CIFAR10.base_folder else Path(data)
    if (root / CIFAR10.base_folder).is_dir():
        return _open_batches(root)
    train, test = (FolderImages(find_split(data, split, LAYOUT), skip_bad_images=True) for split in ("train", "val"))
    return Cifar10(_decoded(train), _decoded(test), train.classes)


def make_synthetic() -> Cifar10:
    """Images of ten classes, each a coarse random pattern under noise; the same every time."""
    random = torch.Generator().manual_seed(0)
    patterns = F.interpolate(torch.randn(10, 3, 4, 4, generator=random), size=32, mode="bilinear")
    splits = []
    for count in SYNTHETIC_IMAGES.values():
        labels = torch.arange(count) % 10
        noise = torch.randn(count, 3, 32, 32, generator=random)
        splits.append(Split((128 + 32 * (patterns[labels] + noise)).clamp(0, 255).to(torch.uint8), labels))
    return Cifar10(splits[0], splits[1], [f"pattern-{i}" for i in range(10)])


def mean_image_of(split: Split) -> Tensor:
    """The mean of each pixel over the images, [3, 32, 32] in 0..1; exact, so the same on any machine."""
    return (split.images.sum(0, dtype=torch.int64).double() / (255 * len(split.images))).float()


def to_model_input(images: Tensor, mean_image: Tensor) -> Tensor:
    """uint8 [B, 3, 32, 32] to the network's input: values in 0..1 less the per-pixel mean, with no std."""
    return images.float() / 255 - mean_image


def train_batches(
    split: Split,
    mean_image: Tensor,
    *,
    batch_size: int,
    seed: int,
    rank: int = 0,
    ranks: int = 1,
    start: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless augmented batches, ([b, 3, 32, 32] channels last, labels [b]) on `device`, from the `start`-th on.

    Batches have `batch_size` images of this rank, which makes every `ranks`-th. Every image is drawn once an epoch, in
    an order that depends on the seed and the epoch; the next epoch may begin within a batch. A batch's augmentation
    depends on the seed, its number and the rank.
    """
    images, labels, mean_image = (tensor.to(device) for tensor in (*split, mean_image))
    for indices, random in draws(len(labels), batch_size=batch_size, seed=seed, rank=rank, ranks=ranks, start=start):
        drawn = torch.tensor(indices)[:, None], *draw_crops(len(indices), random)
        chosen, top, left, flipped = torch.stack(drawn).to(device)  # one copy
        yield crop(to_model_input(images[chosen[:, 0]], mean_image), top, left, flipped), labels[chosen[:, 0]]


def draws(
    count: int, *, batch_size: int, seed: int, rank: int = 0, ranks: int = 1, start: int = 0
) -> Iterator[tuple[list[int], torch.Generator]]:
    """The images, of `count`, in each of `train_batches`' batches, and the generator of its augmentation."""
    samples = shuffled(count, seed=seed, rank=rank, ranks=ranks, start=start * batch_size)
    for number in itertools.count(start):
        indices = [index for index, _ in itertools.islice(samples, batch_size)]
        # Three numbers: no epoch, seeded by two, has the same seed.
        yield indices, torch.Generator().manual_seed(int(np.random.default_rng((seed, number, rank)).integers(2**62)))


def draw_crops(count: int, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The first row and column of `count` crops of padded images, and 1 for those to flip: int64 [count, 1] each.

    `random` is a CPU generator, so every device gets the same crops.
    """
    top, left = torch.randint(0, 2 * PADDING + 1, (2, count, 1), generator=random)
    return top, left, torch.randint(0, 2, (count, 1), generator=random)


def crop(images: Tensor, top: Tensor, left: Tensor, flipped: Tensor) -> Tensor:
    """Pad each of [B, 3, H, W] by 4 zeros a side (the mean's value), crop it to H x W, and flip it or not.

    The crops come from `draw_crops`; the result is channels last.
    """
    count, _, height, width = images.shape
    rows = top + torch.arange(height, device=images.device)  # [B, H]
    columns = torch.arange(width, device=images.device).expand(count, width)
    columns = left + torch.where(flipped == 1, columns.flip(1), columns)  # [B, W]
    padded = F.pad(images, (PADDING,) * 4).permute(0, 2, 3, 1)  # [B, H + 8, W + 8, 3]
    which = torch.arange(count, device=images.device)
    cropped = padded[which[:, None, None], rows[:, :, None], columns[:, None, :]]  # [B, H, W, 3]
    return cropped.permute(0, 3, 1, 2)


def _open_batches(root: Path) -> Cifar10:
    try:
        train, test = (CIFAR10(str(root), train=part) for part in (True, False))  # checks hashes first
    except (RuntimeError, OSError):
        raise UserError(
            f"{root}: {CIFAR10.base_folder} is incomplete or not the original; {CIFAR10.url} has it, MD5 "
            f"{CIFAR10.tgz_md5}"
        ) from None
    splits = [Split(_channels_first(part.data), torch.tensor(part.targets)) for part in (train, test)]
    return Cifar10(splits[0], splits[1], list(train.classes))


def _decoded(files: FolderImages) -> Split:
    pixels = []
    for i in range(len(files)):
        try:
            image = decode(files.file(i), files.name(i))
        except BadImage as error:
            raise UserError(str(error)) from None  # of a BadImage, commands say that --skip-bad-images skips it
        if image.shape != (32, 32, 3):
            raise UserError(f"image {files.name(i)}: {image.shape[1]} x {image.shape[0]} pixels; must be 32 x 32")
        pixels.append(image)
    return Split(_channels_first(np.stack(pixels)), torch.from_numpy(files.labels))


def _channels_first(pixels: np.ndarray) -> Tensor:  # [N, 32, 32, 3] -> [N, 3, 32, 32]
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
