"""Training augmentation: a decoded image to a uint8 crop; and whole batches of these to what a network takes."""

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import rand_augment_transform
from torch import Tensor
from torchvision.transforms import v2

from resbackbone.checks import UserError, one_of
from resbackbone.weights.inputs import MEAN, STD

COLOURS = ("none", "pca")
# Principal components of the RGB values (0..1) of ImageNet's training images: variance along each (the eigenvalue, with
# which the source scales its noise), and the three directions as columns. Computed for fb.resnet.torch (Facebook's
# ResNets) after Krizhevsky et al. 2012.
PCA_VARIANCES = np.array([0.2175, 0.0188, 0.0045])
PCA_DIRECTIONS = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
PCA_NOISE = 0.1
MEAN_COLOUR = [round(255 * mean) for mean in MEAN]  # what is erased becomes about zero when it is normalized


class TrainAugment:
    """Decoded image -> random crop, resized to `size` -> flip -> automatic augmentation -> colour -> erasing.

    size: side of the square crop in pixels.
    scale, ratio: area of the crop as a fraction of the image's, and width over height (Szegedy et al. 2015, as
        torchvision's RandomResizedCrop draws them).
    shorter_side: in their place, the image is resized so that its shorter side is in this range, in pixels, and a
        square cut out anywhere (Simonyan and Zisserman 2014, Sec. 3.1; 256..480 in the ResNet paper). The square is
        cut first and then resized: the same picture, to a pixel.
    flip: mirror every other image.
    colour: "none", or "pca": noise along the principal components of RGB (Krizhevsky et al. 2012, Sec. 4.1).
    auto_augment: a RandAugment of timm, "rand-m7-mstd0.5-inc1", or "trivial": torchvision's TrivialAugmentWide.
    erase: probability of torchvision's RandomErasing, which fills with the mean colour.

    Everything is uint8 here, so what colour noise carries beyond 0..255 saturates. Resizing is bilinear, antialiased.
    Raises ValueError for a value that is out of range.
    """

    def __init__(
        self,
        size: int,
        *,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        shorter_side: tuple[int, int] | None = None,
        flip: bool = True,
        colour: str = "none",
        auto_augment: str | None = None,
        erase: float = 0.0,
    ):
        if shorter_side is not None and not size <= shorter_side[0] <= shorter_side[1]:
            raise UserError(
                f"a crop of {size} does not fit into shorter sides of {shorter_side[0]} to {shorter_side[1]}"
            )
        self.size, self.scale, self.ratio, self.shorter_side, self.flip = size, scale, ratio, shorter_side, flip
        self.colour = one_of("colour augmentation", colour, COLOURS)
        self.auto_augment = _auto_augment(auto_augment, size)
        self.erase = v2.RandomErasing(erase, value=MEAN_COLOUR) if erase else None

    def __call__(self, image: np.ndarray, seed: int) -> Tensor:
        """uint8 [H, W, 3] to uint8 [3, size, size]; what is random is a function of `seed`."""
        draw = random.Random(seed)
        height, width = image.shape[:2]
        if self.shorter_side is None:
            top, left, h, w = self._resized_crop(height, width, draw)
        else:
            top, left, h, w = self._scaled_crop(height, width, draw)
        crop = np.ascontiguousarray(image[top : top + h, left : left + w])[
            None
        ]  # as channels_last it is resized faster
        pixels = torch.from_numpy(crop).permute(0, 3, 1, 2)
        x = F.interpolate(pixels, (self.size, self.size), mode="bilinear", antialias=True)[0]
        if self.flip and draw.random() < 0.5:
            x = x.flip(-1)
        with _seeded(draw.getrandbits(32), needed=self.auto_augment is not None or self.erase is not None):
            if self.auto_augment is not None:
                augmented = self.auto_augment(Image.fromarray(x.permute(1, 2, 0).numpy()))
                x = torch.from_numpy(np.array(augmented)).permute(2, 0, 1)
            if self.colour == "pca":
                noise = PCA_DIRECTIONS @ (PCA_VARIANCES * [draw.gauss(0, PCA_NOISE) for _ in range(3)])
                shift = torch.from_numpy((255 * noise).round().astype(np.int16)).view(3, 1, 1)
                x = (x + shift).clamp_(0, 255).to(torch.uint8)
            if self.erase is not None:
                x = self.erase(x)
        return x

    def _resized_crop(self, height: int, width: int, draw: random.Random) -> tuple[int, int, int, int]:
        for _ in range(10):
            area = height * width * draw.uniform(*self.scale)
            ratio = math.exp(draw.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if 0 < h <= height and 0 < w <= width:
                return draw.randint(0, height - h), draw.randint(0, width - w), h, w
        # an image too long or too high: the largest middle part of it whose ratio is in range
        w = max(1, min(width, round(height * self.ratio[1])))
        h = max(1, min(height, round(width / self.ratio[0])))
        return (height - h) // 2, (width - w) // 2, h, w

    def _scaled_crop(self, height: int, width: int, draw: random.Random) -> tuple[int, int, int, int]:
        shorter = min(height, width)
        side = max(1, round(self.size * shorter / draw.randint(*self.shorter_side)))
        return draw.randint(0, height - side), draw.randint(0, width - side), side, side


def to_model_input(images: Tensor, device: torch.device) -> Tensor:
    """uint8 [B, 3, H, W] RGB to what networks take: fp32 on `device` in channels_last, normalized by MEAN and STD.

    The same numbers, bit for bit, as torchvision's to_tensor and normalize compute.
    """
    width = images.shape[-1]
    # Rows of pixels, [B, H, W*3], and a number for each value: CPUs take many times as long for [.., 3] / [3].
    rows = images.to(device, non_blocking=True).permute(0, 2, 3, 1).flatten(2).float()
    mean, std = _row_of_constants(width, device)
    return rows.div_(255).sub_(mean).div_(std).unflatten(2, (width, 3)).permute(0, 3, 1, 2)


@lru_cache(maxsize=16)
def _row_of_constants(width: int, device: torch.device) -> list[Tensor]:
    with torch.inference_mode(False):
        return [torch.tensor(values).repeat(width).to(device) for values in (MEAN, STD)]


def _auto_augment(name: str | None, size: int):
    if name is None:
        return None
    if name == "trivial":
        return v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR)  # as torchvision's own recipes do
    try:  # timm asserts what it checks
        assert name.startswith("rand-")
        return rand_augment_transform(name, {"translate_const": int(0.45 * size), "img_mean": tuple(MEAN_COLOUR)})
    except (AssertionError, ValueError, KeyError):
        raise UserError(
            f"unknown auto_augment {name!r}; 'trivial' or timm's 'rand-m7-mstd0.5-inc1' is wanted"
        ) from None


@contextmanager
def _seeded(seed: int, *, needed: bool) -> Iterator[None]:
    """Seed the generators of Python, numpy and torch, which timm and torchvision draw from, and put them back after."""
    if not needed:
        yield
        return
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
