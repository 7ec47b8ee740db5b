"""report.html of a run that classifies images: pretraining, or CIFAR-10."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from markupsafe import Markup
from PIL import Image

from resbackbone.image_io import BadImage
from resbackbone.report.numbers import number
from resbackbone.report.page import Section, absent, fraction, jpeg, macros, short, table
from resbackbone.report.run import RunLog, report_page
from resbackbone.report.run import write_report as write_page

WHOLE_MATRIX = 20  # classes; with more, only the most confused pairs are shown
PAIRS = 30
WORST = 24  # images
SIDE, PICTURE_LIMIT = 224, 40_000  # pixels, and characters of a picture
SMALL = 64  # pixels; a picture no larger than that is shown pixel by pixel


class Predictions(NamedTuple):
    """A network's predictions on n images, from which a report takes the confusions and the worst images.

    losses: the cross-entropy of each image, in nats.
    """

    classes: Sequence[str]
    labels: np.ndarray  # int64 [n], from 0
    best: np.ndarray  # int64 [n, k]: the network's classes, the best first; -1 for an unreadable image
    image: Callable[[int], Image.Image]  # raises BadImage for an unreadable one
    name: Callable[[int], str]
    losses: np.ndarray  # [n]


def write_report(
    folder: Path, *, network: str, predictions: Predictions | None = None, why_not: str = "No evaluation yet."
) -> Path | None:
    """Write report.html of the run in `folder`, finished or not; returns the file.

    `network` names what is trained, for the title. `predictions` are those of the last evaluation, whose results are in
    the metrics: fractions {"top1", "top5"} or {"error"}, and "images". Without them the page shows `why_not`. A failure
    never stops the run: it prints one line, and the result is None.
    """

    def page() -> str:
        log, words = RunLog(folder), macros("classification.html")
        names = {"top1": "top-1", "top5": "top-5", "error": "test"}
        curves = {title: log.curve(name, evaluations=True, scale=100) for name, title in names.items()}
        curves["training batches"] = log.curve("train_error", scale=100)
        results = log.evaluations[-1] if log.evaluations else None
        parts = [absent(why_not)] * 3
        if predictions is not None:
            parts = [_classes(predictions), _confusions(predictions), _worst(predictions)]
        return report_page(
            log,
            network,
            results,
            summary=absent(why_not) if results is None else words.summary(results),
            over_time=words.over_time({name: curve for name, curve in curves.items() if curve}, bool(log.evaluations)),
            sections=list(map(Section, ("Classes", "Confusions", "Worst images"), parts)),
        )

    return write_page(folder, page)


def _classes(predictions: Predictions) -> Markup:
    hits, k = predictions.best == predictions.labels[:, None], predictions.best.shape[1]
    images, *right = (
        np.bincount(predictions.labels, weights=weights, minlength=len(predictions.classes))
        for weights in (None, hits[:, 0], *([hits.any(1)] if k > 1 else []))
    )
    rows = [
        (short(name), int(images[i]), *(fraction(count[i] / images[i] if images[i] else None) for count in right))
        for i, name in enumerate(predictions.classes)
    ]
    titles = ["class", "images", "top-1", f"top-{k}"][: 2 + len(right)]
    return table(titles, rows, sortable=True)


def _confusions(predictions: Predictions) -> Markup:
    first, n = predictions.best[:, 0], len(predictions.classes)
    read = first >= 0
    names, images = [short(name) for name in predictions.classes], np.bincount(predictions.labels, minlength=n)
    pairs, counts = np.unique(predictions.labels[read] * n + first[read], return_counts=True)
    true, taken = np.divmod(pairs, n)
    wrong = np.flatnonzero(true != taken)
    most = [
        (names[true[i]], names[taken[i]], int(counts[i]), fraction(counts[i] / images[true[i]]))
        for i in wrong[np.argsort(-counts[wrong], kind="stable")[:PAIRS]]
    ]
    matrix = []
    if n <= WHOLE_MATRIX:
        table = np.zeros((n, n), int)
        table[true, taken] = counts
        shades = 1 + np.searchsorted([0.05, 0.2, 0.5], table / images.clip(1)[:, None])
        matrix = [list(zip(*row, strict=True)) for row in zip(table.tolist(), shades.tolist(), strict=True)]
    return macros("classification.html").confusions(names, matrix, most)


def _worst(predictions: Predictions) -> Markup:
    wrong = np.flatnonzero((predictions.best[:, 0] != predictions.labels) & (predictions.best[:, 0] >= 0))
    ranked = wrong[np.argsort(-predictions.losses[wrong], kind="stable")]
    figures: list[dict] = []
    for index in ranked.tolist():
        if len(figures) == WORST:
            break
        try:
            image = predictions.image(index)
        except BadImage:
            continue
        uri, small = jpeg(image, side=SIDE, limit=PICTURE_LIMIT), max(image.size) <= SMALL
        true, taken = (short(predictions.classes[i]) for i in (predictions.labels[index], predictions.best[index, 0]))
        loss = number(float(predictions.losses[index]), 3)
        file = short(Path(predictions.name(index)).name)
        figures.append({"uri": uri, "small": small, "true": true, "taken": taken, "loss": loss, "file": file})
    return macros("classification.html").worst(figures, bool(len(wrong)))
