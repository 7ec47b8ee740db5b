"""Charts: lines over a number, drawn by matplotlib, and bars in a table's cells."""

import base64
import io
from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup

from resbackbone.report.page import ENVIRONMENT, absent, macros

COLOURS = ("#3b82d6", "#e2661b", "#2e9d53", "#b44cc4", "#a8841a", "#1a93a8", "#d8435f", "#7b8594")  # as in style.css
GREY = "#808a96"  # of axes and ticks: can be read on white and on black

Points = Sequence[tuple[float, float | None]]


def line_chart(title: str, curves: Mapping[str, Points], *, x: str, x_range=None, y_range=None) -> Markup:
    """Curves of (x, y) points in one picture, with a legend; a value that is not finite is a gap, a single point a dot.

    The ranges (minimum, maximum) are by default those of the points; that of y includes 0.
    """
    from matplotlib import rc_context  # slow to import
    from matplotlib.figure import Figure

    arrays = {name: np.array([(at, np.nan if y is None else y) for at, y in points]) for name, points in curves.items()}
    shown = {name: points for name, points in arrays.items() if len(points) and np.isfinite(points[:, 1]).any()}
    if not shown:
        return absent(f"{title}: no finite value to draw.")
    with rc_context({"axes.edgecolor": GREY, "xtick.color": GREY, "ytick.color": GREY}):
        figure = Figure(figsize=(4.4, 2.5), layout="constrained")
        axes = figure.add_subplot()
        for i, points in enumerate(shown.values()):
            axes.plot(*points.T, color=COLOURS[i % 8], linewidth=1.3, marker="o" if len(points) == 1 else None)
        axes.set(xlim=x_range, ylim=y_range or (min(0, axes.get_ylim()[0]), None))
        axes.grid(axis="y", color=GREY, linewidth=0.4)
        axes.spines[["top", "right"]].set_visible(False)
        written = io.BytesIO()
        figure.savefig(written, format="png", dpi=150, transparent=True)
    uri = f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode()}"
    return macros("chart.html").line_chart(title, uri, x, list(shown))


def bar(share: float) -> Markup:
    """A bar that fills this share, 0..1, of a table's cell."""
    return macros("chart.html").bar(round(100 * min(max(share, 0), 1), 1))


ENVIRONMENT.globals["line_chart"] = line_chart
