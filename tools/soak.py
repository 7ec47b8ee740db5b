"""Break trainings in every way that is known to happen, resume them, and compare them with undisturbed runs.

python tools/soak.py                                  all faults, 50 kills; about a quarter of an hour on two cores
python tools/soak.py --faults kill full-disk --kills 10 --output runs/soak

The subjects are a small Faster R-CNN (train_coco.py) and a small ResNet-18 (pretrain.py) on drawn images, on a CPU.
"""

import json
import random
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from resbackbone.cli.command import main_of, parse

import torch

from resbackbone.atomic import write_atomically
from resbackbone.checks import one_of
from resbackbone.tools.benchmarks.machine import describe
from resbackbone.tools.soaking.faults import FAULTS
from resbackbone.tools.soaking.subject import COMMANDS, Subject


@dataclass(frozen=True)
class Options:
    """Break trainings, resume them, and compare them with undisturbed runs."""

    faults: tuple[str, ...] = ()
    """Of kill, terminate, damage, full-disk, restart, bad-rank, two-nodes and evaluation. Default: all."""
    kills: int = 50
    """Number of kills, half of them in a detector's training and half in a classifier's; other faults scale with it."""
    output: Path = Path("runs/soak")
    """Folder for the runs, reliability.json and reliability.md. Its content is replaced."""
    seed: int = 0
    """Of the moments at which faults happen."""


def main(argv: list[str] | None = None) -> None:
    """Subjects -> faults -> a table of what was injected and what was lost; exit status 1 if anything was."""
    options = parse(Options, argv)
    for name in options.faults:
        one_of("fault", name, FAULTS)
    shutil.rmtree(options.output, ignore_errors=True)
    options.output.mkdir(parents=True)
    moments = random.Random(options.seed)
    detector, classifier = (Subject(name, options.output) for name in COMMANDS)
    rows: list[dict] = []
    for name in options.faults or FAULTS:
        title, inject = FAULTS[name]
        times = max(1, options.kills // (2 if name == "kill" else 10))
        for subject in (detector, classifier) if name in ("kill", "terminate", "damage") else (detector,):
            try:
                outcome, lost = inject(subject, times, moments)
            except RuntimeError as error:
                outcome, lost = "not finished", [str(error)]
            rows.append({"fault": title, "subject": subject.name, "times": times, "outcome": outcome, "lost": lost})
            print(f"{name}, {subject.name}: {outcome}; lost: {lost or 'nothing'}", flush=True)
            machine = describe("cpu", torch.get_num_threads())
            content = {**machine, "kills": options.kills, "seed": options.seed, "rows": rows}
            write_atomically(options.output / "reliability.json", json.dumps(content, indent=2) + "\n")
            write_atomically(options.output / "reliability.md", table(rows))
    print(table(rows))
    if any(row["lost"] for row in rows):
        sys.exit(1)


def table(rows: Sequence[dict]) -> str:
    """A Markdown table, a row for each fault and subject."""
    lines = ["| injected | into | times | what happened | lost |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        cells = [str(row[name]) for name in ("fault", "subject", "times", "outcome")]
        lines.append(f"| {' | '.join(cells)} | {'; '.join(row['lost']) or 'nothing'} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main_of(main)
