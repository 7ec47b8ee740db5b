"""Images as users have them -> boxes with names: what `FasterRCNN.predict` does and returns."""

import copy
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from detection import video
from detection.faster_rcnn import FasterRCNN, fuse_detector
from detection.foreign import NOT_A_CLASS
from detection.gallery import QUALITY, draw_boxes
from detection.inputs import images_in
from detection.transforms import MOST_NORMALIZED, SLACK, InputTransform, to_model_input
from resbackbone.checks import MissingPackage, UserError, brief
from resbackbone.engine.device import INFERENCE, choose_precision
from resbackbone.image_io import SUFFIXES, read_image, to_rgb
from resbackbone.layers import BATCH_NORMS, FrozenBatchNorm2d

NORMS = (FrozenBatchNorm2d, *BATCH_NORMS)  # which `fuse_detector` folds
T = TypeVar("T")


@dataclass(frozen=True, eq=False, repr=False)
class Prediction:
    """What a detector found in one image, by falling score. Numbers are CPU tensors; `.numpy()` makes arrays of them.

    boxes_xyxy: float32 [n, 4], x1 y1 x2 y2 in pixels of the given image.
    scores: float32 [n], in 0..1.
    labels: int64 [n], 1..num_classes.
    category_ids: int64 [n], the data set's ids of these classes.
    names: their names, n of them.
    image_size: (height, width) in pixels.
    categories: the detector's {category id: name}, in the order of the labels.
    path: the image's file, which is read again to draw on it; None if pixels were given.
    image: the pixels that were given, [3, H, W] on their device, not copied; None for a file.
    """

    boxes_xyxy: Tensor
    scores: Tensor
    labels: Tensor
    category_ids: Tensor
    names: list[str]
    image_size: tuple[int, int]
    categories: dict[int, str]
    path: Path | None = None
    image: Tensor | None = None

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        found = ", ".join(f"{count} {name}" for name, count in Counter(self.names).items()) or "nothing found"
        height, width = self.image_size
        return f"Prediction({self.path or 'image'}, {width} x {height} pixels: {found})"

    def at_least(self, score: float) -> "Prediction":
        """The boxes with this score or a higher one."""
        kept = self.scores.double() >= score
        return replace(
            self,
            boxes_xyxy=self.boxes_xyxy[kept],
            scores=self.scores[kept],
            labels=self.labels[kept],
            category_ids=self.category_ids[kept],
            names=[name for name, keep in zip(self.names, kept.tolist(), strict=True) if keep],
        )

    def picture(self) -> Image.Image:
        """The image with its boxes, one colour per class; a small image is enlarged so that labels can be read."""
        image = self.image
        if image is None:
            image = read_image(self.path or "")
        if image.is_floating_point():
            image = image.detach().float().mul(255).round().clamp(0, 255).to(torch.uint8)
        if len(image) != 3:
            raise UserError(f"an image of {len(image)} channels cannot be drawn, only RGB and gray")
        return draw_boxes(image.cpu(), self.to_coco(0), self.categories)

    def save(self, path: str | os.PathLike) -> None:
        """Write `picture()` to a file; the suffix decides the format (.png, .jpg, ..).

        Raises UserError for an unknown suffix or missing folder, and for the file of the image itself.
        """
        if self.path is not None and Path(path).resolve() == self.path.resolve():
            raise UserError(f"{path}: is the image itself, which boxes would replace; choose another name")
        picture = self.picture()
        try:
            picture.save(path, quality=QUALITY)  # other formats ignore it
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be written ({error})") from None

    def to_coco(self, image_id: int) -> list[dict[str, Any]]:
        """COCO's results format: {"image_id", "category_id", "bbox": [x, y, width, height], "score"} of each box."""
        boxes = self.boxes_xyxy.double()
        boxes[:, 2:] -= boxes[:, :2]
        rows = zip(self.category_ids.tolist(), boxes.tolist(), self.scores.tolist(), strict=True)
        return [{"image_id": image_id, "category_id": c, "bbox": box, "score": score} for c, box, score in rows]

    def to_supervision(self) -> Any:
        """An `sv.Detections`: xyxy, confidence, class_id (the labels, from 1) and data["class_name"].

        Raises MissingPackage if supervision is not installed.
        """
        if find_spec("supervision") is None:
            raise MissingPackage("to_supervision needs supervision: pip install supervision", name="supervision")
        import supervision

        return supervision.Detections(
            xyxy=self.boxes_xyxy.numpy(),
            confidence=self.scores.numpy(),
            class_id=self.labels.numpy(),
            data={"class_name": np.array(self.names, dtype=str)},
        )


def predict(
    detector: FasterRCNN, images: Any, *, score: float, batch_size: int, precision: str | None
) -> Prediction | list[Prediction]:
    """`FasterRCNN.predict`, which describes it."""
    if not 0 <= score <= 1:
        raise UserError(f"score={score}: must be between 0 and 1")
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size}: must be at least 1")
    weight = next(detector.parameters())
    wanted = precision or ("bf16" if weight.dtype == torch.bfloat16 else None)
    bf16 = choose_precision(wanted, str(weight.device), INFERENCE) == "bf16"
    given = expanded(images)
    ready, found = prepared(detector), []
    for batch in batches(given, batch_size):
        pixels = [pixels_of(image, detector) for image in batch]
        for image, prediction in zip(batch, predictions(ready, pixels, bf16=bf16), strict=True):
            if isinstance(image, str | os.PathLike):
                prediction = replace(prediction, path=Path(image), image=None)
            found.append(prediction.at_least(score))
    one = not isinstance(images, list | tuple) and given[0] is images
    return found[0] if one else found


def predictions(detector: FasterRCNN, images: Sequence[Tensor], *, bf16: bool = False) -> list[Prediction]:
    """What a detector that is ready for inference finds in images, uint8 [3, H, W] or floats in 0..1, at any score.

    Outputs that stand for no class, which torchvision's COCO detectors have, are left out.
    """
    categories = detector.categories
    ids, names = torch.tensor(list(categories)), list(categories.values())
    real = torch.tensor([name != NOT_A_CLASS for name in names])
    found = []
    for image, rows in zip(images, boxes_of(detector, images, bf16=bf16), strict=True):
        labels = rows[:, 5].long()
        labels, rows = labels[real[labels - 1]], rows[real[labels - 1]]
        found.append(
            Prediction(
                boxes_xyxy=rows[:, :4].clone(),
                scores=rows[:, 4].clone(),
                labels=labels,
                category_ids=ids[labels - 1],
                names=[names[label - 1] for label in labels.tolist()],
                image_size=(image.shape[-2], image.shape[-1]),
                categories=categories,
                image=image,
            )
        )
    return found


@torch.inference_mode()
def boxes_of(
    detector: nn.Module, images: Sequence[Tensor], device: torch.device | None = None, *, bf16: bool = False
) -> list[Tensor]:
    """x1 y1 x2 y2, score and label of the boxes in each image, [n, 6] on the CPU, by falling score.

    Images, uint8 [3, H, W] or floats in 0..1, go to `device`, by default the detector's. Those of one size go through
    the network together, without padding, which would change the boxes.
    """
    device = device or next(detector.parameters()).device
    found = [torch.empty(0, 6)] * len(images)
    for shape in {image.shape: None for image in images}:
        which = [i for i, image in enumerate(images) if image.shape == shape]
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            outputs = detector([to_model_input(images[i], device) for i in which])
        columns = [torch.cat((o["boxes"], o["scores"][:, None], o["labels"][:, None]), 1) for o in outputs]
        rows = torch.cat(columns).cpu()  # one wait for the GPU
        for i, of_image in zip(which, rows.split([len(each) for each in columns]), strict=True):
            found[i] = of_image
    return found


def prepared(detector: FasterRCNN) -> FasterRCNN:
    """The detector in eval mode with its norms folded: itself if it is so already, else a copy that shares its weights.

    So predictions are those of the commands, bit for bit, also in bf16, and the detector stays as it is.
    """
    modules = [module for module in detector.modules() if not isinstance(module, nn.Identity)]  # a norm that was folded
    if not any(module.training or isinstance(module, NORMS) for module in modules):
        return detector
    shared: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in detector.parameters()}
    return fuse_detector(copy.deepcopy(detector, shared))


def expanded(images: Any) -> list[Any]:
    """The images of a list or folder, or the one given. Raises UserError for an empty folder, a video and a URL."""
    if isinstance(images, list | tuple):
        return [image for each in images for image in expanded(each)]
    if not isinstance(images, str | os.PathLike):
        return [images]
    path = Path(images)
    if re.match(r"\w+://", str(images)):
        raise UserError(f"{images}: is a URL, and predict reads files; download it first")
    if path.suffix.lower() in video.SUFFIXES:
        raise UserError(f"{path}: is a video; use tools/detect.py, or give its frames as arrays [H, W, 3] in RGB")
    if not path.is_dir():
        return [images]
    if not (files := images_in(path)):
        raise UserError(f"{path}: holds no image ({', '.join(SUFFIXES)})")
    return list(files)


def pixels_of(image: Any, detector: FasterRCNN) -> Tensor:
    """An image in any of the forms that `FasterRCNN.predict` takes -> uint8 [3, H, W], or floats in 0..1.

    Raises BadImage for a file that cannot be used, and UserError for pixels that are not as described there.
    """
    if isinstance(image, str | os.PathLike):
        return read_image(image)
    if isinstance(image, Image.Image):
        image = np.array(to_rgb(ImageOps.exif_transpose(image)))
    channels = len(detector.transform.image_mean)
    form = f"an array [H, W, {channels}]" if isinstance(image, np.ndarray) else f"a tensor [{channels}, H, W]"
    if isinstance(image, np.ndarray):
        given, kind = list(image.shape), image.dtype
        if image.dtype.kind == "f":
            image = image.astype(np.float32)
        elif image.dtype != np.uint8:
            raise UserError(f"an array of {kind}: pixels are uint8 in 0..255 or floats in 0..1")
        image = image[:, :, None] if image.ndim == 2 else image
        image = torch.from_numpy(np.require(image, requirements=["C", "W"]))  # torch warns of arrays without "W"
        image = image.permute(2, 0, 1) if image.ndim == 3 else image
    elif isinstance(image, Tensor):
        given = list(image.shape)
        if image.dtype != torch.uint8 and not image.is_floating_point():
            raise UserError(f"a tensor of {image.dtype}: pixels are uint8 in 0..255 or floats in 0..1")
    else:
        raise UserError(
            "an image is a file, a PIL image, an array [H, W, 3] or a tensor [3, H, W], and several are a list or "
            f"a folder, not {brief(image)}"
        )
    if image.ndim != 3 or len(image) not in ((1, 3, 4) if channels == 3 else (channels,)):
        several = "; give several images as a list" if image.ndim == 4 else ""
        raise UserError(f"an image is {form}, not {given}{several}")
    if 0 in image.shape:
        raise UserError(f"an image of {given} has no pixels: leave it out")
    if image.is_floating_point():
        image = image.detach().float()
        _check_floats(image, detector)
    return image.expand(3, -1, -1) if channels == 3 and len(image) == 1 else image[:channels]  # a fourth is alpha


def _check_floats(image: Tensor, detector: FasterRCNN) -> None:
    low, high = (end.item() for end in image.aminmax())
    given = f"an image holds values from {low:g} to {high:g}; floats are in 0..1"
    if not np.isfinite(high - low):
        raise UserError(given)
    transform = detector.transform
    if isinstance(transform, InputTransform) and transform.has_own_range():
        return
    if high > MOST_NORMALIZED:
        raise UserError(f"{given}: divide it by 255, or give uint8")
    if low < -SLACK or high > 1 + SLACK:
        raise UserError(f"{given}: leave out your own normalization, the detector normalizes itself")


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield the items in lists of `size`; the last may be shorter."""
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch
