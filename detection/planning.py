"""What fits a time budget: image size, anchors and number of updates, from the data and timed updates."""

import timeit
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import NamedTuple

from torch import Tensor

from detection.coco import CocoImages
from detection.statistics import object_sizes, unreached
from resbackbone.checks import UserError

ANCHOR_SCALES = (4.0, 3.0, 6.0, 8.0, 2.0, 12.0, 16.0)  # the first of those that are equally good
ENOUGH = 16  # pixels: where half of the objects of every class are this large, larger images are not worth their time
SMALLEST, LARGEST, STEP = 256, 800, 32  # pixels of a shorter side: where recipes with larger ones begin, and the end
LEAST_UPDATES = {"detector": 150, "backbone": 600}  # by trained weights, if any: larger images are not worth fewer
MARGIN = 1.05  # updates measured one after the other, to those between which checkpoints and metrics are written
SAME_SHARE = 0.01  # of the boxes: smaller differences between anchor scales do not count


def sides_for(dataset: CocoImages, smallest: int) -> list[int]:
    """The image sizes to choose from: from `smallest` to those that the images have, but at most LARGEST."""
    own = int(dataset.widths_heights.min(1).values.median())
    return [smallest, *range(smallest + STEP, min(own, LARGEST) + 1, STEP)]


def cost_through(seconds: dict[int, float]) -> Callable[[int], float]:
    """Seconds of a repeated work at a side as a + b * side ** 2, through {side in pixels: seconds} at one or two sides.

    Noise does not make larger images cheaper.
    """
    (low, fast), (high, slow) = min(seconds.items()), max(seconds.items())
    per_pixel = max(0.0, slow - fast) / max(1, high**2 - low**2)
    fixed = max(0.0, fast - per_pixel * low**2)
    return lambda side: fixed + per_pixel * side**2


def seconds_of(work: Callable[[], object]) -> float:
    """The fastest of three calls of `work`, in seconds, after one that is not timed."""
    return min(timeit.repeat(work, "gc.enable()", number=1, repeat=4)[1:])


class Plan(NamedTuple):
    """The shorter side of images in pixels, the anchor scale, the number of updates, and lines that say why."""

    image_size: int
    anchor_scale: float
    steps: int
    reasons: tuple[str, ...]


def make_plan(
    dataset: CocoImages,
    *,
    seconds_left: Callable[[], float],
    batch_size: int,
    sides: Sequence[int],
    aspect: float,
    scales: Sequence[float],
    levels: Sequence[str],
    least_updates: int,
    update_seconds: Callable[[int], float],
    detect_seconds: Callable[[int], float],
    images_to_test: int,
    eval_period: int = 0,
) -> Plan:
    """Choose how to train on `dataset` and to evaluate `images_to_test` images in the time that is left.

    seconds_left: gives that time, and is called after the measurements.
    sides: image sizes to choose from, rising, in pixels of the shorter side; the longer one has at most `aspect` times
        as many. The chosen one is the first at which half of the objects of each class are ENOUGH pixels large, or else
        the last at which the time suffices for `least_updates`.
    scales: anchor scales to choose from, for anchors on `levels`; without levels, the first.
    update_seconds, detect_seconds: measure an update and a detection in an image at a side. They are called at two
        sides, from which the cost at others follows.
    eval_period: updates between evaluations; 0 for one at the end.

    Raises UserError if the time does not suffice for an update.
    """
    measured = (sides[0], sides[len(sides) // 4]) if len(sides) > 1 else (sides[0],)
    update = cost_through({side: update_seconds(side) for side in measured})
    detect = cost_through({side: detect_seconds(side) for side in measured})
    seconds = seconds_left()

    def updates(side: int) -> int:
        testing = images_to_test * detect(side)
        return int((seconds - testing) / (update(side) * MARGIN + (testing / eval_period if eval_period else 0)))

    def small_object(side: int) -> float:
        sizes = object_sizes(dataset, side, round(aspect * side))
        return min(of_class.median().item() for of_class in by_class(dataset, sizes))

    affordable = [*takewhile(lambda side: updates(side) >= least_updates, sides)] or [sides[0]]
    side = next((side for side in affordable if small_object(side) >= ENOUGH), affordable[-1])
    steps, testing = updates(side), images_to_test * detect(side)
    if steps < 1:
        raise UserError(
            f"--minutes: too short; one update takes {update(side):.1f} s and evaluating {images_to_test} images "
            f"{testing:.0f} s; give more minutes"
        )
    own = int(dataset.widths_heights.min(1).values.median())
    reasons = [
        f"{steps} updates of {batch_size} images at {update(side):.2f} s, "
        f"{steps * batch_size / len(dataset):.1f} epochs; then {testing:.0f} s to evaluate {images_to_test} images",
        f"images with a shorter side of {side} pixels (own: {own}); in the class with the smallest objects, half are "
        f"then under {small_object(side):.0f} pixels",
    ]
    scale = scales[0]
    if levels:
        scale, share = choose_anchor_scale(dataset, scales, levels, side, round(aspect * side))
        first, last = (scale * 2 ** int(level[1]) for level in (levels[0], levels[-1]))
        reasons.append(f"anchors of {first:g} to {last:g} pixels; {about_share(share)}")
    return Plan(side, scale, steps, tuple(reasons))


def about_share(share: float) -> str:
    """What the share of `choose_anchor_scale` says, in words."""
    return f"they miss {100 * share:.1f} % of the boxes (IoU under 0.5 with each; mean over the classes)"


def choose_anchor_scale(
    dataset: CocoImages, scales: Sequence[float], levels: Sequence[str], side: int, max_size: int
) -> tuple[float, float]:
    """The scale of `scales` whose anchors reach most boxes at this image size, and the share that they do not reach.

    The share is the mean over classes, as AP is. Of scales that differ by less than SAME_SHARE, the first.
    """
    shares = {}
    for scale in scales:
        missed = by_class(dataset, unreached(dataset, side, max_size, scale, levels).float())
        shares[scale] = sum(of_class.mean().item() for of_class in missed) / len(missed)
    scale = next(scale for scale in scales if shares[scale] <= min(shares.values()) + SAME_SHARE)
    return scale, shares[scale]


def by_class(dataset: CocoImages, values: Tensor) -> list[Tensor]:
    """The values of all boxes, [boxes], as one tensor for each class that has any."""
    if not len(dataset.labels):
        raise UserError("the training images have no boxes to plan by; give --steps, and a number for --anchor-scale")
    counts = dataset.labels.long().bincount()
    return [of_class for of_class in values[dataset.labels.argsort()].split(counts.tolist()) if len(of_class)]
