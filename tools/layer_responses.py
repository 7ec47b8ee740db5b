"""Why residual networks train: the layers' responses (He et al. 2015, Fig. 7) and the gradients that they receive.

python tools/layer_responses.py                                    plain-20/56 and ResNet-20/56/110 at initialisation
python tools/layer_responses.py --data cifar10 --runs runs/cifar10-plain-20 runs/cifar10-resnet-20  trained ones as well
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from resbackbone.cli.command import Auto, Several, config_of, console, main_of, parse, progress_console
from resbackbone.cli.errors import from_option

import matplotlib
import numpy as np
import torch
from torch import Tensor

from resbackbone.analysis import gradient_norms, layer_responses
from resbackbone.atomic import write_atomically, write_json
from resbackbone.checks import UserError, one_of, usual_folder
from resbackbone.cifar import CIFAR_DEPTHS, CifarResNet, build_cifar_resnet
from resbackbone.classification.cifar10 import SYNTHETIC, mean_image_of, open_cifar10, to_model_input
from resbackbone.engine.checkpoints import checkpoints
from resbackbone.engine.run import read_yaml
from resbackbone.report.numbers import markdown_table
from resbackbone.tools.train_cifar10 import CIFAR10_FOLDERS, network_name
from resbackbone.tools.train_cifar10 import Options as TrainOptions

NETWORKS = {network_name(depth, shortcut): (depth, shortcut) for shortcut in ("none", "A") for depth in CIFAR_DEPTHS}
FILE = "model.safetensors"  # in each checkpoint of a run


@dataclass(frozen=True)
class Options:
    """Measure the layers' responses and gradients in the paper's CIFAR-10 networks, and draw them in one figure."""

    networks: tuple[str, ...] = ("plain-20", "plain-56", "resnet-20", "resnet-56", "resnet-110")
    """Networks to measure at initialisation."""
    runs: Several[Path] = ()
    """Runs of tools/train_cifar10.py, or single checkpoint folders; every checkpoint is measured."""
    data: Auto[Path] = None
    """CIFAR-10 as train_cifar10.py takes it. Default: the data of the first run; without runs $CIFAR10_DIR or
    ./datasets/cifar10, else synthetic (generated patterns)."""
    images: int = 128
    """Number of training images to measure on."""
    output: Path = Path("runs/layer-responses")
    """Folder for layer_responses.png, .json and .md; existing ones are replaced."""
    seed: int = 0
    """Seed of the initial weights and of the choice of images."""
    quiet: bool = False
    """Print only warnings, errors and the result."""


@dataclass(frozen=True)
class Measured:
    """One network at one time: `layers` are [{"layer", "std", "norm", "relative"}, ..] of `resbackbone.analysis`."""

    network: str  # plain-20, resnet-56, ..
    depth: int
    step: int  # updates done; 0 is initialisation
    source: str
    layers: list[dict]


def main(argv: list[str] | None = None) -> None:
    """Networks, and checkpoints of runs -> responses and gradients of their layers -> one figure and its numbers."""
    options = parse(Options, argv)
    if options.images < 2:
        raise UserError(f"--images {options.images}: must be at least 2, for the statistics of batch norm")
    networks = [NETWORKS[one_of("network", name, NETWORKS)] for name in options.networks]
    files = [file for run in options.runs for file in files_of(run)]
    if not networks and not files:
        raise UserError("nothing to measure: no --networks and no --runs")
    data_folder = options.data or trained_on(options.runs)
    with from_option("--data"):
        data = open_cifar10(data_folder)
    mean_image = mean_image_of(data.train)
    drawn = torch.randperm(len(data.train.labels), generator=torch.Generator().manual_seed(options.seed))
    images, labels = (tensor[drawn[: options.images]] for tensor in data.train)
    looked_at = f"{len(labels)} training images of {data_folder}"
    progress_console.print(f"measuring on {looked_at}")

    measured = []
    for depth, shortcut in networks:
        torch.manual_seed(options.seed)
        model = build_cifar_resnet(depth, shortcut=shortcut, num_classes=len(data.classes))
        measured.append(measure(model, 0, f"initialised, seed {options.seed}", images, labels, mean_image))
    for file in files:
        model = build_cifar_resnet(weights=file, num_classes=len(data.classes))
        given = mean_image if model.mean_image is None else model.mean_image
        step = int(file.resolve().parent.name.removeprefix("step_"))
        measured.append(measure(model, step, str(file.parent), images, labels, given))

    options.output.mkdir(parents=True, exist_ok=True)
    content = {"looked_at": looked_at, "torch": str(torch.__version__), "measured": [asdict(m) for m in measured]}
    write_json(options.output / "layer_responses.json", content, indent=1)
    write_atomically(options.output / "layer_responses.md", table(measured))
    draw(measured, options.output / "layer_responses.png")
    console.print(table(measured), f"figure: {options.output / 'layer_responses.png'}", sep="\n")


def files_of(folder: Path) -> list[Path]:
    """The weight files of a run's checkpoints, oldest first, or the one in a checkpoint's folder."""
    if (folder / "config.yaml").is_file():
        with from_option("--runs"):
            config_of(TrainOptions, folder / "config.yaml")
    is_checkpoint = re.fullmatch(r"step_\d+", folder.resolve().name)
    files = [path / FILE for path in ([folder] if is_checkpoint else checkpoints(folder))]
    if not files or not all(file.is_file() for file in files):
        raise UserError(f"--runs {folder}: holds no checkpoint (checkpoints/step_NNNNNNN/{FILE})")
    return files


def trained_on(runs: Sequence[Path]) -> str:
    """The data of the first run; without runs, CIFAR-10 from its usual places, else synthetic."""
    if not runs:
        return str(usual_folder(*CIFAR10_FOLDERS) or SYNTHETIC)
    file = runs[0] / "config.yaml"
    if not file.is_file():
        raise UserError(f"--runs {runs[0]}: does not say what it was trained on (no config.yaml); give --data DIR")
    return read_yaml(file)["data"]


def measure(model: CifarResNet, step: int, source: str, images: Tensor, labels: Tensor, mean_image: Tensor) -> Measured:
    """Measure one network's layers on uint8 images [B, 3, 32, 32] minus the mean image that it was trained with."""
    images = to_model_input(images, mean_image)
    responses, gradients = layer_responses(model, images), gradient_norms(model, images, labels)
    layers = [response | gradient for response, gradient in zip(responses, gradients, strict=True)]
    depth = model.config["depth"]
    return Measured(network_name(depth, model.config["shortcut"]), depth, step, source, layers)


def when(step: int) -> str:
    return f"after {step} updates" if step else "at initialisation"


def table(measured: Sequence[Measured]) -> str:
    """A Markdown table with a row per network and time."""
    header = ("network", "when", "response: median", "smallest", "largest")
    rows = []
    for m in measured:
        stds, norms = ([layer[key] for layer in m.layers] for key in ("std", "norm"))
        ratios = [f"{a / b:.3g}" if b else "n/a" for a, b in ((norms[0], norms[-1]), (max(norms), min(norms)))]
        rows.append([m.network, when(m.step), *(f"{f(stds):.3f}" for f in (np.median, min, max)), *ratios])
    return markdown_table([*header, "gradient: first/last layer", "largest/smallest"], rows)


def draw(measured: Sequence[Measured], path: Path) -> None:
    """Draw three panels per time: responses by layer and in descending order, as in Fig. 7, and gradients."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = sorted({m.step for m in measured})
    depths = sorted({m.depth for m in measured})
    colours = dict(zip(depths, pyplot.get_cmap("tab10").colors, strict=False))  # type: ignore[attr-defined]
    figure, rows = pyplot.subplots(
        len(steps), 3, figsize=(15, 0.6 + 3.6 * len(steps)), squeeze=False, layout="constrained"
    )
    for step, (by_layer, ranked, gradient) in zip(steps, rows, strict=True):
        for m in (m for m in measured if m.step == step):
            stds, relative = ([layer[key] for layer in m.layers] for key in ("std", "relative"))
            number = range(1, len(stds) + 1)
            plain = m.network.startswith("plain")
            style = {"color": colours[m.depth], "linestyle": "--" if plain else "-", "linewidth": 1.4}
            by_layer.plot(number, stds, label=m.network, **style)
            ranked.plot(number, sorted(stds, reverse=True), label=m.network, **style)
            gradient.plot(number, relative, label=m.network, **style)
        deviation, first = "standard deviation of the response", "" if step else " (1, by batch norm)"
        by_layer.set(title=f"{when(step)}: responses{first}", xlabel="3x3 layer", ylabel=deviation)
        ranked.set(title="responses in descending order", xlabel="rank of the layer", ylabel=deviation)
        gradient.set(title="gradients with respect to the responses", xlabel="3x3 layer", yscale="log")
        gradient.set_ylabel("gradient norm, relative to the last layer's")
        gradient.legend(fontsize="small")
        for panel in (by_layer, ranked):
            panel.set_ylim(bottom=0)
        for panel in (by_layer, ranked, gradient):
            panel.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main_of(main)
