"""What the report of any run says: its curves, its timing, its configuration, and the file it is written to."""

import math
import platform
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path

import torch

from resbackbone.atomic import write_atomically
from resbackbone.cli.command import console
from resbackbone.engine.metrics import read_metrics
from resbackbone.engine.run import read_yaml
from resbackbone.report.charts import bar, line_chart
from resbackbone.report.numbers import number, percent
from resbackbone.report.page import (
    Cell,
    Html,
    Section,
    absent,
    paragraph,
    short,
    side_by_side,
    table,
    tag,
)

FILE = "report.html"
PACKAGES = ("resbackbone", "torch", "torchvision", "timm", "numpy", "pillow", "safetensors")
PACKAGES += ("pycocotools", "hotcoco", "detectron2")  # where they are installed
UPDATE = {  # its parts, as metrics.jsonl and the page call them
    "data_seconds": "waiting for data",
    "forward_seconds": "forward",
    "backward_seconds": "backward",
    "optimizer_seconds": "optimizer",
}


class RunLog:
    """What a run's folder holds of it: `config`, and the lines of metrics.jsonl as `train` and `evaluations`."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            self.config = read_yaml(folder / "config.yaml")
        except ValueError:
            self.config = {}
        begun = (folder / "metrics.jsonl").exists()
        self.train, self.evaluations = (read_metrics(folder, kind) if begun else [] for kind in ("train", "eval"))

    def curve(self, name: str, *, evaluations: bool = False) -> list[tuple[int, float | None]]:
        """(update, value) wherever it was recorded."""
        lines = self.evaluations if evaluations else self.train
        return [(line["step"], _number(line[name])) for line in lines if name in line]

    def spans(self) -> list[tuple[int, dict]]:
        """(how many updates a line of `train` is the mean of, the line), of lines that tell an update's seconds."""
        lines = [line for line in self.train if all(_number(line.get(name)) for name in ("step", "seconds"))]
        return [
            (line["step"] - since, line) for line, since in zip(lines, [0, *(s["step"] for s in lines)], strict=False)
        ]

    def total(self, name: str) -> float:
        """The sum over all updates of what the lines of `train` tell of one, such as its `seconds`."""
        return sum(updates * (_number(line.get(name)) or 0) for updates, line in self.spans())

    def data_name(self) -> str:
        path = Path(str(self.config.get("data", "unknown data")))
        return short((path.parent if ".tar" in path.name else path).name or path)


def write_report(folder: Path, page: Callable[[], str]) -> Path | None:
    """Write what `page` makes to `report.html` in the run's folder; returns the file.

    A report that cannot be made or written costs one printed line, never the run: then it returns None.
    """
    try:
        write_atomically(folder / FILE, page())
        return folder / FILE
    except Exception as error:
        console.print(f"{folder / FILE} could not be written ({type(error).__name__}: {' '.join(str(error).split())})")
        return None


def training_section(log: RunLog, *extra: Html) -> Section:
    """Losses, learning rate and gradient norm against updates, and further charts."""
    if not log.train:
        return Section("Training", [absent("No line of metrics has been recorded yet: nothing to draw."), *extra])
    names = dict.fromkeys(name for line in log.train for name in line)
    parts = {name.removeprefix("loss_"): log.curve(name) for name in names if name.startswith("loss_")}
    charts = [line_chart("Loss", {"loss": log.curve("loss")}, x="updates")]
    if len(parts) > 1:
        charts.append(line_chart("Parts of the loss", parts, x="updates"))
    charts.append(line_chart("Learning rate", {"lr": log.curve("lr")}, x="updates"))
    if "gradient_norm" in names:
        charts.append(line_chart("Gradient norm", {"norm": log.curve("gradient_norm")}, x="updates"))
    last = log.train[-1]
    said = f"{number(last['step'])} updates; the last loss recorded is {number(_number(last.get('loss')))}."
    return Section("Training", [paragraph(said), side_by_side(*charts, *extra)])


def timing_section(log: RunLog) -> Section:
    """Where the time went: the parts of the updates, and evaluations; images a second and memory."""
    spans = log.spans()
    total, evaluations = log.total("seconds"), [value or 0 for _, value in log.curve("seconds", evaluations=True)]
    recorded = [name for name in UPDATE if any(name in line for _, line in spans)]
    rows, spent = [], {}
    if total > 0:
        updates = sum(n for n, _ in spans)
        each = total / updates
        rows += [("updates recorded", updates), ("seconds an update", Cell(number(each), each))]
        if batch := _number(log.config.get("batch_size")):
            rows.append(("images a second", Cell(number(batch / each), batch / each)))
        spent = {UPDATE[name]: log.total(name) for name in recorded}
        spent["rest of the updates"] = max(total - sum(spent.values()), 0)
    if evaluations:
        rows.append(("evaluations", len(evaluations)))
        spent["evaluations"] = sum(evaluations)
    if memory := [_number(line.get("memory_mib")) or 0 for line in log.train]:
        rows.append(("peak memory of the main process or its GPU, MiB", Cell(number(round(max(memory))), max(memory))))
    parts = [table(("what", "value"), rows) if rows else absent("No time has been recorded yet.")]
    if whole := sum(spent.values()):
        shares = [
            (
                name,
                Cell(f"{seconds:,.1f}", seconds),
                Cell(percent(seconds / whole), seconds / whole),
                bar(seconds / whole),
            )
            for name, seconds in spent.items()
        ]
        parts += [tag("h3", "Where the time went"), table(("part", "seconds", "percent", ""), shares, sortable=True)]
    if "forward_seconds" not in recorded:
        parts.append(absent("Forward and backward are not shown apart: they have not been recorded."))
    if len(spans) > 1:
        in_percent = {
            UPDATE[name]: [(line["step"], 100 * (_number(line.get(name)) or 0) / line["seconds"]) for _, line in spans]
            for name in recorded
        }
        title = "Percent of an update" + (f": {UPDATE[recorded[0]]}" if len(recorded) == 1 else "")
        speed = {"images/s": log.curve("images_per_second")}
        parts.append(
            side_by_side(
                line_chart("Images a second", speed, x="updates"),
                line_chart(title, in_percent, x="updates", y_range=(0, 100)),
            )
        )
    return Section("Timing", parts)


def configuration_section(log: RunLog) -> Section:
    """Every option and what came of it, as config.yaml has them, and the versions of what it ran with."""
    config = dict(log.config)
    effective = config.pop("effective", None)
    rows = [*config.items(), *(effective.items() if isinstance(effective, Mapping) else ())]
    options = table(("option", "value"), [(short(name), "–" if v is None else str(v)[:500]) for name, v in rows])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    versions = [("Python", platform.python_version()), ("system", platform.platform()), ("device", device)]
    versions += [(name, version) for name in PACKAGES if (version := _version(name))]
    parts = [options if rows else absent("There is no config.yaml in the run's folder.")]
    parts += [
        table(("software", "version"), versions),
        paragraph(f"Written {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}."),
    ]
    return Section("Configuration", parts)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _number(value: object) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None
