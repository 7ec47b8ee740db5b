"""report.html of a run that classifies images: pretraining, or CIFAR-10."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from markupsafe import Markup
from PIL import Image

from resbackbone.image_io import BadImage
from resbackbone.report.confusions import confusions
from resbackbone.report.numbers import number, percent
from resbackbone.report.page import Section, absent, fraction, jpeg, macros, short, table
from resbackbone.report.run import RunLog, report_page
from resbackbone.report.run import write_report as write_page

BEST, WORST = 5, 24  # images
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
        parts, best = [absent(why_not)] * 3, Markup()
        if predictions is not None:
            parts = [_classes(predictions), _confusions(predictions), _worst(predictions)]
            best = _best_images(predictions)
        shown = {"top1": "top-1 accuracy", "top5": "top-5 accuracy", "error": "error"}
        return report_page(
            log,
            network,
            results,
            tiles={
                title: f"{percent(results[name])} %" for name, title in shown.items() if results and name in results
            },
            summary=(absent(why_not) if results is None else words.summary(results)) + best,
            over_time=words.over_time({name: curve for name, curve in curves.items() if curve}, bool(log.evaluations)),
            sections=[
                Section("Classes", parts[0], half=True),
                Section("Confusions", parts[1], half=True),
                Section("Worst images", parts[2]),
            ],
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
    if not (first[read] != predictions.labels[read]).any():
        return absent("No image was classified wrongly.")
    pairs, counts = np.unique(predictions.labels[read] * n + first[read], return_counts=True)
    totals = np.bincount(predictions.labels, minlength=n)
    return confusions(predictions.classes, *np.divmod(pairs, n), counts, totals, things="images")


def _best_images(predictions: Predictions) -> Markup:
    right = np.flatnonzero(predictions.best[:, 0] == predictions.labels)
    figures = _figures(predictions, right[np.argsort(predictions.losses[right], kind="stable")], BEST)
    return macros("classification.html").best_images(figures) if figures else Markup()


def _worst(predictions: Predictions) -> Markup:
    wrong = np.flatnonzero((predictions.best[:, 0] != predictions.labels) & (predictions.best[:, 0] >= 0))
    figures = _figures(predictions, wrong[np.argsort(-predictions.losses[wrong], kind="stable")], WORST)
    return macros("classification.html").worst(figures, bool(len(wrong)))


def _figures(predictions: Predictions, ranked: np.ndarray, most: int) -> list[dict]:
    """What the template shows of the first images that can be read."""
    figures: list[dict] = []
    for index in ranked.tolist():
        if len(figures) == most:
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
    return figures
