"""Compare runs: their results and cost, the options that differ, and their curves in common charts.

python tools/compare_runs.py runs/mine runs/mine-2
python tools/compare_runs.py runs --output compared               all runs in a folder

Prints a table and writes compare.html, one page that works without a network. Runs of train_coco.py, pretrain.py and
train_cifar10.py can be compared while they are being trained, too.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resbackbone.cli.command import Auto, console, main_of, parse
from resbackbone.cli.errors import from_option

import tyro

from resbackbone.atomic import write_atomically
from resbackbone.checks import UserError, sibling
from resbackbone.report.charts import line_chart, one_decimal
from resbackbone.report.numbers import duration, finite, number
from resbackbone.report.page import Cell, Section, fraction, macros, page, short, table
from resbackbone.report.run import MEMORY, RunLog, in_words

RESULTS = {"AP": "AP", "AP50": "AP50", "AP75": "AP75", "top1": "top-1", "top5": "top-5", "error": "error"}
NO_SETTING = ("effective", "command", "resumed")  # of config.yaml; these differ between equal runs


@dataclass(frozen=True)
class Options:
    """Compare runs of training commands."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """The folders of two runs or more, or folders that hold them."""
    output: Auto[Path] = None
    """Folder for compare.html; an existing one is replaced. Default: the folder that holds the first run."""
    quiet: bool = False
    """Print only warnings and the page's path."""


def main(argv: list[str] | None = None) -> None:
    """The folders of runs -> a table, and a page with it and with charts."""
    options = parse(Options, argv)
    folders = runs_in(options.runs)
    try:
        common = os.path.commonpath(folders)
        logs = {os.path.relpath(folder, common): RunLog(folder) for folder in folders}
    except ValueError:  # on several drives of Windows
        logs = {str(folder): RunLog(folder) for folder in folders}
    header, rows = results_of(logs)
    if not options.quiet:
        shown = [[cell.shown if isinstance(cell, Cell) else str(cell) for cell in row] for row in [header, *rows]]
        widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
        for row in shown:
            console.print("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]))
    notes, words = differences_in_data(logs), macros("compare.html")
    for note in notes:
        console.print(f"note: {note}")
    sections = [
        Section("Results", words.results(table(header, rows, sortable=True), notes)),
        Section("Curves", words.curves(charts(logs))),
        Section("Options that differ", words.settings(["option", *map(short, logs)], settings_that_differ(logs))),
    ]
    target = (options.output or folders[0].parent) / "compare.html"
    with from_option("--output"):
        target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, page(f"{len(logs)} runs", ", ".join(logs), sections))
    console.print(f"written: {target}")


def runs_in(given: Iterable[Path]) -> list[Path]:
    """The folders of runs that are given, or that are in folders that are given. Raises ValueError for fewer than two.

    Among several, files and folders without a run are passed over, as `runs/*` has them.
    """
    found: dict[Path, None] = {}
    for folder in given:
        if not folder.exists():
            raise UserError(f"{folder}: no such folder{sibling(folder)}; give the folders of runs")
        own = [folder / "metrics.jsonl"] if (folder / "metrics.jsonl").is_file() else folder.glob("*/metrics.jsonl")
        found |= dict.fromkeys(file.parent.resolve() for file in sorted(own))
    if len(found) < 2:
        few = f"only {list(found)[0]} is a run" if found else "there is no run (no metrics.jsonl)"
        raise UserError(f"{' '.join(map(str, given))}: {few}; give the folders of two runs or more")
    return list(found)


def results_of(logs: dict[str, RunLog]) -> tuple[list[str], list[list]]:
    """A table's header, and its row for each run: the last evaluation's results, in percent, and the cost."""
    last = {name: (log.evaluations or [{}])[-1] for name, log in logs.items()}
    measured = [name for name in RESULTS if any(name in of for of in last.values())]
    header = ["run", *(RESULTS[name] for name in measured), "after", "time", "images/s", "parameters", "memory, GiB"]
    rows: list[list] = []
    for name, log in logs.items():
        facts, parameters = log.facts(), log.effective.get("parameters")
        memory, step = facts.get(MEMORY), last[name].get("step")
        cells = [fraction(finite(last[name].get(metric))) for metric in measured]
        cells += [Cell(number(step), step), Cell(duration(log.seconds()), log.seconds())]
        cells.append(Cell(number(facts.get("images per second"), 3), facts.get("images per second")))
        cells.append(Cell("n/a" if parameters is None else f"{parameters / 1e6:.1f} M", parameters))
        cells.append(Cell("n/a" if memory is None else f"{memory / 1024:.1f}", memory))
        rows.append([short(name), *cells])
    return header, rows


def differences_in_data(logs: dict[str, RunLog]) -> list[str]:
    """What forbids comparing the results."""
    notes = []
    trained = {tuple(v for k, v in log.effective.items() if k.endswith("sha256")) for log in logs.values()}
    if len(trained - {()}) > 1:
        notes.append("the runs were trained on different data")
    tested = {log.effective["validation_images"] for log in logs.values() if "validation_images" in log.effective}
    if len(tested) > 1:
        counts = ", ".join(map(str, sorted(tested)))
        notes.append(f"the runs were evaluated on different images ({counts} of them): the results do not compare")
    return notes


def settings_that_differ(logs: dict[str, RunLog]) -> list[list[str]]:
    """A row for each option, and what came of it, that is not the same in all runs."""
    settings: list[dict[str, Any]] = [{**log.config, **log.effective} for log in logs.values()]
    names = [name for name in dict.fromkeys(name for of in settings for name in of) if name not in NO_SETTING]
    rows = [[name, *(in_words(of.get(name)) for of in settings)] for name in names]
    return [row for row in rows if len(set(row[1:])) > 1]


def charts(logs: dict[str, RunLog]) -> list:
    """The results, losses and learning rates of all runs over their updates."""
    last = [log.evaluations[-1] for log in logs.values() if log.evaluations]
    measured = [name for name in ("AP", "AP50", "top1", "error") if any(name in of for of in last)]
    found = []
    for name in measured:
        curves = {run: log.curve(name, evaluations=True, scale=100) for run, log in logs.items()}
        found.append(line_chart(f"{RESULTS[name]}, percent", curves, x="updates", show=one_decimal))
    for title, name in (("Loss", "loss"), ("Validation loss", "loss"), ("Learning rate", "lr")):
        curves = {run: log.curve(name, evaluations=title.startswith("Validation")) for run, log in logs.items()}
        found += [line_chart(title, curves, x="updates")] if any(curves.values()) else []
    return found


def run() -> None:
    main_of(main)


if __name__ == "__main__":
    run()
