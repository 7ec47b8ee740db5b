"""What commands that train have in common in their options: counts, the run's folder, going on with a run."""

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import TypeVar

from resbackbone.training.command import console, from_config, parse
from resbackbone.training.run import latest_folder, new_folder

T = TypeVar("T")


def check_counts(options, *, least: int, names: Collection[str]) -> None:
    """ValueError for the first of these options that is below `least`; None is not."""
    for name in names:
        if getattr(options, name) is not None and getattr(options, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)}: {least} or more is wanted")


def claim_folder(output: Path | None, *, default: Path, resume: bool) -> Path:
    """Where the run is written: --output, which may hold a run only if that is resumed, or a new `default`."""
    if output is None:
        return new_folder(default)
    if not resume and (output / "config.yaml").exists():
        raise ValueError(f"--output {output} holds a run already; --resume goes on with it")
    return output


def resumed(options: T, argv: list[str] | None, *, default: Path, may_differ: Collection[str]) -> T:
    """The options of the run that is resumed, which flags may not contradict; those given if there is no such run.

    The run is the one in --output, or the latest of the folder `default`. `may_differ` names the options that a flag
    may change; ValueError for any other. What the run left to be chosen is left so.
    """
    folder = options.output or latest_folder(default)
    if not (folder / "config.yaml").is_file():
        console.print(f"nothing to resume in {folder}: starting at step 0")
        return dataclasses.replace(options, output=folder)
    saved = from_config(type(options), folder / "config.yaml")
    options = parse(type(options), argv, default=saved)
    for name in sorted({field.name for field in dataclasses.fields(options)} - set(may_differ)):
        if (asked := getattr(options, name)) != (had := getattr(saved, name)):
            raise ValueError(
                f"--{name.replace('_', '-')} {asked}: the run in {folder} was made with {had}; leave the option out to "
                "resume that run, or give another --output to start anew"
            )
    return dataclasses.replace(options, output=folder)
