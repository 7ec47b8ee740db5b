"""The degradation experiment: plain and residual nets of several depths under one recipe (He et al. 2015, Fig. 6).

python tools/degradation.py --data cifar10                       plain-20/56 and ResNet-20/56, the paper's schedule
python tools/degradation.py --data cifar10 --depths 20 32 44 56 110 --steps 16000 --output runs/quarter
python tools/degradation.py --data cifar10 --no-plain --depths 20 56     the residual nets alone
python tools/degradation.py --data cifar10 --shortcuts --depths 20       shortcuts A, B and C compared (Table 3's point)
python tools/degradation.py --output runs/quarter --plot-only            draws again what is there
Started again, it skips the runs that are finished and goes on with the one that is not.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resbackbone.cli.command import console, main_of, parse, progress_console
from resbackbone.cli.options import check_counts, resumed

import matplotlib

from resbackbone.analysis import count_parameters
from resbackbone.atomic import write_atomically
from resbackbone.checks import UserError
from resbackbone.cifar import build_cifar_resnet
from resbackbone.engine.metrics import read_metrics
from resbackbone.engine.run import read_yaml
from resbackbone.tools import train_cifar10
from resbackbone.tools.train_cifar10 import name_of

POINTS = 100  # of a training curve: the mean over a hundredth of the updates each
LAST = 0.1  # the share of the updates over which the final training error is the mean
SAME = ("steps", "batch_size", "validation", "precision", "seed")  # in runs that are compared, and the training images


@dataclass(frozen=True)
class Options:
    """Train plain and residual nets under one recipe; draw and tabulate their errors."""

    data: Path | None = None
    """CIFAR-10, or synthetic, as train_cifar10.py takes it."""
    depths: tuple[int, ...] = (20, 56)
    """Of 20, 32, 44, 56, 110 and 1202."""
    shortcuts: bool = False
    """Compare residual nets with the shortcuts A, B and C instead of plain and residual ones."""
    plain: bool = True
    """The plain nets too; without them the residual nets of the --depths alone (Fig. 6, the middle)."""
    output: Path = Path("runs/degradation")
    """Folder for a run folder a net, and degradation (or shortcuts) .png, .svg, .md and .json."""
    plot_only: bool = False
    """Train nothing: draw what the runs in --output have recorded, finished or not."""
    steps: int | None = None
    """Updates of each net; the drops come at the half and three quarters. Default: the paper's 64000."""
    batch_size: int = train_cifar10.BATCH_SIZE
    """Images an update, over all GPUs."""
    validation: bool = False
    """Test on a tenth of the training images, kept for it."""
    checkpoint_period: int = 500
    """Updates between checkpoints."""
    eval_period: int | None = None
    """Updates between tests: points of a test curve. Default: 1000, or a tenth of --steps if that is less."""
    log_period: int = 20
    """Updates between lines of metrics."""
    seed: int = 0
    """Of every net."""
    device: str | None = None
    """cuda, cuda:N, cpu or mps. Default: all GPUs if there are any."""
    gpus: int | None = None
    """How many of this machine's GPUs. Default: all."""
    precision: str | None = None
    """fp32, bf16 or fp16 (autocast). Default: bf16 where the device computes in it."""
    quiet: bool = False
    """Print warnings, errors and the results alone."""


@dataclass(frozen=True)
class Curves:
    """What one run has recorded: (update, error) in fractions, of training batches and of the test images."""

    name: str
    network: dict  # depth and shortcut
    recipe: dict
    updates: int
    train: list[tuple[int, float]]
    test: list[tuple[int, float]]
    minutes: float

    def row(self) -> dict:
        """What the tables say of it."""
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
    check_counts(options, least=1, names=("steps",))
    nets = networks(options)
    if not options.plot_only:
        for net in nets:
            train(net, options)
    if os.environ.get("RANK", "0") != "0":
        return
    curves = [read_run(options.output / name_of(net)) for net in nets]
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
    """The complete options of every net's run, but for the folder; ValueError for what is not there."""
    shared = {
        "data": options.data or (Path(train_cifar10.SYNTHETIC) if options.plot_only else None),  # which is not read
        **{name: getattr(options, name) for name in ("steps", "batch_size", "validation", "seed", "precision")},
        **{name: getattr(options, name) for name in ("checkpoint_period", "eval_period", "log_period")},
        **{name: getattr(options, name) for name in ("device", "gpus")},
    }
    if not options.depths:
        raise UserError("--depths: give one or more, such as --depths 20 56")
    residual: dict[str, Any] = {}  # with shortcut A, the default
    kinds = [{"plain": True}, residual] if options.plain else [residual]
    if options.shortcuts:
        kinds = [residual, {"shortcut": "B"}, {"shortcut": "C"}]
    asked = [train_cifar10.Options(depth=depth, **kind, **shared) for kind in kinds for depth in options.depths]
    return [train_cifar10.complete(one) for one in asked]


def train(net: train_cifar10.Options, options: Options) -> None:
    """Train a net in its folder, or go on with it, or leave it if it is finished; ValueError for another recipe's."""
    folder = options.output / name_of(net)
    argv = ["--output", folder, "--depth", net.depth, "--max-steps", net.steps]
    argv += ["--resume"] if (folder / "config.yaml").is_file() else []
    argv += ["--plain"] if net.plain else ["--shortcut", net.shortcut] if net.shortcut else []
    argv += ["--validation"] if net.validation else ["--no-validation"]
    argv += ["--quiet"] if options.quiet else []
    for name in ("data", "steps", "batch_size", "seed", "precision", "device", "gpus"):
        if getattr(net, name) is not None:
            argv += [f"--{name.replace('_', '-')}", getattr(net, name)]
    for name in ("checkpoint_period", "eval_period", "log_period"):
        argv += [f"--{name.replace('_', '-')}", getattr(net, name)]
    argv = [str(word) for word in argv]
    if (folder / "results.json").is_file():
        wanted = train_cifar10.parse(train_cifar10.Options, argv)
        resumed(wanted, argv, default=folder, may_differ=train_cifar10.MAY_DIFFER)  # says so if it is another recipe's
        if json.loads((folder / "results.json").read_text())["steps"] >= net.steps:
            progress_console.print(f"{folder} is finished")
            return
    train_cifar10.main(argv)


def read_run(folder: Path) -> Curves:
    """The curves of a run; ValueError if there is none or it has recorded nothing yet."""
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
    """ValueError if two runs were not made alike: their errors say nothing of their depths then."""
    for one in curves[1:]:
        for name, value in one.recipe.items():
            if value != curves[0].recipe[name]:
                raise UserError(
                    f"{one.name} was trained with {name} {value}, {curves[0].name} with {curves[0].recipe[name]}; runs "
                    "that are compared have one recipe"
                )


def table(rows: Sequence[dict]) -> str:
    """A Markdown table, a row for each net."""
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
    """A panel for each group of runs, side by side and on one scale: training error dashed, test error bold."""
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
    # The first updates would take all of the scale: it ends above whatever comes after a tenth of them.
    late = [e for c in drawn for u, e in [*binned(c.train), *c.test] if u > LAST * max(d.updates for d in drawn)]
    axes[0][0].set_ylim(0, min(100, 105 * max(late, default=1.0)) or 1)
    axes[0][0].set_ylabel("error, %")
    for kind in ("png", "svg"):
        figure.savefig(path.with_name(f"{path.name}.{kind}"), dpi=110)
    pyplot.close(figure)


def binned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The points, averaged over equal stretches so that about POINTS are left, each at the end of its stretch."""
    size = max(1, len(points) // POINTS)
    stretches = [points[i : i + size] for i in range(0, len(points), size)]
    return [(part[-1][0], sum(error for _, error in part) / len(part)) for part in stretches]


def in_percent(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [update for update, _ in points], [100 * error for _, error in points]


def run() -> None:
    main_of(main)


if __name__ == "__main__":
    run()
