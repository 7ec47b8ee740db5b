"""What the report of any run says: its curves, its timing, its configuration, and the file it is written to."""

import json
import math
import platform
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path

import torch

from resbackbone.atomic import write_atomically
from resbackbone.report.charts import line_chart
from resbackbone.report.page import Cell, Html, Section, absent, number, paragraph, percent, short, side_by_side, table
from resbackbone.training.command import console
from resbackbone.training.run import read_yaml

FILE = "report.html"
PACKAGES = ("resbackbone", "torch", "torchvision", "timm", "numpy", "pillow", "safetensors", "pycocotools", "hotcoco")


class RunLog:
    """What a run's folder holds of it: `config`, and the lines of metrics.jsonl as `train` and `evaluations`."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            self.config = read_yaml(folder / "config.yaml")
        except ValueError:
            self.config = {}
        self.train, self.evaluations = [], []
        path = folder / "metrics.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            try:
                content = json.loads(line)
                (self.evaluations if content["kind"] == "eval" else self.train).append(
                    {**content, "step": content["step"]}
                )
            except (ValueError, KeyError, TypeError):  # the line during which a run was killed
                continue

    def curve(self, name: str, *, evaluations: bool = False) -> list[tuple[int, float | None]]:
        """(update, value) wherever it was recorded."""
        lines = self.evaluations if evaluations else self.train
        return [(line["step"], _number(line[name])) for line in lines if name in line]

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
    """Where the time went: updates, of these waiting for data, evaluations; images a second and memory."""
    spans = [line for line in log.train if all(_number(line.get(name)) for name in ("step", "seconds"))]
    before = [0, *(line["step"] for line in spans)]
    updates = [line["step"] - since for line, since in zip(spans, before, strict=False)]
    total = sum(line["seconds"] * n for line, n in zip(spans, updates, strict=True))
    rows, parts = [], []
    if total > 0:
        rows += [("updates recorded", sum(updates)), ("seconds in updates", Cell(number(total), total))]
        rows.append(("seconds an update", Cell(number(total / sum(updates)), total / sum(updates))))
        for name in dict.fromkeys(name for line in spans for name in line if name.endswith("_seconds")):
            share = sum((_number(line.get(name)) or 0) * n for line, n in zip(spans, updates, strict=True)) / total
            what = "waiting for data" if name == "data_seconds" else name.removesuffix("_seconds")
            rows.append((f"share of them {what}", Cell(f"{percent(share)}%", share)))
        if batch := _number(log.config.get("batch_size")):
            rows.append(("images a second", Cell(number(batch * sum(updates) / total), batch * sum(updates) / total)))
    if memory := [_number(line.get("memory_mib")) or 0 for line in log.train]:
        rows.append(("peak memory of the main process or its GPU, MiB", Cell(number(round(max(memory))), max(memory))))
    if seconds := [value for _, value in log.curve("seconds", evaluations=True) if value is not None]:
        rows += [("evaluations", len(seconds)), ("seconds in evaluations", Cell(number(sum(seconds)), sum(seconds)))]
    parts.append(table(("what", "value"), rows) if rows else absent("No time has been recorded yet."))
    if not any("forward_seconds" in line or "backward_seconds" in line for line in spans):
        why = "an update is timed as a whole, and of it the waiting for data"
        parts.append(absent(f"Forward and backward are not shown apart: {why}."))
    if len(spans) > 1:
        speed = {"images/s": log.curve("images_per_second")}
        waiting = [(line["step"], 100 * (_number(line.get("data_seconds")) or 0) / line["seconds"]) for line in spans]
        parts.append(
            side_by_side(
                line_chart("Images a second", speed, x="updates"),
                line_chart("Waiting for data, percent of an update", {"data": waiting}, x="updates", y_range=(0, 100)),
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
