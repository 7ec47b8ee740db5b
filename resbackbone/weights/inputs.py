"""The one input every backbone takes, and the exact conversion of weights that were made for another."""

from collections.abc import Mapping

import torch
from torch import Tensor

from resbackbone.checks import UserError

MEAN = (0.485, 0.456, 0.406)  # ImageNet's, RGB, of values 0..1: the one input every backbone here takes
STD = (0.229, 0.224, 0.225)
INPUT = {"channel_order": "RGB", "range": [0.0, 1.0], "mean": list(MEAN), "std": list(STD)}
BGR_255 = {  # MSRA's, Caffe's and Detectron's
    "channel_order": "BGR",
    "range": [0.0, 255.0],
    "mean": [103.53, 116.28, 123.675],
    "std": [1.0, 1.0, 1.0],
}
BGR_255_WITH_STD = {**BGR_255, "std": [57.375, 57.12, 58.395]}  # of FAIR's ResNeXts


def describe_input(given: Mapping) -> str:
    """One phrase on an input: `BGR 0..255, mean 103.53 116.28 123.675, std 1 1 1`."""
    mean, std = (" ".join(f"{value:g}" for value in given[key]) for key in ("mean", "std"))
    return f"{given['channel_order']} 0..{given['range'][1]:g}, mean {mean}, std {std}"


def for_canonical_input(conv1: Tensor, given: Mapping) -> Tensor:
    """The first convolution, [channels, 3, k, k], made for `given`, changed to take INPUT instead.

    Both inputs are (value - mean) / std, channel by channel, so a factor on the weights is all there is to change, at
    the zero-padded borders too, if both means are the same colour: else padding stands for another colour there, and
    ValueError says so. Computed in fp64 and rounded once.
    """
    return (conv1.double().flip(1) if _is_bgr(given) else conv1.double()).mul(_factor(given)).float()


def for_given_input(conv1: Tensor, given: Mapping) -> Tensor:
    """The opposite of `for_canonical_input`: takes INPUT, and becomes one that takes `given`."""
    weight = conv1.double().div(_factor(given))
    return (weight.flip(1) if _is_bgr(given) else weight).float()


def _is_bgr(given: Mapping) -> bool:
    return given["channel_order"] == "BGR"


def _factor(given: Mapping) -> Tensor:
    """[1, 3, 1, 1], RGB: how many of `given`'s units one unit of INPUT is."""
    check_input(given)
    top = given["range"][1]
    mean, std = (torch.tensor(given[key], dtype=torch.float64) for key in ("mean", "std"))
    if _is_bgr(given):
        mean, std = mean.flip(0), std.flip(0)
    if not torch.allclose(mean / top, torch.tensor(MEAN, dtype=torch.float64), rtol=1e-6, atol=0):
        raise UserError(
            f"weights made for an input of {describe_input(given)} cannot be converted exactly: padding would stand "
            f"for another colour at the borders, as the mean is not {' '.join(map(str, MEAN))} (RGB, of 0..1)"
        )
    return (top * torch.tensor(STD, dtype=torch.float64) / std).view(1, 3, 1, 1)


def check_input(given: Mapping) -> None:
    """ValueError unless `given` is an input as INPUT is one: its four keys, three channels, a deviation above 0."""
    try:
        numbers = [float(value) for key in ("range", "mean", "std") for value in given[key]]
        known = given["channel_order"] in ("RGB", "BGR") and given["range"][0] == 0 and given["range"][1] in (1, 255)
        known = known and len(numbers) == 8 and all(float(value) > 0 for value in given["std"])
    except (KeyError, TypeError, ValueError, IndexError):
        known = False
    if not known:
        raise UserError(f"unknown input {given!r}; one looks like {INPUT}, with RGB or BGR and a range to 1 or 255")
