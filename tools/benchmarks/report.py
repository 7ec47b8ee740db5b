"""The figures of a run, from its rounds: Markdown tables, a plot, and what was not measured and why."""

import importlib.util
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from resbackbone.atomic import write_atomically
from resbackbone.tools.benchmarks.contest import OWN, is_own, package_of
from resbackbone.tools.benchmarks.rounds import MATRIX_PRODUCT


class Spread(NamedTuple):
    """Median and quartiles of the rounds."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(*(statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * list(values)))

    def __str__(self) -> str:
        spread = "" if self.low == self.high else f" ({number(self.low)} .. {number(self.high)})"
        return number(self.median) + spread


class Row(NamedTuple):
    """The times of one contender in one contest. None stands for what cannot be computed."""

    name: str
    seconds: float  # of a run
    images_per_second: float | None
    ratio: Spread | None  # of its time to the reference's, round by round; below 1 is faster
    share: float | None  # of the rate at which the machine multiplies matrices


def reference_of(result: dict) -> str | None:
    """Whose times the ratios divide by: the contest's own choice, or the fastest of the other packages, if any."""
    times = result["seconds"]
    if result["reference"] in times:
        return result["reference"]
    others = [name for name in result["names"] if times.get(name) and not is_own(name)]
    return min(others, key=lambda name: statistics.median(times[name]), default=None)


def rows_of(result: dict) -> list[Row]:
    """A row for each contender that was timed, in the contest's order."""
    times, items, reference = result["seconds"], result["items"], reference_of(result)
    an_item = {name: [s / items.get(name, 1) for s in times[name]] for name in result["names"] if times.get(name)}
    rows = []
    for name, each in an_item.items():
        ratio = share = None
        if reference is not None:
            ratio = Spread.of([own / other for own, other in zip(each, an_item[reference], strict=True)])
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


def time_of(seconds: float) -> str:
    return f"{number(seconds)} s" if seconds >= 1 else f"{number(1000 * seconds)} ms"


def settings_of(result: dict) -> str:
    """Mode and batch size as far as the contest has them, such as "fp32, 2 images"."""
    size = result.get("batch_size")
    return ", ".join(filter(None, [result["mode"], size and f"{size} image{'s' * (size > 1)}"]))


def label_of(result: dict) -> str:
    return ", ".join(filter(None, [result["job"], settings_of(result)]))


def remarks_on(result: dict, kinds: Sequence[str] = ("left_out", "failed")) -> list[str]:
    """What was not measured of a contest and why, a line for each reason."""
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
    remarks = [*content["skipped"], *(line for result in content["contests"] for line in remarks_on(result))]
    return "\n".join([*lines, *(f"Not measured: {line}." for line in remarks)]).rstrip() + "\n"


def rounds_of(result: dict) -> str:
    """How often a contest was measured, and how far its outputs differ."""
    count = len(next(filter(None, result["seconds"].values())))
    line = f"{count} round{'s' * (count != 1)}"
    if result["thrown_away"]:
        line += f", {result['thrown_away']} more thrown away"
    if result["difference"]:
        most = max(result["difference"].values())
        line += f"; outputs differ by at most {most:.1g} ({result['tolerance']:g} accepted)"
    return f"{': '.join(filter(None, [settings_of(result), line]))}."


def job_table(results: list[dict]) -> list[str]:
    """The lines of one job's table, without columns that have no figure."""
    cells = []
    several_sizes = len({result.get("batch_size") for result in results}) > 1
    for result in results:
        for row in rows_of(result):
            reference = row.name == reference_of(result)
            cells.append(
                {
                    "images": str(result["batch_size"]) if several_sizes else "",
                    "mode": result["mode"],
                    "package": f"**{row.name}**" if is_own(row.name) else row.name,
                    "a run": time_of(row.seconds),
                    "images/s": number(row.images_per_second) if row.images_per_second else "",
                    "ratio of times (quartiles)": "1" if reference else str(row.ratio or ""),
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


def draw(content: dict, path: Path) -> None:
    """Plot the ratios of times with their quartiles as `path`; nothing without ratios, or without matplotlib."""
    drawn = [(result, rows) for result in content["contests"] if (rows := [r for r in rows_of(result) if r.ratio])]
    if not drawn or importlib.util.find_spec("matplotlib") is None:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = dict.fromkeys(package_of(row.name) for _, rows in drawn for row in rows if not is_own(row.name))
    colours = {OWN: "black"} | {name: f"C{i}" for i, name in enumerate(names)}
    figure, axis = pyplot.subplots(figsize=(8, 1.5 + 0.4 * len(drawn)), layout="constrained")
    handles = {}
    for height, (_, rows) in enumerate(drawn):
        for row in rows:
            name = package_of(row.name)
            low, median, high = row.ratio
            shift, fill = (0, "full") if row.name == name else (0.15, "none")
            bar, shape = [[median - low], [high - median]], "D" if is_own(name) else "o"
            handle = axis.errorbar(median, height + shift, xerr=bar, color=colours[name], fmt=shape, fillstyle=fill)
            handles.setdefault(name, handle)
    axis.axvline(1, color="grey", linewidth=0.8)
    axis.set_xscale("log")
    axis.set_yticks(range(len(drawn)), [label_of(result) for result, _ in drawn])
    axis.invert_yaxis()
    axis.grid(alpha=0.3, axis="x")
    axis.set_xlabel("time / time of the fastest other package: left is faster\n(hollow: run in another way)")
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def write_json(content: dict, path: Path) -> None:
    write_atomically(path, json.dumps(content, indent=1) + "\n")


def write_tables(content: dict, path: Path) -> None:
    """Write the tables and the plot beside `path`, as .md and .png."""
    write_atomically(path.with_suffix(".md"), markdown(content))
    draw(content, path.with_suffix(".png"))
