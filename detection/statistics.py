"""What a data set holds, in numbers: classes, sizes of images and objects, what anchors reach, and what is odd."""

import contextlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_area

from detection.anchors import ASPECT_RATIOS
from detection.coco import SMALL_SET, CocoImages, box_faults, usable_boxes
from resbackbone.atomic import file_digest
from resbackbone.checks import some

DIVISIBLE = 32  # pixels: a detector pads an image to multiples of this
CROWDED = 100  # boxes, the most that a detector returns by default
NEARLY_ALL = 0.95  # of an image's area
NETWORK_SIDES = (128, 256, 512, 800)  # shorter sides in pixels
LONGEST = 1333 / 800  # of the longer side over the shorter one, as published detectors limit it
COMPARED_SCALES = (4, 8)  # an anchor's side over its level's stride: the recipe `scratch`'s, and the published one
SMALL = 8  # pixels; objects below are hardly found
COMPARED = 100_000  # boxes with anchors, spread over the data set
HASHED = 2_000_000_000  # bytes: of more, equal files are not looked for
HASHED_AT_START = 250_000_000  # the same before a training, which a slow disk must not delay
EXAMPLES = 5
EDGES = {  # of the histograms
    "box_sides": [round(2 ** (k / 2), 2) for k in range(25)],
    "aspect_ratios": [round(2 ** (k / 2), 3) for k in range(-8, 9)],
    "boxes_per_image": [0, *(2**k for k in range(12))],
}
EQUAL, MISLABELLED = "boxes equal to another of their class", "boxes equal to one of another class"
WHOLE = f"boxes over {NEARLY_ALL:.0%} of their image"
THIN = "boxes with a side under 2 pixels"
LEVELS = ("p2", "p3", "p4", "p5", "p6")  # of the default detector


@dataclass(frozen=True)
class Spread:
    """Quantiles of some values: the least, 5 %, half, 95 %, the largest. None without values."""

    min: float | None
    p5: float | None
    median: float | None
    p95: float | None
    max: float | None


@dataclass(frozen=True)
class OddBoxes:
    """Boxes of one kind: how many, and the first as {"file", "class", "box_xywh"} (pixels; null for NaN)."""

    boxes: int
    examples: list[dict]


@dataclass(frozen=True)
class NetworkSizes:
    """Objects when images are resized to a shorter side: sqrt(width * height) in pixels, and shares of the boxes 0..1.

    `unreached` is the share that no anchor of p2 .. p6 overlaps with an IoU of 0.5, by anchor scale (`unreached`).
    """

    shorter_side: int
    max_size: int
    sides: Spread
    small: float  # share below SMALL pixels
    unreached: dict[str, float]


@dataclass(frozen=True)
class SplitStatistics:
    """One split. Boxes are the usable ones, clipped to their images; lengths are in pixels of the files."""

    images: int
    boxes: int
    crowds: int
    empty_images: int  # without a usable box
    crowded_images: int  # with over CROWDED boxes
    boxes_per_image: Spread
    widths: Spread  # of images
    heights: Spread
    image_sizes: list[tuple[int, int, int]]  # width, height, images: the most frequent ones
    box_sides: Spread  # sqrt(width * height)
    aspect_ratios: Spread  # width over height
    histograms: dict[str, list[int]]  # by name of EDGES: the number in each bin, from an edge up to the next
    odd_boxes: dict[str, OddBoxes]  # those of the first kinds are not used
    unusable_images: list[str]  # messages
    decoded: bool  # whether all images were decoded; of a larger set only missing and empty files are found
    at_network_sizes: list[NetworkSizes]


@dataclass(frozen=True)
class ClassCounts:
    """A class, and its boxes and images in each split that lists it."""

    name: str
    boxes: dict[str, int]
    images: dict[str, int]


@dataclass(frozen=True)
class DataStatistics:
    """A data set. Images are equal if their files have the same bytes."""

    splits: dict[str, SplitStatistics]
    classes: list[ClassCounts]
    equal_images: list[dict[str, list[str]]]  # groups: file names by split
    copies: dict[str, int]  # by split: images that are equal to an earlier one of the same split
    leaks: dict[str, int]  # "val in train": images of val that are equal to one of train
    not_compared_bytes: int  # of files with equal sizes, if they were too many to hash
    findings: list[str]  # what to look at, in sentences


def describe(splits: Mapping[str, CocoImages]) -> DataStatistics:
    """The statistics of a data set's splits. Reads image files only to compare those of equal sizes."""
    files = {name: _file_sizes(dataset) for name, dataset in splits.items()}
    of_splits = {name: _split_statistics(dataset, files[name]) for name, dataset in splits.items()}
    classes = _classes(splits)
    groups, not_compared = _equal_images(splits, files)
    copies = {name: sum(len(group[name]) - 1 for group in groups if name in group) for name in splits}
    leaks = {
        f"{other} in {one}": sum(len(group[other]) for group in groups if one in group and other in group)
        for one, other in combinations(splits, 2)
    }
    findings = [
        *_about_images(of_splits, copies, leaks, not_compared),
        *_about_classes(classes, splits),
        *_about_boxes(of_splits),
    ]
    return DataStatistics(of_splits, classes, groups, copies, leaks, not_compared, findings)


def object_sizes(dataset: CocoImages, shorter_side: int, max_size: int) -> Tensor:
    """sqrt(width * height) of every box, float [boxes], in pixels of the images as a detector resizes them."""
    return box_area(_resized(dataset, shorter_side, max_size)[0]).sqrt()


def unreached(
    dataset: CocoImages,
    shorter_side: int,
    max_size: int,
    anchor_scale: float,
    levels: Sequence[str],
    iou: float = 0.5,
) -> Tensor:
    """Boxes that every anchor overlaps with an IoU below `iou`, bool [boxes], in the image resized as by a detector.

    The anchors of p_k lie around the multiples of 2^k pixels and are squares of `anchor_scale` * 2^k pixels a side,
    stretched to each of ASPECT_RATIOS (height over width; Ren et al. 2015, Sec. 3.1.1). For a given shape the nearest
    anchor overlaps most, so one per level and ratio is compared.
    """
    return _best_ious(*_resized(dataset, shorter_side, max_size), anchor_scale, levels) < iou


def _best_ious(boxes: Tensor, sizes: Tensor, anchor_scale: float, levels: Sequence[str]) -> Tensor:
    x1, y1, x2, y2 = boxes.T.contiguous()
    padded = (sizes / DIVISIBLE).ceil() * DIVISIBLE
    across, down = ((x1 + x2) / 2, x2 - x1, padded[:, 0]), ((y1 + y2) / 2, y2 - y1, padded[:, 1])
    best = torch.zeros(len(boxes))
    for level in levels:
        stride = 2 ** int(level[1:])
        offsets = [  # to the nearest anchor of a row or column, whose last one lies before the padded border
            centre - (centre / stride).round().minimum((border / stride).ceil() - 1) * stride
            for centre, _, border in (across, down)
        ]
        for ratio in ASPECT_RATIOS:
            anchor = anchor_scale * stride * ratio**-0.5, anchor_scale * stride * ratio**0.5  # width, height
            overlaps = [
                ((side + own) / 2 - offset.abs()).minimum(side).clamp(min=0, max=own)
                for (_, side, _), own, offset in zip((across, down), anchor, offsets, strict=True)
            ]
            overlap = overlaps[0] * overlaps[1]
            best = best.maximum(overlap / (across[1] * down[1] + anchor[0] * anchor[1] - overlap))
    return best


def odd_boxes(dataset: CocoImages) -> dict[str, OddBoxes]:
    """Boxes that look like mistakes, by kind; each kind is there, also with 0 boxes. Crowds are not looked at."""
    annotations = dataset.annotations
    masks, _ = box_faults(annotations)
    del masks["crowds"]
    boxes, rows = usable_boxes(annotations, Counter())
    images, labels = annotations.image_indices.numpy()[rows], annotations.labels.numpy()[rows]
    areas = annotations.widths_heights.numpy()[images].astype(float).prod(1)
    sides = boxes[:, 2:] - boxes[:, :2]
    order = np.lexsort((labels, *boxes.T, images))
    same = (np.diff(boxes[order], axis=0) == 0).all(1) & (np.diff(images[order]) == 0)  # as the one before
    same_class = np.diff(labels[order]) == 0
    for kind, found in {
        EQUAL: order[1:][same & same_class],
        MISLABELLED: order[1:][same & ~same_class],
        WHOLE: np.flatnonzero(sides.prod(1) > NEARLY_ALL * areas),
        THIN: np.flatnonzero(sides.min(1) < 2),
    }.items():
        masks[kind] = np.zeros(len(annotations.labels), bool)
        masks[kind][rows[found]] = True
    names = list(dataset.categories.values())

    def shown(row: int) -> dict:
        box = [round(value, 2) if np.isfinite(value) else None for value in annotations.boxes_xywh[row].tolist()]
        file = annotations.file_name(int(annotations.image_indices[row]))
        return {"file": file, "class": names[int(annotations.labels[row]) - 1], "box_xywh": box}

    return {
        kind: OddBoxes(int(mask.sum()), [shown(int(row)) for row in np.flatnonzero(mask)[:EXAMPLES]])
        for kind, mask in masks.items()
    }


def _resized(dataset: CocoImages, shorter_side: int, max_size: int) -> tuple[Tensor, Tensor]:
    """Boxes, x1 y1 x2 y2, and the widths and heights of their images, float [boxes, 4] and [boxes, 2], when resized.

    The shorter side becomes `shorter_side` pixels, or less where the longer would exceed `max_size`; sides are rounded
    down, to at least one pixel (`transforms.InputTransform.resize`).
    """
    old = dataset.widths_heights.double()
    scales = (shorter_side / old.amin(1)).minimum(max_size / old.amax(1))
    new = (old * scales[:, None]).floor().clamp(min=1)
    of_boxes = dataset.offsets.diff()
    ratios = (new / old).float().repeat_interleave(of_boxes, 0)
    return dataset.boxes * ratios.repeat(1, 2), new.float().repeat_interleave(of_boxes, 0)


def _file_sizes(dataset: CocoImages) -> dict[str, int]:
    """Bytes of each image's file, by name, without those that cannot be read."""
    sizes = {}
    for name in dataset.annotations.file_names():
        path = os.path.join(dataset.folder, name)
        with contextlib.suppress(OSError):
            sizes[name] = os.stat(path).st_size
    return sizes


def _equal_images(
    splits: Mapping[str, CocoImages], files: Mapping[str, Mapping[str, int]]
) -> tuple[list[dict[str, list[str]]], int]:
    """(groups of images whose files have the same bytes, as file names by split; 0).

    Only files of equal sizes are read. Over HASHED bytes of these, none is: then ([], their bytes).
    """
    by_size: dict[int, list[tuple[str, str, str]]] = defaultdict(list)
    for split, dataset in splits.items():
        for name, size in files[split].items():
            if size:
                by_size[size].append((split, name, os.path.join(dataset.folder, name)))
    alike = {size: of_size for size, of_size in by_size.items() if len(of_size) > 1}
    total = sum(size * len(of_size) for size, of_size in alike.items())
    if total > HASHED:
        return [], total
    by_content: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for same_size in alike.values():
        for split, name, path in same_size:
            if os.access(path, os.R_OK):
                by_content[file_digest(path)].append((split, name))
    groups = [equal for equal in by_content.values() if len(equal) > 1]
    return [{split: [name for of, name in equal if of == split] for split, _ in equal} for equal in groups], 0


def leaked_images(train: CocoImages, val: CocoImages) -> int:
    """The number of images of `val` whose files have the bytes of one of `train`. Reads only files of equal sizes.

    Where these are over HASHED_AT_START bytes, only those of equal names are compared.
    """
    splits = {"train": train, "val": val}
    files = {name: _file_sizes(dataset) for name, dataset in splits.items()}
    common = set(files["train"].values()) & set(files["val"].values())
    alike = {split: {name: size for name, size in of.items() if size in common} for split, of in files.items()}
    if sum(sum(of.values()) for of in alike.values()) > HASHED_AT_START:
        last = [{os.path.basename(name) for name in of} for of in alike.values()]
        names = last[0] & last[1]
        alike = {
            split: {n: size for n, size in of.items() if os.path.basename(n) in names} for split, of in alike.items()
        }
    groups, _ = _equal_images(splits, alike)
    return sum(len(group["val"]) for group in groups if len(group) == 2)


def _split_statistics(dataset: CocoImages, files: Mapping[str, int]) -> SplitStatistics:
    annotations, sizes = dataset.annotations, dataset.annotations.widths_heights.numpy()
    boxes, rows = usable_boxes(annotations, Counter())
    per_image = np.bincount(annotations.image_indices.numpy()[rows], minlength=len(sizes))
    width, height = (boxes[:, 2:] - boxes[:, :2]).astype(float).T
    measured = {"box_sides": np.sqrt(width * height), "aspect_ratios": width / height, "boxes_per_image": per_image}
    usual, counts = np.unique(sizes, axis=0, return_counts=True)
    most = np.argsort(-counts, kind="stable")[:EXAMPLES]
    return SplitStatistics(
        images=len(sizes),
        boxes=len(boxes),
        crowds=int(annotations.crowds.sum()),
        empty_images=int((per_image == 0).sum()),
        crowded_images=int((per_image > CROWDED).sum()),
        widths=_spread(sizes[:, 0]),
        heights=_spread(sizes[:, 1]),
        image_sizes=[(*usual[i].tolist(), int(counts[i])) for i in most],
        **{name: _spread(values) for name, values in measured.items()},
        histograms={name: binned(values, EDGES[name]) for name, values in measured.items()},
        odd_boxes=odd_boxes(dataset),
        unusable_images=list(dataset.broken),
        decoded=sum(files.values()) <= SMALL_SET,
        at_network_sizes=[_network_sizes(dataset, side) for side in NETWORK_SIDES],
    )


def _network_sizes(dataset: CocoImages, shorter_side: int) -> NetworkSizes:
    size = shorter_side, round(shorter_side * LONGEST)
    resized = _resized(dataset, *size)
    sides = box_area(resized[0]).sqrt().numpy()
    boxes, sizes = (x[:: -(-len(x) // COMPARED) or 1] for x in resized)
    ious = {str(scale): _best_ious(boxes, sizes, scale, LEVELS) for scale in COMPARED_SCALES}
    shares = {scale: int((best < 0.5).sum()) / max(len(best), 1) for scale, best in ious.items()}
    return NetworkSizes(*size, _spread(sides), int((sides < SMALL).sum()) / max(len(sides), 1), shares)


def _spread(values: np.ndarray) -> Spread:
    if not len(values):
        return Spread(*[None] * 5)
    return Spread(*(round(value, 3) for value in np.quantile(values, (0, 0.05, 0.5, 0.95, 1)).tolist()))


def binned(values: np.ndarray, edges: Sequence[float]) -> list[int]:
    """The number of values in each bin, from an edge up to the next; those beyond lie in the first or last."""
    return np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0].tolist()


def _classes(splits: Mapping[str, CocoImages]) -> list[ClassCounts]:
    """The classes of all splits by name, in the order of their ids in the first split that has them."""
    counts: dict[str, ClassCounts] = {}
    for split, dataset in splits.items():
        labels = dataset.labels.long()
        images = torch.repeat_interleave(torch.arange(len(dataset)), dataset.offsets.diff())
        total = len(dataset.categories) + 1
        boxes = labels.bincount(minlength=total).tolist()
        in_images = ((images * total + labels).unique() % total).bincount(minlength=total).tolist()
        for label, name in enumerate(dataset.categories.values(), 1):
            of_class = counts.setdefault(name, ClassCounts(name, {}, {}))
            of_class.boxes[split] = of_class.boxes.get(split, 0) + boxes[label]
            of_class.images[split] = of_class.images.get(split, 0) + in_images[label]
    return list(counts.values())


def _about_images(splits: Mapping[str, SplitStatistics], copies, leaks, not_compared: int) -> Iterator[str]:
    for name, split in splits.items():
        if bad := split.unusable_images:
            yield f"{name}: {_number(len(bad), 'image')} cannot be used; the first: {bad[0]}"
    for pair, count in leaks.items():
        if count:
            other, _, one = pair.partition(" in ")
            yield (
                f"{other}: {count} of {_number(splits[other].images, 'image')} {_verb(count)} in {one} too, with the "
                f"same bytes, so an AP measured on {other} is too high: remove them from one of the two"
            )
    for name, count in copies.items():
        if count:
            yield f"{name}: {_number(count, 'image')} {_verb(count)} equal to an earlier one in {name}"
    if not_compared:
        yield f"equal images were not looked for: {not_compared / 1e9:.1f} GB of files have equal sizes"
    for name, split in splits.items():
        if split.empty_images:
            yield f"{name}: {split.empty_images} of {_number(split.images, 'image')} without a usable box"
        if crowded := split.crowded_images:
            most = f"{CROWDED} boxes, the most that a detector returns by default"
            yield f"{name}: {_number(crowded, 'image')} with over {most}"
        if not split.decoded:
            yield f"{name}: over {SMALL_SET / 1e6:.0f} MB, so images were not decoded: broken ones may be left"


def _about_classes(classes: Sequence[ClassCounts], splits: Iterable[str]) -> Iterator[str]:
    for split in splits:
        for what, names in {
            f"classes that {split} does not list": [c.name for c in classes if split not in c.boxes],
            "classes without a box": [c.name for c in classes if c.boxes.get(split) == 0],
        }.items():
            if names:
                yield f"{split}: {what}: {some(names, EXAMPLES)}"


def _about_boxes(splits: Mapping[str, SplitStatistics]) -> Iterator[str]:
    for name, split in splits.items():
        for kind, odd in split.odd_boxes.items():
            if odd.boxes:
                first = odd.examples[0]
                yield f"{name}: {kind}: {odd.boxes}; the first: {first['class']} in {first['file']}"


def _number(count: int, thing: str) -> str:
    return f"{count} {thing}{'' if count == 1 else 's'}"


def _verb(count: int) -> str:
    return "is" if count == 1 else "are"
