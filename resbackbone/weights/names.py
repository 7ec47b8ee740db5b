"""Templates for tensor names: one line of a table renames in both directions."""

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

_PLACE = re.compile(r"\{(\w+?)(?:([+-]\d+)|:(\w+))?\}")
_LEAF = "(weight|bias|running_mean|running_var|num_batches_tracked)"


@cache
def _pattern(template: str) -> re.Pattern:
    pattern, end = "", 0
    for place in _PLACE.finditer(template):
        name, _, letters = place.groups()
        pattern += re.escape(template[end : place.start()])
        pattern += _LEAF if name == "leaf" else f"([{letters}])" if letters else r"(0|[1-9]\d{0,3})"
        end = place.end()
    return re.compile(pattern + re.escape(template[end:]))


def read_name(template: str, name: str) -> dict[str, int | str] | None:
    """The values of the placeholders of `layer{i}.{j}.bn{k}.{leaf}` in `name`, or None if it does not match.

    `{i}` is a number, `{i+1}` the number i + 1, `{k:abc}` the k-th letter of abc, and `{leaf}` weight, bias,
    running_mean, running_var or num_batches_tracked. Templates with the same placeholders translate into each other.
    """
    match = _pattern(template).fullmatch(name)
    if match is None:
        return None
    values: dict[str, int | str] = {}
    for (place, shift, letters), text in zip(_PLACE.findall(template), match.groups(), strict=True):
        if place == "leaf":
            values[place] = text
        else:
            values[place] = letters.index(text) + 1 if letters else int(text) - int(shift or 0)
    return values


def write_name(template: str, values: Mapping[str, Any]) -> str:
    """The template with these values for its placeholders; others stay: `res{i+1}.{j}` with i = 4 is `res5.{j}`."""

    def fill(match: re.Match) -> str:
        place, shift, letters = match.groups()
        if place not in values:
            return match[0]
        if letters:
            return letters[values[place] - 1]
        return values[place] if place == "leaf" else str(values[place] + int(shift or 0))

    return _PLACE.sub(fill, template)
