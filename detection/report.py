"""What a person looks at after a run: report.html, and pictures of predictions beside the ground truth."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import hotcoco
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from detection.coco import CocoImages
from detection.evaluate import Evaluation
from detection.gallery import class_colour, gallery
from detection.scoring import BACKENDS, METRICS, entries
from resbackbone.image_io import BadImage
from resbackbone.report.charts import bar, line_chart
from resbackbone.report.numbers import number, percent
from resbackbone.report.page import (
    Cell,
    Html,
    Section,
    absent,
    page,
    paragraph,
    short,
    side_by_side,
    table,
    tag,
    tiles,
)
from resbackbone.report.run import RunLog, configuration_section, timing_section, training_section
from resbackbone.report.run import write_report as write_page

CURVES = 6  # classes whose precision and recall are drawn
NO_EVALUATION = "No evaluation yet"
ERRORS = {  # Bolya et al. 2020, Sec. 2.2
    "Cls": ("classification", "right place (IoU at least 0.5), wrong class"),
    "Loc": ("localisation", "right class, IoU between 0.1 and 0.5"),
    "Both": ("both", "wrong class, IoU between 0.1 and 0.5"),
    "Dupe": ("duplicate", "right, but another detection of this object scored higher"),
    "Bkg": ("background", "no object there: IoU under 0.1 with all of them"),
    "Miss": ("missed", "an object without detection that none of these errors accounts for"),
}
MEANING = {  # of COCO's 12 numbers: IoU, area in pixels, detections an image
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
    """Write `count` images of the data set, evenly spread, ground truth left and detections right, as PNG.

    Detections, DETECTION [n], under the score `threshold` are not drawn. Returns the files, which are named by image
    id; an image that cannot be read has none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sure = detections[detections["score"] >= threshold]
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
        found = entries(sure[sure["image_id"] == target["image_id"]])
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


def write_report(folder: Path, dataset: CocoImages | None = None, evaluation: Evaluation | None = None) -> Path | None:
    """Write report.html of the detector's run in `folder`, as far as it has come; returns the file.

    `evaluation` is the last one, on `dataset`; without, the page says that there is none yet. If it cannot be made a
    printed line says why, the run goes on, and None is returned.
    """
    return write_page(folder, lambda: report(folder, dataset, evaluation))


def report(folder: Path, dataset: CocoImages | None, evaluation: Evaluation | None) -> str:
    """The page that `write_report` writes."""
    results = None if evaluation is None else evaluation.results
    log = RunLog(folder)
    config = log.config
    network = (
        "VGG-16" if config.get("variant") == "vgg16" else f"R{config.get('depth', '?')}-{config.get('variant', '?')}"
    )
    title = f"Faster R-CNN {network} on {log.data_name()}"
    said = [f"recipe {config['recipe']}"] if "recipe" in config else []
    said += [f"{number(log.train[-1]['step'])} updates"] if log.train else []
    said += [f"{number(results['images'])} images evaluated"] if results else [NO_EVALUATION.lower()]
    sections = [_summary(results), training_section(log, _ap_over_time(log)), _numbers(results), _classes(results)]
    if dataset is None or evaluation is None:
        missing = [absent(f"{NO_EVALUATION}: there are no detections to show.")]
        sections += [Section(t, missing) for t in ("Precision and recall", "Errors", "Worst and best images")]
    else:
        sections += [*_curves_and_errors(dataset, evaluation), gallery(dataset, evaluation.detections)]
    return page(title, ", ".join(said), [*sections, timing_section(log), configuration_section(log)])


def _summary(results: Mapping | None) -> Section:
    if results is None:
        return Section("Summary", [absent(f"{NO_EVALUATION}: AP is known after the first one.")])
    parts = [tiles((name, percent(results["bbox"][name])) for name in METRICS[:6])]
    said = f"COCO box AP in percent on {number(results['images'])} images, {number(results['detections'])} detections."
    parts.append(paragraph(said))
    if results.get("note"):
        parts.append(absent(results["note"]))
    for what, kind in (("skipped_images", "evaluation"), ("skipped_training_images", "training")):
        if messages := results.get(what):
            more = f" and {len(messages) - 5} more" if len(messages) > 5 else ""
            parts.append(absent(f"Without images that could not be read, in {kind}: {'; '.join(messages[:5])}{more}."))
    return Section("Summary", parts)


def _ap_over_time(log: RunLog) -> Html:
    if len(log.evaluations) < 2:
        times = "not evaluated yet" if not log.evaluations else "evaluated once"
        return absent(f"AP over time is not drawn: {times} (", tag("code", "--eval-period"), " evaluates on the way).")
    curves = {
        name: [(step, value and 100 * value) for step, value in log.curve(name, evaluations=True)]
        for name in METRICS[:3]
    }
    return line_chart("AP over time, percent", curves, x="updates")


def _numbers(results: Mapping | None) -> Section:
    if results is None:
        return Section("The 12 numbers", [absent(f"{NO_EVALUATION}: there are no numbers to show.")])
    rows = [(name, _fraction(results["bbox"][name]), *MEANING[name]) for name in METRICS]
    said = "IoU 0.50:0.95 is the mean over ten of them. Areas are in pixels; the last column is detections an image."
    return Section("The 12 numbers", [table(("", "percent", "IoU", "area", "per image"), rows), paragraph(said)])


def _classes(results: Mapping | None) -> Section:
    if results is None:
        return Section("Classes", [absent(f"{NO_EVALUATION}: AP by class is known after the first one.")])
    rows = [
        (short(name), _fraction(entry["AP"]), _fraction(entry["AP50"]), entry["boxes"])
        for name, entry in results["per_class"].items()
    ]
    note = paragraph("A class without boxes in the annotations has no AP. A click on a heading sorts.")
    return Section("Classes", [note, table(("class", "AP", "AP50", "boxes"), rows, sortable=True)])


def _fraction(value: float | None) -> Cell:
    return Cell(percent(value), value)


def _curves_and_errors(dataset: CocoImages, evaluation: Evaluation) -> list[Section]:
    """Precision against recall, and the errors by kind: both by hotcoco, also where the other backend scored."""
    annotations, detections, scorer = dataset.annotations, evaluation.detections, evaluation.scorer
    truth = np.isfinite(annotations.boxes_xywh.numpy()).all(1)
    finite = np.isfinite(detections["bbox"]).all(1) & np.isfinite(detections["score"])
    found = detections[finite & np.isin(detections["category_id"], list(dataset.categories))]
    if not len(found) or not (truth & ~annotations.crowds.numpy()).any():
        lacking = "detections" if not len(found) else "objects to be found"
        return [Section(t, [absent(f"There are no {lacking}.")]) for t in ("Precision and recall", "Errors")]
    if not isinstance(scorer, hotcoco.COCOeval):
        scorer = BACKENDS["hotcoco"](annotations, truth, found)
        scorer.evaluate()
        scorer.accumulate()
    precision = scorer.eval["precision"][:, :, :, 0, -1]  # [IoU, recall, class], -1 for a class without boxes
    defined = [k for k in range(precision.shape[2]) if (precision[0, :, k] > -1).all()]
    recall = np.linspace(0, 1, precision.shape[1])
    means = {f"IoU {iou:.2f}": precision[i][:, defined].mean(1) for i, iou in ((0, 0.5), (5, 0.75))}
    boxes = np.bincount(
        annotations.labels.numpy()[truth & ~annotations.crowds.numpy()], minlength=precision.shape[2] + 1
    )
    few = sorted(defined, key=lambda k: -boxes[k + 1])[:CURVES]
    names = list(dataset.categories.values())
    of_classes = {f"{short(names[k])} ({percent(precision[0, :, k].mean())})": precision[0, :, k] for k in few}
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
    return [Section("Precision and recall", [side_by_side(*charts)]), _errors(scorer.tide_errors())]


def _errors(tide: Mapping) -> Section:
    cost, counts = tide["delta_ap"], tide["counts"]
    largest = max([cost[name] for name in ERRORS] + [1e-9])
    rows = [
        (title, _fraction(cost[name]), bar(cost[name] / largest), int(counts[name]), meaning)
        for name, (title, meaning) in ERRORS.items()
    ]
    said = (
        f"Of the AP50 that is missing (it is {percent(tide['ap_base'])}), what each kind of error costs: the AP50 that "
        "would be gained by mending those errors alone, in percent. Kinds do not add up to the whole. All wrong "
        f"detections together cost {percent(cost['FP'])}, all objects that were not found {percent(cost['FN'])}."
    )
    source = paragraph("After TIDE (Bolya et al. 2020, arXiv 2008.08115), computed by hotcoco.")
    header = ("error", "costs", "", "count", "what it is")
    return Section("Errors", [paragraph(said), table(header, rows, sortable=True), source])
