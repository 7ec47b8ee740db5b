"""What a caller or a file did wrong, in one sentence: what was given, what is accepted, what to do."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

LFS_POINTER = b"version https://git-lfs"  # how the file begins that Git leaves in the place of a large one


class UserError(ValueError):
    """A mistake of a caller or in a file. Commands print it as one line; every other exception keeps its traceback."""


def one_of(kind: str, value, choices: Iterable, note: str = ""):
    """Return `value` if it is one of `choices`, else raise ValueError: `unknown level 'c6'; choose from c2, c3`."""
    choices = list(choices)
    if any(value == choice and type(value) is type(choice) for choice in choices):
        return value
    listed = ", ".join(str(choice) for choice in choices)
    near = nearest(str(value), [choice for choice in choices if isinstance(choice, str)])
    meant = f"; did you mean {near}?" if near else ""
    raise UserError(f"unknown {kind} {brief(value)}; choose from {listed}{note}{meant}")


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that `word` begins or that it may be a slip of in any case; None if there is none."""
    small = {choice.lower(): choice for choice in choices}
    begun = (choice for choice in small.values() if len(word) > 2 and choice.startswith(word))
    slips = (small[near] for near in get_close_matches(word.lower(), small, n=1, cutoff=0.75))
    return next(begun, None) or next(slips, None)


def is_url(word: str) -> bool:
    """Whether it begins with a scheme, which is longer than the letter of a drive."""
    return re.match("[a-z][a-z0-9+.-]+://", word, re.IGNORECASE) is not None


def sibling(path: str | os.PathLike) -> str:
    """ "; did you mean runs/mine?" if that is beside a path that does not exist and is named much like it, else ""."""
    folder, name = os.path.split(path)
    try:
        near = nearest(name, set(os.listdir(folder or ".")) - {name})
    except OSError:
        near = None
    return f"; did you mean {os.path.join(folder, near)}?" if near else ""


def check_ranges(values: object, ranges: Mapping[str, tuple[float, float, str]]) -> None:
    """Raise ValueError if an attribute of `values`, or one of its numbers, is out of its range.

    ranges: {"names of attributes": (smallest, largest, both in words)}; None is in every range.
    """
    for names, (low, high, words) in ranges.items():
        for name in names.split():
            value = getattr(values, name)
            numbers = value if isinstance(value, tuple) else (low if value is None else value,)
            if not all(low <= number <= high for number in numbers):
                raise UserError(f"{name} is {value}; it must be {words}")


def some(names: Sequence[object], count: int = 3) -> str:
    """The first names and the number of the others."""
    return ", ".join(map(str, names[:count])) + (f" and {len(names) - count} more" if len(names) > count else "")


def brief(value: object) -> str:
    """`value` as a message shows it: its repr, or for one of several lines or over 200 characters its type."""
    text = repr(value)
    return text if len(text) <= 200 and "\n" not in text else f"of type {type(value).__name__}"


def usual_folder(variables: Mapping[str, str], default: str) -> Path | None:
    """The first of $variable/below, for `variables` {variable: below}, that is set; without one, `default`.

    None if `default` is no folder. Raises UserError if the variable does not lead to a folder: another data set is not
    what it asks for.
    """
    for name, below in variables.items():
        if os.environ.get(name):
            place = Path(os.environ[name]) / below
            if place.is_dir():
                return place
            raise UserError(
                f"${name} is {os.environ[name]!r}, but there is no folder {place.absolute()}; correct or unset the "
                "variable, or give --data"
            )
    return Path(default) if Path(default).is_dir() else None


class MissingPackage(ModuleNotFoundError, UserError):
    """A package of an extra is not installed; the message says which, and how to install it."""


class BrokenPackage(ImportError, UserError):
    """A package is installed and cannot be imported."""


def require(extra: str, *modules: str, user: str) -> None:
    """Raise MissingPackage if one of these modules is not installed: `detection needs hotcoco: pip install ..`.

    `user` is what needs them, and `extra` the one of setup.py that brings them.
    """
    if missing := [module for module in modules if find_spec(module) is None]:
        raise MissingPackage(f"{user} needs {', '.join(missing)}: pip install 'resbackbone[{extra}]'", name=missing[0])


def detection_clash() -> str | None:
    """Say which other package `import detection` finds (the registry has one of this name); None if it finds ours."""
    spec = find_spec("detection")
    if spec is None:
        return "detection is not installed: install resbackbone again"
    if spec.origin and "resbackbone" in Path(spec.origin).read_text(encoding="utf-8"):
        return None
    found = spec.origin or spec.name
    return f"{found} is another package named detection: pip uninstall detection, then install resbackbone again"
