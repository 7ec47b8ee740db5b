"""Templates for tensor names: one line of a table renames in both directions."""

import re
from functools import cache

LEAVES = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
NUMBERS = [str(number) for number in range(10_000)]
_PLACE = re.compile(r"\{(\w+)([+-]\d+)?(?::([\w,]+))?\}")


@cache
def _parsed(template: str) -> tuple[re.Pattern, list[tuple[str, str, int, list[str]]]]:
    """The pattern of a template's names, and of each placeholder its text, name, shift and choices."""
    pattern, places, end = "", [], 0
    for match in _PLACE.finditer(template):
        name, shift, words = match.groups()
        choices = words.split(",") if words else LEAVES if name == "leaf" else NUMBERS
        places.append((match[0], name, int(shift or 0), choices))
        choice = r"0|[1-9]\d{0,3}" if choices is NUMBERS else "|".join(choices)
        pattern += f"{re.escape(template[end : match.start()])}({choice})"
        end = match.end()
    return re.compile(pattern + re.escape(template[end:])), places


def rename(name: str, source: str, target: str) -> str | None:
    """Turn a name of the form `source` into the form `target`; None if it has another form, or `target` no word for it.

    `{i}` is a number, `{i+1}` the number i + 1, `{k-1:a,b,c}` the word at place k - 1, counted from 0, and `{leaf}` one
    of LEAVES. Both templates have the same placeholders.
    """
    pattern, places = _parsed(source)
    match = pattern.fullmatch(name)
    if match is None:
        return None
    found = zip(places, match.groups(), strict=True)
    values = {place: choices.index(text) - shift for (_, place, shift, choices), text in found}
    for placeholder, place, shift, choices in _parsed(target)[1]:
        index = values[place] + shift
        if index not in range(len(choices)):
            return None
        target = target.replace(placeholder, choices[index])
    return target
