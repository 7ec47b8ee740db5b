"""The words of a command line become a dataclass of options; a word that does not fit becomes a sentence about it.

tyro prints the help of the same dataclass. Its parser is not used: it draws a box around what it says of a mistake.
"""

import contextlib
import dataclasses
import inspect
import math
import os
import re
import shlex
import sys
from collections.abc import Sequence
from functools import reduce
from operator import or_
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

from resbackbone.checks import UserError, is_url, nearest

T = TypeVar("T", bound=Any)  # a dataclass of options
NOUNS = {int: "whole number", float: "number", str: "name", Path: "path"}
OPTION = re.compile(r"[-–—](?!$|[\d.])")  # -5 and - are values; word processors make dashes of hyphens
SEE_HELP = "--help lists the options"
RECIPE = "--recipe."  # before the name of one of `recipe_values`
SYNONYMS = {  # what other packages say: what it may be here, the best first; what to say where it is none of these
    "imgsz image-size img-size img-scale input-size resolution crop-size min-size size": "image-size size",
    "conf conf-thres confidence score-thr score-thresh score-threshold threshold": "threshold score-thresh",
    "confidence-threshold": "threshold score-thresh",
    "learning-rate lr0 base-lr": "lr",
    "lr-steps lr-step step-size decay-epochs": "milestones",
    "epochs epoch e num-epochs max-epochs": "epochs steps max-steps",
    "iters iterations max-iter max-iters num-steps": "steps max-steps",
    "batch bs b batch-size images-per-batch": "batch-size batch-sizes",
    "data-path data-dir data-root dataset root d": "data source root",
    "output output-dir out-dir out o work-dir project save-dir logdir name": "output destination file",
    "num-workers nw j": "workers",
    "num-gpus nproc-per-node": "gpus",
    "config-file cfg c": "config",
    "amp fp16 bf16 half": "precision; exported files compute in fp32",
    "weights model checkpoint ckpt pretrained": "weights run source",
    "source images image img input": "inputs data",
    "patience": "early-stop",
    "val-interval eval-interval": "eval-period",
    "log-interval print-freq": "log-period",
    "save-period save-freq": "checkpoint-period",
    "wd": "weight-decay",
    "auto-resume continue": "resume",
    "arch": "backbone depth",
    "gpu": "device",
    "h usage options": "help",
    "format": "to file",
    "sync-bn sync-batchnorm": "norm=SyncBN",
    "public": "no-private",
    "int8": "; networks compute in fp32, bf16 or fp16",
    "val": "val-json eval-only split",
    "eval evaluate test test-only validate eval-only": "eval-only split; evaluate_coco.py evaluates a detector, "
    "pretrain.py --eval-only a classifier",
    "freeze freeze-at freeze-layers frozen-stages trainable-layers": "frozen-through; train_coco.py --frozen-through "
    "freezes stages",
    "num-classes classes class-names names nc": "; the classes are those of the data",
    "no-pretrained from-scratch scratch": "; without --weights, a training starts from random ones",
    "momentum": "; SGD's momentum is 0.9",
    "cos-lr cosine lr-scheduler cfg-options opts set": "; in train_coco.py and pretrain.py, --recipe.NAME VALUE sets "
    "what has no option; --print-recipe lists the names",
    "iou iou-thres nms nms-thres": "; a detector is trained with it: train_coco.py --recipe.detector.box-nms-thresh",
    "local-rank rank world-size nnodes launcher dist-url": "; torchrun sets the ranks, as in docs/scaling.md",
    "save-txt save-json save-conf": "; detections.json in --output has every box",
    "show view-img": "; no window opens; --output has the pictures",
    "dynamic dynamic-axes": "; exported files take images of any size and number",
    "simplify opset": "; PyTorch simplifies the file and chooses its opset",
    "token hf-token": "; log in with `hf auth login`, or set HF_TOKEN",
    "version v": "; `pip show resbackbone` prints it",
}


@dataclasses.dataclass(frozen=True)
class Syntax:
    """What the command line of a dataclass of options may hold: types by name, and names by what is typed."""

    options: type
    hints: dict[str, Any]
    flags: dict[str, str]
    positional: list[str]

    @classmethod
    def of(cls, options: type) -> "Syntax":
        hints = get_type_hints(options)
        given = {name: [kind for kind in _kinds(hint) if kind is not NoneType] for name, hint in hints.items()}
        hints = {name: reduce(or_, kinds) for name, kinds in given.items()}  # None is what is not given
        marked = get_type_hints(options, include_extras=True)
        positional = [name for name in hints if tyro.conf.Positional in get_args(marked[name])]
        flags = {_flag(name): name for name in hints if name not in [*positional, "recipe_values"]}
        flags |= {_flag(f"no_{name}"): name for name in flags.values() if hints[name] is bool}
        return cls(options, hints, flags, positional)

    @property
    def needed(self) -> list[str]:
        parameters = inspect.signature(self.options).parameters.values()
        return [parameter.name for parameter in parameters if parameter.default is parameter.empty]

    @property
    def room(self) -> float:
        """How many positional arguments there can be."""
        return sum(_count(self.hints[name]) or math.inf for name in self.positional)

    def like(self, word: str) -> str:
        """What to give instead of an option that there is not."""
        word = word.strip("-–—").replace("_", "-").lower()
        ours = [flag[2:] for flag in (*self.flags, "--help")] + self.positional
        meant = next((meant for theirs, meant in SYNONYMS.items() if word in theirs.split()), "")
        names, _, otherwise = meant.partition("; ")
        found = next((name for name in names.split() if name.partition("=")[0] in ours), None)
        if otherwise and not found:
            return f"; {otherwise}"
        found = found or nearest(word, ours)
        if found in self.positional:
            return f"; {found.upper()} is given without a name{self.example()}"
        return f"; did you mean --{found}?" if found else f" nor one like it; {SEE_HELP}"

    def about_surplus(self, word: str, before: Sequence[str]) -> str:
        """What is wrong with a word for which there is no positional argument; `before` are an option and its value."""
        name, equals, _ = word.partition("=")
        if equals:
            return f"is not an option{self.like(name)}"
        if len(before) == 1:
            return f"one word too many after {before[0]}, which takes no value"
        if before:
            return f"one word too many after {' '.join(before)}; put quotes around a value with spaces"
        if self.positional:
            return f"one word too many{self.example()}"
        is_data = "--data" in self.flags and Path(word).exists()
        return f"belongs to no option; {f'did you mean --data {word}?' if is_data else SEE_HELP}"

    def example(self) -> str:
        """The first command with positional arguments in the docstring of the options' module."""
        doc = sys.modules[self.options.__module__].__doc__ or ""
        found = re.search(r"^python \S+ [^-\s].*?(?=\s{3}|$)", doc, re.M)
        return f"; for example: {found[0]}" if found else ""


def read(options: type[T], argv: Sequence[str], default: T | None = None) -> T:
    """`default`, or the dataclass's defaults, changed by a command line: RUN --max-steps 5 --data=DIR --no-resume.

    --recipe.NAME VALUE .. becomes one of `recipe_values`: "NAME=VALUE ..". Raises ValueError for any other line.
    """
    syntax, values, recipe = Syntax.of(options), dict[str, Any](), dict[str, str]()
    left, loose = [_readable(word) for word in argv], list[str]()  # words to read, and those of positional arguments
    before: list[str] = []  # an option and its value
    while left:
        word = left.pop(0)
        flag, equals, attached = word.partition("=")
        attached = os.path.expanduser(attached)  # shells expand ~ only at the beginning of a word
        flag = flag.replace("_", "-")
        name = syntax.flags.get(flag)
        if word == "--":
            loose, left = loose + left, []
        elif not OPTION.match(word):
            if len(loose) == syntax.room:
                raise UserError(f"{word}: {syntax.about_surplus(word, before)}")
            loose.append(word)
        elif flag.startswith(RECIPE) and "recipe_values" in syntax.hints:
            before = [flag, *([attached] if equals else _take(left, None))]
            recipe[flag.removeprefix(RECIPE).replace("-", "_")] = shlex.join(before[1:])
        elif name is None:
            raise UserError(f"no option {word.partition('=')[0]}{syntax.like(flag)}")
        elif syntax.hints[name] is bool:
            if equals or (left and left[0].lower() in ("true", "false", "yes", "no")):
                given = word if equals else f"{word} {left[0]}"
                raise UserError(f"{given}: takes no value; {_flag(name)} is on, {_flag(f'no_{name}')} is off")
            values[name], before = flag == _flag(name), [word]
        else:
            missing = len([name for name in syntax.positional if name in syntax.needed]) - len(loose)
            count = _count(syntax.hints[name])
            before = [flag, *([attached] if equals else _take(left, count, missing))]
            if not before[1:] and (count or not getattr(options, name, ())):  # no values, in place of several, are none
                raise UserError(f"{flag}: needs a value, {_in_words(syntax.hints[name])}")
            values[name] = value_of(syntax.hints[name], before[1:], flag)
    for name in syntax.positional:
        count = _count(syntax.hints[name])
        taken, loose = loose[:count], [] if count is None else loose[count:]
        if taken:
            values[name] = value_of(syntax.hints[name], taken, name.upper())
    if loose:  # of those behind --
        raise UserError(f"{loose[0]}: {syntax.about_surplus(loose[0], [])}")
    if default is None and (absent := [name for name in syntax.needed if name not in values]):
        shown = absent[0].upper() if absent[0] in syntax.positional else _flag(absent[0])
        raise UserError(f"{shown} is missing: {texts(options)[absent[0]].rstrip('.')}{syntax.example()}")
    if recipe:
        recipe = dict(item.split("=", 1) for item in getattr(default, "recipe_values", ())) | recipe
        values["recipe_values"] = tuple(f"{name}={text}" for name, text in recipe.items())
    return options(**values) if default is None else dataclasses.replace(default, **values)


def value_of(hint: Any, words: Sequence[str], shown: str) -> Any:
    """The words as a value of this type. Raises ValueError, about the option `shown`, if they are none."""
    given = " ".join([shown, *(word or "''" for word in words)])
    if "" in words:
        otherwise = ", or leave the option out" if shown.startswith("--") else ""
        raise UserError(f"{given}: is empty; give {_in_words(hint)}{otherwise}")
    if "-" in words:
        raise UserError(f"{given}: neither stdin nor stdout is used; give {_in_words(hint)}")
    if Path in (hint, *get_args(hint)) and any(map(is_url, words)):
        raise UserError(f"{given}: is a URL; download it, and give the path of the file")
    for kind in sorted(_kinds(hint), key=lambda kind: kind is not NoneType):
        with contextlib.suppress(ValueError, KeyError):
            return _converted(kind, words)
    note = " below 1e18" if any(map(_is_huge, words)) else ""
    note += ", with spaces between them" if "," in given and _count(hint) != 1 else ""
    if int in _kinds(hint) and (named := re.fullmatch(r"[a-zA-Z_-]+(\d+)", words[0])):  # resnet50
        note = f"; did you mean {named[1]}?"
    raise UserError(f"{given}: must be {_in_words(hint)}{note}")


def texts(options: type) -> dict[str, str]:
    """The text below each option, as one line."""
    import docstring_parser  # tyro's, which imports it for --help alone too

    described = docstring_parser.parse_from_object(options).params
    return {option.arg_name: " ".join((option.description or "").split()) for option in described}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _readable(word: str) -> str:
    """Raise ValueError for a word that the system's encoding cannot represent."""
    try:
        word.encode()
    except UnicodeEncodeError:
        encoding = sys.getfilesystemencoding()
        raise UserError(f"{word!r}: is not {encoding}; set PYTHONUTF8=1, or rename the file or folder") from None
    return word


def _take(left: list[str], count: int | None, spare: int = 0) -> list[str]:
    """Take the `count` words of a value from the line, or for None all up to the next option or the `spare` last."""
    end = next((i for i, word in enumerate(left) if OPTION.match(word)), len(left))
    if count is not None:
        end = min(end, count)
    elif end == len(left):
        end = max(0, end - max(0, spare))
    taken, left[:] = left[:end], left[end:]
    return taken


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _count(hint: Any) -> int | None:
    """The number of words of a value, None for any number."""
    items = next((get_args(kind) for kind in _kinds(hint) if get_origin(kind) is tuple), (hint,))
    return None if Ellipsis in items else len(items)


def _in_words(hint: Any) -> str:
    """A type in words: "2 whole numbers", "a number or auto"."""
    if len(kinds := _kinds(hint)) > 1:
        return " or ".join(map(_in_words, kinds))
    if get_origin(hint) is tuple:
        first, *more = get_args(hint)
        return f"{NOUNS[first]}s" if Ellipsis in more else f"{1 + len(more)} {NOUNS[first]}s"
    if get_origin(hint) is Literal:
        return ", ".join(get_args(hint))
    return {NoneType: "None", bool: "True or False"}.get(hint) or f"a {NOUNS[hint]}"


def _is_huge(word: str) -> bool:
    """Whether a word is a number that torch may not hold, or nan."""
    try:
        return not abs(float(word)) < 1e18
    except ValueError:
        return False


def _converted(kind: Any, words: Sequence[str]) -> Any:
    """The words as a value of a type that is no union. Raises ValueError or KeyError if they are none."""
    if get_origin(kind) is tuple:
        items = get_args(kind)
        items = items[:1] * len(words) if Ellipsis in items else items
        return tuple(_converted(item, [word]) for item, word in zip(items, words, strict=True))
    [word] = words
    if kind in (int, float) and _is_huge(word):
        raise ValueError(word)
    if kind in NOUNS:
        return kind(word)
    choices: dict[Any, dict[str, Any]] = {NoneType: {"None": None}, bool: {"True": True, "False": False}}
    return choices.get(kind, {choice: choice for choice in get_args(kind)})[word]
