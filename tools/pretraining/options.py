"""The options of tools/pretrain.py and their defaults."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from resbackbone.cli import options as shared
from resbackbone.cli.command import Auto, refuse_command
from resbackbone.cli.options import (
    MachineOptions,
    RunOptions,
    check_counts,
    check_output,
    check_shortcut,
    choose_machine,
)

import torch

from resbackbone.checks import UserError, one_of
from resbackbone.classification.data import SYNTHETIC
from resbackbone.classification.evaluate import PROTOCOLS
from resbackbone.classification.recipes import RECIPES, Recipe
from resbackbone.engine.device import INFERENCE, PRECISIONS
from resbackbone.engine.run import read_yaml
from resbackbone.resnet import DEPTHS
from resbackbone.weights.sources import is_named

EMBEDDED = Path("datasets/shape-crops")
NORMS = ("BN", "SyncBN", "GN")
MAY_DIFFER = shared.MAY_DIFFER | {"compile", "eval", "eval_only"}  # from the run that is resumed


@dataclass(frozen=True)
class DataOptions:
    data: Auto[str] = None
    """Folder with train/<class>/ and val/<class>/ (or test/), webdataset shards ('path/train-{000000..000146}.tar'),
    or synthetic: no data at all, to measure the speed. Default: $IMAGENET_DIR, ./datasets/imagenet, else the built-in
    set."""
    skip_bad_images: bool = False
    """Skip images that cannot be read; their names and number are printed."""
    workers: Auto[int] = None
    """Processes that load images, for each GPU. Default: 12 with a GPU, 0 on a CPU."""


@dataclass(frozen=True)
class NetworkOptions:
    depth: Auto[int] = None
    """18, 34, 50, 101 or 152. Default: the recipe's (50; demo: 18)."""
    weights: Auto[str] = None
    """A classifier of these classes to start from: a file, or torchvision:ResNet50_Weights.IMAGENET1K_V1. Default:
    random."""
    norm: Auto[str] = None
    """BN, SyncBN or GN. Default: that of the weights, else BN."""
    shortcut: Auto[str] = None
    """A, B or C (the paper's Sec. 4.1). Default: that of the weights, else B."""
    plain: bool = False
    """Without shortcuts: the paper's plain nets."""
    stride_in_1x1: bool = False
    """Stride in a bottleneck's first 1x1, as in the paper, instead of its 3x3, as in torchvision."""


@dataclass(frozen=True)
class TrainingOptions:
    recipe: Auto[str] = None
    """paper, torchvision-v1, torchvision-v2, a1, a2, a3 or demo. Default: torchvision-v1; demo on the built-in set."""
    batch_size: Auto[int] = None
    """Images per update, over all GPUs; the number of updates and SGD's rate are scaled with it. Default: the recipe's;
    32 on a CPU."""
    accumulate: int = 1
    """Split each batch into this many parts, one after the other, to save GPU memory."""
    epochs: Auto[int] = None
    """Length of the training; drops and warm-up are scaled with it. Default: the recipe's."""
    size: Auto[int] = None
    """Side of a training crop in pixels; test sizes change in proportion. Default: the recipe's."""
    ema: bool = False
    """Evaluate and keep a moving average of the weights, as torchvision-v2 always does."""
    compile: bool = False
    """Compile the network (torch.compile): minutes at the start for faster updates."""
    checkpoint_period: int = 2000
    """Updates between checkpoints."""


@dataclass(frozen=True)
class EvaluationOptions:
    eval: str = "1crop"
    """Final evaluation: 1crop, 10crop or multiscale."""
    eval_only: tuple[str, ...] = ()
    """Runs, weight files or named sources to evaluate instead of training; the scores of several are averaged. --data,
    --recipe (for the image sizes) and --precision default to those of the first run; without a run, fp32."""
    eval_period: int = 0
    """Updates between evaluations (1crop); 0 evaluates at the end only."""


@dataclass(frozen=True)
class Options(DataOptions, NetworkOptions, TrainingOptions, EvaluationOptions, RunOptions, MachineOptions):
    """Train a ResNet to classify images and evaluate it."""


def complete(options: Options) -> Options:
    """Fill in every option except the folder. Raises ValueError for an option that is not accepted."""
    data = options.data or find_imagenet() or str(EMBEDDED)
    default = "demo" if Path(data) == EMBEDDED else "torchvision-v1"
    recipe_name = one_of("recipe", options.recipe or default, RECIPES)
    recipe = RECIPES[recipe_name]
    one_of("evaluation", options.eval, PROTOCOLS)
    if options.norm is not None:
        one_of("norm", options.norm, NORMS)
    check_shortcut(options)
    least_one = ("batch_size", "accumulate", "epochs", "max_steps", "checkpoint_period", "log_period")
    check_counts(options, least=1, names=least_one)
    check_counts(options, least=0, names=("eval_period", "seed", "workers"))
    check_counts(options, least=32, names=("size",))
    device, processes, precision = choose_machine(options, INFERENCE if options.eval_only else PRECISIONS)
    on_gpu = torch.device(device).type == "cuda"
    shares = processes * options.accumulate
    default_size = recipe.batch_size if on_gpu else 32
    batch_size = options.batch_size or max(1, default_size // (2 * shares)) * 2 * shares  # of pairs, for mixing
    per_part, left = divmod(batch_size, shares)
    in_parts = f"{processes} processes and {options.accumulate} parts (--accumulate)"
    size = options.size or recipe.size
    if left:
        raise UserError(f"--batch-size {batch_size} does not divide evenly over {in_parts}")
    batch_norm = options.norm == "BN" or options.norm is None and options.weights is None
    if batch_norm and per_part == 1 and size <= 32:  # a channel of c5 is one number then
        raise UserError(
            f"--batch-size {batch_size}: batch norm has no statistics of one image of {size} pixels; use at least 2 "
            "images, a larger --size or --norm GN"
        )
    if per_part % 2 and (recipe.mixup or recipe.cutmix):
        raise UserError(f"--batch-size {batch_size}: recipe {recipe_name} mixes pairs; over {in_parts} it must be even")
    return replace(
        options,
        data=data,
        recipe=recipe_name,
        depth=one_of("depth", recipe.depth if options.depth is None else options.depth, DEPTHS),
        batch_size=batch_size,
        epochs=options.epochs or recipe.epochs,
        size=size,
        device=device,
        workers=(12 if on_gpu else 0) if options.workers is None else options.workers,
        precision=precision,
    )


def complete_for_evaluation(options: Options) -> Options:
    """Fill in the options for --eval-only; those that are not given come from the first run."""
    check_output(options.output)
    paths = [Path(source) for source in options.eval_only if not is_named(source)]
    files = [(path if path.is_dir() else path.parent) / "config.yaml" for path in paths]
    config = next((read_yaml(file) for file in files if file.is_file()), {})
    if options.data is None:
        refuse_command("data", config.get("data"), options.eval_only[0])
    given = {name: getattr(options, name) or config.get(name) for name in ("data", "recipe", "size", "precision")}
    if given["precision"] not in INFERENCE and not options.precision:
        given["precision"] = "fp32"  # publishers of weights evaluate in fp32
    if given["data"] == SYNTHETIC:
        raise UserError(f"--data {SYNTHETIC}: synthetic images show only the speed; give --data DIR to evaluate on")
    if given["data"] is None and not find_imagenet():
        raise UserError(f"{options.eval_only[0]} does not say what it was trained on (no config.yaml); give --data DIR")
    if options.recipe:
        given["size"] = options.size
    return complete(replace(options, **given, batch_size=None, accumulate=1))


def recipe_of(options: Options) -> Recipe:
    """The recipe with the changes that options make."""
    recipe = RECIPES[options.recipe]
    scale = options.size / recipe.size
    if scale != 1:
        crop, resize = round(scale * recipe.crop), round(scale * recipe.resize)
        recipe = replace(recipe, size=options.size, crop=crop, resize=resize)
        if recipe.shorter_side is not None:
            low, high = recipe.shorter_side
            recipe = replace(recipe, shorter_side=(round(scale * low), round(scale * high)))
    return replace(recipe, ema=recipe.ema or options.ema)


def find_imagenet() -> str | None:
    """The first of $IMAGENET_DIR and ./datasets/imagenet that exists, or None."""
    places = [os.environ.get("IMAGENET_DIR"), "datasets/imagenet"]
    return next((place for place in places if place and Path(place).is_dir()), None)


def default_folder(options: Options) -> Path:
    kind = "plain" if options.plain else "r"
    return Path("runs") / f"{data_name(options)}-{kind}{options.depth}-{options.recipe}"


def data_name(options: Options) -> str:
    """A short name of the data: their folder's."""
    path = Path(options.data)
    return (path.parent if ".tar" in path.name else path).resolve().name
