"""The part of a report that every run has: curves, timing and configuration; and the file it is written to."""

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from markupsafe import Markup

from resbackbone.atomic import write_atomically
from resbackbone.checks import UserError
from resbackbone.engine.best import read_best
from resbackbone.engine.metrics import read_metrics
from resbackbone.engine.provenance import versions
from resbackbone.engine.run import read_yaml
from resbackbone.report.charts import bar
from resbackbone.report.numbers import duration, finite, number
from resbackbone.report.page import Cell, Section, fraction, macros, page, short

FILE = "report.html"
MEMORY = "peak memory of the main process or its GPU, MiB"
PACKAGES = (  # those that are installed
    *("resbackbone", "torch", "torchvision", "timm", "numpy", "pillow", "safetensors"),
    *("pycocotools", "hotcoco", "detectron2"),
)
PARTS = {  # of an update, as metrics.jsonl and the page call them
    "data_seconds": "waiting for data",
    "forward_seconds": "forward",
    "backward_seconds": "backward",
    "optimizer_seconds": "optimizer",
}


class RunLog:
    """What a run's folder has recorded: `config`, what came of it (`effective`), lines of metrics.jsonl as `train` and
    `evaluations`, and `best`."""

    def __init__(self, folder: Path):
        try:
            self.config = read_yaml(folder / "config.yaml")
        except UserError:
            self.config = {}
        self.best = read_best(folder)
        self.effective = self.config.get("effective") or {}
        started = (folder / "metrics.jsonl").exists()
        self.train, self.evaluations = (read_metrics(folder, kind) if started else [] for kind in ("train", "eval"))

    def curve(self, name: str, *, evaluations: bool = False, scale: float = 1) -> list[tuple[int, float | None]]:
        """(update, value times `scale`) wherever it was recorded."""
        lines = [line for line in (self.evaluations if evaluations else self.train) if name in line]
        return [(line["step"], (value := finite(line[name])) and value * scale) for line in lines]

    def spans(self) -> list[tuple[int, dict]]:
        """(number of updates that a line of `train` averages, the line), for lines with an update's seconds."""
        lines = [line for line in self.train if finite(line.get("seconds"))]
        before = [0, *(line["step"] for line in lines)]
        return [(line["step"] - since, line) for line, since in zip(lines, before, strict=False)]

    def total(self, name: str) -> float:
        """The sum over all updates of a value that `train` records for each, such as its `seconds`."""
        return sum(updates * (finite(line.get(name)) or 0) for updates, line in self.spans())

    def evaluation_seconds(self) -> float:
        return sum(value or 0 for _, value in self.curve("seconds", evaluations=True))

    def facts(self) -> dict[str, float]:
        """What the run did so far, from its first update: counts, times in seconds, memory in MiB and the last loss."""
        spans, seconds = self.spans(), self.total("seconds")
        if not seconds:
            return {"updates recorded": 0}
        updates = sum(count for count, _ in spans)
        images = sum(n * (finite(line.get("images_per_second")) or 0) * line["seconds"] for n, line in spans)
        facts = {
            "updates recorded": updates,
            "seconds of updates": round(seconds, 1),
            "seconds per update": seconds / updates,
            "images per second": images / seconds,
            "percent of the time waiting for data": round(100 * self.total("data_seconds") / seconds, 1),
            "seconds of evaluation": round(self.evaluation_seconds(), 1),
        }
        if memory := [value for _, value in self.curve("memory_mib") if value]:  # not on Windows
            facts[MEMORY] = round(max(memory))
        if (loss := finite(self.train[-1].get("loss"))) is not None:
            count = spans[-1][0]
            facts[f"loss in the last {f'{count} updates' if count > 1 else 'update'}"] = loss
        return facts

    def seconds(self) -> float:
        """Of all updates and evaluations."""
        return self.total("seconds") + self.evaluation_seconds()

    def images(self) -> dict[str, int]:
        """The numbers of images and classes, where they are recorded and images are loaded."""
        counts = {} if self.config.get("data") == "synthetic" else self.effective
        names = ("training_images", "validation_images", "classes")
        return {name.replace("_", " "): counts[name] for name in names if name in counts}

    def cost(self) -> dict[str, str]:
        """What the training took, for the summary."""
        facts, images = self.facts(), self.images()
        tiles = {name: number(count) for name, count in images.items() if name != "validation images"}
        if self.train:
            tiles["training and evaluation"] = duration(self.seconds())
        if "images per second" in facts:
            tiles["images per second"] = number(facts["images per second"], 3)
        if MEMORY in facts:
            tiles["peak memory"] = f"{facts[MEMORY] / 1024:.1f} GiB"
        return tiles

    def data_name(self) -> str:
        path = Path(self.config.get("data") or self.config.get("train_json") or "unknown data")
        return short((path.parent if ".tar" in path.name else path).name or path)


def report_page(
    log: RunLog,
    network: str,
    results: Mapping | None,
    *,
    tiles: Mapping[str, str],
    summary: Markup,
    over_time: Markup,
    sections: list[Section],
    facts: Mapping[str, str] | None = None,
    data: Sequence[Section] = (),
) -> str:
    """The page of a run: its results as `tiles`, {what: number}, and in words; `facts` about its data; `data` and,
    after the training, `sections`. `over_time` charts the evaluations.
    """
    subtitle = [f"recipe {log.config['recipe']}"] if "recipe" in log.config else []
    subtitle += [f"{number(log.train[-1]['step'])} updates"] if log.train else []
    subtitle += [f"{number(results['images'])} images evaluated" if results else "no evaluation"]
    top = macros("run.html").summary({**tiles, **log.cost()}, len(tiles), log.effective.get("hardware"), summary)
    first = [Section("Summary", top), facts_section(log, facts or {}), *data, training_section(log, over_time)]
    last = [timing_section(log), configuration_section(log)]
    return page(f"{network} on {log.data_name()}", ", ".join(subtitle), [*first, *sections, *last])


def summary(folder: Path, results: Mapping[str, str], files: Mapping[str, str]) -> str:
    """What a command prints at the end of the training in `folder`: its facts, `results`, and where its `files` are.

    `files` are paths in `folder` by name; missing ones are left out. A resumed run counts from its first update.
    """
    facts = {name: number(value) for name, value in RunLog(folder).facts().items()} | dict(results)
    width = max(map(len, facts))
    lines = ["Summary", *(f"  {name:{width}}  {value}" for name, value in facts.items())]
    lines += [f"{name}: {folder / path}" for name, path in files.items() if (folder / path).exists()]
    return "\n".join(lines)


def write_report(folder: Path, make_page: Callable[[], str], say: Callable[[str], object] = print) -> Path | None:
    """Write what `make_page` returns to `report.html` in the run's folder; returns the file.

    A failure never stops the run: `say` gets one line about it, and the result is None.
    """
    try:
        write_atomically(folder / FILE, make_page())
        return folder / FILE
    except Exception as error:
        say(f"{folder / FILE} could not be written ({type(error).__name__}: {' '.join(str(error).split())})")
        return None


def facts_section(log: RunLog, more: Mapping[str, str]) -> Section:
    """What was trained, on what, with which command; `more` are facts about the data."""
    effective, processes = log.effective, log.effective.get("processes", 1)
    facts = {"data": log.config.get("data") or log.config.get("train_json")}
    facts |= {name: number(count) for name, count in log.images().items()} | dict(more)
    if "parameters" in effective:
        facts["parameters"] = f"{effective['parameters'] / 1e6:.1f} million"
    if log.train:
        facts["updates"] = f"{number(log.train[-1]['step'])} in {duration(log.total('seconds'))}"
        facts["images per update"] = log.config.get("batch_size", "?")
        facts["evaluations"] = f"{len(log.evaluations)} in {duration(log.evaluation_seconds())}"
    if "hardware" in effective:
        facts["hardware"] = effective["hardware"] + (f"; {processes} processes" if processes > 1 else "")
    facts |= {name: effective[name] for name in ("commit", "resumed") if name in effective}
    facts["software"] = f"Python {platform.python_version()}, torch {effective.get('torch', torch.__version__)}"
    shown = {name: in_words(value) for name, value in facts.items()}
    return Section("Facts", macros("run.html").facts(effective.get("command"), shown))


def training_section(log: RunLog, over_time: Markup) -> Section:
    """Losses, learning rate and gradient norm over updates, and the chart of the evaluations."""
    names = dict.fromkeys(name for line in log.train for name in line if name.startswith("loss_"))
    parts = {name.removeprefix("loss_"): log.curve(name) for name in names}
    last_loss = finite(log.train[-1].get("loss")) if log.train else None
    return Section("Training", macros("run.html").training(log, last_loss, parts, over_time))


def timing_section(log: RunLog) -> Section:
    """Where the time went: parts of the updates, and evaluations; images per second and memory."""
    spans = log.spans()
    recorded = [name for name in PARTS if any(name in line for _, line in spans)]
    spent = {PARTS[name]: log.total(name) for name in recorded}
    if spans:
        spent["rest of the updates"] = max(log.total("seconds") - sum(spent.values()), 0)
    if log.evaluations:
        spent["evaluations"] = log.evaluation_seconds()
    whole = sum(spent.values())
    shares = [
        (name, Cell(f"{value:,.1f}", value), fraction(value / whole), bar(value / whole))
        for name, value in spent.items()
        if whole
    ]
    return Section("Timing", macros("run.html").timing(log, shares, "forward_seconds" in recorded))


def configuration_section(log: RunLog) -> Section:
    """Every option and what came of it, as in config.yaml, and the versions of the software."""
    rows = [(name, value) for name, value in log.config.items() if name != "effective"] + [*log.effective.items()]
    options = {short(name): in_words(value) for name, value in rows}
    software = {"Python": platform.python_version(), "system": platform.platform(), **versions(PACKAGES)}
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return Section("Configuration", macros("run.html").configuration(options, software, written))


def in_words(value: object) -> str:
    """A value of config.yaml as a page shows it."""
    value = "; ".join(map(str, value)) if isinstance(value, list) else value
    return "–" if value in (None, "") else str(value)[:500]
