"""What a pretraining can be asked for, and what is meant where that is left open."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from resbackbone.cli.command import refuse_command
from resbackbone.cli.options import RunOptions, check_counts

import torch

from resbackbone.checks import UserError, one_of
from resbackbone.classification.data import SYNTHETIC
from resbackbone.classification.evaluate import PROTOCOLS
from resbackbone.classification.recipes import RECIPES, Recipe
from resbackbone.engine.device import INFERENCE, PRECISIONS, choose_device, choose_precision
from resbackbone.engine.distributed import count_processes
from resbackbone.engine.run import read_yaml
from resbackbone.resnet import DEPTHS
from resbackbone.weights.sources import is_named

EMBEDDED = Path("datasets/shape-crops")
NORMS = ("BN", "SyncBN", "GN")
MAY_DIFFER = {  # from the run that is resumed: where it runs and how long, and what is said of it
    *("data", "output", "max_steps", "device", "gpus", "workers", "skip_bad_images", "compile", "resume", "config"),
    *("checkpoint_period", "eval_period", "log_period", "eval", "eval_only"),
}


@dataclass(frozen=True)
class Training:
    """What is trained on what, and how it is evaluated."""

    data: str | None = None
    """Folder with train/<class>/ and val/<class>/ (or test/), webdataset shards ('path/train-{000000..000146}.tar'),
    or synthetic: no data at all, for the speed. Default: $IMAGENET_DIR, ./datasets/imagenet, else the built-in set."""
    depth: int | None = None
    """18, 34, 50, 101 or 152. Default: the recipe's (50; demo: 18)."""
    recipe: str | None = None
    """paper, torchvision-v1, torchvision-v2, a1, a2, a3 or demo. Default: torchvision-v1; demo on the built-in set."""
    batch_size: int | None = None
    """Images an update, over all GPUs; steps follow, and SGD's rate. Default: the recipe's; 32 on a CPU."""
    accumulate: int = 1
    """Parts a batch goes through the network in, one after the other, for what a GPU's memory does not hold."""
    epochs: int | None = None
    """Length of the training; drops and warm-up follow. Default: the recipe's."""
    size: int | None = None
    """Side of a training crop in pixels; the test images follow in proportion. Default: the recipe's."""
    weights: str | None = None
    """A classifier of these classes to start from: a file, or torchvision:ResNet50_Weights.IMAGENET1K_V1. Default:
    random."""
    norm: str | None = None
    """BN, SyncBN or GN. Default: that of the weights, else BN."""
    shortcut: str | None = None
    """A, B or C (the paper's Sec. 4.1). Default: that of the weights, else B."""
    plain: bool = False
    """Without shortcuts: the paper's plain nets."""
    stride_in_1x1: bool = False
    """A bottleneck's stride in its first 1x1, as the paper has it, not in the 3x3, as torchvision does."""
    ema: bool = False
    """Evaluate and keep a moving average of the weights, which torchvision-v2 does anyhow."""
    eval: str = "1crop"
    """1crop, 10crop or multiscale: how the network is tested at the end."""
    eval_only: tuple[str, ...] = ()
    """Runs, weight files or named sources to evaluate instead of training; of several, the averaged scores. What
    --data, --recipe (for the images' sizes) and --precision leave open is as in the first run; without a run, fp32."""
    checkpoint_period: int = 2000
    """Updates between checkpoints."""
    eval_period: int = 0
    """Updates between evaluations (1crop); 0 evaluates at the end only."""
    workers: int | None = None
    """Processes that load images, for each GPU. Default: 12 with a GPU, 0 on a CPU."""
    compile: bool = False
    """Compile the network (torch.compile): minutes at the start for faster updates."""
    skip_bad_images: bool = False
    """Skip images that cannot be read; name and count them."""


@dataclass(frozen=True)
class PretrainOptions(RunOptions, Training):
    """What pretrain.py is asked for."""


def complete(options: PretrainOptions) -> PretrainOptions:
    """Every option that was left out gets its value, but for the folder; ValueError for one that is not there."""
    data = options.data or find_imagenet() or str(EMBEDDED)
    default = "demo" if Path(data) == EMBEDDED else "torchvision-v1"
    recipe_name = one_of("recipe", options.recipe or default, RECIPES)
    recipe = RECIPES[recipe_name]
    one_of("evaluation", options.eval, PROTOCOLS)
    if options.norm is not None:
        one_of("norm", options.norm, NORMS)
    if options.shortcut is not None:
        one_of("shortcut", options.shortcut, ("A", "B", "C"), " (or --plain)")
        if options.plain:
            raise UserError(f"--plain has no shortcuts, --shortcut {options.shortcut} asks for them; leave one out")
    least_one = ("batch_size", "accumulate", "epochs", "max_steps", "checkpoint_period", "log_period")
    check_counts(options, least=1, names=least_one)
    check_counts(options, least=0, names=("eval_period", "seed", "workers"))
    check_counts(options, least=32, names=("size",))
    device = choose_device(options.device)
    processes = count_processes(device, options.gpus)
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
            f"--batch-size {batch_size}: that is one image of {size} pixels at a time, of which batch norm has no "
            "statistics; take 2 or more, a larger --size or --norm GN"
        )
    if per_part % 2 and (recipe.mixup or recipe.cutmix):
        raise UserError(f"--batch-size {batch_size}: recipe {recipe_name} mixes pairs, and over {in_parts} it is odd")
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
        precision=choose_precision(options.precision, device, INFERENCE if options.eval_only else PRECISIONS),
    )


def complete_for_evaluation(options: PretrainOptions) -> PretrainOptions:
    """What evaluation needs and was left out is that of the first run, if there is one."""
    paths = [Path(source) for source in options.eval_only if not is_named(source)]
    files = [(path if path.is_dir() else path.parent) / "config.yaml" for path in paths]
    config = next((read_yaml(file) for file in files if file.is_file()), {})
    if options.data is None:
        refuse_command("data", config.get("data"), options.eval_only[0])
    given = {name: getattr(options, name) or config.get(name) for name in ("data", "recipe", "size", "precision")}
    if given["precision"] not in INFERENCE and not options.precision:
        given["precision"] = "fp32"  # as publishers of weights evaluate theirs
    if given["data"] == SYNTHETIC:
        raise UserError(f"--data {SYNTHETIC}: synthetic images show the speed alone; give --data DIR to evaluate on")
    if given["data"] is None and not find_imagenet():
        raise UserError(f"{options.eval_only[0]} does not say what it was trained on (no config.yaml); give --data DIR")
    if options.recipe:
        given["size"] = options.size
    return complete(replace(options, **given, batch_size=None, accumulate=1))


def recipe_of(options: PretrainOptions) -> Recipe:
    """The recipe with what options change in it."""
    recipe = RECIPES[options.recipe]
    scale = options.size / recipe.size
    if scale != 1:
        side = recipe.shorter_side and tuple(round(scale * length) for length in recipe.shorter_side)
        sizes = {"crop": round(scale * recipe.crop), "resize": round(scale * recipe.resize), "shorter_side": side}
        recipe = replace(recipe, size=options.size, **sizes)
    return replace(recipe, ema=recipe.ema or options.ema)


def find_imagenet() -> str | None:
    """ImageNet where its users keep it: $IMAGENET_DIR, ./datasets/imagenet; None if in neither."""
    places = [os.environ.get("IMAGENET_DIR"), "datasets/imagenet"]
    return next((place for place in places if place and Path(place).is_dir()), None)


def default_folder(options: PretrainOptions) -> Path:
    kind = "plain" if options.plain else "r"
    return Path("runs") / f"{data_name(options)}-{kind}{options.depth}-{options.recipe}"


def data_name(options: PretrainOptions) -> str:
    """A short name of the data: their folder's."""
    path = Path(options.data)
    return (path.parent if ".tar" in path.name else path).resolve().name
