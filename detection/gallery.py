"""Pictures of detections beside the ground truth, and the worst and best images of an evaluation for a report."""

import colorsys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from markupsafe import Markup
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.ops import box_convert

from detection.coco import CocoImages, usable_boxes
from detection.scoring import entries, evaluated
from resbackbone.image_io import BadImage
from resbackbone.report.page import Section, jpeg, macros, short

IOU, SCORE = 0.5, 0.5  # detections from this score on count, and are right from this IoU on
SHOWN = 6  # worst images, and as many best ones
SIDE, PICTURE_LIMIT = 512, 100_000  # pixels and characters of a picture; twelve fit into a page of 2 MB
SHEET = 12  # images of a contact sheet
THUMB_SIDE, THUMB_LIMIT, THUMB_BOXES = 400, 40_000, 50  # as SIDE, PICTURE_LIMIT and MOST_BOXES
DRAWN = 400  # SVG units of a picture's longer side; text is 11 high
MOST_BOXES = 100  # in a picture
MIN_SIDE = 480  # pixels; smaller pictures are enlarged so that labels can be read
GAP = 12


def save_pictures(folder: Path, dataset: CocoImages, detections: np.ndarray, *, count: int = 12) -> list[Path]:
    """Write `count` images, evenly spread over the data set, as PNG: ground truth left, detections right.

    Detections, DETECTION [n], that score below SCORE are not drawn. Returns the files, named by image id; unreadable
    images are skipped.
    """
    folder.mkdir(parents=True, exist_ok=True)
    confident = detections[detections["score"] >= SCORE]
    ids, written = list(dataset.categories), []
    for index in sorted(set(np.linspace(0, len(dataset) - 1, min(count, len(dataset)), dtype=int).tolist())):
        sample = dataset[index]
        if isinstance(sample, BadImage):
            continue
        image, target = sample
        boxes = box_convert(target["boxes"], "xyxy", "xywh").tolist()
        truth = [
            {"category_id": ids[label - 1], "bbox": box}
            for box, label in zip(boxes, target["labels"].tolist(), strict=True)
        ]
        found = list(entries(confident[confident["image_id"] == target["image_id"]]))
        left = draw_boxes(image, truth, dataset.categories, title="ground truth")
        right = draw_boxes(image, found, dataset.categories, title=f"detections, score >= {SCORE:g}")
        both = Image.new("RGB", (left.width + GAP + right.width, left.height), "white")
        both.paste(left, (0, 0))
        both.paste(right, (left.width + GAP, 0))
        path = folder / f"{target['image_id']:012d}.png"
        both.save(path)
        written.append(path)
    return written


def draw_boxes(
    image: Tensor, entries: Sequence[dict], categories: Mapping[int, str], *, title: str | None = None
) -> Image.Image:
    """uint8 [3, H, W] with the boxes of `entries` (COCO annotations or detections), one colour per class.

    Boxes are [x, y, width, height] in the image's pixels. A small image is enlarged; a title goes above it.
    """
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    zoom = max(1, min(-(-MIN_SIDE // min(picture.size)), 4 * MIN_SIDE // max(picture.size)))  # less for narrow images
    picture = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.BICUBIC)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=max(13, min(picture.size) // 36))
    order = {category: i for i, category in enumerate(categories)}
    for entry in sorted(entries, key=lambda entry: entry.get("score", 1.0)):  # the highest scores on top
        x, y, w, h = (value * zoom for value in entry["bbox"])
        colour = class_colour(order[entry["category_id"]])
        draw.rectangle((x, y, x + w, y + h), outline=colour, width=max(2, min(picture.size) // 240))
        score = f" {entry['score']:.2f}" if "score" in entry else ""
        text = f"{categories[entry['category_id']]}{score}"
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        height, width = bottom + 4, right - left + 6
        corner = min(max(x, 0), max(picture.width - width, 0)), max(y - height, 0)
        draw.rectangle((*corner, corner[0] + width, corner[1] + height), fill=colour)
        draw.text((corner[0] + 3, corner[1] + 1), text, fill="black", font=font)
    if title is None:
        return picture
    framed = Image.new("RGB", (picture.width, picture.height + 26), "white")
    framed.paste(picture, (0, 26))
    ImageDraw.Draw(framed).text((4, 4), title, fill="black", font=ImageFont.load_default(size=16))
    return framed


def class_colour(index: int) -> tuple[int, int, int]:
    """A light colour for the class at `index`; neighbours differ by the golden angle, so any few look different."""
    red, green, blue = colorsys.hls_to_rgb(index * 0.61803 % 1.0, 0.62, 0.95)
    return round(red * 255), round(green * 255), round(blue * 255)


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
    scorer = evaluated(annotations, truth, found)
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


def contact_sheet(splits: Mapping[str, CocoImages]) -> Markup:
    """SHEET images, evenly spread over the splits and the images of each, with their boxes; unreadable ones are left
    out."""
    figures = []
    for split, dataset in splits.items():
        count = min(SHEET // len(splits), len(dataset))
        for index in sorted(set(np.linspace(0, len(dataset) - 1, count, dtype=int).tolist())):
            if isinstance(sample := dataset[index], BadImage):
                continue
            image, target = sample
            uri, size, scale = _picture(image, THUMB_SIDE, THUMB_LIMIT)
            names = list(dataset.categories.values())
            found = zip(target["boxes"].numpy(), target["labels"].tolist(), strict=True)
            boxes = [_box(xyxy * scale, size["width"], label, names[label - 1], True) for xyxy, label in found]
            boxes.sort(key=lambda box: -box["width"] * box["height"])  # drawn last to first: the small ones on top
            caption = f"{split}: {short(dataset.path(index).name)}"
            figures.append(macros("data.html").thumbnail(uri, size, boxes, THUMB_BOXES, caption))
    return Markup("").join(figures)


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
    uri, size, scale = _picture(image, SIDE, PICTURE_LIMIT)
    width = size["width"]
    found, names, ids = outcome.found, list(dataset.categories.values()), list(dataset.categories)
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
    file = short(dataset.path(outcome.image_index).name)
    return macros("detection.html").figure(outcome, uri, size, truth_boxes, found_boxes, MOST_BOXES, file)


def _picture(image: Tensor, side: int, limit: int) -> tuple[str, dict[str, float], float]:
    """uint8 [3, H, W] as a data: URI, its size in the units in which it is drawn, and these units per pixel."""
    uri = jpeg(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()), side=side, limit=limit)
    scale = DRAWN / max(image.shape[1:])
    height, width = (round(length * scale, 1) for length in image.shape[1:])
    return uri, {"width": width, "height": height}, scale


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
