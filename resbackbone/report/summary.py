"""The summary that a command prints at the end of a training."""

from collections.abc import Mapping
from pathlib import Path

from resbackbone.report.numbers import duration
from resbackbone.report.run import RunLog


def summary(folder: Path, results: Mapping[str, str], files: Mapping[str, str]) -> str:
    """What the run in `folder` did, from its metrics, with its `results`, and where those of its `files` are.

    `files` are paths in `folder` by name; missing ones are left out. A resumed run counts from its first update.
    """
    facts = {**_facts(RunLog(folder)), **results}
    width = max(map(len, facts))
    lines = ["Summary", *(f"  {name:{width}}  {value}" for name, value in facts.items())]
    lines += [f"{name}: {folder / path}" for name, path in files.items() if (folder / path).exists()]
    return "\n".join(lines)


def _facts(log: RunLog) -> dict[str, str]:
    if not log.spans():
        return {"updates": "none in this run's metrics"}
    seconds = log.total("seconds")
    images = sum(updates * line["images_per_second"] * line["seconds"] for updates, line in log.spans())
    evaluating = sum(line["seconds"] for line in log.evaluations)
    memory = [line["memory_mib"] for line in log.train if "memory_mib" in line]  # not on Windows
    return {
        "updates": f"{log.train[-1]['step']:,}",
        "images": f"{images:,.0f}",
        "time": f"{duration(seconds)} of updates, {duration(evaluating)} of evaluation",
        "images per second": f"{images / seconds:.1f}",
        "waiting for data": f"{100 * log.total('data_seconds') / seconds:.0f}% of the updates' time",
        "memory": f"{max(memory):,.0f} MiB at most" if memory else "unknown",
        "loss": f"{log.train[-1]['loss']:.3f} in the last {log.spans()[-1][0]} updates",
    }
