"""The degradation experiment: plain and residual nets of several depths under one recipe (He et al. 2015, Fig. 6).

python tools/degradation.py --data cifar10                       plain-20/56 and ResNet-20/56, the paper's schedule
python tools/degradation.py --data cifar10 --depths 20 32 44 56 110 --steps 16000 --output runs/quarter
python tools/degradation.py --data cifar10 --no-plain --depths 20 56     the residual nets alone
python tools/degradation.py --data cifar10 --shortcuts --depths 20       shortcuts A, B and C compared (Table 3's point)
python tools/degradation.py --output runs/quarter --plot-only            draws what is recorded so far

Run the same command again to resume: finished runs are skipped.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from resbackbone.cli.command import console, from_config, main_of, parse, progress_console
from resbackbone.cli.options import MachineOptions, check_same_run, launch_command

import matplotlib
import numpy as np

from resbackbone.analysis import count_parameters
from resbackbone.atomic import write_atomically, write_json
from resbackbone.checks import UserError
from resbackbone.cifar import build_cifar_resnet
from resbackbone.engine.run import read_yaml
from resbackbone.report.numbers import markdown_table
from resbackbone.report.run import RunLog
from resbackbone.tools import train_cifar10
from resbackbone.tools.train_cifar10 import name_of

POINTS = 100  # of a training curve; each is the mean over a hundredth of the updates
LAST = 0.1  # the final training error is the mean over this share of the updates
SAME = ("steps", "batch_size", "precision", "seed")  # equal in all runs that are compared


@dataclass(frozen=True)
class ComparisonOptions:
    depths: tuple[int, ...] = (20, 56)
    """Of 20, 32, 44, 56, 110 and 1202."""
    shortcuts: bool = False
    """Compare residual nets with the shortcuts A, B and C instead of plain and residual ones."""
    plain: bool = True
    """Include the plain nets; --no-plain trains only the residual nets (Fig. 6, middle)."""
    output: Path = Path("runs/degradation")
    """Folder for a run folder per net, and degradation (or shortcuts) .png, .md and .json."""
    plot_only: bool = False
    """Train nothing; draw what the runs in --output have recorded, finished or not."""
    log_period: int = 20
    """Updates between lines of metrics."""
    quiet: bool = False
    """Print only warnings, errors and the results."""


@dataclass(frozen=True)
class Options(ComparisonOptions, train_cifar10.DataOptions, train_cifar10.TrainingOptions, MachineOptions):
    """Train plain and residual nets under one recipe; draw and tabulate their errors."""


class Curves(NamedTuple):
    """One run. The curves are float [n, 2]: (update, error, a fraction) of training batches, and of the test images."""

    name: str
    network: dict  # depth and shortcut
    recipe: dict
    train: np.ndarray
    test: np.ndarray
    minutes: float

    def row(self) -> dict:
        """The row of the tables."""
        updates, errors = self.train.T
        return {
            "network": self.name,
            **self.network,
            "parameters": count_parameters(build_cifar_resnet(**self.network)),
            "updates": int(updates[-1]),
            "train_error": errors[updates > (1 - LAST) * updates[-1]].mean(),
            "test_error": self.test[-1, 1] if len(self.test) else None,
            "minutes": self.minutes,
        }


def main(argv: list[str] | None = None) -> None:
    """Nets -> a run each -> one figure and one table."""
    options = parse(Options, argv)
    nets = networks(options)
    if not options.plot_only:
        for net in nets:
            train(net)
    if os.environ.get("RANK", "0") != "0":
        return
    curves = [read_run(net.output) for net in nets]
    recipe = curves[0].recipe
    if differing := sorted({key for c in curves for key, value in c.recipe.items() if value != recipe[key]}):
        raise UserError(f"the runs in {options.output} differ in {', '.join(differing)}: their errors do not compare")
    name = "shortcuts" if options.shortcuts else "degradation"
    panels: dict[str, list[Curves]] = {}
    for c in curves:
        kind = "plain" if c.network["shortcut"] == "none" else "residual"
        panels.setdefault(f"ResNet-{c.network['depth']}" if options.shortcuts else kind, []).append(c)
    draw(panels, options.output / f"{name}.png")
    rows = [c.row() for c in curves]
    write_json(options.output / f"{name}.json", {"recipe": recipe, "runs": rows})
    write_atomically(options.output / f"{name}.md", table(rows))
    console.print(table(rows), f"figure: {options.output / name}.png", sep="\n")


def networks(options: Options) -> list[train_cifar10.Options]:
    """The options of each net's run, folder included. Raises ValueError for an option that is not accepted."""
    if not options.depths:
        raise UserError("--depths: give one or more, such as --depths 20 56")
    names = {field.name for field in fields(train_cifar10.Options)} - {"plain", "output"}
    shared: dict[str, Any] = {name: value for name, value in vars(options).items() if name in names}
    if options.plot_only:
        shared["data"] = Path(train_cifar10.SYNTHETIC)  # not read
    residual: dict[str, Any] = {}  # with shortcut A, the default
    kinds = [{"plain": True}, residual] if options.plain else [residual]
    if options.shortcuts:
        kinds = [residual, {"shortcut": "B"}, {"shortcut": "C"}]
    asked = [train_cifar10.Options(depth=depth, **kind, **shared) for kind in kinds for depth in options.depths]
    nets = [train_cifar10.complete(one) for one in asked]
    return [replace(net, output=options.output / name_of(net), max_steps=net.steps) for net in nets]


def train(net: train_cifar10.Options) -> None:
    """Train a net or resume its run, unless it is finished. Raises ValueError if the run has another recipe."""
    config = net.output / "config.yaml"
    if config.is_file():
        saved = train_cifar10.complete(from_config(train_cifar10.Options, config))
        check_same_run(net, saved, net.output)
        net = replace(net, resume=True)
        results = net.output / "results.json"
        if results.is_file() and json.loads(results.read_text())["steps"] >= net.steps:
            progress_console.print(f"{net.output} is finished")
            return
    launch_command(train_cifar10.train, net)


def read_run(folder: Path) -> Curves:
    """The curves of a run. Raises ValueError if there is no run or it has recorded nothing yet."""
    config, log = read_yaml(folder / "config.yaml"), RunLog(folder)
    if not log.train:
        raise UserError(f"{folder}: has recorded no updates yet")
    train, test = log.curve("train_error"), log.curve("error", evaluations=True)
    seconds = log.total("seconds") + sum(line["seconds"] for line in log.evaluations)
    shortcut = "none" if config["plain"] else config["shortcut"] or "A"
    recipe = {name: config[name] for name in SAME} | {"train_set_sha256": config["effective"]["train_set_sha256"]}
    network = {"depth": config["depth"], "shortcut": shortcut}
    return Curves(folder.name, network, recipe, np.array(train), np.array(test).reshape(-1, 2), seconds / 60)


def table(rows: Sequence[dict]) -> str:
    """A Markdown table with a row per net."""
    header = ("network", "shortcut", "parameters", "updates", "training error, %", "test error, %", "minutes")
    lines = []
    for row in rows:
        test = "" if row["test_error"] is None else f"{100 * row['test_error']:.2f}"
        cells = [row["network"], row["shortcut"], f"{row['parameters'] / 1e6:.2f} M", row["updates"]]
        lines.append([*cells, f"{100 * row['train_error']:.2f}", test, f"{row['minutes']:.1f}"])
    return markdown_table(header, lines)


def draw(panels: Mapping[str, Sequence[Curves]], path: Path) -> None:
    """Draw a panel per group of runs, all on one scale: training error dashed, test error bold."""
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import PercentFormatter

    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(6 * len(panels), 4.5), sharey=True, squeeze=False, layout="constrained"
    )
    for (title, group), axis in zip(panels.items(), axes[0], strict=True):
        for number, curves in enumerate(group):
            colour = f"C{number}"
            axis.plot(*binned(curves.train).T, color=colour, linestyle="--", linewidth=1)
            axis.plot(*curves.test.T, color=colour, linewidth=2.2, label=curves.name)
        axis.set(title=title, xlabel="updates")
        axis.grid(alpha=0.3)
        axis.legend(title="test bold, training dashed")
    # The scale ends above the errors after the first tenth of the updates, which are much larger.
    points = np.concatenate([p for group in panels.values() for c in group for p in (binned(c.train), c.test)])
    late = points[points[:, 0] > LAST * points[:, 0].max(), 1]
    axes[0][0].set_ylim(0, min(1, 1.05 * late.max()) or 1)
    axes[0][0].yaxis.set_major_formatter(PercentFormatter(1.0))
    axes[0][0].set_ylabel("error")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def binned(points: np.ndarray) -> np.ndarray:
    """Average (update, error) pairs over POINTS stretches at most, each at the end of its stretch."""
    stretches = np.array_split(points, min(POINTS, len(points)))
    return np.array([(stretch[-1, 0], stretch[:, 1].mean()) for stretch in stretches])


if __name__ == "__main__":
    main_of(main)
