"""Charts as SVG: lines over a number, and bars. Their colours are the page's, so they follow light and dark."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from resbackbone.report.page import Html, absent, short, tag

WIDTH, HEIGHT = 420, 230  # units, which on a phone are a little less than pixels
LEFT, RIGHT, TOP, BOTTOM = 48, 22, 10, 38
COLOURS = 8
MAX_POINTS = 250  # of a curve; of more, each stands for several

Points = Sequence[tuple[float, float | None]]


def line_chart(title: str, curves: Mapping[str, Points], *, x: str, x_range=None, y_range=None) -> Html:
    """Curves of (x, y) points in one chart, with a legend; what is not finite is a gap, a single point a dot.

    Of more than MAX_POINTS neighbours are drawn as their mean, in a band from their least to their largest. Ranges
    (least, largest) are those of the points, from 0, unless given.
    """
    kept = {name: _thinned(points) for name, points in curves.items()}
    kept = {name: points for name, points in kept.items() if np.isfinite(points[:, 1]).any()}
    if not kept:
        return tag("figure", tag("figcaption", title), absent("No finite value to draw."), class_="chart")
    every = np.concatenate(list(kept.values()))
    every = every[np.isfinite(every[:, 1])]
    x_low, x_high = x_range or _widened(min(0, every[:, 0].min()), every[:, 0].max())
    y_low, y_high = y_range or _widened(min(0, every[:, 2].min()), every[:, 3].max())
    x_ticks, y_ticks = ticks(x_low, x_high, 5), ticks(y_low, y_high, 5)
    if y_high > y_ticks[-1]:  # up to a tick
        y_high = 2 * y_ticks[-1] - y_ticks[-2]
        y_ticks.append(y_high)

    def across(value: float) -> float:
        return round(LEFT + (value - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT), 1)

    def up(value: float) -> float:
        share = (value - y_low) / (y_high - y_low)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    drawn = []
    for value in y_ticks:
        drawn.append(tag("path", class_="axis", d=f"M{LEFT} {up(value)}H{WIDTH - RIGHT}"))
        drawn.append(tag("text", _label(value), x=LEFT - 6, y=up(value) + 4, text_anchor="end"))
    for value in x_ticks:
        drawn.append(tag("path", class_="axis", d=f"M{across(value)} {HEIGHT - BOTTOM}v4"))
        drawn.append(tag("text", _label(value), x=across(value), y=HEIGHT - BOTTOM + 16, text_anchor="middle"))
    drawn.append(tag("text", x, x=(WIDTH + LEFT - RIGHT) / 2, y=HEIGHT - 5, text_anchor="middle"))
    legend = []
    for i, (name, points) in enumerate(kept.items()):
        colour = f"c{i % COLOURS}"
        for part in _unbroken(points):
            mean, low, high = ([(across(p[0]), up(p[k])) for p in part] for k in (1, 2, 3))
            if low != high:
                drawn.append(tag("path", class_=f"band {colour}", d=f"{_path(high + low[::-1])}Z"))
            if len(part) == 1:
                drawn.append(tag("circle", class_=f"dot {colour}", cx=mean[0][0], cy=mean[0][1], r=3))
            else:
                drawn.append(tag("path", class_=f"curve {colour}", d=_path(mean)))
        if len(kept) > 1:
            legend.append(tag("span", tag("i", class_=colour), short(name)))
    picture = tag("svg", *drawn, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=title)
    return tag("figure", tag("figcaption", title), picture, tag("div", *legend, class_="legend"), class_="chart")


def bar(share: float) -> Html:
    """A bar that fills this share, 0..1, of a table's cell."""
    rectangle = tag("rect", width=round(100 * min(max(share, 0), 1), 1), height=8)
    return tag("svg", rectangle, class_="bar", viewBox="0 0 100 8", preserveAspectRatio="none", aria_hidden="true")


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
    """[n, 4]: x, y, and the least and largest y of the points that it stands for."""
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


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x} {y}" for x, y in points)
