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
from typing import Any

from resbackbone.cli.command import console, from_config, main_of, parse, progress_console
from resbackbone.cli.options import MachineOptions, check_counts, check_output, check_same_run, launch_command

import matplotlib

from resbackbone.analysis import count_parameters
from resbackbone.atomic import write_atomically
from resbackbone.checks import UserError
from resbackbone.cifar import build_cifar_resnet
from resbackbone.engine.metrics import read_metrics
from resbackbone.engine.run import read_yaml
from resbackbone.tools import train_cifar10
from resbackbone.tools.train_cifar10 import name_of

POINTS = 100  # of a training curve; each is the mean over a hundredth of the updates
LAST = 0.1  # the final training error is the mean over this share of the updates
SAME = ("steps", "batch_size", "validation", "precision", "seed")  # equal in all runs that are compared


@dataclass(frozen=True)
class ComparisonOptions:
    depths: tuple[int, ...] = (20, 56)
    """Of 20, 32, 44, 56, 110 and 1202."""
    shortcuts: bool = False
    """Compare residual nets with the shortcuts A, B and C instead of plain and residual ones."""
    plain: bool = True
    """Include the plain nets; --no-plain trains only the residual nets (Fig. 6, middle)."""
    output: Path = Path("runs/degradation")
    """Folder for a run folder per net, and degradation (or shortcuts) .png, .svg, .md and .json."""
    plot_only: bool = False
    """Train nothing; draw what the runs in --output have recorded, finished or not."""
    log_period: int = 20
    """Updates between lines of metrics."""
    quiet: bool = False
    """Print only warnings, errors and the results."""


@dataclass(frozen=True)
class Options(ComparisonOptions, train_cifar10.DataOptions, train_cifar10.TrainingOptions, MachineOptions):
    """Train plain and residual nets under one recipe; draw and tabulate their errors."""


@dataclass(frozen=True)
class Curves:
    """The (update, error) pairs of one run, in fractions: of training batches, and of the test images."""

    name: str
    network: dict  # depth and shortcut
    recipe: dict
    updates: int
    train: list[tuple[int, float]]
    test: list[tuple[int, float]]
    minutes: float

    def row(self) -> dict:
        """The row of the tables."""
        begin = (1 - LAST) * self.train[-1][0]
        last = [error for update, error in self.train if update > begin]
        return {
            "network": self.name,
            **self.network,
            "parameters": count_parameters(build_cifar_resnet(**self.network)),
            "updates": self.updates,
            "train_error": sum(last) / len(last),
            "test_error": self.test[-1][1] if self.test else None,
            "minutes": self.minutes,
        }


def main(argv: list[str] | None = None) -> None:
    """Nets -> a run each -> one figure and one table."""
    options = parse(Options, argv)
    check_output(options.output)
    check_counts(options, least=1, names=("steps",))
    nets = networks(options)
    if not options.plot_only:
        for net in nets:
            train(net)
    if os.environ.get("RANK", "0") != "0":
        return
    curves = [read_run(net.output) for net in nets]
    check_same_recipe(curves)
    name = "shortcuts" if options.shortcuts else "degradation"
    if options.shortcuts:
        panels = {f"ResNet-{depth}": [c for c in curves if c.network["depth"] == depth] for depth in options.depths}
    else:
        plain = [c for c in curves if c.network["shortcut"] == "none"]
        panels = {"plain": plain, "residual": [c for c in curves if c not in plain]}
        panels = {title: group for title, group in panels.items() if group}
    draw(panels, options.output / name)
    rows = [c.row() for c in curves]
    content = {"recipe": curves[0].recipe, "runs": rows}
    write_atomically(options.output / f"{name}.json", json.dumps(content, indent=2) + "\n")
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
    config = read_yaml(folder / "config.yaml")
    train, tests = read_metrics(folder, "train"), read_metrics(folder, "eval")
    if not train:
        raise UserError(f"{folder}: has recorded no updates yet")
    seconds, before = sum(line["seconds"] for line in tests), 0
    for line in train:
        seconds += line["seconds"] * (line["step"] - before)
        before = line["step"]
    shortcut = "none" if config["plain"] else config["shortcut"] or "A"
    recipe = {name: config[name] for name in SAME} | {"train_set_sha256": config["effective"]["train_set_sha256"]}
    return Curves(
        folder.name,
        {"depth": config["depth"], "shortcut": shortcut},
        recipe,
        before,
        [(line["step"], line["train_error"]) for line in train],
        [(line["step"], line["error"]) for line in tests],
        seconds / 60,
    )


def check_same_recipe(curves: Sequence[Curves]) -> None:
    """Raise ValueError if two runs have different recipes, so that their errors do not compare their depths."""
    for one in curves[1:]:
        for name, value in one.recipe.items():
            if value != curves[0].recipe[name]:
                raise UserError(
                    f"{one.name} was trained with {name} {value}, {curves[0].name} with {curves[0].recipe[name]}; "
                    "compare runs of the same recipe"
                )


def table(rows: Sequence[dict]) -> str:
    """A Markdown table with a row per net."""
    lines = [
        "| network | shortcut | parameters | updates | training error, % | test error, % | minutes |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        test = "" if row["test_error"] is None else f"{100 * row['test_error']:.2f}"
        cells = [row["network"], row["shortcut"], f"{row['parameters'] / 1e6:.2f} M", str(row["updates"])]
        cells += [f"{100 * row['train_error']:.2f}", test, f"{row['minutes']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(panels: Mapping[str, Sequence[Curves]], path: Path) -> None:
    """Draw a panel per group of runs, all on one scale: training error dashed, test error bold."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(6 * len(panels), 4.5), sharey=True, squeeze=False, layout="constrained"
    )
    drawn = [curves for group in panels.values() for curves in group]
    for (title, group), axis in zip(panels.items(), axes[0], strict=True):
        for number, curves in enumerate(group):
            colour = f"C{number}"
            axis.plot(*in_percent(binned(curves.train)), color=colour, linestyle="--", linewidth=1)
            axis.plot(*in_percent(curves.test), color=colour, linewidth=2.2, label=curves.name)
        axis.set_title(title)
        axis.set_xlabel("updates")
        axis.grid(alpha=0.3)
        axis.legend(title="test bold, training dashed")
    # The scale ends above the errors after the first tenth of the updates, which are much larger.
    late = [e for c in drawn for u, e in [*binned(c.train), *c.test] if u > LAST * max(d.updates for d in drawn)]
    axes[0][0].set_ylim(0, min(100, 105 * max(late, default=1.0)) or 1)
    axes[0][0].set_ylabel("error, %")
    for kind in ("png", "svg"):
        figure.savefig(path.with_name(f"{path.name}.{kind}"), dpi=110)
    pyplot.close(figure)


def binned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Average the points over equal stretches to about POINTS, each at the end of its stretch."""
    size = max(1, len(points) // POINTS)
    stretches = [points[i : i + size] for i in range(0, len(points), size)]
    return [(part[-1][0], sum(error for _, error in part) / len(part)) for part in stretches]


def in_percent(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [update for update, _ in points], [100 * error for _, error in points]


if __name__ == "__main__":
    main_of(main)
