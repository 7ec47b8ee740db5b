"""Augmentation of training images and boxes (torchvision's transforms v2), and a detector's own input transform."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms import v2


class TrainTransform:
    """Flip with probability one half, then resize the shorter side to one of `short_sides`, the longer to at most
    `max_size` (Faster R-CNN tests at 800 and 1333; Detectron trains at 640..800), and the boxes with the image.

    (uint8 [3, H, W], {"boxes": float [n, 4] x1 y1 x2 y2 in pixels, "labels": int64 [n], ...}) to the same. It draws
    from torch's global random state, which `CocoImages` seeds for every sample.
    """

    def __init__(self, short_sides: Sequence[int], max_size: int):
        self.transforms = v2.Compose(
            [
                v2.RandomHorizontalFlip(0.5),
                v2.RandomShortestSize(list(short_sides), max_size),
                v2.ClampBoundingBoxes(),
            ]
        )

    def __call__(self, image: Tensor, target: dict) -> tuple[Tensor, dict]:
        boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=tuple(image.shape[-2:]))
        image, boxes = self.transforms(tv_tensors.Image(image), boxes)
        boxes = boxes.as_subclass(Tensor)
        kept = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)  # a box of one pixel can vanish when the image shrinks
        return image.as_subclass(Tensor), {**target, "boxes": boxes[kept], "labels": target["labels"][kept]}


class InputTransform(GeneralizedRCNNTransform):
    """torchvision's normalisation, resizing and padding, with mean and std kept on the device."""

    def __init__(self, min_size, max_size, image_mean, image_std, *, size_divisible=32, resize_in_training=True):
        super().__init__(min_size, max_size, image_mean, image_std, size_divisible)
        self.resize_in_training = resize_in_training
        self.sent: dict[tuple, tuple[Tensor, ...]] = {}  # mean and std on the device

    def normalize(self, image: Tensor) -> Tensor:
        """[3, H, W] floats in 0..1, less the mean, over the standard deviation."""
        if not image.is_floating_point():
            raise TypeError(f"images are floats in 0..1, not {image.dtype}: divide uint8 images by 255")
        key = image.dtype, image.device, tuple(self.image_mean), tuple(self.image_std)
        if torch.compiler.is_compiling():  # tensors of a trace hold no numbers to keep
            mean, std = self._constants(image)
        elif key in self.sent:
            mean, std = self.sent[key]
        else:
            with torch.inference_mode(False):  # they outlive a call under inference_mode, and a gradient may pass them
                mean, std = self.sent[key] = self._constants(image)
        return (image - mean) / std

    def _constants(self, image: Tensor) -> tuple[Tensor, ...]:
        both = torch.tensor([self.image_mean, self.image_std], dtype=image.dtype, device=image.device)
        return both[:, :, None, None].unbind()

    def resize(self, image: Tensor, target: dict | None = None) -> tuple[Tensor, dict | None]:
        """[3, H, W] and its boxes at the detector's size; in eval mode at the test size."""
        if self.training and not self.resize_in_training:
            return image, target
        resized, _ = super().resize(image)
        if target is not None:
            target = {**target, "boxes": _resized(target["boxes"], image.shape[-2:], resized.shape[-2:])}
        return resized, target

    def postprocess(self, result: list[dict[str, Tensor]], image_shapes, original_image_sizes):
        """Boxes on the resized images [(H, W), ..] -> boxes on the original images."""
        if not self.training:
            for found, resized, original in zip(result, image_shapes, original_image_sizes, strict=True):
                found["boxes"] = _resized(found["boxes"], resized, original)
        return result


def _resized(boxes: Tensor, size: Sequence[int], new_size: Sequence[int]) -> Tensor:
    """Boxes [n, 4] x1 y1 x2 y2 on an image of `size` (H, W) -> on the same image at `new_size`."""
    y, x = (new / old for new, old in zip(new_size, size, strict=True))
    return torch.stack((boxes[:, 0] * x, boxes[:, 1] * y, boxes[:, 2] * x, boxes[:, 3] * y), 1)


def to_model_input(image: Tensor, device: torch.device) -> Tensor:
    """uint8 pixels of any shape -> floats in 0..1 on `device`, as every detector here takes them."""
    return image.to(device, non_blocking=True).float().div_(255)
