"""Names of tensors as templates, so that one line of a table renames in both directions."""

import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

_PLACE = re.compile(r"\{(\w+?)(?:([+-]\d+)|:(\w+))?\}")
_LEAF = "(weight|bias|running_mean|running_var|num_batches_tracked)"


class Template:
    """A name with places in it: `layer{i}.{j}.bn{k}.{leaf}`.

    `{i}` is a number; `{i+1}` one greater than i; `{k:abc}` the k-th letter of abc; `{leaf}` what a layer calls its
    tensor (weight, bias, running_mean, ..). Templates that have the same places translate into each other.
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
        """What stands at the places of `name`, or None if it is not of this form."""
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
        """The name with `values` at its places."""

        def fill(place: re.Match) -> str:
            name, shift, letters = place.groups()
            if letters:
                return letters[values[name] - 1]
            return values[name] if name == "leaf" else str(values[name] + int(shift or 0))

        return _PLACE.sub(fill, self.text)


def with_value(template: str, place: str, value: int) -> str:
    """The template with a number at one of its places: `res{i+1}` with i = 4 is `res5`."""

    def fill(match: re.Match) -> str:
        name, shift, _ = match.groups()
        return match[0] if name != place else str(value + int(shift or 0))

    return _PLACE.sub(fill, template)


def by_leaf(template: str, leaves: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """A template that ends in `{leaf}` once for each leaf, with another format's word for it: [(template, word)]."""
    return [(template.replace("{leaf}", leaf), word) for leaf, word in leaves]
