"""What was measured, told: figures, Markdown tables, a table on the terminal, a plot."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
from rich import box
from rich.table import Table

from benchmarks.contest import MATRIX_PRODUCT, OWN
from resbackbone.atomic import write_atomically

MIB = 2**20


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
    """One contender of one contest. Times are of a run; None is what was not measured."""

    name: str
    seconds: float
    images_per_second: float | None
    ratio: Spread | None  # of its time to the reference's, round by round; below 1 is faster
    share: float | None  # of the machine's own rate of matrix products
    saved: int | None
    peak: int | None
    held: int | None


def is_own(name: str) -> bool:
    return name.split(",")[0] == OWN


def reference_of(result: dict) -> str | None:
    """Whom ratios are to: the contest's own choice, or the fastest of the other packages; None if there is none."""
    times = result["seconds"]
    if result["reference"] in times:
        return result["reference"]
    others = [name for name in times if name != MATRIX_PRODUCT and not is_own(name)]
    return min(others, key=lambda name: statistics.median(times[name]), default=None)


def rows_of(result: dict) -> list[Row]:
    """A row for each contender that was timed, in the contest's order."""
    times, rows = result["seconds"], []
    items = result["items"]
    reference = reference_of(result)
    for name in (name for name in result["names"] if times.get(name)):
        each = [seconds / items.get(name, 1) for seconds in times[name]]
        ratio = share = None
        if reference is not None:
            base = [seconds / items.get(reference, 1) for seconds in times[reference]]
            ratio = Spread.of([own / other for own, other in zip(each, base, strict=True)])
        flops = result["flops"].get(name) or result["flops"].get(name.split(",")[0])
        if flops and MATRIX_PRODUCT in times:
            products = times[MATRIX_PRODUCT]
            most = result["matrix_product_flops"]
            share = statistics.median(flops / t / (most / p) for t, p in zip(times[name], products, strict=True))
        rows.append(
            Row(
                name,
                statistics.median(times[name]),
                1 / statistics.median(each) if items else None,
                ratio,
                share,
                result["saved_bytes"].get(name),
                result["peak_bytes"].get(name),
                result["held_bytes"].get(name),
            )
        )
    return rows


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    digits = f"{value:.3g}"
    return (
        f"{float(digits):.0f}"
        if "e" in digits and value > 1
        else f"{value:.6f}".rstrip("0")
        if "e" in digits
        else digits
    )


def time_of(seconds: float) -> str:
    return f"{number(seconds)} s" if seconds >= 1 else f"{number(1000 * seconds)} ms"


def markdown(content: dict) -> str:
    """All of a benchmark.json as Markdown: on what it was measured, then a table for each job."""
    machine, versions = content["hardware"], content["versions"]
    lines = [
        f"Measured {content['date']}, commit {content['commit'] or 'unknown'}, with `{content['command']}`.",
        f"{machine['cpu']}, {machine['cores']} cores ({', '.join(machine['instructions'])}), {machine['threads']} "
        f"threads, {machine['memory_gib']} GiB, {machine['system']}."
        + (f" {machine['gpu']}, CUDA {machine['cuda']}, cuDNN {machine['cudnn']}, " if "gpu" in machine else "")
        + (f"TF32 in {tf32(machine['tf32'])}." if "gpu" in machine else ""),
        "Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
        "",
    ]
    for job, title in content["jobs"].items():
        results = [result for result in content["contests"] if result["job"] == job and result["seconds"]]
        if not results:
            continue
        lines += [f"### {title}", "", *job_table(results), ""]
        lines += [f"{mode_of(result)}{rounds_of(result)}." for result in results] + [""]
    lines += [f"Not measured: {line}." for line in content["skipped"]]
    lines += [
        f"{r['job']}{', ' + r['mode'] if r['mode'] else ''}: {r['skipped']}."
        for r in content["contests"]
        if r["skipped"]
    ]
    return "\n".join(lines).rstrip() + "\n"


def tf32(switches: dict) -> str:
    return " and ".join(name for name, on in switches.items() if on) or "nothing"


def mode_of(result: dict) -> str:
    return f"{result['mode']}: " if result["mode"] else ""


def rounds_of(result: dict) -> str:
    """How often it was measured and how equal the outputs are."""
    count = len(next(iter(result["seconds"].values())))
    line = f"{count} round{'s' * (count != 1)}"
    if result["thrown_away"]:
        line += f", {result['thrown_away']} more thrown away"
    if result["difference"]:
        line += (
            f"; outputs differ by at most {max(result['difference'].values()):.1g} ({result['tolerance']:g} accepted)"
        )
    return line


def job_table(results: list[dict]) -> list[str]:
    """The lines of one job's table; columns without a figure are left out."""
    cells = []
    for result in results:
        reference = reference_of(result)
        for row in rows_of(result):
            cells.append(
                {
                    "mode": result["mode"],
                    "package": f"**{row.name}**" if is_own(row.name) else row.name,
                    "a run": time_of(row.seconds),
                    "images/s": "" if row.images_per_second is None else number(row.images_per_second),
                    "ratio of times (quartiles)": ""
                    if row.ratio is None
                    else "1"
                    if row.name == reference
                    else str(row.ratio),
                    "saved for backward, MiB": mib(row.saved),
                    "peak memory, MiB": mib(row.peak),
                    "held, MiB": mib(row.held) if result["job"] == "annotations" else "",
                    "of torch.mm's rate": "" if row.share is None else f"{100 * row.share:.0f}%",
                }
            )
    columns = [name for name in cells[0] if any(row[name] for row in cells)] if cells else []
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    return lines + [f"| {' | '.join(row[name] for name in columns)} |" for row in cells]


def mib(count: int | None) -> str:
    return "" if not count else f"{count / MIB:.0f}"


def summary(content: dict) -> Table:
    """A line a contest: this package beside the fastest peer."""
    table = Table(
        "job", "mode", OWN, "beside", "ratio (quartiles)", "saved MiB", "peak MiB", "of torch.mm", box=box.SIMPLE_HEAD
    )
    for result in content["contests"]:
        rows = {row.name: row for row in rows_of(result)}
        own = next((row for row in rows.values() if is_own(row.name)), None)
        if own is None:
            continue
        peer = rows.get(reference_of(result))
        table.add_row(
            result["job"],
            result["mode"],
            time_of(own.seconds),
            f"{peer.name} {time_of(peer.seconds)}" if peer else "",
            str(own.ratio) if own.ratio else "",
            " / ".join(filter(None, (mib(row.saved) for row in (own, peer) if row))),
            " / ".join(filter(None, (mib(row.peak) for row in (own, peer) if row))),
            "" if own.share is None else f"{100 * own.share:.0f}%",
        )
    return table


def draw(content: dict, path: Path) -> None:
    """Ratios of times to the fastest peer with their quartiles, as path.png and path.svg; nothing without ratios.

    Networks are on a scale of their own: other jobs differ by more than a hundred times.
    """
    drawn = [(result, rows) for result in content["contests"] if (rows := [r for r in rows_of(result) if r.ratio])]
    groups = [[one for one in drawn if (MATRIX_PRODUCT in one[0]["seconds"]) is network] for network in (True, False)]
    groups = [group for group in groups if group]
    if not groups:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row.name.split(",")[0] for _, rows in drawn for row in rows if not is_own(row.name)))
    colours = {name: f"C{i}" for i, name in enumerate(names)} | {OWN: "black"}
    figure, axes = pyplot.subplots(
        len(groups),
        figsize=(8, 1.5 + 0.4 * len(drawn)),
        squeeze=False,
        layout="constrained",
        height_ratios=[len(group) + 1 for group in groups],
    )
    handles = {}
    for group, axis in zip(groups, axes[:, 0], strict=True):
        for height, (_, rows) in enumerate(group):
            for row in rows:
                name, _, way = row.name.partition(",")
                low, median, high = row.ratio
                bar = [[median - low], [high - median]]
                shape = {"fmt": "D" if is_own(name) else "o", "fillstyle": "none" if way else "full"}
                handle = axis.errorbar(median, height + 0.15 * bool(way), xerr=bar, color=colours[name], **shape)
                if not way:
                    handles.setdefault(name, handle)
        axis.axvline(1, color="grey", linewidth=0.8)
        axis.set_xscale("linear" if MATRIX_PRODUCT in group[0][0]["seconds"] else "log")
        axis.set_yticks(range(len(group)), [f"{r['job']}{', ' + r['mode'] if r['mode'] else ''}" for r, _ in group])
        axis.set_ylim(len(group) - 0.5, -0.5)
        axis.grid(alpha=0.3, axis="x")
    axes[-1][0].set_xlabel("time / time of the fastest other package: left is faster\n(hollow: run in another way)")
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4)
    for kind in ("png", "svg"):
        figure.savefig(path.with_name(f"{path.name}.{kind}"), dpi=110)
    pyplot.close(figure)


def write_json(content: dict, path: Path) -> None:
    write_atomically(path.with_name(f"{path.name}.json"), json.dumps(content, indent=1) + "\n")


def write(content: dict, path: Path) -> None:
    """Write path.json, path.md, path.png and path.svg."""
    write_json(content, path)
    write_atomically(path.with_name(f"{path.name}.md"), markdown(content))
    draw(content, path)
