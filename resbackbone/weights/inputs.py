"""The one input that every backbone takes, and the exact conversion of weights trained with another."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resbackbone.checks import UserError

MEAN = (0.485, 0.456, 0.406)  # ImageNet's, in RGB and for values in 0..1
STD = (0.229, 0.224, 0.225)
INPUT = {"channel_order": "RGB", "range": [0.0, 1.0], "mean": list(MEAN), "std": list(STD)}
RGB_255 = {**INPUT, "range": [0.0, 255.0], "mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]}
# MSRA's, Caffe's and Detectron's
BGR_255 = {"channel_order": "BGR", "range": [0.0, 255.0], "mean": [103.53, 116.28, 123.675], "std": [1.0, 1.0, 1.0]}
BGR_255_WITH_STD = {**BGR_255, "std": [57.375, 57.12, 58.395]}  # of FAIR's ResNeXts
INPUTS = {"rgb": INPUT, "rgb-255": RGB_255, "bgr-255": BGR_255, "bgr-255-std": BGR_255_WITH_STD}  # by their names

# The mean or the standard deviation of an input among settings and buffers: std, image_mean, normalize.mean, means.
STATISTICS = re.compile(
    r"(.*\.)?_?((?:(?:pixel|ima?ge?|img|input|norm|normali[sz]e|normali[sz]ation|rgb|data|dataset|imagenet|new)_)?)"
    r"(mean|std)(s|_|_tensor|_rgb)?",
    re.IGNORECASE,
)


def describe_input(given: Mapping) -> str:
    """An input in a phrase: `BGR 0..255, mean 103.53 116.28 123.675, std 1 1 1`."""
    mean, std = (" ".join(f"{value:g}" for value in given[key]) for key in ("mean", "std"))
    return f"{given['channel_order']} 0..{given['range'][1]:g}, mean {mean}, std {std}"


def same_input(one: Mapping, other: Mapping) -> bool:
    """Whether two inputs are the same, whatever the unit of their ranges. Raises ValueError if one is no input."""
    numbers = []
    for given in (one, other):
        check_input(given)
        numbers.append([value / given["range"][1] for key in ("mean", "std") for value in given[key]])
    return one["channel_order"] == other["channel_order"] and all(
        math.isclose(x, y, rel_tol=1e-4) for x, y in zip(*numbers, strict=True)
    )


def order_of(mean: Sequence[float], top: float) -> str | None:
    """The order of the channels if `mean`, of values in 0..`top`, is ImageNet's in RGB or in BGR."""
    for order, usual in (("RGB", MEAN), ("BGR", MEAN[::-1])):
        if all(abs(x / top - y) < 0.005 for x, y in zip(mean, usual, strict=True)):
            return order
    return None


def statistics_in(values: Mapping) -> list[dict[str, str]]:
    """The keys of each mean with its std: [{"mean": "img_mean", "std": "img_std"}]. One of the two may be missing."""
    pairs: dict[tuple, dict[str, str]] = {}
    for key in values:
        if match := STATISTICS.fullmatch(key):
            *name, kind, suffix = match.groups()
            pairs.setdefault((*name, suffix), {})[kind.lower()] = key
    return list(pairs.values())


def numbers_of(value: Any) -> list[float] | None:
    """One number or three, as a number, a list, an array or text ("0.5,0.5,0.5"); None if it is anything else."""
    if isinstance(value, Tensor | np.ndarray) and math.prod(value.shape) in (1, 3):
        value = [float(f"{x:.7g}") for x in value.reshape(-1).tolist()]  # 0.485, not its fp32
    elif isinstance(value, str):
        value = re.sub(r"array|tensor|[\[\](),]", " ", value[:200]).split()
    value = value if isinstance(value, list | tuple) else [value]
    try:
        numbers = [float(x) for x in value] if len(value) in (1, 3) and bool not in map(type, value) else []
    except (TypeError, ValueError):
        return None
    return numbers if numbers and all(map(math.isfinite, numbers)) else None


def input_of(mean: list[float], std: list[float]) -> dict[str, Any] | None:
    """The input of three means and deviations, of 0..1 or 0..255; None unless the mean is ImageNet's, RGB or BGR."""
    top = 255.0 if max(mean) > 1 else 1.0
    if (order := order_of(mean, top)) is None or min(std) <= 0:
        return None
    return {"channel_order": order, "range": [0.0, top], "mean": mean, "std": std}


def for_canonical_input(conv1: Tensor, given: Mapping) -> Tensor:
    """Convert the first convolution, [channels, 3, k, k], from the input `given` to INPUT.

    Both inputs are (value - mean) / std for each channel. If both means are the same colour, a factor on the weights
    converts one into the other, at zero-padded borders too. Else padding would stand for another colour, and ValueError
    is raised. Computed in fp64 and rounded once.
    """
    weight = conv1.double() * _factor(given)
    return (weight.flip(1) if given["channel_order"] == "BGR" else weight).float()


def for_given_input(conv1: Tensor, given: Mapping) -> Tensor:
    """The inverse of `for_canonical_input`: from INPUT to `given`."""
    weight = conv1.double().flip(1) if given["channel_order"] == "BGR" else conv1.double()
    return (weight / _factor(given)).float()


def _factor(given: Mapping) -> Tensor:
    """[1, 3, 1, 1], in the order of `given`: its units in one unit of INPUT."""
    top = given["range"][1]
    mean, std = (torch.tensor(given[key], dtype=torch.float64) for key in ("mean", "std"))
    ours = torch.tensor((MEAN, STD), dtype=torch.float64)
    our_mean, our_std = ours.flip(1) if given["channel_order"] == "BGR" else ours
    if not torch.allclose(mean / top, our_mean, rtol=1e-6, atol=0):
        raise UserError(
            f"made for an input of {describe_input(given)} cannot be converted exactly: padding would stand "
            f"for another colour at the borders, as the mean is not {' '.join(map(str, MEAN))} (RGB, of 0..1); to use "
            "its normalisation, give its state dict alone (torch.load, safetensors.torch.load_file) to read_weights "
            "with given_input='rgb', and images normalised as in its training"
        )
    return (top * our_std / std).view(1, 3, 1, 1)


def check_input(given: Mapping) -> None:
    """Raise ValueError unless `given` has the layout of INPUT: four keys, three channels, deviations above 0."""
    try:
        numbers = [float(value) for key in ("range", "mean", "std") for value in given[key]]
        known = given["channel_order"] in ("RGB", "BGR") and given["range"][0] == 0 and given["range"][1] in (1, 255)
        known = known and len(numbers) == 8 and all(float(value) > 0 for value in given["std"])
    except (KeyError, TypeError, ValueError, IndexError):
        known = False
    if not known:
        raise UserError(f"unknown input {given!r}; one looks like {INPUT}, with RGB or BGR and a range to 1 or 255")
