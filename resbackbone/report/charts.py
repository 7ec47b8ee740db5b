"""Charts as SVG: lines over a number, and bars. Their colours are the page's, so they follow light and dark.

Each curve carries its points, as [place, x, y] with the last two in words, which page.js shows under the pointer.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from markupsafe import Markup

from resbackbone.report.numbers import number
from resbackbone.report.page import ENVIRONMENT, macros

WIDTH, HEIGHT = 420, 230  # units, which on a phone are a little less than pixels
LEFT, RIGHT, TOP, BOTTOM = 48, WIDTH - 22, 10, HEIGHT - 38  # edges of the plot
FRAME = {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM}
MAX_LABELS = 7  # of a histogram's edges
MAX_POINTS = 250  # of a curve; of more, each stands for several

Points = Sequence[tuple[float, float | None]]


def line_chart(
    title: str,
    curves: Mapping[str, Points],
    *,
    x: str,
    x_range=None,
    y_range=None,
    show: Callable[[float], str] = number,
    mark: float | None = None,
) -> Markup:
    """Curves of (x, y) points in one chart, with a legend; a value that is not finite is a gap, a single point a dot.

    A curve of more than MAX_POINTS is thinned: neighbours become their mean, in a band from their minimum to their
    maximum. The ranges (minimum, maximum) are by default those of the points, including 0. `show` words a value under
    the pointer; a dashed line stands at x = `mark`.
    """
    thinned = {name: _thinned(points) for name, points in curves.items()}
    shown = {name: points for name, points in thinned.items() if np.isfinite(points[:, 1]).any()}
    if not shown:
        return macros("chart.html").empty(title)
    every = np.concatenate(list(shown.values()))
    every = every[np.isfinite(every[:, 1])]
    x_low, x_high = x_range or _widened(min(0, every[:, 0].min()), every[:, 0].max())
    y_low, y_high = y_range or _widened(min(0, every[:, 2].min()), every[:, 3].max())
    x_ticks, y_ticks = ticks(x_low, x_high, 5), ticks(y_low, y_high, 5)
    if y_high > y_ticks[-1]:  # the axis ends at a tick
        y_high = 2 * y_ticks[-1] - y_ticks[-2]
        y_ticks.append(y_high)

    def across(value: float) -> float:
        return round(LEFT + (value - x_low) / (x_high - x_low) * (RIGHT - LEFT), 1)

    def up(value: float) -> float:
        return round(BOTTOM - (value - y_low) / (y_high - y_low) * (BOTTOM - TOP), 1)

    return macros("chart.html").line_chart(
        title,
        x,
        FRAME,
        [(across(value), _label(value)) for value in x_ticks],
        [(up(value), _label(value)) for value in y_ticks],
        {
            name: {
                "parts": [_drawn(part, across, up) for part in _unbroken(points)],
                "points": [[across(a), number(a), show(b)] for a, b in points[:, :2].tolist() if math.isfinite(b)],
            }
            for name, points in shown.items()
        },
        None if mark is None else across(mark),
    )


def histogram(title: str, edges: Sequence[float], counts: Mapping[str, Sequence[int]], *, x: str) -> Markup:
    """Counts between `edges` as steps, in percent of the curve's sum; bins are equally wide, empty ends left out."""
    shares = {name: 100 * np.array(values) / sum(values) for name, values in counts.items() if sum(values)}
    if not shares:
        return macros("chart.html").empty(title)
    filled = np.flatnonzero(sum(shares.values()))
    first, bins = int(filled[0]), int(filled[-1] - filled[0]) + 1
    y_ticks = ticks(0, _widened(0, max(map(max, shares.values())))[1], 5)
    y_ticks.append(2 * y_ticks[-1] - y_ticks[-2])

    def across(edge: float) -> float:
        return round(LEFT + edge / bins * (RIGHT - LEFT), 1)

    def up(value: float) -> float:
        return round(BOTTOM - value / y_ticks[-1] * (BOTTOM - TOP), 1)

    every = next(step for step in (1, 2, 4, 8, 16) if bins < MAX_LABELS * step)
    curves = {}
    for name, values in shares.items():
        steps = "".join(f"V{up(y)}H{across(i + 1)}" for i, y in enumerate(values[first : first + bins].tolist()))
        outline = f"M{LEFT} {BOTTOM}{steps}V{BOTTOM}"
        bars = enumerate(values[first : first + bins].tolist())
        spans = [f"{_label(edges[first + i])} to {_label(edges[first + i + 1])}" for i in range(bins)]
        curves[name] = {
            "parts": [{"band": f"{outline}Z", "curve": outline, "dot": None}],
            "points": [[across(i + 0.5), spans[i], one_decimal(share)] for i, share in bars],
        }
    labels = [(across(i), _label(edges[first + i])) for i in range(bins + 1) if (first + i) % every == 0]
    return macros("chart.html").line_chart(title, x, FRAME, labels, [(up(y), _label(y)) for y in y_ticks], curves)


def one_decimal(value: float) -> str:
    return f"{value:.1f}"


def bar(share: float) -> Markup:
    """A bar that fills this share, 0..1, of a table's cell."""
    return macros("chart.html").bar(round(100 * min(max(share, 0), 1), 1))


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from `low` to `high`, 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.9g}") for i in range(first, last + 1)]


def _label(value: float) -> str:
    if 0 < abs(value) < 1e-3:  # 1.5e-4 is short, 0.00015 is not
        power = math.floor(math.log10(abs(value)))
        return f"{value / 10.0**power:g}e{power}"
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e6 else f"{value:g}"


def _widened(low: float, high: float) -> tuple[float, float]:
    low, high = float(low), float(high)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        return low - (abs(low) / 2 or 0.5), high + (abs(high) / 2 or 0.5)
    return low, high


def _thinned(points: Points) -> np.ndarray:
    """[n, 4]: x, y, and the minimum and maximum y of the points that it stands for."""
    values = np.array([(x, math.nan if y is None else y) for x, y in points], float).reshape(-1, 2)
    values = values[np.isfinite(values[:, 0])]
    values[~np.isfinite(values[:, 1]), 1] = math.nan
    if len(values) <= MAX_POINTS:
        return values[:, [0, 1, 1, 1]]
    thinned = []
    for part in np.array_split(values, MAX_POINTS):
        finite = part[np.isfinite(part[:, 1]), 1]
        spread = (finite.mean(), finite.min(), finite.max()) if len(finite) else (math.nan,) * 3
        thinned.append((part[:, 0].mean(), *spread))
    return np.array(thinned)


def _unbroken(points: np.ndarray) -> list[np.ndarray]:
    finite = np.isfinite(points[:, 1])
    parts = np.split(points, np.flatnonzero(np.diff(finite)) + 1)
    return [part for part in parts if len(part) and np.isfinite(part[0, 1])]


def _drawn(part: np.ndarray, across: Callable, up: Callable) -> dict:
    mean, low, high = ([f"{across(point[0])} {up(point[k])}" for point in part] for k in (1, 2, 3))
    band = "M" + "L".join(high + low[::-1]) + "Z" if low != high else None
    return {"band": band, "curve": "M" + "L".join(mean), "dot": mean[0].split() if len(part) == 1 else None}


ENVIRONMENT.globals |= {"line_chart": line_chart, "one_decimal": one_decimal}
