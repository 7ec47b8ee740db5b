"""Break trainings in every way that is known to happen, go on with them, and compare with runs that were left alone.

python tools/soak.py                                  all faults, 50 kills; about a quarter of an hour on two cores
python tools/soak.py --faults kill full-disk --kills 10 --output runs/soak
The subjects are a small Faster R-CNN (train_coco.py) and a small ResNet-18 (pretrain.py) on drawn images, on a CPU.
"""

import json
import random
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from resbackbone.cli.command import console, main_of, parse, progress_console

import torch

from resbackbone.atomic import write_atomically
from resbackbone.checks import one_of
from resbackbone.tools.benchmarks.machine import describe
from resbackbone.tools.soaking.faults import FAULTS, Row
from resbackbone.tools.soaking.subject import COMMANDS, Subject


@dataclass(frozen=True)
class Options:
    """Break trainings, go on with them, and compare them with runs that were left alone."""

    faults: tuple[str, ...] = ()
    """Of kill, terminate, damage, full-disk, restart, bad-rank, two-nodes and evaluation.
    Default: all."""
    kills: int = 50
    """How many kills, half of a detector's training and half of a classifier's; the other faults scale with it."""
    output: Path = Path("runs/soak")
    """Folder for the runs, reliability.json and reliability.md; what is there is replaced."""
    seed: int = 0
    """Of the moments."""
    quiet: bool = False
    """Print warnings, errors and the table alone."""


def main(argv: list[str] | None = None) -> None:
    """Subjects -> faults -> a table of what was injected and what was lost; exit status 1 if anything was."""
    options = parse(Options, argv)
    for name in options.faults:
        one_of("fault", name, FAULTS)
    shutil.rmtree(options.output, ignore_errors=True)
    options.output.mkdir(parents=True)
    moments = random.Random(options.seed)
    detector, classifier = (Subject(name, options.output) for name in COMMANDS)
    few = max(1, options.kills // 10)
    rows = []
    for name in options.faults or FAULTS:
        began = time.monotonic()
        for subject in (detector, classifier) if name in ("kill", "terminate", "damage") else (detector,):
            times = max(1, options.kills // 2) if name == "kill" else few
            try:
                rows.append(FAULTS[name](subject, times, moments))
            except RuntimeError as error:  # it hung, or could not be gone on with
                rows.append(Row(name, subject.name, times, "not done", [str(error)]))
            progress_console.print(f"{name}, {subject.name}: {rows[-1].outcome}; lost: {rows[-1].lost or 'nothing'}")
            content = {**describe("cpu", torch.get_num_threads()), "kills": options.kills, "seed": options.seed}
            content["rows"] = [vars(row) for row in rows]
            write_atomically(options.output / "reliability.json", json.dumps(content, indent=2) + "\n")
            write_atomically(options.output / "reliability.md", table(rows))
        progress_console.print(f"  {time.monotonic() - began:.0f} s")
    console.print(table(rows))
    if any(row.lost for row in rows):
        sys.exit(1)


def table(rows: Sequence[Row]) -> str:
    """A Markdown table, a row for each fault and subject."""
    lines = ["| injected | into | times | what happened | lost |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        lost = "; ".join(row.lost) or "nothing"
        lines.append(f"| {row.fault} | {row.subject} | {row.times} | {row.outcome} | {lost} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main_of(main)
