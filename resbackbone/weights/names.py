"""Templates for tensor names: one line of a table renames in both directions."""

import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

_PLACE = re.compile(r"\{(\w+?)(?:([+-]\d+)|:(\w+))?\}")
_LEAF = "(weight|bias|running_mean|running_var|num_batches_tracked)"


class Template:
    """A name with placeholders: `layer{i}.{j}.bn{k}.{leaf}`.

    `{i}` is a number, `{i+1}` the number i + 1, `{k:abc}` the k-th letter of abc, and `{leaf}` weight, bias,
    running_mean, running_var or num_batches_tracked. Templates with the same placeholders translate into each other.
    """

    def __init__(self, text: str):
        self.text = text

    @cached_property
    def _pattern(self) -> re.Pattern:
        pattern, end = "", 0
        for place in _PLACE.finditer(self.text):
            name, _, letters = place.groups()
            pattern += re.escape(self.text[end : place.start()])
            pattern += _LEAF if name == "leaf" else f"([{letters}])" if letters else r"(0|[1-9]\d{0,3})"
            end = place.end()
        return re.compile(pattern + re.escape(self.text[end:]))

    def read(self, name: str) -> dict[str, int | str] | None:
        """The values of the placeholders in `name`, or None if it does not match."""
        match = self._pattern.fullmatch(name)
        if match is None:
            return None
        values: dict[str, int | str] = {}
        for (place, shift, letters), text in zip(_PLACE.findall(self.text), match.groups(), strict=True):
            if place == "leaf":
                values[place] = text
            else:
                values[place] = letters.index(text) + 1 if letters else int(text) - int(shift or 0)
        return values

    def write(self, values: Mapping[str, Any]) -> str:
        """The name with these values for its placeholders."""

        def fill(place: re.Match) -> str:
            name, shift, letters = place.groups()
            if letters:
                return letters[values[name] - 1]
            return values[name] if name == "leaf" else str(values[name] + int(shift or 0))

        return _PLACE.sub(fill, self.text)


def with_value(template: str, place: str, value: int) -> str:
    """The template with a number for one placeholder: `res{i+1}` with i = 4 is `res5`."""

    def fill(match: re.Match) -> str:
        name, shift, _ = match.groups()
        return match[0] if name != place else str(value + int(shift or 0))

    return _PLACE.sub(fill, template)


def by_leaf(template: str, leaves: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """A template that ends in `{leaf}`, once for each leaf, with another format's word: [(template, word)]."""
    return [(template.replace("{leaf}", leaf), word) for leaf, word in leaves]
