"""What a person reads on the terminal when a training is over."""

from collections.abc import Mapping
from pathlib import Path

from rich.table import Table

from resbackbone.cli.command import duration, progress_console
from resbackbone.report.run import RunLog


def print_summary(folder: Path, results: Mapping[str, str], files: Mapping[str, str]) -> None:
    """Print what the run in `folder` did, from its metrics, with its `results` and the `files` that it wrote, by name.

    Files and folders are named as they lie in `folder`; one that is not there is left out. A run that was resumed
    counts from its first update.
    """
    table = Table(title="Summary", show_header=False, title_justify="left")
    for name, value in {**_facts(RunLog(folder)), **results}.items():
        table.add_row(name, value)
    progress_console.print(table)
    for name, path in files.items():  # below the table, which would cut a long path
        if (folder / path).exists():
            progress_console.print(f"{name}: {folder / path}")


def _facts(log: RunLog) -> dict[str, str]:
    if not log.train:
        return {"updates": "none in this run's metrics"}
    seconds = log.total("seconds")
    images = sum(updates * line["images_per_second"] * line["seconds"] for updates, line in log.spans())
    evaluating = sum(line["seconds"] for line in log.evaluations)
    memory = [line["memory_mib"] for line in log.train if "memory_mib" in line]  # Windows does not tell
    return {
        "updates": f"{log.train[-1]['step']:,}",
        "images": f"{images:,.0f}",
        "time": f"{duration(seconds)} of updates, {duration(evaluating)} of evaluation",
        "images a second": f"{images / seconds:.1f}",
        "waiting for data": f"{100 * log.total('data_seconds') / seconds:.0f}% of the updates' time",
        "memory": f"{max(memory):,.0f} MiB at most" if memory else "unknown",
        "loss": f"{log.train[-1]['loss']:.3f} in the last {log.spans()[-1][0]} updates",
    }
