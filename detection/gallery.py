"""The worst and best images of an evaluation for a report, ground truth beside detections."""

import colorsys
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from markupsafe import Markup
from PIL import Image
from torch import Tensor
from torchvision.ops import box_convert

from detection.coco import CocoImages, usable_boxes
from detection.scoring import BACKENDS
from resbackbone.image_io import BadImage
from resbackbone.report.page import Section, jpeg, macros, short

IOU, SCORE = 0.5, 0.5  # detections from this score on count, and are right from this IoU on
SHOWN = 6  # worst images, and as many best ones
SIDE, PICTURE_LIMIT = 512, 100_000  # pixels and characters of a picture; twelve fit into a page of 2 MB
DRAWN = 400  # SVG units of a picture's longer side; text is 11 high
MOST_BOXES = 100  # in a picture


class Outcome(NamedTuple):
    """How one image's detections match its objects; detections in a crowd of their class are left out."""

    image_index: int
    found: np.ndarray  # DETECTION [d], by falling score, down to SCORE
    right: np.ndarray  # bool [d]
    seen: np.ndarray  # bool [objects]

    @property
    def f1(self) -> float:
        """2 right / (detections + objects); 1 without either."""
        total = len(self.found) + len(self.seen)
        return 2 * self.right.sum() / total if total else 1.0

    @property
    def wrong(self) -> int:
        """Wrong detections and missed objects."""
        return int((~self.right).sum() + (~self.seen).sum())


def outcomes(dataset: CocoImages, detections: np.ndarray) -> list[Outcome]:
    """Match the detections of every image with its objects, as COCO's evaluation does.

    By falling score, each detection takes the free object of its class with the largest IoU of at least IOU.
    """
    annotations, crowds = dataset.annotations, dataset.annotations.crowds.numpy()
    known = np.isin(detections["category_id"], list(dataset.categories)) & np.isfinite(detections["bbox"]).all(1)
    known &= np.isin(detections["image_id"], dataset.image_ids.numpy()) & (detections["score"] >= SCORE)
    found = detections[known]
    found = found[np.lexsort((-found["score"], found["image_id"]))]
    rows = usable_boxes(annotations, Counter())[1]  # of the annotations, in the order of the data set's boxes
    truth = crowds & np.isfinite(annotations.boxes_xywh.numpy()).all(1)
    truth[rows] = True
    scorer = BACKENDS["hotcoco"](annotations, truth, found)
    scorer.evaluate()
    status = scorer.image_diagnostics(IOU)  # by number from 1, without crowds and what is detected in them
    of_objects = np.array([status["gt_status"].get(number, "") for number in truth.cumsum()[rows].tolist()], str)
    of_found = np.array([status["dt_status"].get(number, "") for number in range(1, len(found) + 1)], str)
    found, of_found = found[of_found != ""], of_found[of_found != ""]
    result = []
    for index, image_id in enumerate(dataset.image_ids.tolist()):
        objects = slice(*dataset.offsets[index : index + 2].tolist())
        detected = slice(*np.searchsorted(found["image_id"], [image_id, image_id + 1]))
        result.append(Outcome(index, found[detected], of_found[detected] == "tp", of_objects[objects] == "matched"))
    return result


def gallery(dataset: CocoImages, detections: np.ndarray) -> Section:
    """The section with the worst and best images under `detections`, DETECTION [n]."""
    every = outcomes(dataset, detections)
    worst = _figures(dataset, sorted((o for o in every if o.wrong), key=lambda o: (o.f1, -o.wrong)))
    some_right = [o for o in every if o.right.any() and o.image_index not in worst]
    best = _figures(dataset, sorted(some_right, key=lambda o: (-o.f1, -int(o.right.sum()))))
    content = macros("detection.html").gallery(list(worst.values()), list(best.values()), SCORE, IOU)
    return Section("Worst and best images", content)


def _figures(dataset: CocoImages, ranked: Sequence[Outcome]) -> dict[int, Markup]:
    """{image's index: figure} of the first SHOWN images that can be read."""
    figures: dict[int, Markup] = {}
    for outcome in ranked:
        if len(figures) == SHOWN:
            break
        sample = dataset[outcome.image_index]
        if not isinstance(sample, BadImage):
            image, target = sample
            figures[outcome.image_index] = _figure(dataset, image, target, outcome)
    return figures


def _figure(dataset: CocoImages, image: Tensor, target: dict, outcome: Outcome) -> Markup:
    uri, _ = jpeg(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()), side=SIDE, limit=PICTURE_LIMIT)
    scale = DRAWN / max(image.shape[1:])
    height, width = (round(side * scale, 1) for side in image.shape[1:])
    found, names, ids = outcome.found, dataset.class_names, list(dataset.categories)
    found_xyxy = box_convert(torch.tensor(found["bbox"]), "xywh", "xyxy").numpy()
    labels = [ids.index(category) + 1 for category in found["category_id"].tolist()]
    truth_boxes = [
        _box(xyxy * scale, width, label, names[label - 1], seen)
        for xyxy, label, seen in zip(target["boxes"].numpy(), target["labels"].tolist(), outcome.seen, strict=True)
    ]
    found_boxes = [
        _box(xyxy * scale, width, label, names[label - 1], right, f" {score:.2f}")
        for xyxy, label, right, score in zip(found_xyxy, labels, outcome.right, found["score"].tolist(), strict=True)
    ]
    file, size = short(dataset.path(outcome.image_index).name), {"width": width, "height": height}
    return macros("detection.html").figure(outcome, uri, size, truth_boxes, found_boxes, MOST_BOXES, file)


def _box(xyxy: np.ndarray, width: float, label: int, name: str, right: bool, score: str = "") -> dict:
    """A box and its label, in the picture's units, as the template draws them."""
    x1, y1, x2, y2 = (round(float(value), 1) for value in xyxy)
    text = (name if len(name) <= 20 else name[:19] + "…") + score
    long = 6.3 * len(text) + 6
    return {
        "name": short(name),
        "text": text,
        "colour": "rgb({},{},{})".format(*class_colour(label - 1)),
        "right": right,
        "x": x1,
        "y": y1,
        "width": max(x2 - x1, 0),
        "height": max(y2 - y1, 0),
        "label_x": round(min(max(x1, 0), max(width - long, 0)), 1),
        "label_y": round(max(y1 - 14, 0), 1),
        "label_width": round(long, 1),
    }


def class_colour(index: int) -> tuple[int, int, int]:
    """A light colour for the class at `index`; neighbours differ by the golden angle, so any few look different."""
    red, green, blue = colorsys.hls_to_rgb(index * 0.61803 % 1.0, 0.62, 0.95)
    return round(red * 255), round(green * 255), round(blue * 255)
