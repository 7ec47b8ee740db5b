"""What a detector finds in one image, and what every level of its backbone responds to, from one pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from detection.evaluate import detect
from detection.faster_rcnn import FasterRCNN

COLOURS = matplotlib.colormaps["inferno"]
SIDE = 640  # pixels of a heat map's longer side, at most


class Response(NamedTuple):
    """A level's response to an image: the mean over its channels of the activations' magnitudes.

    `values` is float32 [H, W], rows and columns of the map that the image covers (padding is cut off); `channels` are
    the map's, `stride` is in pixels of the resized image that the network sees.
    """

    values: np.ndarray
    channels: int
    stride: int


class Look(NamedTuple):
    """An image, uint8 [3, H, W], its detections, DETECTION [n] of every score, and the levels' responses, c2.. p2.."""

    image: Tensor
    detections: np.ndarray
    responses: dict[str, Response]


def look(detector: FasterRCNN, image: Tensor, device: torch.device, *, bf16: bool = False) -> Look:
    """One pass of `detector`, which is on `device` in eval mode, over one image, uint8 [3, H, W].

    With a pyramid the levels are the trunk's maps that it is made of, and its own; otherwise the trunk's alone.
    """
    with _recorded(detector) as record:
        detections = detect(detector, image, 0, list(detector.categories), device, bf16=bf16)
    height, width = record["image_size"]
    trunk = getattr(detector.backbone, "stage_features", {})
    features = {**trunk, **detector.backbone.features}
    responses = {}
    for level, x in record["maps"].items():
        stride = features[level].stride
        values = x[0, :, : -(-height // stride), : -(-width // stride)].float().abs().mean(0)
        responses[level] = Response(values.cpu().numpy(), x.shape[1], stride)
    return Look(image, detections, responses)


@contextmanager
def _recorded(detector: FasterRCNN) -> Iterator[dict]:
    record: dict = {"maps": {}}
    backbone = detector.backbone

    def resized(_, __, output) -> None:
        record["image_size"] = output[0].image_sizes[0]  # before padding

    hooks = [
        detector.transform.register_forward_hook(resized),
        backbone.register_forward_hook(lambda _, __, maps: record["maps"].update(maps)),
    ]
    if backbone.fpn is not None:
        hooks.append(backbone.fpn.register_forward_pre_hook(lambda _, given: record["maps"].update(given[0])))
    try:
        yield record
    finally:
        for hook in hooks:
            hook.remove()


def heat_map(image: Tensor, response: Response) -> Image.Image:
    """A response in colour over the image, uint8 [3, H, W], in grey: black where it is least, yellow where most."""
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    picture.thumbnail((SIDE, SIDE))
    values = np.nan_to_num(response.values, posinf=0.0)
    low, high = values.min(), values.max()
    scaled = Image.fromarray((values - low) / max(high - low, 1e-12)).resize(picture.size, Image.Resampling.BILINEAR)
    colours = Image.fromarray((COLOURS(np.asarray(scaled))[:, :, :3] * 255).astype(np.uint8))
    return Image.blend(picture.convert("L").convert("RGB"), colours, 0.65)
