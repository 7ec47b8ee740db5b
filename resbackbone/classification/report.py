"""report.html of a run that classifies images: pretraining, or CIFAR-10."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from resbackbone.image_io import BadImage
from resbackbone.report.charts import line_chart
from resbackbone.report.numbers import number, percent
from resbackbone.report.page import (
    Cell,
    Html,
    Section,
    absent,
    joined,
    jpeg,
    page,
    paragraph,
    short,
    table,
    tag,
    tiles,
)
from resbackbone.report.run import RunLog, configuration_section, timing_section, training_section
from resbackbone.report.run import write_report as write_page

WHOLE_MATRIX = 20  # classes; of more, the most confused pairs
PAIRS = 30
WORST = 24  # images
SIDE, PICTURE_LIMIT = 224, 40_000  # pixels, and characters of a picture
SMALL = 64  # pixels; a picture no larger than that is shown pixel by pixel
NO_EVALUATION = "No evaluation yet"


class Predictions(NamedTuple):
    """What a network said of n images, of which a report shows the confusions and the worst.

    losses: the cross-entropy of each, in nats, if it is known; without, the worst are those whose class comes last
        among the network's best.
    """

    classes: Sequence[str]
    labels: np.ndarray  # int64 [n], from 0
    best: np.ndarray  # int64 [n, k]: the network's classes, the best first; -1 for an image that could not be read
    losses: np.ndarray | None  # [n]
    image: Callable[[int], Image.Image]  # raises BadImage for one that cannot be read
    name: Callable[[int], str]


def write_report(
    folder: Path,
    *,
    network: str,
    results: Mapping | None = None,
    predictions: Predictions | None = None,
    why_not: str = f"{NO_EVALUATION}.",
) -> Path | None:
    """Write report.html of the run in `folder`, as far as it has come; returns the file.

    `network` is what is trained, for the title. `results` has fractions, {"top1", "top5"} or {"error"}, and "images",
    of the last evaluation, and `predictions` what they are counted from; without, `why_not` says why. If the page
    cannot be made a printed line says why, the run goes on, and None is returned.
    """
    return write_page(folder, lambda: report(folder, network, results, predictions, why_not))


def report(folder: Path, network: str, results: Mapping | None, predictions: Predictions | None, why_not: str) -> str:
    """The page that `write_report` writes."""
    log = RunLog(folder)
    said = [f"recipe {log.config['recipe']}"] if "recipe" in log.config else []
    said += [f"{number(log.train[-1]['step'])} updates"] if log.train else []
    said += [f"{number(results['images'])} images evaluated"] if results else []
    sections = [_summary(results, why_not), training_section(log, _accuracy_over_time(log))]
    if predictions is None:
        sections += [Section(title, [absent(why_not)]) for title in ("Classes", "Confusions", "Worst images")]
    else:
        sections += [_classes(predictions), _confusions(predictions), _worst(predictions)]
    sections += [timing_section(log), configuration_section(log)]
    return page(f"{network} on {log.data_name()}", ", ".join(said), sections)


def _summary(results: Mapping | None, why_not: str) -> Section:
    if results is None:
        return Section("Summary", [absent(why_not)])
    titles = {"top1": "top-1, percent", "top5": "top-5, percent", "error": "error, percent"}
    shown = [(title, f"{100 * results[name]:.2f}") for name, title in titles.items() if name in results]
    shown += [("mean loss", number(results["loss"]))] if "loss" in results else []
    how = f", {results['protocol']}" if "protocol" in results else ""
    parts = [tiles(shown), paragraph(f"On {number(results['images'])} images{how}.")]
    if results.get("unreadable"):
        parts.append(absent(f"{number(results['unreadable'])} images could not be read and count as wrong."))
    return Section("Summary", parts)


def _accuracy_over_time(log: RunLog) -> Html:
    """Top-1 and top-5, or the error beside that of the training batches."""
    if not log.evaluations:
        said = "Accuracy over time is not drawn: not evaluated yet ("
        return absent(said, tag("code", "--eval-period"), " evaluates on the way).")
    names = {"top1": "top-1", "top5": "top-5", "error": "test"}
    curves = {title: log.curve(name, evaluations=True) for name, title in names.items()}
    title = "Error, percent" if curves["test"] else "Accuracy, percent"
    curves["training batches"] = log.curve("train_error")
    in_percent = {
        name: [(step, None if value is None else 100 * value) for step, value in curve]
        for name, curve in curves.items()
        if curve
    }
    return line_chart(title, in_percent, x="updates")


def _classes(predictions: Predictions) -> Section:
    n = len(predictions.classes)
    hits = predictions.best == predictions.labels[:, None]
    images, top1, topk = (
        np.bincount(predictions.labels, weights=weights, minlength=n) for weights in (None, hits[:, 0], hits.any(1))
    )
    k = predictions.best.shape[1]
    titles = ["class", "images", "top-1", *([f"top-{k}"] if k > 1 else [])]
    rows = []
    for i, name in enumerate(predictions.classes):
        shares = [count[i] / images[i] if images[i] else None for count in (top1, topk)][: len(titles) - 2]
        rows.append((short(name), int(images[i]), *(Cell(percent(share), share) for share in shares)))
    return Section("Classes", [table(titles, rows, sortable=True)])


def _confusions(predictions: Predictions) -> Section:
    first, n = predictions.best[:, 0], len(predictions.classes)
    wrong = (first != predictions.labels) & (first >= 0)
    if not wrong.any():
        return Section("Confusions", [absent("No image was given a wrong class.")])
    names = [short(name) for name in predictions.classes]
    images = np.bincount(predictions.labels, minlength=n)
    pairs, counts = np.unique(predictions.labels[wrong] * n + first[wrong], return_counts=True)
    rows = []
    for pair in np.argsort(-counts, kind="stable")[:PAIRS].tolist():
        true, said = divmod(int(pairs[pair]), n)
        share = counts[pair] / images[true]
        rows.append((names[true], names[said], int(counts[pair]), Cell(percent(share), share)))
    most = table(("class", "taken for", "images", "percent of the class"), rows, sortable=True)
    if n > WHOLE_MATRIX:
        said = f"The {len(rows)} most confused pairs; the whole matrix of {n} classes would be too large to read."
        return Section("Confusions", [paragraph(said), most])
    said = paragraph("A row a class, a column what it was taken for; images. Darker is a larger share of the row.")
    return Section("Confusions", [said, _matrix(predictions, names, images), tag("h3", "Most confused"), most])


def _matrix(predictions: Predictions, names: Sequence[str], images: np.ndarray) -> Html:
    counts = np.zeros((len(names), len(names)), int)
    read = predictions.best[:, 0] >= 0
    np.add.at(counts, (predictions.labels[read], predictions.best[read, 0]), 1)
    head = tag("tr", tag("th", ""), *(tag("th", name, scope="col") for name in names))
    body = [
        tag("tr", tag("td", name), *(_shaded(counts[i, j], images[i], i == j) for j in range(len(names))))
        for i, name in enumerate(names)
    ]
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body), class_="matrix"), class_="box")


def _shaded(count: int, total: int, right: bool) -> Html:
    shade = 0 if not count else 1 + int(np.searchsorted([0.05, 0.2, 0.5], count / total))
    return tag("td", int(count) if count else "", class_=f"h{shade}{' right' if right else ''}")


def _worst(predictions: Predictions) -> Section:
    wrong = np.flatnonzero((predictions.best[:, 0] != predictions.labels) & (predictions.best[:, 0] >= 0))
    if not len(wrong):
        return Section("Worst images", [absent("No image was given a wrong class.")])
    if predictions.losses is not None:
        badness, said = predictions.losses, "Those with the largest loss, of the images that were given a wrong class."
    else:
        hits = predictions.best == predictions.labels[:, None]
        badness = np.where(hits.any(1), hits.argmax(1), predictions.best.shape[1])  # how many classes were preferred
        said = (
            f"Of the images that were given a wrong class, those whose own is not among the best "
            f"{predictions.best.shape[1]} (if there are that many), evenly spread; their losses are not recorded."
        )
    ranked = _most_evenly(wrong, badness) if predictions.losses is None else wrong[np.argsort(-badness[wrong])]
    figures = []
    for index in ranked.tolist():
        if len(figures) == WORST:
            break
        try:
            image = predictions.image(index)
        except BadImage:
            continue
        figures.append(_figure(predictions, index, image))
    return Section("Worst images", [paragraph(said), tag("div", *figures, class_="thumbs")])


def _most_evenly(wrong: np.ndarray, badness: np.ndarray) -> np.ndarray:
    """The worst first; where many are equally bad, those that lie evenly over the data set come before the others."""
    chosen = []
    for level in sorted(set(badness[wrong].tolist()), reverse=True):
        of_level = wrong[badness[wrong] == level]
        spread = np.unique(np.linspace(0, len(of_level) - 1, min(WORST, len(of_level)), dtype=int))
        chosen += [of_level[spread], np.delete(of_level, spread)]
    return np.concatenate(chosen)


def _figure(predictions: Predictions, index: int, image: Image.Image) -> Html:
    uri, (width, height) = jpeg(image, side=SIDE, limit=PICTURE_LIMIT)
    true, said = (short(predictions.classes[i]) for i in (predictions.labels[index], predictions.best[index, 0]))
    loss = "" if predictions.losses is None else f", loss {number(float(predictions.losses[index]), 3)}"
    caption = joined([tag("b", true), f", taken for {said}{loss}. {short(Path(predictions.name(index)).name)}"])
    small = "small" if max(width, height) <= SMALL else None
    return tag("figure", tag("img", src=uri, alt=f"{true}, taken for {said}", class_=small), tag("figcaption", caption))
