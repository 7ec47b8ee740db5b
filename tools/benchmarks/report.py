"""The figures of a run as Markdown tables, and what was not measured and why."""

import statistics
from typing import NamedTuple

from resbackbone.tools.benchmarks.contest import OWN, package_of
from resbackbone.tools.benchmarks.runtimes import RUNTIMES


class Row(NamedTuple):
    """The times of one contender in one contest."""

    name: str
    seconds: float  # of a run
    ratio: list[float]  # quartiles of its time over the reference's, round by round; empty if there is none


def reference_of(result: dict) -> str | None:
    """The contender whose times the ratios divide by: the fastest of the other packages, runtimes not among them."""
    times = result["seconds"]
    others = [name for name in result["names"] if times.get(name) and package_of(name) not in (OWN, *RUNTIMES)]
    return min(others, key=lambda name: statistics.median(times[name]), default=None)


def rows_of(result: dict) -> list[Row]:
    """A row for each contender that was timed, in the contest's order."""
    times, rows = result["seconds"], []
    others = times.get(reference_of(result), [])
    for name in filter(times.get, result["names"]):
        ratios = [own / other for own, other in zip(times[name], others, strict=bool(others))]
        quartiles = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else 3 * ratios
        rows.append(Row(name, statistics.median(times[name]), quartiles))
    return rows


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{float(f'{value:.3g}'):f}".rstrip("0").rstrip(".")


def label_of(result: dict) -> str:
    """Such as "training, fp32, 2 images"."""
    size = result["batch_size"]
    return f"{result['job']}, {result['mode']}, {size} image{'s' * (size > 1)}"


def failures_of(result: dict) -> list[str]:
    """The contenders that failed, and why."""
    return [f"{label_of(result)}: {name}: {reason}" for name, reason in result["failed"].items()]


def markdown(content: dict) -> str:
    """All of a benchmark.json as Markdown: the machine, a table for each job, and what was not measured."""
    machine, versions = content["hardware"], content["versions"]
    gpu = f" {machine['gpu']}, CUDA {machine['cuda']}, cuDNN {machine['cudnn']}." if "gpu" in machine else ""
    lines = [
        f"Measured {content['date']}, commit {content['commit'] or 'unknown'}, with `{content['command']}`.",
        f"{machine['cpu']}, {machine['cores']} cores ({', '.join(machine['instructions'])}), {machine['threads']} "
        f"threads, {machine['memory_gib']} GiB, {machine['system']}.{gpu}",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
        "",
    ]
    for job, title in content["jobs"].items():
        results = [result for result in content["contests"] if result["job"] == job and rows_of(result)]
        if results:
            lines += [f"### {title}", "", *table(results), "", *map(rounds_of, results), ""]
    remarks = [*content["skipped"], *(line for result in content["contests"] for line in failures_of(result))]
    return "\n".join([*lines, *(f"Not measured: {line}." for line in remarks)]).rstrip() + "\n"


def rounds_of(result: dict) -> str:
    """How many rounds there were, and how far outputs differ."""
    count, most = len(next(iter(result["seconds"].values()))), max(result["difference"].values())
    rounds = f"{label_of(result)}: {count} round{'s' * (count != 1)}"
    return f"{rounds}; outputs differ by at most {most:.1g} ({result['tolerance']:g} accepted)."


def table(results: list[dict]) -> list[str]:
    """One job's table, without empty columns."""
    cells = []
    for result in results:
        reference = reference_of(result)
        for row in rows_of(result):
            unit, factor = ("s", 1) if row.seconds >= 1 else ("ms", 1000)
            cells.append(
                {
                    "images": str(result["batch_size"]),
                    "mode": result["mode"],
                    "package": f"**{row.name}**" if package_of(row.name) == OWN else row.name,
                    "a run": f"{number(factor * row.seconds)} {unit}",
                    "images/s": number(result["batch_size"] / row.seconds),
                    "ratio of times (quartiles)": "1" if row.name == reference else spread(row.ratio),
                    "saved for backward, MiB": mib(result["saved_bytes"].get(row.name)),
                    "peak memory, MiB": mib(result["peak_bytes"].get(row.name)),
                }
            )
    columns = [name for name in cells[0] if any(row[name] for row in cells)]
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    return lines + [f"| {' | '.join(row[name] for name in columns)} |" for row in cells]


def spread(quartiles: list[float]) -> str:
    if not quartiles:
        return ""
    low, median, high = map(number, quartiles)
    return median if quartiles[0] == quartiles[2] else f"{median} ({low} .. {high})"


def mib(count: int | None) -> str:
    return f"{count / 2**20:.0f}" if count else ""
