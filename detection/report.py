"""report.html of a detector's run."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from detection.coco import CocoImages
from detection.evaluate import Evaluation
from detection.gallery import SCORE, best_images, worst_images
from detection.outcomes import SCORES, Outcome, OverScores, match, over_scores
from detection.scoring import METRICS
from detection.statistics import EDGES, binned
from resbackbone.report.charts import bar, histogram, line_chart, one_decimal
from resbackbone.report.confusions import confusions
from resbackbone.report.numbers import percent
from resbackbone.report.page import Cell, Section, absent, fraction, macros, short
from resbackbone.report.run import RunLog, report_page
from resbackbone.report.run import write_report as write_page

CURVES = 6  # classes whose precision and recall are drawn
WIDE = 8  # classes; a matrix of more takes the whole width
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
    about_data: Callable[[], tuple[Section, dict[str, str]]] | None = None,
) -> Path | None:
    """Write report.html for the detector's run in `folder`, finished or not; returns the file.

    `evaluation` is the last one, on `dataset`, or None if there was none yet. `about_data` makes the section about the
    data (`data_report.data_section`). A failure does not stop the run: it is printed in one line, and the result is
    None.
    """
    return write_page(folder, lambda: _report(folder, dataset, evaluation, about_data))


def _report(
    folder: Path, dataset: CocoImages | None, evaluation: Evaluation | None, about_data: Callable | None
) -> str:
    log, words, results, tiles = RunLog(folder), macros("detection.html"), None, {}
    config = log.config
    variant = config.get("variant", "?")
    network = "VGG-16" if variant == "vgg16" else f"R{config.get('depth', '?')}-{variant}"
    if config.get("backbone"):
        network = f"{config['backbone'].removeprefix('timm:')}-{variant}"
    ap = {name: log.curve(name, evaluations=True, scale=100) for name in METRICS[:3]}
    data, facts = about_data() if about_data is not None else (None, {})
    summary = absent("No evaluation yet.")
    titles = ("The 12 numbers", "Classes", "Precision and recall", "Confusions", "Errors", "Boxes", "Worst images")
    sections = [Section(title, summary) for title in titles]
    if dataset is not None and evaluation is not None:
        results = evaluation.results
        tiles = {name: f"{percent(results['bbox'][name])} %" for name in METRICS[:2]}
        summary, sections = _of_evaluation(dataset, evaluation)
    return report_page(
        log,
        f"{'Cascade' if log.curve('loss_classifier_1') else 'Faster'} R-CNN {network}",
        results,
        tiles=tiles,
        summary=summary,
        over_time=words.ap_over_time(ap, len(log.evaluations)),
        facts=facts,
        data=[data] if data else [],
        sections=sections,
    )


def _of_evaluation(dataset: CocoImages, evaluation: Evaluation) -> tuple[Markup, list[Section]]:
    """What stands at the top, and the sections."""
    words, results, names = macros("detection.html"), evaluation.results, list(dataset.categories.values())
    scorer, matched = match(dataset, evaluation.detections)
    found, right = (np.concatenate([getattr(o, name) for o in matched]) for name in ("found", "right"))
    boxes = np.bincount(dataset.labels.numpy(), minlength=len(names) + 1)[1:].tolist()  # that the outcomes are about
    whole = over_scores(found["score"], right, sum(boxes))
    of_classes = []
    for category, count in zip(dataset.categories, boxes, strict=True):
        mask = found["category_id"] == category
        of_classes.append(over_scores(found["score"][mask], right[mask], count))
    at = None if whole.best is None else OverScores(*(values[whole.best] for values in whole))
    score = SCORE if whole.best is None else SCORES[whole.best]
    numbers = [(name, fraction(results["bbox"][name]), *MEANING[name]) for name in METRICS]
    classes = [
        (short(name), fraction(entry["AP"]), fraction(entry["AP50"]), entry["boxes"], *_best(curves))
        for (name, entry), curves in zip(results["per_class"].items(), of_classes, strict=True)
    ]
    shown = [outcome.above(score) for outcome in matched]
    if len(found) and sum(boxes):
        charts, confused, errors = _by_hotcoco(scorer, names, boxes, score)
    else:
        confused = errors = absent(f"There are no {'objects to find' if len(found) else 'detections'}.")
        charts = [errors]
    over = {name: list(zip(SCORES, 100 * values, strict=True)) for name, values in whole._asdict().items()}
    over["F1"] = over.pop("f1")
    title = "Precision, recall and F1 over the lowest score, percent"
    ranges: dict[str, Any] = {"x_range": (0, 1), "y_range": (0, 100), "show": one_decimal}
    charts = [line_chart(title, over, x="score", mark=None if at is None else score, **ranges), *charts]
    sections = [
        Section("The 12 numbers", words.numbers(numbers), half=True),
        Section("Classes", words.classes(classes), half=True),
        Section("Precision and recall", words.scores(charts, at, score)),
        Section("Confusions", confused, half=len(names) <= WIDE),
        Section("Errors", errors, half=True),
        Section("Boxes", _boxes(dataset, shown, score), half=len(names) > WIDE),
        Section("Worst images", worst_images(dataset, shown, score)),
    ]
    return words.summary(results, at, score) + best_images(dataset, shown), sections


def _best(curves: OverScores) -> tuple[Cell, Cell]:
    """The highest F1, and its score."""
    if curves.best is None:
        return fraction(None), fraction(None)
    score = SCORES[curves.best]
    return fraction(curves.f1[curves.best]), Cell(f"{score:.2f}", score)


def _boxes(dataset: CocoImages, shown: Sequence[Outcome], score: float) -> Markup:
    """Sizes and numbers of the objects and of the detections."""
    objects = (dataset.boxes[:, 2:] - dataset.boxes[:, :2]).numpy().astype(float)
    found = np.concatenate([o.found["bbox"] for o in shown])[:, 2:].clip(0)
    sides = {"objects": np.sqrt(objects.prod(1)), "detections": np.sqrt(found.prod(1))}
    counts = {"objects": [len(o.seen) for o in shown], "detections": [len(o.found) for o in shown]}
    charts = [
        histogram(title, EDGES[edges], {name: binned(np.array(v), EDGES[edges]) for name, v in values.items()}, x=axis)
        for title, edges, values, axis in (
            ("Sizes of boxes, percent", "box_sides", sides, "sqrt(width · height), pixels"),
            ("Images by their number of boxes, percent", "boxes_per_image", counts, "boxes"),
        )
    ]
    rows = [
        (name, len(v), *(Cell(f"{q:.0f}", q) for q in np.quantile(v, (0.05, 0.5, 0.95))))
        for name, v in sides.items()
        if len(v)
    ]
    return macros("detection.html").boxes_found(charts, rows, score)


def _by_hotcoco(
    scorer: Any, names: Sequence[str], boxes: Sequence[int], score: float
) -> tuple[list[Markup], Markup, Markup]:
    """Charts of precision against recall, the confusions from `score` on, and the errors by kind.

    `boxes` are the numbers of objects by class.
    """
    words = macros("detection.html")
    scorer.accumulate()
    precision = 100 * scorer.eval["precision"][:, :, :, 0, -1]  # [IoU, recall, class], < 0 for a class without boxes
    defined = [k for k in range(len(names)) if (precision[0, :, k] >= 0).all()]
    most = sorted(defined, key=lambda k: -boxes[k])[:CURVES]
    means = {f"IoU {iou:.2f}": precision[i][:, defined].mean(1) for i, iou in ((0, 0.5), (5, 0.75))}
    of_classes = {f"{short(names[k])} (AP50 {precision[0, :, k].mean():.1f})": precision[0, :, k] for k in most}
    recall = np.linspace(0, 100, precision.shape[1])
    charts = [
        line_chart(
            title,
            {name: list(zip(recall, values, strict=True)) for name, values in curves.items()},
            x="recall",
            x_range=(0, 100),
            y_range=(0, 100),
            show=one_decimal,
        )
        for title, curves in (
            (f"Precision over recall, percent, mean of {len(defined)} classes", means),
            ("Precision over recall, percent, IoU 0.50, largest classes", of_classes),
        )
    ]
    matrix = scorer.confusion_matrix(min_score=score)["matrix"].astype(int)
    true, taken = np.nonzero(matrix)
    counts, totals = matrix[true, taken], matrix.sum(1)
    table = confusions([*names, "background"], true, taken, counts, totals, things="boxes", background=True)
    tide = scorer.tide_errors()
    cost, largest = tide["delta_ap"], max(1e-9, *(tide["delta_ap"][kind] for kind in ERRORS))
    rows = [
        (words.error(title, meaning), fraction(cost[kind]), bar(cost[kind] / largest), int(tide["counts"][kind]))
        for kind, (title, meaning) in ERRORS.items()
    ]
    return charts, words.confused(score, table), words.errors(rows, tide)
