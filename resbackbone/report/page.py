"""One self-contained HTML page: escaped text, tables that sort, embedded pictures; it loads nothing from anywhere.

Markup is made by `tag`, which escapes whatever is not markup already, so a name from a data set is text wherever it
stands. The page's own policy (CSP) admits its one script and its one style sheet by their hashes, and pictures that
are part of it: should anything slip through after all, a browser would not run or fetch it.
"""

import base64
import hashlib
import html
import io
import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from PIL import Image

from resbackbone.report.assets import SCRIPT, STYLE
from resbackbone.report.numbers import number

LIMIT = 2_000_000  # bytes of a page
MAX_NAME = 80  # characters of a name; longer ones are cut
MAX_ROWS = 2000  # of a table
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufdd0-\ufdef\ufffe\uffff]")


class Html(str):
    """Markup, put on a page as it is. Made by `tag` and `escaped` only."""


class Section(NamedTuple):
    """A heading and what stands below it, piece by piece."""

    title: str
    parts: Sequence[Html]


def escaped(value: object) -> Html:
    """Any value as text; what no page may hold (control characters, half surrogates) becomes U+FFFD."""
    if isinstance(value, Html):
        return value
    text = str(value).encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    return Html(html.escape(CONTROL.sub("\ufffd", text)))


def tag(name: str, /, *content: object, **attributes: object) -> Html:
    """An element; attributes that are None are left out, `class_` is class and data_value data-value."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escaped(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in ("img", "meta"):
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{joined(content)}</{name}>")


def joined(parts: Iterable[object]) -> Html:
    return Html("".join(map(escaped, parts)))


def paragraph(*content: object) -> Html:
    return tag("p", *content)


def absent(*what: object) -> Html:
    """A sentence in place of what cannot be shown: what it is, and why."""
    return tag("p", *what, class_="absent")


def short(name: object) -> str:
    """A name of at most MAX_NAME characters."""
    text = str(name)
    return text if len(text) <= MAX_NAME else text[: MAX_NAME - 1] + "…"


class Cell(NamedTuple):
    """A number in a table: as it is shown, and what it is sorted by."""

    shown: object
    value: float | None


def table(header: Sequence[str], rows: Sequence[Sequence[object]], *, sortable: bool = False) -> Html:
    """A table in a box of its own, which scrolls if it is too wide or too long. Of many rows the first are shown.

    A cell is text, markup, a `Cell`, or an int or float, which is shown by `number`.
    """
    numeric = [isinstance(cell, Cell | int | float) for cell in rows[0]] if rows else [False] * len(header)
    titles = (tag("th", t, scope="col", class_="number" if n else None) for t, n in zip(header, numeric, strict=True))
    head = tag("thead", tag("tr", *titles))
    body = tag("tbody", *(tag("tr", *map(_cell, row)) for row in rows[:MAX_ROWS]))
    note = absent(f"{len(rows) - MAX_ROWS} more rows are not shown.") if len(rows) > MAX_ROWS else ""
    return joined([tag("div", tag("table", head, body, class_="sortable" if sortable else None), class_="box"), note])


def _cell(content: object) -> Html:
    if isinstance(content, int | float) and not isinstance(content, bool):
        content = Cell(number(content), content)
    if not isinstance(content, Cell):
        return tag("td", content)
    value = None if content.value is None or not math.isfinite(content.value) else repr(float(content.value))
    return tag("td", content.shown, class_="number", data_value="" if value is None else value)


def tiles(values: Iterable[tuple[str, str]]) -> Html:
    """Headline numbers, (label, value) each."""
    shown = (tag("div", tag("b", value), tag("span", label), class_="tile") for label, value in values)
    return tag("div", *shown, class_="tiles")


def side_by_side(*parts: Html) -> Html:
    """Figures in as many columns as there is room for."""
    return tag("div", *parts, class_="grid")


def jpeg(image: Image.Image, *, side: int, limit: int) -> tuple[str, tuple[int, int]]:
    """A picture as a data: URI of at most `limit` characters, and its (width, height): at most `side` pixels a side."""
    image = image.convert("RGB")
    while True:
        image.thumbnail((side, side))
        for quality in (85, 70, 50):
            file = io.BytesIO()
            image.save(file, "JPEG", quality=quality, optimize=True)
            uri = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
            if len(uri) <= limit or side <= 16:
                return uri, image.size
        side = side * 2 // 3


def page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The page. Over LIMIT bytes, its largest sections are left out, and a sentence says so in their place."""
    sections = list(sections)
    for _ in range(len(sections)):
        if len(_page(title, subtitle, sections).encode()) <= LIMIT:
            break
        sizes = [len(joined(section.parts).encode()) for section in sections]
        largest = sizes.index(max(sizes))
        why = f"Left out: with its {sizes[largest] / 1e6:.1f} MB the page would be over {LIMIT / 1e6:g} MB."
        sections[largest] = Section(sections[largest].title, [absent(why)])
    return _page(title, subtitle, sections)


def _page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    title, subtitle = short(title), short(subtitle)
    ids = [re.sub("[^a-z0-9]+", "-", section.title.lower()) for section in sections]
    contents = tag("nav", *(tag("a", s.title, href=f"#{i}") for s, i in zip(sections, ids, strict=True)))
    written = (
        tag("section", tag("h2", section.title), *section.parts, id=i) for section, i in zip(sections, ids, strict=True)
    )
    policy = f"default-src 'none'; img-src data:; style-src {_hash(STYLE)}; script-src {_hash(SCRIPT)}"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Html(STYLE)),
    )
    header = tag("header", tag("h1", title), tag("p", subtitle), contents)
    body = tag("body", tag("main", header, *written), tag("script", Html(SCRIPT)))
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
