"""Which classes are taken for which: a matrix, and the most frequent pairs."""

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from resbackbone.report.page import fraction, macros, short

WHOLE = 20  # classes of a matrix; of more, the most confused ones are shown
PAIRS = 30


def confusions(
    names: Sequence[str],
    true: np.ndarray,
    taken: np.ndarray,
    counts: np.ndarray,
    totals: np.ndarray,
    *,
    things: str,
    background: bool = False,
) -> Markup:
    """A matrix of the `counts` of things of class true[i] that were taken for class taken[i], and a table of pairs.

    A row's share is of the class's `totals`. With `background` the last of the names stands for what is no object: its
    row has false detections, its column missed objects.
    """
    names, wrong = [short(name) for name in names], true != taken
    errors = np.bincount(np.append(true[wrong], taken[wrong]), np.tile(counts[wrong], 2), len(names))
    real = len(names) - background
    most = np.argsort(-errors[:real], kind="stable")[:WHOLE] if real > WHOLE else np.arange(real)
    shown = [*sorted(most.tolist()), *range(real, len(names))]
    places = np.full(len(names), -1)
    places[shown] = np.arange(len(shown))
    inside = (places[true] >= 0) & (places[taken] >= 0)
    matrix = np.zeros((len(shown), len(shown)), int)
    matrix[places[true[inside]], places[taken[inside]]] = counts[inside]
    shares = matrix / totals[shown].clip(1)[:, None]
    shades = np.where(matrix > 0, 1 + np.searchsorted([0.05, 0.2, 0.5], shares), 0)
    rows = [list(zip(*row, strict=True)) for row in zip(matrix.tolist(), shades.tolist(), strict=True)]
    pairs = np.flatnonzero(wrong & (true < real) & (taken < real))
    pairs = pairs[np.argsort(-counts[pairs], kind="stable")[:PAIRS]]
    table = [
        (names[true[i]], names[taken[i]], int(counts[i]), fraction(counts[i] / max(1, totals[true[i]]))) for i in pairs
    ]
    return macros("confusions.html").confusions([names[i] for i in shown], rows, table, real, things, background)
