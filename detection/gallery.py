"""Pictures of detections beside the ground truth, and the best and worst images of an evaluation for a report."""

import colorsys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from markupsafe import Markup
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.ops import box_convert

from detection.coco import CocoImages
from detection.outcomes import IOU, Outcome
from detection.scoring import entries
from resbackbone.image_io import BadImage
from resbackbone.report.page import jpeg, macros, short

SCORE = 0.5  # detections from this score on are drawn, if a report suggests no other
BEST, WORST = 5, 6  # images
SIDE, PICTURE_LIMIT = 512, 100_000  # pixels and characters of a picture; eleven fit into a page of 2 MB
SHEET = 12  # images of a contact sheet
THUMB_SIDE, THUMB_LIMIT, THUMB_BOXES = 400, 40_000, 50  # as SIDE, PICTURE_LIMIT and MOST_BOXES
DRAWN, LABEL_HEIGHT = 300, 14  # SVG units of a picture's longer side, and of a label, whose text is 11 high
MOST_BOXES = 100  # in a picture
MIN_SIDE = 480  # pixels; smaller pictures are enlarged so that labels can be read
GAP = 12
QUALITY = 90  # of JPEG; Pillow's 75 smears thin lines and labels


def spread(total: int, count: int) -> list[int]:
    """At most `count` indices of `total` items, evenly spread from the first to the last."""
    return np.linspace(0, total - 1, min(count, total), dtype=int).tolist()


def save_pictures(folder: Path, dataset: CocoImages, detections: np.ndarray, *, count: int = 12) -> list[Path]:
    """Write `count` images, evenly spread over the data set, as JPEG: ground truth left, detections right.

    Detections, DETECTION [n], that score below SCORE are not drawn. Returns the files, which have the images' names;
    unreadable images are skipped.
    """
    folder.mkdir(parents=True, exist_ok=True)
    confident = detections[detections["score"] >= SCORE]
    ids, written = list(dataset.categories), []
    for index in spread(len(dataset), count):
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
        stem = dataset.path(index).stem
        path = folder / f"{stem}.jpg"
        if path in written:
            path = folder / f"{stem}-{target['image_id']}.jpg"
        both.save(path, quality=QUALITY)
        written.append(path)
    return written


def draw_boxes(
    image: Tensor, entries: Sequence[dict], categories: Mapping[int, str], *, title: str | None = None
) -> Image.Image:
    """uint8 [3, H, W] with the boxes of `entries` (COCO annotations or detections), one colour per class.

    Boxes are [x, y, width, height] in the image's pixels. A small image is enlarged; a title goes above it. No label
    covers another: that of a lower score is left out where there is no room.
    """
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    zoom = max(1, min(-(-MIN_SIDE // min(picture.size)), 4 * MIN_SIDE // max(picture.size)))  # less for narrow images
    picture = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.BICUBIC)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=max(13, min(picture.size) // 36))
    order = {category: i for i, category in enumerate(categories)}
    drawn = []  # by falling score
    for entry in sorted(entries, key=lambda entry: -entry.get("score", 1.0)):
        x, y, w, h = (value * zoom for value in entry["bbox"])
        score = f" {entry['score']:.2f}" if "score" in entry else ""
        text = f"{categories[entry['category_id']]}{score}"
        drawn.append(((x, y, x + w, y + h), class_colour(order[entry["category_id"]]), text))
    for xyxy, colour, _ in reversed(drawn):  # the highest scores on top
        draw.rectangle(xyxy, outline=colour, width=max(2, min(picture.size) // 240))
    taken: list[tuple] = []
    for xyxy, colour, text in drawn:
        left, _, right, bottom = draw.textbbox((0, 0), text, font=font)
        place = free_place(xyxy, (right - left + 6, bottom + 4), picture.size, taken)
        if place is not None:
            taken.append(place)
            x, y, width, height = place
            draw.rectangle((x, y, x + width, y + height), fill=colour)
            draw.text((x + 3, y + 1), text, fill="black", font=font)
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


def contact_sheet(splits: Mapping[str, CocoImages]) -> Markup:
    """SHEET images, evenly spread over the splits and the images of each, with their boxes; unreadable ones are left
    out."""
    figures = []
    for split, dataset in splits.items():
        for index in spread(len(dataset), SHEET // len(splits)):
            if isinstance(sample := dataset[index], BadImage):
                continue
            image, target = sample
            uri, size, scale = _picture(image, THUMB_SIDE, THUMB_LIMIT)
            names = list(dataset.categories.values())
            found = zip(target["boxes"].numpy(), target["labels"].tolist(), strict=True)
            boxes = [_box(xyxy * scale, label, names[label - 1], True) for xyxy, label in found]
            boxes.sort(key=lambda box: -box["width"] * box["height"])  # drawn last to first: the small ones on top
            _place_labels(boxes[:THUMB_BOXES], size)
            caption = f"{split}: {short(dataset.path(index).name)}"
            figures.append(macros("data.html").thumbnail(uri, size, boxes, THUMB_BOXES, caption))
    return Markup("").join(figures)


def best_images(dataset: CocoImages, every: Sequence[Outcome]) -> Markup:
    """The BEST images by F1 and right detections, as pictures with detections over ground truth."""
    some_right = [o for o in every if o.right.any()]
    figures = _figures(dataset, sorted(some_right, key=lambda o: (-o.f1, -int(o.right.sum()))), BEST, "overlaid")
    return macros("detection.html").strip(figures)


def worst_images(dataset: CocoImages, every: Sequence[Outcome], score: float) -> Markup:
    """The WORST images by F1 and errors, as pictures with ground truth beside detections."""
    wrong = sorted((o for o in every if o.wrong), key=lambda o: (o.f1, -o.wrong))
    return macros("detection.html").gallery(_figures(dataset, wrong, WORST, "beside"), score, IOU)


def _figures(dataset: CocoImages, ranked: Sequence[Outcome], most: int, macro: str) -> list[Markup]:
    """Those of the first images that can be read."""
    figures: list[Markup] = []
    for outcome in ranked:
        if len(figures) == most:
            break
        sample = dataset[outcome.image_index]
        if not isinstance(sample, BadImage):
            figures.append(_figure(dataset, sample, outcome, macro))
    return figures


def _figure(dataset: CocoImages, sample: tuple[Tensor, dict], outcome: Outcome, macro: str) -> Markup:
    image, target = sample
    uri, size, scale = _picture(image, SIDE, PICTURE_LIMIT)
    found, names, ids = outcome.found, list(dataset.categories.values()), list(dataset.categories)
    found_xyxy = box_convert(torch.tensor(found["bbox"]), "xywh", "xyxy").numpy()
    labels = [ids.index(category) + 1 for category in found["category_id"].tolist()]
    truth_boxes = [
        _box(xyxy * scale, label, names[label - 1], seen)
        for xyxy, label, seen in zip(target["boxes"].numpy(), target["labels"].tolist(), outcome.seen, strict=True)
    ]
    found_boxes = [
        _box(xyxy * scale, label, names[label - 1], right, f" {score:.2f}")
        for xyxy, label, right, score in zip(found_xyxy, labels, outcome.right, found["score"].tolist(), strict=True)
    ]
    truth_boxes.sort(key=lambda box: box["right"])  # missed objects get their labels first
    for boxes in [found_boxes, truth_boxes] if macro == "beside" else [found_boxes + truth_boxes]:
        _place_labels(boxes[:MOST_BOXES], size)
    file = short(dataset.path(outcome.image_index).name)
    draw = getattr(macros("detection.html"), macro)
    return draw(outcome, uri, size, truth_boxes, found_boxes, MOST_BOXES, file)


def _picture(image: Tensor, side: int, limit: int) -> tuple[str, dict[str, float], float]:
    """uint8 [3, H, W] as a data: URI, its size in the units in which it is drawn, and these units per pixel."""
    uri = jpeg(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()), side=side, limit=limit)
    scale = DRAWN / max(image.shape[1:])
    height, width = (round(length * scale, 1) for length in image.shape[1:])
    return uri, {"width": width, "height": height}, scale


def _box(xyxy: np.ndarray, label: int, name: str, right: bool, score: str = "") -> dict:
    """A box in the picture's units, as the template draws it."""
    x1, y1, x2, y2 = (round(float(value), 1) for value in xyxy)
    return {
        "name": short(name) + score,
        "text": (name if len(name) <= 20 else name[:19] + "…") + score,
        "colour": "rgb({},{},{})".format(*class_colour(label - 1)),
        "right": right,
        "x": x1,
        "y": y1,
        "width": max(x2 - x1, 0),
        "height": max(y2 - y1, 0),
        "label": None,
    }


def _place_labels(boxes: Sequence[dict], size: Mapping[str, float]) -> None:
    """Give each box, the first ones first, a `label` [x, y, width, height] where there is room for it."""
    taken: list[tuple] = []
    for box in boxes:
        xyxy = box["x"], box["y"], box["x"] + box["width"], box["y"] + box["height"]
        place = free_place(xyxy, (6.3 * len(box["text"]) + 6, LABEL_HEIGHT), (size["width"], size["height"]), taken)
        if place is not None:
            taken.append(place)
            box["label"] = [round(value, 1) for value in place]


def free_place(xyxy: Sequence, label: tuple, picture: tuple, taken: Sequence[tuple]) -> tuple | None:
    """(x, y, width, height) of a label of this (width, height) at a box in a picture, clear of the `taken` ones.

    It stands above the box, below it, or in a corner of it; None if it would cover another label in each.
    """
    (x1, y1, x2, y2), (width, height) = xyxy, label
    for y in (y1 - height, y2, y1, y2 - height):
        for x in (x1, x2 - width):
            x, y = (max(min(at, room - long), 0) for at, room, long in zip((x, y), picture, label, strict=True))
            if all(x >= a + w or a >= x + width or y >= b + h or b >= y + height for a, b, w, h in taken):
                return x, y, width, height
    return None
