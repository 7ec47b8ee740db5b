"""One self-contained HTML page, made from the templates in templates/ by jinja2; it loads nothing from anywhere.

Every value is escaped. The page's content security policy admits its one style sheet and its one script by their
hashes, and embedded pictures: a browser neither runs nor fetches anything else, whatever markup slips through.
"""

import base64
import hashlib
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup
from PIL import Image

from resbackbone.report.numbers import number, percent

LIMIT = 2_000_000  # bytes of a page
MAX_NAME = 80  # characters of a name; longer ones are cut
MAX_ROWS = 2000  # of a table
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufdd0-\ufdef\ufffe\uffff]")
TEMPLATES = Path(__file__).parent / "templates"


class Section(NamedTuple):
    """A heading and what stands below it; on a wide screen a `half` one shares the width with the next."""

    title: str
    content: Markup
    half: bool = False


class Cell(NamedTuple):
    """A number in a table: as it is shown, and what it is sorted by."""

    shown: str
    value: float | None


def short(name: object) -> str:
    """A name of at most MAX_NAME characters."""
    text = str(name)
    return text if len(text) <= MAX_NAME else text[: MAX_NAME - 1] + "…"


def fraction(value: float | None) -> Cell:
    """A fraction 0..1 as a table's cell in percent."""
    return Cell(percent(value), value)


def macros(template: str) -> Any:
    """The macros of a template, as functions that return Markup."""
    return ENVIRONMENT.get_template(template).module


def absent(why: str) -> Markup:
    """A sentence in place of what cannot be shown: what it is, and why."""
    return Markup('<p class="absent">{}</p>').format(_printable(why))


def table(header: Sequence[str], rows: Sequence[Sequence[object]], *, sortable: bool = False) -> Markup:
    """A table that scrolls where it is too wide or too long; it shows the first MAX_ROWS rows.

    A cell is text, Markup, a `Cell`, or an int or float, which is shown by `number`.
    """
    cells = [[Cell(number(c), c) if isinstance(c, int | float) else c for c in row] for row in rows[:MAX_ROWS]]
    numeric = [isinstance(cell, Cell) for cell in cells[0]] if cells else [False] * len(header)
    return macros("table.html").table(list(zip(header, numeric, strict=True)), cells, len(rows) - MAX_ROWS, sortable)


def jpeg(image: Image.Image, *, side: int, limit: int = LIMIT) -> str:
    """A picture as a data: URI of at most `limit` characters, scaled down to at most `side` pixels a side."""
    image = image.convert("RGB")
    while True:
        image.thumbnail((side, side))
        for quality in (85, 70, 50):
            file = io.BytesIO()
            image.save(file, "JPEG", quality=quality, optimize=True)
            uri = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
            if len(uri) <= limit or side <= 16:
                return uri
        side = side * 2 // 3


def page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The page. Over LIMIT bytes its largest sections are left out, and a sentence in their place says so."""
    sections = list(sections)
    style, script = (Markup((TEMPLATES / name).read_text(encoding="utf-8")) for name in ("style.css", "page.js"))
    policy = f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}"
    template = ENVIRONMENT.get_template("page.html")
    for _ in range(len(sections) + 1):
        html = template.render(
            title=short(title), subtitle=short(subtitle), sections=sections, policy=policy, style=style, script=script
        )
        if len(html.encode()) <= LIMIT:
            break
        sizes = [len(section.content.encode()) for section in sections]
        largest = sizes.index(max(sizes))
        why = f"Left out: its {sizes[largest] / 1e6:.1f} MB would take the page over {LIMIT / 1e6:g} MB."
        sections[largest] = Section(sections[largest].title, absent(why))
    return html


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def _printable(value: object) -> object:
    """Text without what no page may hold: control characters and half surrogates become U+FFFD."""
    if isinstance(value, Markup):
        return value
    return CONTROL.sub("\ufffd", str(value).encode("utf-8", "surrogatepass").decode("utf-8", "replace"))


ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(TEMPLATES),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    finalize=_printable,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.filters |= {"number": number, "percent": percent, "short": short}
ENVIRONMENT.filters["slug"] = lambda title: re.sub("[^a-z0-9]+", "-", title.lower())
ENVIRONMENT.filters["sort_key"] = lambda value: "" if value is None or not math.isfinite(value) else float(value)
ENVIRONMENT.globals["table"] = table
