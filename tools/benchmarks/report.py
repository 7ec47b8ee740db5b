"""The figures of a run as Markdown tables, and what was not measured and why."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from resbackbone.tools.benchmarks.contest import MATRIX_PRODUCT, OWN, package_of


class Row(NamedTuple):
    """The times of one contender in one contest; None if it cannot be computed."""

    name: str
    seconds: float  # of a run
    images_per_second: float | None
    ratio: list[float] | None  # quartiles of its time over the reference's, round by round; below 1 is faster
    share: float | None  # of the rate at which the machine multiplies matrices


def reference_of(result: dict) -> str | None:
    """The contender whose times the ratios divide by: the contest's own, or the fastest of the other packages."""
    times = result["seconds"]
    if result["reference"] in times:
        return result["reference"]
    others = [name for name in result["names"] if times.get(name) and package_of(name) != OWN]
    return min(others, key=lambda name: statistics.median(times[name]), default=None)


def rows_of(result: dict) -> list[Row]:
    """A row for each contender that was timed, in the contest's order."""
    times, items, reference = result["seconds"], result["items"], reference_of(result)
    an_item = {name: [s / items.get(name, 1) for s in times[name]] for name in result["names"] if times.get(name)}
    rows = []
    for name, each in an_item.items():
        ratio = share = None
        if reference is not None:
            ratios = [own / other for own, other in zip(each, an_item[reference], strict=True)]
            ratio = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else 3 * ratios
        flops = result["flops"].get(name) or result["flops"].get(package_of(name))  # fused, the work is the same
        if flops and MATRIX_PRODUCT in times:
            rates = [result["matrix_product_flops"] / seconds for seconds in times[MATRIX_PRODUCT]]
            share = statistics.median(flops / s / rate for s, rate in zip(times[name], rates, strict=True))
        images_per_second = 1 / statistics.median(each) if items else None
        rows.append(Row(name, statistics.median(times[name]), images_per_second, ratio, share))
    return rows


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{float(f'{value:.3g}'):f}".rstrip("0").rstrip(".")


def spread(quartiles: list[float]) -> str:
    low, median, high = map(number, quartiles)
    return median if quartiles[0] == quartiles[2] else f"{median} ({low} .. {high})"


def settings_of(result: dict) -> str:
    """Mode and batch size, such as "fp32, 2 images"."""
    size = result.get("batch_size")
    return ", ".join(filter(None, [result["mode"], size and f"{size} image{'s' * (size > 1)}"]))


def label_of(result: dict) -> str:
    return ", ".join(filter(None, [result["job"], settings_of(result)]))


def not_measured(result: dict, kinds: Sequence[str] = ("left_out", "failed")) -> list[str]:
    """The contenders without times, a line for each reason."""
    names_by_reason: dict[str, list[str]] = {}
    for name, reason in ((name, reason) for kind in kinds for name, reason in result.get(kind, {}).items()):
        names_by_reason.setdefault(reason, []).append(name)
    return [f"{label_of(result)}: {', '.join(names)}: {reason}" for reason, names in names_by_reason.items()]


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
            lines += [f"### {title}", "", *job_table(results), "", *map(rounds_of, results), ""]
    remarks = [*content["skipped"], *(line for result in content["contests"] for line in not_measured(result))]
    return "\n".join([*lines, *(f"Not measured: {line}." for line in remarks)]).rstrip() + "\n"


def rounds_of(result: dict) -> str:
    """How many rounds there were, and how far outputs differ."""
    count = len(next(filter(None, result["seconds"].values())))
    line = f"{count} round{'s' * (count != 1)}"
    if result.get("thrown_away"):  # an earlier version repeated rounds in which other processes took over 6%
        line += f", {result['thrown_away']} more thrown away"
    if result["difference"]:
        most = max(result["difference"].values())
        line += f"; outputs differ by at most {most:.1g} ({result['tolerance']:g} accepted)"
    return f"{': '.join(filter(None, [settings_of(result), line]))}."


def job_table(results: list[dict]) -> list[str]:
    """One job's table, without empty columns."""
    cells = []
    several_sizes = len({result.get("batch_size") for result in results}) > 1
    for result in results:
        for row in rows_of(result):
            unit, factor = ("s", 1) if row.seconds >= 1 else ("ms", 1000)
            ratio = "1" if row.name == reference_of(result) else spread(row.ratio) if row.ratio else ""
            cells.append(
                {
                    "images": str(result["batch_size"]) if several_sizes else "",
                    "mode": result["mode"],
                    "package": f"**{row.name}**" if package_of(row.name) == OWN else row.name,
                    "a run": f"{number(factor * row.seconds)} {unit}",
                    "images/s": number(row.images_per_second) if row.images_per_second else "",
                    "ratio of times (quartiles)": ratio,
                    "saved for backward, MiB": mib(result["saved_bytes"].get(row.name)),
                    "peak memory, MiB": mib(result["peak_bytes"].get(row.name)),
                    "held, MiB": mib(result["held_bytes"].get(row.name)) if result["job"] == "annotations" else "",
                    "of torch.mm's rate": f"{100 * row.share:.0f}%" if row.share else "",
                }
            )
    columns = [name for name in cells[0] if any(row[name] for row in cells)]
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    return lines + [f"| {' | '.join(row[name] for name in columns)} |" for row in cells]


def mib(count: int | None) -> str:
    return f"{count / 2**20:.0f}" if count else ""
