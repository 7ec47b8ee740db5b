"""The worst and the best images of an evaluation, ground truth beside detections, for a report."""

import colorsys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.ops import box_iou

from detection.coco import CocoImages
from resbackbone.image_io import BadImage
from resbackbone.report.page import Html, Section, absent, jpeg, paragraph, short, tag

IOU, SCORE = 0.5, 0.5  # what a detection in the report's gallery needs to be right, and to be counted
SHOWN = 6  # worst images in the gallery, and as many best
SIDE, PICTURE_LIMIT = 512, 100_000  # pixels, and characters of a picture: twelve leave room in a page of 2 MB
DRAWN = 400  # units of a gallery picture's longer side; text in it is 11 high
MOST_BOXES = 100  # in a picture


class Outcome(NamedTuple):
    """How the detections of one image met its objects; one in a crowd of its class counts for nothing."""

    index: int  # type: ignore[assignment]  # in place of a tuple's method of that name
    found: np.ndarray  # DETECTION [d], the surest first, of a score of at least SCORE
    right: np.ndarray  # bool [d]
    seen: np.ndarray  # bool [objects]

    @property
    def f1(self) -> float:
        """2 right / (detections + objects); 1 without either."""
        total = len(self.found) + len(self.seen)
        return 2 * self.right.sum() / total if total else 1.0

    @property
    def wrong(self) -> int:
        """Wrong detections and objects that were missed."""
        return int((~self.right).sum() + (~self.seen).sum())


def outcomes(dataset: CocoImages, detections: np.ndarray) -> list[Outcome]:
    """The detections of every image beside its objects: from the surest on, each takes the free object of its class
    with which it has the largest IoU, of at least IOU.
    """
    known = np.isin(detections["category_id"], list(dataset.categories)) & np.isfinite(detections["bbox"]).all(1)
    sure = detections[known & (detections["score"] >= SCORE)]
    sure = sure[np.lexsort((-sure["score"], sure["image_id"]))]
    label_of = {category: i for i, category in enumerate(dataset.categories, 1)}
    annotations = dataset.annotations
    crowd_rows: dict[int, list[int]] = {}
    for row in np.flatnonzero(annotations.crowds.numpy()).tolist():
        crowd_rows.setdefault(int(annotations.image_indices[row]), []).append(row)
    all_of_them = []
    for index in range(len(dataset)):
        target = dataset.target(index)
        begin, end = np.searchsorted(sure["image_id"], [target["image_id"], target["image_id"] + 1])
        found = sure[begin:end]
        crowds = crowd_rows.get(int(dataset.kept[index]), [])
        right, seen, ignored = _matched(found, target, annotations, crowds, label_of)
        all_of_them.append(Outcome(index, found[~ignored], right[~ignored], seen))
    return all_of_them


def _matched(found, target, annotations, crowds, label_of) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """bool [d], [objects], [d]: detections that are right, objects that are found, detections in a crowd."""
    right, ignored = (np.zeros(len(found), bool) for _ in range(2))
    seen = np.zeros(len(target["labels"]), bool)
    if not len(found):
        return right, seen, ignored
    labels = np.array([label_of[category] for category in found["category_id"].tolist()])
    boxes = _corners(found["bbox"])
    same = labels[:, None] == target["labels"].numpy()
    overlap = np.where(same, box_iou(Tensor(boxes), target["boxes"]).numpy(), 0)  # [d, objects]
    for d, row in enumerate(overlap):
        free = np.where(seen, 0, row)
        if len(free) and free.max() >= IOU:
            right[d] = seen[free.argmax()] = True
    for row in crowds:
        crowd = _corners(annotations.boxes_xywh.numpy()[row : row + 1])[0]
        low, high = np.maximum(boxes[:, :2], crowd[:2]), np.minimum(boxes[:, 2:], crowd[2:])
        inside = (high - low).clip(0).prod(1) >= IOU * (boxes[:, 2:] - boxes[:, :2]).prod(1)
        ignored |= inside & ~right & (labels == int(annotations.labels[row]))
    return right, seen, ignored


def _corners(boxes_xywh: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]], axis=1)


def gallery(dataset: CocoImages, detections: np.ndarray) -> Section:
    """The worst and the best images of the data set, ground truth beside detections, DETECTION [n]."""
    interesting = [outcome for outcome in outcomes(dataset, detections) if len(outcome.found) or len(outcome.seen)]
    worst = [o for o in sorted(interesting, key=lambda o: (o.f1, -o.wrong)) if o.wrong]
    best = [o for o in sorted(interesting, key=lambda o: (-o.f1, -int(o.right.sum()))) if o.f1 > 0]
    worst_figures = _figures(dataset, worst)
    taken = {index for index, _ in worst_figures}
    best_figures = _figures(dataset, [o for o in best if o.index not in taken])
    said = (
        f"By F1 at a score of {SCORE:g} and an IoU of {IOU:g}: ground truth left (or above), detections right (or "
        "below). A dashed box is a missed object or a wrong detection. What lies in a crowd is left out."
    )
    parts = [paragraph(said)]
    for title, figures, none in (
        (
            "Worst",
            worst_figures,
            "No image has an error at this score and IoU, or none of those that have could be read.",
        ),
        ("Best", best_figures, f"No other image has a right detection with a score of {SCORE:g} or more."),
    ):
        shown = tag("div", *(figure for _, figure in figures), class_="gallery") if figures else absent(none)
        parts += [tag("h3", title), shown]
    return Section("Worst and best images", parts)


def _figures(dataset: CocoImages, ranked: Sequence[Outcome]) -> list[tuple[int, Html]]:
    """(image's index, figure) of the first SHOWN images that can be read."""
    figures: list[tuple[int, Html]] = []
    for outcome in ranked:
        if len(figures) == SHOWN:
            break
        sample = dataset[outcome.index]
        if not isinstance(sample, BadImage):
            image, target = sample
            figures.append((outcome.index, _figure(dataset, image, target, outcome)))
    return figures


def _figure(dataset: CocoImages, image: Tensor, target: dict, outcome: Outcome) -> Html:
    uri, _ = jpeg(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()), side=SIDE, limit=PICTURE_LIMIT)
    scale = DRAWN / max(image.shape[1:])
    height, width = (round(side * scale, 1) for side in image.shape[1:])
    name = f"image-{outcome.index}"
    size = {"width": width, "height": height}
    truth = [
        _box(box, scale, width, label, dataset.class_names[label - 1], "truth", right=seen)
        for box, label, seen in zip(target["boxes"].numpy(), target["labels"].tolist(), outcome.seen, strict=True)
    ]
    ids = list(dataset.categories)
    found = [
        _box(box, scale, width, ids.index(row["category_id"]) + 1, dataset.categories[row["category_id"]], "found",
             right=right, score=float(row["score"]))
        for box, row, right in zip(_corners(outcome.found["bbox"]), outcome.found, outcome.right, strict=True)
    ]  # fmt: skip
    panels = [
        tag("svg", picture, *boxes[:MOST_BOXES][::-1], viewBox=f"0 0 {width} {height}", role="img", aria_label=label)
        for label, boxes, picture in (
            ("ground truth", truth, tag("image", id=name, href=uri, preserveAspectRatio="none", **size)),
            ("detections", found, tag("use", href=f"#{name}")),  # the same picture, which is on the page once
        )
    ]
    more = (
        f", {MOST_BOXES} boxes drawn of {max(len(truth), len(found))}"
        if max(len(truth), len(found)) > MOST_BOXES
        else ""
    )
    said = (
        f"F1 {outcome.f1:.2f}: {outcome.right.sum()} right, {(~outcome.right).sum()} wrong, "
        f"{(~outcome.seen).sum()} missed{more}. {short(dataset.path(outcome.index).name)}"
    )
    return tag("figure", tag("figcaption", said), tag("div", *panels, class_="pair"))


def _box(
    box: np.ndarray, scale: float, width: float, label: int, name: str, kind: str, *, right: bool, score=None
) -> Html:
    x1, y1, x2, y2 = (round(float(value) * scale, 1) for value in box)
    red, green, blue = class_colour(label - 1)
    colour = f"rgb({red},{green},{blue})"
    text = name if len(name) <= 20 else name[:19] + "…"
    text += f" {score:.2f}" if score is not None else ""
    long = 6.3 * len(text) + 6
    x, y = min(max(x1, 0), max(width - long, 0)), max(y1 - 14, 0)
    return tag(
        "g",
        tag("title", short(name)),
        tag("rect", x=x1, y=y1, width=max(x2 - x1, 0), height=max(y2 - y1, 0), stroke=colour,
            class_=kind if right else f"{kind} wrong"),
        tag("rect", x=round(x, 1), y=round(y, 1), width=round(long, 1), height=14, fill=colour),
        tag("text", text, x=round(x + 3, 1), y=round(y + 11, 1)),
    )  # fmt: skip


def class_colour(index: int) -> tuple[int, int, int]:
    """A light colour for the class at `index`; neighbours differ by the golden angle, so any few are told apart."""
    red, green, blue = colorsys.hls_to_rgb(index * 0.61803 % 1.0, 0.62, 0.95)
    return round(red * 255), round(green * 255), round(blue * 255)
