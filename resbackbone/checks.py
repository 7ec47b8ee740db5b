"""How a wrong argument is answered: one sentence that says what was given and what there is."""

from collections.abc import Iterable


def one_of(kind: str, value, choices: Iterable, note: str = ""):
    """Return `value` if it is one of `choices`, else raise ValueError: `unknown level 'c6'; choose from c2, c3`."""
    choices = list(choices)
    if any(value == choice and type(value) is type(choice) for choice in choices):
        return value
    listed = ", ".join(str(choice) for choice in choices)
    raise ValueError(f"unknown {kind} {value!r}; choose from {listed}{note}")
