"""What a caller or a file did wrong, in one sentence: what was given, what is accepted, what to do."""

from collections.abc import Iterable


class UserError(ValueError):
    """A mistake of a caller or in a file. Commands print it as one line; every other exception keeps its traceback."""


def one_of(kind: str, value, choices: Iterable, note: str = ""):
    """Return `value` if it is one of `choices`, else raise ValueError: `unknown level 'c6'; choose from c2, c3`."""
    choices = list(choices)
    if any(value == choice and type(value) is type(choice) for choice in choices):
        return value
    listed = ", ".join(str(choice) for choice in choices)
    raise UserError(f"unknown {kind} {value!r}; choose from {listed}{note}")
