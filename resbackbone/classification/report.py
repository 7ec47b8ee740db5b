"""report.html of a run that classifies images: pretraining, or CIFAR-10."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from markupsafe import Markup
from PIL import Image

from resbackbone.image_io import BadImage
from resbackbone.report.page import Section, absent, fraction, jpeg, macros, short, table
from resbackbone.report.run import RunLog, report_page
from resbackbone.report.run import write_report as write_page

PAIRS = 30  # of classes
WORST = 24  # images
SIDE = 224  # pixels of a picture
SMALL = 64  # pixels; a picture no larger than that is shown pixel by pixel


class Predictions(NamedTuple):
    """A network's predictions on n images, from which a report takes the confusions and the worst images."""

    classes: Sequence[str]
    labels: np.ndarray  # int64 [n], from 0
    best: np.ndarray  # int64 [n, k]: the network's classes, the best first; -1 for an unreadable image
    image: Callable[[int], Image.Image]  # raises BadImage for an unreadable one
    name: Callable[[int], str]


def write_report(folder: Path, *, network: str, predictions: Predictions | None = None) -> Path | None:
    """Write report.html of the run in `folder`, finished or not; returns the file.

    `network` names what is trained, for the title. `predictions` are those of the last evaluation, whose results are in
    the metrics: fractions {"top1", "top5"} or {"error"}, and "images". A failure never stops the run: it prints one
    line, and the result is None.
    """

    def page() -> str:
        log, words = RunLog(folder), macros("classification.html")
        names = {"top1": "top-1", "top5": "top-5", "error": "test"}
        curves = {title: log.curve(name, evaluations=True, scale=100) for name, title in names.items()}
        curves["training batches"] = log.curve("train_error", scale=100)
        results = log.evaluations[-1] if log.evaluations else None
        parts = [none_yet := absent("No evaluation yet.")] * 3
        if predictions is not None:
            parts = [_classes(predictions), _confusions(predictions), _worst(predictions)]
        return report_page(
            log,
            network,
            results,
            summary=none_yet if results is None else words.summary(results),
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
    wrong = _wrong(predictions)
    names, images = [short(name) for name in predictions.classes], np.bincount(predictions.labels, minlength=n)
    pairs, counts = np.unique(predictions.labels[wrong] * n + first[wrong], return_counts=True)
    true, taken = np.divmod(pairs, n)
    most = [
        (names[true[i]], names[taken[i]], int(counts[i]), fraction(counts[i] / images[true[i]]))
        for i in np.argsort(-counts, kind="stable")[:PAIRS]
    ]
    return macros("classification.html").confusions(most)


def _wrong(predictions: Predictions) -> np.ndarray:
    """The indices of readable images whose best class is wrong."""
    first = predictions.best[:, 0]
    return np.flatnonzero((first != predictions.labels) & (first >= 0))


def _worst(predictions: Predictions) -> Markup:
    k = predictions.best.shape[1]
    hits = predictions.best == predictions.labels[:, None]
    rank = np.where(hits.any(1), hits.argmax(1), k)  # of the true class
    wrong = np.random.default_rng(0).permutation(_wrong(predictions))  # of equally bad ones, some of the whole set
    figures: list[dict] = []
    for index in wrong[np.argsort(-rank[wrong], kind="stable")].tolist():
        if len(figures) == WORST:
            break
        try:
            image = predictions.image(index)
        except BadImage:
            continue
        true, taken = (short(predictions.classes[i]) for i in (predictions.labels[index], predictions.best[index, 0]))
        figures.append(
            {
                "uri": jpeg(image, side=SIDE),
                "small": max(image.size) <= SMALL,
                "true": true,
                "taken": taken,
                "file": short(Path(predictions.name(index)).name),
            }
        )
    return macros("classification.html").worst(figures, bool(len(wrong)), k)
