"""Numbers as tables and progress lines show them, n/a for what is undefined; and tables in Markdown."""

import math
from collections.abc import Iterable, Sequence


def number(value: float | None, digits: int = 4) -> str:
    """`digits` significant digits; whole numbers in full, with commas."""
    if value is None or not math.isfinite(value):
        return "n/a"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.{digits}g}" if 1e-4 <= abs(value) < 10**digits else f"{value:.{max(digits - 2, 1)}e}"


def percent(fraction: float | None) -> str:
    """A fraction 0..1 in percent with one decimal and no sign, as COCO tables print it: 37.0."""
    return "n/a" if fraction is None or not math.isfinite(fraction) else f"{100 * fraction:.1f}"


def finite(value: object) -> float | None:
    """`value` if it is a finite number, otherwise None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) else None


def duration(seconds: float) -> str:
    """Seconds in the two largest units that they fill: 41 s, 14 min 21 s, 2 h 5 min, 3 d 4 h."""
    for unit, length, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit} {seconds % length // part:.0f} {smaller}"
    return f"{seconds:.0f} s"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, cells))} |\n" for cells in lines)
