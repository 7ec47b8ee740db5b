"""Augmentation of training images and boxes (torchvision's transforms v2), and a detector's own input transform."""

import copy
import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_keypoints
from torchvision.transforms import v2

from detection.batch import numbers_of
from detection.boxes import MIN_BOX_SIDE
from detection.patches import is_patched, keeps
from resbackbone.checks import UserError
from resbackbone.compat import is_transformed
from resbackbone.weights.inputs import MEAN

_log = logging.getLogger("resbackbone")
SLACK = 0.25  # that resampling and augmentation may leave 0..1 by
MEAN_COLOUR = [round(255 * mean) for mean in MEAN]  # 0 when normalized, as the padding of a batch
MOST_NORMALIZED = 10.0  # ImageNet's mean and deviation make 2.64 of white


class TrainTransform:
    """Augmentation of an image and its boxes, as they are left to a detector with `resize_in_training=False`.

    flip: probability of a horizontal flip.
    short_sides, max_size: the shorter side becomes one of `short_sides`, the longer at most `max_size` (Faster R-CNN
        tests at 800 and 1333; Detectron trains at 640..800). Not used with a crop.
    scale_jitter, crop_size: large-scale jitter (Ghiasi et al. 2021, Sec. 3; theirs: 0.1 to 2.0, 1024). The image is
        resized to fit into `crop_size` x `crop_size` pixels times a factor drawn from `scale_jitter`, cut where it is
        larger, and padded at the right and bottom with ImageNet's mean colour where it is smaller.
    photometric: SSD's random brightness, contrast, saturation, hue and order of channels, each at one half.
    copy_paste: probability with which `CocoImages` pastes objects of another image, if there is one
        (`copy_paste.paste_objects`).

    (uint8 [3, H, W], {"boxes": float [n, 4] x1 y1 x2 y2 in pixels, "labels": int64 [n], ...}) to the same. Boxes are
    clipped; those left with under a pixel a side are dropped. An image whose crop shows no object is trained on as
    background, as in torchvision and detectron2: drawing again would favour small factors. It draws from torch's global
    random state, which `CocoImages` seeds for every sample.

    Raises UserError if `scale_jitter` or `crop_size` is given alone or a value is out of range.
    """

    def __init__(
        self,
        short_sides: Sequence[int],
        max_size: int,
        *,
        flip: float = 0.5,
        scale_jitter: Sequence[float] | None = None,
        crop_size: int | None = None,
        photometric: bool = False,
        copy_paste: float = 0.0,
    ):
        for name, probability in {"flip": flip, "copy_paste": copy_paste}.items():
            if not 0 <= probability <= 1:
                raise UserError(f"{name} {probability:g}: must be a probability, from 0 to 1")
        if (scale_jitter is None) != (crop_size is None):
            given, missing = ("scale_jitter", "crop_size") if crop_size is None else ("crop_size", "scale_jitter")
            raise UserError(f"{given} without {missing}: give both (the paper's are 0.1 2.0 and 1024) or neither")
        resize: list[v2.Transform]
        if scale_jitter is None or crop_size is None:
            if not isinstance(short_sides, Sequence) or not short_sides or min(*short_sides, max_size) < 1:
                raise UserError(
                    f"short_sides {short_sides} and max_size {max_size}: must be such as (640, 800) and 1333"
                )
            resize = [RandomShortestSize(list(short_sides), max_size)]
        else:
            pair = isinstance(scale_jitter, Sequence) and len(scale_jitter) == 2
            if not pair or not 0 < scale_jitter[0] <= scale_jitter[1] < math.inf:
                raise UserError(f"scale_jitter {scale_jitter}: must be the least and the largest factor, as (0.1, 2)")
            if not isinstance(crop_size, int) or crop_size < 1:
                raise UserError(f"crop_size {crop_size}: must be a whole number of pixels, at least 1")
            resize = [ScaleJitter((crop_size, crop_size), tuple(scale_jitter)), CropAndPad(crop_size)]
        self.copy_paste = copy_paste
        self.transforms = v2.Compose(
            [
                v2.RandomHorizontalFlip(flip),
                *([v2.RandomPhotometricDistort()] if photometric else []),
                *resize,
                v2.ClampBoundingBoxes(),
            ]
        )

    def __call__(self, image: Tensor, target: dict) -> tuple[Tensor, dict]:
        boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=tuple(image.shape[-2:]))
        if drawn := target.keys() & {"masks", "keypoints"}:
            raise UserError(
                f"a target with {' and '.join(sorted(drawn))}: TrainTransform flips and resizes boxes only; use "
                "torchvision.transforms.v2"
            )
        image, boxes = self.transforms(tv_tensors.Image(image), boxes)
        boxes = boxes.as_subclass(Tensor)
        kept = (boxes[:, 2:] - boxes[:, :2] >= MIN_BOX_SIDE).all(dim=1)
        return image.as_subclass(Tensor), {**target, "boxes": boxes[kept], "labels": target["labels"][kept]}


class LeavesAPixel(v2.Transform):
    """For torchvision's random sizes, which fail where a long, thin image is left without a pixel."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {"size": tuple(max(1, side) for side in super().make_params(flat_inputs)["size"])}


class RandomShortestSize(LeavesAPixel, v2.RandomShortestSize):
    pass


class ScaleJitter(LeavesAPixel, v2.ScaleJitter):
    pass


class CropAndPad(v2.Transform):
    """A random part of at most `size` x `size` pixels, padded to that at the right and bottom with the mean colour."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        sides = flat_inputs[0].shape[-2:]  # the image comes first
        top, left = (int(torch.randint(max(side - self.size, 0) + 1, ())) for side in sides)
        height, width = (min(side, self.size) for side in sides)
        return {"top": top, "left": left, "height": height, "width": width}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        inpt = self._call_kernel(v2.functional.crop, inpt, **params)
        padding = [0, 0, self.size - params["width"], self.size - params["height"]]  # left, top, right, bottom
        return self._call_kernel(v2.functional.pad, inpt, padding, fill=MEAN_COLOUR)


class InputTransform(GeneralizedRCNNTransform):
    """torchvision's normalisation, resizing and padding, with mean and std kept on the device."""

    fixed_size: tuple[int, int] | None  # width and height, if not None
    warned = looked = False  # whether `check_range` has warned, and whether it has looked at pixels

    def __init__(
        self,
        min_size,
        max_size,
        image_mean,
        image_std,
        *,
        size_divisible=32,
        resize_in_training=True,
        fp32_ratios=True,
    ):
        super().__init__(min_size, max_size, image_mean, image_std, size_divisible)
        self.resize_in_training = resize_in_training
        self.fp32_ratios = fp32_ratios  # of sizes, by which boxes are multiplied: torchvision's are, not detectron2's
        self.sent: dict[tuple, tuple[Tensor, ...]] = {}  # mean and std on the device

    def check_range(self, images: Sequence[Tensor]) -> None:
        """Raise UserError for pixels in 0..255; warn once about normalized ones, and about 0..1 under a larger mean.

        Pixels are looked at where mean and standard deviation are those of images in 0..1 (ImageNet's, 0.5, ..) or of
        larger numbers: every time on a CPU, and once on a GPU, which would have to be waited for.
        """
        larger = max(self.image_mean) > 1
        watched = torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed()
        if (self.has_own_range() and not larger) or watched or (self.looked and images[0].device.type != "cpu"):
            return
        self.looked = True
        ends = numbers_of(torch.stack([torch.stack(image.detach().aminmax()) for image in images]).float())
        low, high = ends[:, 0].min().item(), ends[:, 1].max().item()
        if larger:
            if high <= 1 and not self.warned:
                self.warned = True
                _log.warning(
                    "images hold values up to %.3g, and image_mean is %s: give images of that range, or mean and "
                    "standard deviation for 0..1",
                    high,
                    list(self.image_mean),
                )
            return
        if not math.isfinite(high - low):
            raise UserError(f"images hold values from {low:g} to {high:g}; they are floats in 0..1")
        if high > MOST_NORMALIZED:
            raise UserError(f"images hold values up to {high:g}; they are floats in 0..1: divide them by 255")
        if (low < -SLACK or high > 1 + SLACK) and not self.warned:
            self.warned = True
            _log.warning(
                "images hold values from %.3g to %.3g, and a detector takes RGB floats in 0..1, which it normalizes "
                "itself: leave out your own normalization",
                low,
                high,
            )

    def has_own_range(self) -> bool:
        """Whether mean and standard deviation are not those of images in 0..1."""
        return not all(0 < mean <= 1 for mean in self.image_mean) or max(self.image_std) > 1

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None):
        """[3, H, W] floats in 0..1 -> the images normalized and resized in one tensor, padded with 0, and targets."""
        if not self.training or self.resize_in_training or not self.is_as_built():
            return super().forward(images, targets)  # normalizes each before it is resized
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        height, width = (
            -(-max(sides) // self.size_divisible) * self.size_divisible for sides in zip(*sizes, strict=True)
        )
        mean, _ = self._mean_and_std(images[0])
        batch = mean.expand(len(images), -1, height, width).clone()  # padding, which normalization turns to 0
        for i, image in enumerate(images):
            batch[i, :, : image.shape[-2], : image.shape[-1]].copy_(image)
        return ImageList(self.normalize(batch), sizes), targets

    @torch.compiler.assume_constant_result
    def is_as_built(self) -> bool:
        """Whether `forward` computes what torchvision's would with this transform's methods."""
        own = {"normalize": InputTransform.normalize, "resize": InputTransform.resize}
        return keeps(self, {**own, "batch_images": GeneralizedRCNNTransform.batch_images}) and not is_patched()

    def normalize(self, image: Tensor) -> Tensor:
        """[.., 3, H, W] floats in 0..1, less the mean, over the standard deviation."""
        if is_patched():
            return super().normalize(image)
        mean, std = self._mean_and_std(image)
        return (image - mean) / std

    def _mean_and_std(self, image: Tensor) -> tuple[Tensor, ...]:
        """Both [3, 1, 1], of the image's type, on its device."""
        key = image.dtype, image.device, tuple(self.image_mean), tuple(self.image_std)
        if torch.compiler.is_compiling():  # tensors of a trace hold no numbers to keep
            return self._constants(image)
        if key not in self.sent:
            with torch.inference_mode(False):  # they outlive a call under inference_mode, and a gradient may pass them
                self.sent[key] = self._constants(image)
        return self.sent[key]

    def _constants(self, image: Tensor) -> tuple[Tensor, ...]:
        both = torch.tensor([self.image_mean, self.image_std], dtype=image.dtype, device=image.device)
        return both[:, :, None, None].unbind()

    def resize(self, image: Tensor, target: dict | None = None) -> tuple[Tensor, dict | None]:
        """[3, H, W] and its boxes, masks and keypoints at the detector's size; in eval mode at the test size."""
        if self.training and not self.resize_in_training:
            return image, target
        drawn = target is not None and not target.keys().isdisjoint(("masks", "keypoints"))
        height, width = image.shape[-2:]
        scale, resizer = self.max_size / max(height, width), self
        if self.fixed_size is None and min(height, width) * scale < 1:  # a strip without a pixel: torchvision fails
            resizer = copy.copy(self)  # other threads may use this one
            resizer.fixed_size = max(1, int(width * scale)), max(1, int(height * scale))
        own = {**target} if target is not None and drawn else None
        resized, with_resized = super(InputTransform, resizer).resize(image, own)
        if target is not None:
            target = {
                **(with_resized or target),
                "boxes": self.resize_boxes(target["boxes"], image.shape[-2:], resized.shape[-2:]),
            }
        return resized, target

    def resize_boxes(self, boxes: Tensor, size: Sequence[int], new_size: Sequence[int]) -> Tensor:
        """Boxes [.., 4], x1 y1 x2 y2, on an image of `size` (H, W) -> on the same image at `new_size`."""
        y, x = (new / old for new, old in zip(new_size, size, strict=True))
        if self.fp32_ratios:
            y, x = float(np.float32(y)), float(np.float32(x))
        return torch.stack([side * ratio for side, ratio in zip(boxes.unbind(-1), (x, y, x, y), strict=True)], -1)

    def postprocess(self, result: list[dict[str, Tensor]], image_shapes, original_image_sizes):
        """Boxes, masks and keypoints on the resized images [(H, W), ..] -> on the original images."""
        if not self.training:
            for found, resized, original in zip(result, image_shapes, original_image_sizes, strict=True):
                found["boxes"] = self.resize_boxes(found["boxes"], resized, original)
                if "masks" in found:
                    found["masks"] = paste_masks_in_image(found["masks"], found["boxes"], original)
                if "keypoints" in found:
                    found["keypoints"] = resize_keypoints(found["keypoints"], resized, original)
        return result


def check_images(images: Any, transform: GeneralizedRCNNTransform) -> None:
    """Raise UserError unless `images` is a list of float images of the transform's channels and range."""
    channels = len(transform.image_mean)
    if not isinstance(images, list | tuple) and not (isinstance(images, Tensor) and images.dim() == 4):
        given = f"one tensor {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise UserError(f"images are a list of tensors [{channels}, H, W], not {given}")
    if not len(images):
        raise UserError("the list of images is empty: give at least one image")
    counts = (1, 3) if channels == 3 else (channels,)  # a grey image serves as three equal colours
    for image in images:
        if not isinstance(image, Tensor) or image.dim() != 3 or image.shape[0] not in counts:
            given = str(list(image.shape)) if isinstance(image, Tensor) else type(image).__name__
            raise UserError(f"an image is a tensor [{channels}, H, W] of floats in 0..1, not {given}")
        if 0 in image.shape:
            raise UserError(f"an image of {list(image.shape)} has no pixels: leave it out")
        if not image.is_floating_point():
            raise UserError(f"images are floats in 0..1, not {image.dtype}: divide uint8 images by 255")
    if isinstance(transform, InputTransform):
        transform.check_range(list(images))


def to_model_input(image: Tensor, device: torch.device) -> Tensor:
    """uint8 pixels of any shape -> floats in 0..1 on `device`, as detectors take them; floats stay as they are."""
    image = image.to(device, non_blocking=True)
    return image if image.is_floating_point() else image.float().div_(255)
