"""A detector's detections on one image and the response of every level of its backbone, from one pass."""

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
    """A level's response to an image: the mean of its activations' magnitudes over the channels.

    `values` is float32 [H, W], the part of the map that the image covers, without padding; `channels` counts the map's
    channels; `stride` is in pixels of the resized image.
    """

    values: np.ndarray
    channels: int
    stride: int


class Look(NamedTuple):
    """An image, uint8 [3, H, W], its detections, DETECTION [n] of every score, and the response of each level.

    `size` is the height and width in pixels to which the network resized the image.
    """

    image: Tensor
    detections: np.ndarray
    responses: dict[str, Response]
    size: tuple[int, int]


def look(detector: FasterRCNN, image: Tensor, device: torch.device, *, bf16: bool = False) -> Look:
    """One pass of `detector`, which is on `device` in eval mode, over one image, uint8 [3, H, W].

    With a pyramid the levels are those of the trunk it is built on and its own; otherwise those of the trunk alone.
    """
    backbone, maps, sizes = detector.backbone, {}, []
    hooks = [
        detector.transform.register_forward_hook(lambda _, __, output: sizes.extend(output[0].image_sizes)),
        backbone.register_forward_hook(lambda _, __, found: maps.update(found)),
    ]
    if backbone.fpn is not None:
        hooks.append(backbone.fpn.register_forward_pre_hook(lambda _, given: maps.update(given[0])))
    try:
        [detections] = detect(detector, [image], [0], device, bf16=bf16)
    finally:
        for hook in hooks:
            hook.remove()
    [(height, width)] = sizes  # before padding
    features = {**getattr(backbone, "stage_features", {}), **backbone.features}
    responses = {}
    for level, x in maps.items():
        stride = features[level].stride
        values = x[0, :, : -(-height // stride), : -(-width // stride)].float().abs().mean(0)
        responses[level] = Response(values.cpu().numpy(), x.shape[1], stride)
    return Look(image, detections, responses, (height, width))


def heat_map(image: Tensor, response: Response) -> Image.Image:
    """A response in colour, from black (lowest) to yellow (highest), over the grey image, uint8 [3, H, W]."""
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    picture.thumbnail((SIDE, SIDE))
    values = np.nan_to_num(response.values, posinf=0.0)
    low, high = values.min(), values.max()
    scaled = Image.fromarray((values - low) / max(high - low, 1e-12)).resize(picture.size, Image.Resampling.BILINEAR)
    colours = Image.fromarray((COLOURS(np.asarray(scaled))[:, :, :3] * 255).astype(np.uint8))
    return Image.blend(picture.convert("L").convert("RGB"), colours, 0.65)
