"""report.html of a detector's run, and pictures of detections beside the ground truth."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import hotcoco
import numpy as np
from markupsafe import Markup
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from detection.coco import CocoImages
from detection.evaluate import Evaluation
from detection.gallery import class_colour, gallery
from detection.scoring import BACKENDS, METRICS, entries
from resbackbone.image_io import BadImage
from resbackbone.report.charts import bar, line_chart
from resbackbone.report.numbers import percent
from resbackbone.report.page import Section, absent, fraction, macros, short
from resbackbone.report.run import RunLog, report_page
from resbackbone.report.run import write_report as write_page

CURVES = 6  # classes whose precision and recall are drawn
ERRORS = {  # Bolya et al. 2020, Sec. 2.2
    "Cls": ("classification", "right place (IoU at least 0.5), wrong class"),
    "Loc": ("localization", "right class, IoU between 0.1 and 0.5"),
    "Both": ("both", "wrong class, IoU between 0.1 and 0.5"),
    "Dupe": ("duplicate", "right, but another detection of the same object scored higher"),
    "Bkg": ("background", "IoU below 0.1 with every object"),
    "Miss": ("missed", "undetected object that no other error accounts for"),
}
MEANING = {  # of COCO's 12 numbers: IoU, area in pixels, detections per image
    "AP": ("0.50:0.95", "all", 100),
    "AP50": ("0.50", "all", 100),
    "AP75": ("0.75", "all", 100),
    "APs": ("0.50:0.95", "< 32²", 100),
    "APm": ("0.50:0.95", "32²–96²", 100),
    "APl": ("0.50:0.95", "> 96²", 100),
    "AR1": ("0.50:0.95", "all", 1),
    "AR10": ("0.50:0.95", "all", 10),
    "AR100": ("0.50:0.95", "all", 100),
    "ARs": ("0.50:0.95", "< 32²", 100),
    "ARm": ("0.50:0.95", "32²–96²", 100),
    "ARl": ("0.50:0.95", "> 96²", 100),
}
MIN_SIDE = 480  # pixels; smaller pictures are enlarged so that labels can be read
GAP = 12


def save_pictures(
    folder: Path, dataset: CocoImages, detections: np.ndarray, *, count: int = 12, threshold: float = 0.5
) -> list[Path]:
    """Write `count` images, evenly spread over the data set, as PNG: ground truth left, detections right.

    Detections, DETECTION [n], below the score `threshold` are not drawn. Returns the files, named by image id;
    unreadable images are skipped.
    """
    folder.mkdir(parents=True, exist_ok=True)
    confident = detections[detections["score"] >= threshold]
    ids, written = list(dataset.categories), []
    for index in sorted(set(np.linspace(0, len(dataset) - 1, min(count, len(dataset)), dtype=int).tolist())):
        sample = dataset[index]
        if isinstance(sample, BadImage):
            continue
        image, target = sample
        truth = [
            {"category_id": ids[label - 1], "bbox": [x1, y1, x2 - x1, y2 - y1]}
            for (x1, y1, x2, y2), label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True)
        ]
        found = entries(confident[confident["image_id"] == target["image_id"]])
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


def write_report(
    folder: Path,
    dataset: CocoImages | None = None,
    evaluation: Evaluation | None = None,
    say: Callable[[str], object] = print,
) -> Path | None:
    """Write report.html for the detector's run in `folder`, finished or not; returns the file.

    `evaluation` is the last one, on `dataset`, or None if there was none yet. A failure does not stop the run: `say`
    gets one line about it, and the result is None.
    """
    return write_page(folder, lambda: report(folder, dataset, evaluation), say)


def report(folder: Path, dataset: CocoImages | None, evaluation: Evaluation | None) -> str:
    """The page that `write_report` writes."""
    log, results = RunLog(folder), evaluation and evaluation.results
    config, words = log.config, macros("detection.html")
    variant = config.get("variant", "?")
    network = "VGG-16" if variant == "vgg16" else f"R{config.get('depth', '?')}-{variant}"
    ap = {name: log.curve(name, evaluations=True, scale=100) for name in METRICS[:3]}
    summary = absent("No evaluation yet.")
    if dataset is None or evaluation is None or results is None:
        titles = ("The 12 numbers", "Classes", "Precision and recall", "Errors", "Worst and best images")
        sections = [Section(title, summary) for title in titles]
    else:
        numbers = [(name, fraction(results["bbox"][name]), *MEANING[name]) for name in METRICS]
        classes = [
            (short(name), fraction(entry["AP"]), fraction(entry["AP50"]), entry["boxes"])
            for name, entry in results["per_class"].items()
        ]
        curves, errors = _curves_and_errors(dataset, evaluation)
        summary = words.summary(results, METRICS[:6])
        sections = [
            Section("The 12 numbers", words.numbers(numbers)),
            Section("Classes", words.classes(classes)),
            Section("Precision and recall", curves),
            Section("Errors", errors),
            gallery(dataset, evaluation.detections),
        ]
    over_time = words.ap_over_time(ap, len(log.evaluations))
    return report_page(log, f"Faster R-CNN {network}", results, summary=summary, over_time=over_time, sections=sections)


def _curves_and_errors(dataset: CocoImages, evaluation: Evaluation) -> tuple[Markup, Markup]:
    """Precision against recall, and the errors by kind; by hotcoco even if pycocotools scored."""
    annotations, detections, scorer = dataset.annotations, evaluation.detections, evaluation.scorer
    words, names = macros("detection.html"), list(dataset.categories.values())
    truth = np.isfinite(annotations.boxes_xywh.numpy()).all(1)
    objects = truth & ~annotations.crowds.numpy()
    finite = np.isfinite(detections["bbox"]).all(1) & np.isfinite(detections["score"])
    found = detections[finite & np.isin(detections["category_id"], list(dataset.categories))]
    if not len(found) or not objects.any():
        return (absent(f"There are no {'objects to find' if len(found) else 'detections'}."),) * 2
    if not isinstance(scorer, hotcoco.COCOeval):
        scorer = BACKENDS["hotcoco"](annotations, truth, found)
        scorer.evaluate()
        scorer.accumulate()
    precision = scorer.eval["precision"][:, :, :, 0, -1]  # [IoU, recall, class], -1 for a class without boxes
    defined = [k for k in range(len(names)) if (precision[0, :, k] > -1).all()]
    boxes = np.bincount(annotations.labels.numpy()[objects], minlength=len(names) + 1)
    most = sorted(defined, key=lambda k: -boxes[k + 1])[:CURVES]
    means = {f"IoU {iou:.2f}": precision[i][:, defined].mean(1) for i, iou in ((0, 0.5), (5, 0.75))}
    of_classes = {f"{short(names[k])} ({percent(precision[0, :, k].mean())})": precision[0, :, k] for k in most}
    recall = np.linspace(0, 1, precision.shape[1])
    charts = [
        line_chart(
            title,
            {name: list(zip(recall, values, strict=True)) for name, values in curves.items()},
            x="recall",
            x_range=(0, 1),
            y_range=(0, 1),
        )
        for title, curves in (
            (f"Precision, mean of {len(defined)} classes", means),
            ("Precision of the classes with the most objects, IoU 0.50 (AP50)", of_classes),
        )
    ]
    tide = scorer.tide_errors()
    cost, largest = tide["delta_ap"], max(1e-9, *(tide["delta_ap"][kind] for kind in ERRORS))
    rows = [
        (title, fraction(cost[kind]), bar(cost[kind] / largest), int(tide["counts"][kind]), meaning)
        for kind, (title, meaning) in ERRORS.items()
    ]
    return words.curves(charts), words.errors(rows, tide)
