"""What a person looks at after a run: pictures of predictions beside the ground truth."""

import colorsys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from detection.coco import BadImage, CocoImages

MIN_SIDE = 480  # pixels; smaller pictures are enlarged so that labels can be read
GAP = 12


def save_pictures(
    folder: Path, dataset: CocoImages, detections: Sequence[dict], *, count: int = 12, threshold: float = 0.5
) -> list[Path]:
    """Write `count` images of the data set, evenly spread, ground truth left and detections right, as PNG.

    Detections (COCO's results format) under the score `threshold` are not drawn. Returns the files, which are named
    by image id; an image that cannot be read has none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    by_image: dict[int, list[dict]] = {}
    for entry in detections:
        by_image.setdefault(entry["image_id"], []).append(entry)
    written = []
    for index in sorted(set(np.linspace(0, len(dataset) - 1, min(count, len(dataset)), dtype=int).tolist())):
        sample = dataset[index]
        if isinstance(sample, BadImage):
            continue
        image, target = sample
        ids = list(dataset.categories)
        truth = [
            {"category_id": ids[label - 1], "bbox": [x1, y1, x2 - x1, y2 - y1]}
            for (x1, y1, x2, y2), label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True)
        ]
        found = [entry for entry in by_image.get(target["image_id"], []) if entry["score"] >= threshold]
        left = draw_boxes(image, truth, dataset.categories, title="ground truth")
        right = draw_boxes(image, found, dataset.categories, title=f"detections, score >= {threshold:g}")
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
    """uint8 [3, H, W] with the boxes of `entries` (COCO annotations or detections) drawn on it, in a colour a class.

    Boxes are [x, y, width, height] in the image's pixels. A small image is enlarged; a title goes above it.
    """
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    zoom = max(1, min(-(-MIN_SIDE // min(picture.size)), 4 * MIN_SIDE // max(picture.size)))  # a sliver stays one
    picture = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.BICUBIC)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=max(13, min(picture.size) // 36))
    order = {category: i for i, category in enumerate(categories)}
    for entry in sorted(entries, key=lambda entry: entry.get("score", 1.0)):  # the surest on top
        x, y, w, h = (value * zoom for value in entry["bbox"])
        colour = class_colour(order[entry["category_id"]])
        draw.rectangle((x, y, x + w, y + h), outline=colour, width=max(2, min(picture.size) // 240))
        text = categories[entry["category_id"]]
        if "score" in entry:
            text += f" {entry['score']:.2f}"
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
    """A light colour for the class at `index`; neighbours differ by the golden angle, so any few are told apart."""
    red, green, blue = colorsys.hls_to_rgb(index * 0.61803 % 1.0, 0.62, 0.95)
    return round(red * 255), round(green * 255), round(blue * 255)
