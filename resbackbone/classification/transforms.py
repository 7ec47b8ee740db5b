"""Training augmentation, from a decoded image to a uint8 crop, and normalization of whole batches."""

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

from resbackbone.weights.inputs import MEAN, STD

RATIO = (3 / 4, 4 / 3)  # of a crop's width to its height
# Principal components of the RGB values (0..1) of ImageNet's training images: the variance along each (the eigenvalue,
# by which the source scales its noise), and the three directions as columns. From fb.resnet.torch (Facebook's ResNets),
# after Krizhevsky et al. 2012.
PCA_VARIANCES = np.array([0.2175, 0.0188, 0.0045])
PCA_DIRECTIONS = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
PCA_NOISE = 0.1
MEAN_COLOUR = [round(255 * mean) for mean in MEAN]  # erased pixels become about zero when normalized


class TrainAugment:
    """Decoded image -> random crop, resized to `size` -> flip -> automatic augmentation -> colour -> erasing.

    size: side of the square crop in pixels.
    scale: area of the crop as a fraction of the image's; its aspect ratio is between 3/4 and 4/3 (Szegedy et al. 2015,
        as torchvision's RandomResizedCrop draws them).
    shorter_side: instead, the image is resized so that its shorter side is in this range, in pixels, and a square is
        cut out anywhere (Simonyan and Zisserman 2014, Sec. 3.1; 256..480 in the ResNet paper). The square is cut first
        and then resized, which gives the same picture to a pixel.
    flip: mirror an image with probability 1/2.
    pca: add noise along the principal components of RGB (Krizhevsky et al. 2012, Sec. 4.1).
    auto_augment: timm's RandAugment, as "rand-m7-mstd0.5-inc1", or "trivial": torchvision's TrivialAugmentWide.
    erase: probability of torchvision's RandomErasing, which fills with the mean colour.

    All values are uint8, so colour noise saturates at 0 and 255. Resizing is bilinear and antialiased.
    """

    def __init__(
        self,
        size: int,
        *,
        scale: tuple[float, float] = (0.08, 1.0),
        shorter_side: tuple[int, int] | None = None,
        flip: bool = True,
        pca: bool = False,
        auto_augment: str | None = None,
        erase: float = 0.0,
    ):
        self.size, self.scale, self.shorter_side, self.flip, self.pca = size, scale, shorter_side, flip, pca
        self.auto_augment = _auto_augment(auto_augment, size)
        self.erase = v2.RandomErasing(erase, value=MEAN_COLOUR) if erase else None

    def __call__(self, image: np.ndarray, seed: int) -> Tensor:
        """uint8 [H, W, 3] to uint8 [3, size, size]; all randomness is a function of `seed`."""
        draw = random.Random(seed)
        height, width = image.shape[:2]
        cut = self._resized_crop if self.shorter_side is None else self._scaled_crop
        top, left, h, w = cut(height, width, draw)
        crop = np.ascontiguousarray(image[top : top + h, left : left + w])
        pixels = torch.from_numpy(crop)[None].permute(0, 3, 1, 2)  # channels_last is resized faster
        x = F.interpolate(pixels, (self.size, self.size), mode="bilinear", antialias=True)[0]
        if self.flip and draw.random() < 0.5:
            x = x.flip(-1)
        with _seeded(draw.getrandbits(32), needed=self.auto_augment is not None or self.erase is not None):
            if self.auto_augment is not None:
                augmented = self.auto_augment(Image.fromarray(x.permute(1, 2, 0).numpy()))
                x = torch.from_numpy(np.array(augmented)).permute(2, 0, 1)
            if self.pca:
                noise = PCA_DIRECTIONS @ (PCA_VARIANCES * [draw.gauss(0, PCA_NOISE) for _ in range(3)])
                shift = torch.from_numpy((255 * noise).round().astype(np.int16)).view(3, 1, 1)
                x = (x + shift).clamp_(0, 255).to(torch.uint8)
            if self.erase is not None:
                x = self.erase(x)
        return x

    def _resized_crop(self, height: int, width: int, draw: random.Random) -> tuple[int, int, int, int]:
        for _ in range(10):
            area = height * width * draw.uniform(*self.scale)
            ratio = math.exp(draw.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
            h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if 0 < h <= height and 0 < w <= width:
                return draw.randint(0, height - h), draw.randint(0, width - w), h, w
        # the image is too wide or too high: its largest central part whose ratio is in range
        w = max(1, min(width, round(height * RATIO[1])))
        h = max(1, min(height, round(width / RATIO[0])))
        return (height - h) // 2, (width - w) // 2, h, w

    def _scaled_crop(self, height: int, width: int, draw: random.Random) -> tuple[int, int, int, int]:
        assert self.shorter_side is not None
        shorter = min(height, width)
        side = max(1, round(self.size * shorter / draw.randint(*self.shorter_side)))
        return draw.randint(0, height - side), draw.randint(0, width - side), side, side


def to_model_input(images: Tensor, device: torch.device) -> Tensor:
    """uint8 [B, 3, H, W] RGB to the networks' input: fp32 on `device` in channels_last, normalized by MEAN and STD.

    Equal, bit for bit, to torchvision's to_tensor and normalize.
    """
    width = images.shape[-1]
    # Rows of pixels, [B, H, W*3], and a constant for each value: [.., 3] / [3] takes CPUs many times as long.
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
        return v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR)  # as in torchvision's recipes
    return rand_augment_transform(name, {"translate_const": int(0.45 * size), "img_mean": tuple(MEAN_COLOUR)})


@contextmanager
def _seeded(seed: int, *, needed: bool) -> Iterator[None]:
    """Seed the generators of Python, numpy and torch, from which timm and torchvision draw, and restore them after."""
    if not needed:
        yield
        return
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
