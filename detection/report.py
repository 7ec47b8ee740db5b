"""report.html of a detector's run."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from markupsafe import Markup

from detection.coco import CocoImages
from detection.evaluate import Evaluation
from detection.gallery import gallery
from detection.scoring import METRICS, evaluated
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


def write_report(
    folder: Path,
    dataset: CocoImages | None = None,
    evaluation: Evaluation | None = None,
    about_data: Callable[[], Section] | None = None,
) -> Path | None:
    """Write report.html for the detector's run in `folder`, finished or not; returns the file.

    `evaluation` is the last one, on `dataset`, or None if there was none yet. `about_data` makes the first section
    (`data_report.data_section`). A failure does not stop the run: it is printed in one line, and the result is None.
    """
    return write_page(folder, lambda: _report(folder, dataset, evaluation, [about_data()] if about_data else []))


def _report(folder: Path, dataset: CocoImages | None, evaluation: Evaluation | None, first: list[Section]) -> str:
    log, words, results = RunLog(folder), macros("detection.html"), None
    config = log.config
    variant = config.get("variant", "?")
    network = "VGG-16" if variant == "vgg16" else f"R{config.get('depth', '?')}-{variant}"
    if config.get("backbone"):
        network = f"{config['backbone'].removeprefix('timm:')}-{variant}"
    ap = {name: log.curve(name, evaluations=True, scale=100) for name in METRICS[:3]}
    summary = absent("No evaluation yet.")
    titles = ("The 12 numbers", "Classes", "Precision and recall", "Errors", "Worst and best images")
    sections = [Section(title, summary) for title in titles]
    if dataset is not None and evaluation is not None:
        results = evaluation.results
        numbers = [(name, fraction(results["bbox"][name]), *MEANING[name]) for name in METRICS]
        classes = [
            (short(name), fraction(entry["AP"]), fraction(entry["AP50"]), entry["boxes"])
            for name, entry in results["per_class"].items()
        ]
        curves, errors = _curves_and_errors(dataset, evaluation.detections)
        summary = words.summary(results, METRICS[:6])
        sections = [
            Section("The 12 numbers", words.numbers(numbers)),
            Section("Classes", words.classes(classes)),
            Section("Precision and recall", curves),
            Section("Errors", errors),
            gallery(dataset, evaluation.detections),
        ]
    over_time = words.ap_over_time(ap, len(log.evaluations))
    title = f"Faster R-CNN {network}"
    return report_page(log, title, results, summary=summary, over_time=over_time, sections=sections, before=first)


def _curves_and_errors(dataset: CocoImages, detections: np.ndarray) -> tuple[Markup, Markup]:
    """Precision against recall, and the errors by kind, by hotcoco."""
    annotations, words, names = dataset.annotations, macros("detection.html"), list(dataset.categories.values())
    truth = np.isfinite(annotations.boxes_xywh.numpy()).all(1)
    objects = truth & ~annotations.crowds.numpy()
    finite = np.isfinite(detections["bbox"]).all(1) & np.isfinite(detections["score"])
    found = detections[finite & np.isin(detections["category_id"], list(dataset.categories))]
    if not len(found) or not objects.any():
        return (absent(f"There are no {'objects to find' if len(found) else 'detections'}."),) * 2
    scorer = evaluated(annotations, truth, found)
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
