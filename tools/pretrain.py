"""Train a ResNet to classify images such as ImageNet's, and evaluate it; without --data, on the built-in data set.

python tools/pretrain.py                                              the built-in data set, some minutes on a CPU
python tools/pretrain.py --depth 101 --data imagenet --recipe paper --eval 10crop
python tools/pretrain.py --depth 50 --data 'imagenet/train-{000000..000146}.tar' --recipe a3 --accumulate 2
python tools/pretrain.py --depth 50 --output runs/mine --resume       resumes where it stopped
python tools/pretrain.py --eval-only runs/r101 runs/r152 --eval multiscale      an ensemble of two
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from resbackbone.cli.command import Auto, Hidden, Several, be_quiet, console, main_of, parse, values_in
from resbackbone.cli.errors import from_option
from resbackbone.cli.options import (
    MAY_DIFFER,
    MachineOptions,
    RunOptions,
    check_shortcut,
    check_training,
    choose_machine,
    launch_command,
    training_options,
)
from resbackbone.cli.recipes import as_config, check_rate, difference, with_values
from resbackbone.cli.training import Session, about_built_in_data, prepare_run

import torch
from torch import Tensor, nn

from detection.crops import make_shape_crops
from resbackbone.atomic import write_json
from resbackbone.checks import UserError, one_of, usual_folder
from resbackbone.classification.data import LAYOUT, SYNTHETIC, open_images, train_batches
from resbackbone.classification.evaluate import PROTOCOLS, Ensemble, Predicted, evaluate
from resbackbone.classification.images import Images
from resbackbone.classification.recipes import RECIPES, Recipe
from resbackbone.classification.report import Predictions, write_report
from resbackbone.classification.training import build_loss
from resbackbone.classification.transforms import TrainAugment, to_model_input
from resbackbone.classifier import ResNetClassifier, build_resnet_classifier
from resbackbone.engine import loop
from resbackbone.engine.average import build_average
from resbackbone.engine.best import is_best
from resbackbone.engine.device import INFERENCE, PRECISIONS
from resbackbone.engine.distributed import Rank, distributed, from_main, gather, share_buffers
from resbackbone.engine.optimizers import build_optimizer
from resbackbone.engine.run import read_yaml
from resbackbone.engine.schedule import Schedule
from resbackbone.engine.state import TrainState, seed_step
from resbackbone.engine.task import Task
from resbackbone.layers import STEMS
from resbackbone.resnet import DEPTHS
from resbackbone.weights import read_weights, write_weights
from resbackbone.weights.fit import architecture_of, resolve_architecture
from resbackbone.weights.read import backbone_part
from resbackbone.weights.sources import is_named
from resbackbone.weights.write import architecture_name

OPTION_OF = {  # values of a recipe that are options of the command
    "rate": "lr",
    **{name: name for name in ("epochs", "batch_size", "size", "depth", "clip_grad")},
}
EMBEDDED = Path("datasets/shape-crops")
IMAGENET = ({"IMAGENET_DIR": ""}, "datasets/imagenet")
NORMS = ("BN", "SyncBN", "GN")
Batch = tuple[Tensor, Tensor]  # uint8 images [B, 3, H, W], labels [B]
NOT_EVALUATED = "nothing is evaluated: synthetic images show only the speed"


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
    """18, 34, 50, 101 or 152. Default: that of the weights, else the recipe's (50; demo: 18)."""
    norm: Auto[str] = None
    """BN, SyncBN or GN. Default: that of the weights, else BN."""
    shortcut: Auto[str] = None
    """A, B or C (the paper's Sec. 4.1), or D, which averages pixels where B skips them. Default: that of the weights,
    else B."""
    stem: Auto[str] = None
    """7x7, or deep: three 3x3 convolutions, which with --shortcut D is ResNet-D. Default: that of the weights, else
    7x7."""
    plain: bool = False
    """Without shortcuts: the paper's plain nets."""
    weights: Auto[str] = None
    """Start from these instead of random ones: a file or a named source (see convert_weights.py --list). For another
    number of classes than theirs, the last layer starts from random ones."""
    stride_in_1x1: bool = False
    """Stride in a bottleneck's first 1x1, as in the paper, instead of its 3x3, as in torchvision."""


@dataclass(frozen=True)
class TrainingOptions:
    recipe: Auto[str] = None
    """paper, torchvision-v1, torchvision-v2, a1, a2, a3 or demo. Default: torchvision-v1; demo on the built-in set. The
    options below change values of it; any other is set by its name, as in --recipe.mixup 0.1."""
    print_recipe: bool = False
    """Print the recipe with every value, as a file for --config, and stop."""
    recipe_values: Hidden[str] = ()
    batch_size: Auto[int] = None
    """Images per update, over all GPUs; the number of updates and SGD's rate are scaled with it. Default: the recipe's;
    32 on a CPU."""
    lr: Auto[float] = None
    """Learning rate, for this batch size. Default: the recipe's."""
    accumulate: int = 1
    """Split each batch into this many parts, one after the other, to save GPU memory."""
    epochs: Auto[int] = None
    """Length of the training; drops and warm-up are scaled with it. Default: the recipe's."""
    ema: Auto[float] = None
    """Evaluate and keep an exponential moving average of the weights with this decay, such as 0.9998 (less at first);
    0: none. Default: the recipe's (torchvision-v2: over 3.9% of the run; others: none)."""
    clip_grad: Auto[float] = None
    """Largest norm of the gradient, which is scaled down to it; 0: no limit. Default: the recipe's (none; LAMB has its
    own limit of 1)."""
    size: Auto[int] = None
    """Side of a training crop in pixels; test sizes change in proportion. Default: the recipe's."""
    compile: bool = False
    """Compile the network (torch.compile): minutes at the start for faster updates."""
    checkpoint_period: int = 2000
    """Updates between checkpoints."""


@dataclass(frozen=True)
class EvaluationOptions:
    eval: str = "1crop"
    """Final evaluation: 1crop, 10crop or multiscale."""
    eval_only: Several[str] = ()
    """Runs, weight files or named sources to evaluate instead of training; the scores of several are averaged. --data,
    --recipe (for the image sizes) and --precision default to those of the first; without a run, fp32."""
    eval_period: int = 0
    """Updates between evaluations (1crop); 0 evaluates at the end only. With intermediate evaluations, best/ in
    the run's folder keeps the weights of the best one."""
    early_stop: int = 0
    """Stop after this many evaluations in a row without a better one; 0: never. Needs --eval-period."""


@dataclass(frozen=True)
class Options(DataOptions, NetworkOptions, TrainingOptions, EvaluationOptions, RunOptions, MachineOptions):
    """Train a ResNet to classify images and evaluate it."""


def main(argv: list[str] | None = None) -> None:
    """Options -> a trained classifier and its accuracy, in a run folder; in one process, or in one for each GPU."""
    options = parse(Options, argv)
    if options.print_recipe:
        completed = complete(options)
        console.print(as_config(replace(options, recipe=completed.recipe), recipe_of(completed), OPTION_OF))
        return
    if options.eval_only:
        launch_command(evaluate_only, complete_for_evaluation(options))
        return
    may_differ = MAY_DIFFER | {"compile", "eval"}
    launch_command(train, training_options(options, argv, complete, default_folder, may_differ))


def train(rank: Rank, options: Options) -> None:
    """Images -> classifier -> updates -> evaluation, in every process; rank 0 writes."""
    session = prepare_run(rank, options, default=default_folder(options))
    train_set, val_set = open_data(session)
    recipe = recipe_of(options)
    if changes := difference(RECIPES[options.recipe], recipe, options, OPTION_OF):
        session.info(f"recipe: {options.recipe}, but {changes}")

    seed_step(options.seed, 0, 0)  # every rank starts from the same weights
    checkpoint = session.checkpoint
    model, metadata = build(options, recipe, train_set.classes, checkpoint and checkpoint / "model.safetensors")
    model.to(rank.device).to(memory_format=torch.channels_last).train()
    session.info(f"{metadata['architecture']}, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")

    schedule = recipe.schedule(len(train_set), options.batch_size, options.epochs)
    if options.lr is not None:
        schedule = replace(schedule, rate=options.lr)
    average = average_of(model, options, recipe, schedule)
    if options.compile:
        model.compile()
    rate, decay, norms = schedule.rate, recipe.weight_decay, recipe.decay_norms
    optimizer = build_optimizer(model, recipe.optimizer, rate=rate, weight_decay=decay, decay_norms=norms)
    more: dict[str, Any] = {"clip_grad": recipe.clip_grad, "scaled": options.precision == "fp16", "average": average}
    state = TrainState(distributed(model, rank), optimizer, rank, **more)
    task = Classification(session, metadata, train_set, val_set)
    more = {"training_images": len(train_set), "validation_images": len(val_set), "classes": len(train_set.classes)}
    run = session.train(task, state, schedule, **more, train_set_sha256=train_set.fingerprint)

    if options.data == SYNTHETIC:
        session.info(NOT_EVALUATED)
        session.finish({})
    else:
        results = loop.evaluate(task, state, run, final=True)
        skipped = gather(train_set.skipped, rank)
        if rank.is_main:
            bad = {"skipped_images": sorted(val_set.skipped), "skipped_training_images": sorted(set().union(*skipped))}
            finish(session, task, state.evaluated, {**results, **bad})
    run.close()


def open_data(session: Session) -> tuple[Images, Images]:
    """The images to train on and to validate on."""
    options, rank = session.options, session.rank
    if Path(options.data) == EMBEDDED:
        session.info(about_built_in_data(EMBEDDED, LAYOUT))
        from_main(partial(make_shape_crops, EMBEDDED), rank)
    opened = partial(open_images, options.data, skip_bad_images=options.skip_bad_images)
    with from_option("--data"):
        train_set, val_set = (from_main(partial(opened, split), rank) for split in ("train", "val"))
    if train_set.classes != val_set.classes:
        differing = ", ".join(sorted({*train_set.classes} ^ {*val_set.classes})) or "their order"
        raise UserError(f"--data {options.data}: the classes of train and val differ: {differing}")
    session.info(f"train: {train_set.summary()}\nval:   {val_set.summary()}")
    return train_set, val_set


class Classification(Task):
    """A classifier on labelled images."""

    def __init__(self, session: Session, metadata: dict, train_set: Images, val_set: Images):
        self.session, self.options, self.rank = session, session.options, session.rank
        self.recipe = recipe = recipe_of(session.options)
        self.metadata, self.train_set, self.val_set = metadata, train_set, val_set
        self.final_differs = session.options.eval != "1crop"
        self.losses_of = build_loss(recipe, len(train_set.classes))
        self.predictions: Predictions | None = None

    def batches(self, start: int) -> Iterator[Batch]:
        recipe = self.recipe
        return train_batches(
            self.train_set,
            batch_size=self.options.batch_size // self.rank.ranks,
            transform=TrainAugment(
                recipe.size,
                shorter_side=recipe.shorter_side,
                pca=recipe.pca,
                auto_augment=recipe.auto_augment,
                erase=recipe.erase,
            ),
            seed=self.options.seed,
            rank=self.rank.rank,
            ranks=self.rank.ranks,
            start=start,
            workers=self.options.workers,
            repeats=recipe.repeats,
            device=self.rank.device,
        )

    def parts(self, batch: Batch) -> list[Batch]:
        return list(zip(*(tensor.chunk(self.options.accumulate) for tensor in batch), strict=True))

    def losses(self, model: nn.Module, part: Batch) -> Mapping[str, Tensor]:
        pixels, labels = part
        return self.losses_of(model, to_model_input(pixels, self.rank.device), labels)

    def after_update(self, batch: Batch, step: int) -> Mapping[str, float]:
        self.session.warn_skipped(self.train_set.skipped)
        return {}

    def save(self, model: nn.Module, folder: Path) -> None:
        write_weights(folder / "model.safetensors", model.state_dict(), self.metadata)

    def evaluate(self, model: nn.Module, *, final: bool) -> dict:
        share_buffers(model, self.rank)
        protocol, val_set = self.options.eval if final else "1crop", self.val_set
        results, found = score_of(model, val_set, self.session, self.recipe, protocol=protocol)
        if found is not None:
            best, losses = found.best.numpy(), found.losses.numpy()
            self.predictions = Predictions(val_set.classes, val_set.labels, best, val_set.read, val_set.name, losses)
        return results

    def score(self, result: Mapping) -> float:
        return result["top1"]

    def summary(self, result: Mapping) -> str:
        return described(result)

    def write_report(self, folder: Path) -> None:
        why_not = {"why_not": NOT_EVALUATED} if self.options.data == SYNTHETIC else {}
        write_report(folder, network=self.metadata["architecture"], predictions=self.predictions, **why_not)


def finish(session: Session, task: Classification, model: nn.Module, results: dict) -> None:
    """Write the classifier and results.json; print the results."""
    task.save(model, session.folder)
    write_json(session.folder / "results.json", results)
    session.finish({"top-1, top-5": f"{100 * results['top1']:.2f}%, {100 * results['top5']:.2f}%"})
    console.print(described(results))


def average_of(model: nn.Module, options: Options, recipe: Recipe, schedule: Schedule):
    """The moving average that --ema or the recipe asks for, or None; the recipe's starts after the rate's warm-up."""
    if options.ema is not None:
        return build_average(model, options.ema) if options.ema else None
    if not recipe.ema_window:
        return None
    decay = max(0.0, 1 - 1 / (recipe.ema_window * schedule.steps))
    return build_average(model, decay, after=schedule.warmup_steps)


def build(
    options: Options, recipe: Recipe, classes: list[str], checkpoint: Path | None
) -> tuple[ResNetClassifier, dict]:
    """Build the classifier that a run starts or resumes from; returns it with the metadata of its files."""
    asked: dict[str, Any] = {
        "depth": options.depth,
        "norm": options.norm,
        "stem": options.stem,
        "shortcut": "none" if options.plain else options.shortcut,
        "stride_in_1x1": options.stride_in_1x1 or None,
    }
    source = checkpoint or options.weights
    weights = None if source is None else read_weights(source)
    if checkpoint and weights.metadata.get("classes") != classes:
        raise UserError(f"{checkpoint}: was trained on other classes than those of {options.data}; give its data")
    zero_init = recipe.zero_init_residual and not options.plain
    more = {**asked, "zero_init_residual": zero_init, "new_classes": not checkpoint}
    model = build_resnet_classifier(num_classes=len(classes), weights=weights, **more)
    trunk = resolve_architecture(weights, **asked)
    return model, {
        "architecture": architecture_name(trunk),
        "backbone": trunk,
        "num_classes": len(classes),
        "classes": classes,
        "source": f"tools/pretrain.py on {data_name(options)}",
        "recipe": {"name": options.recipe, **asdict(recipe)},
    }


def evaluate_only(rank: Rank, options: Options) -> None:
    """Classifiers and images -> accuracy, in every process; rank 0 writes."""
    be_quiet(options)
    session = Session(options, rank)
    files = [str(Path(run) / "model.safetensors") if Path(run).is_dir() else run for run in options.eval_only]
    with from_option("--data"):
        val_set = from_main(lambda: open_images(options.data, "val", skip_bad_images=options.skip_bad_images), rank)
    models = []
    for file in files:
        weights = read_weights(file)
        models.append(build_resnet_classifier(num_classes=len(val_set.classes), weights=weights))
        # Only files of this command name the classes by their folders.
        ours = str(weights.metadata.get("source")).startswith("tools/pretrain.py ")
        if ours and weights.metadata["classes"] != val_set.classes:
            raise UserError(f"{file}: was trained on other classes than those of {options.data}; give its data")
    model = models[0] if len(models) == 1 else Ensemble(models)
    model.to(rank.device).to(memory_format=torch.channels_last)
    session.info(f"{' and '.join(files)} on {val_set.summary()}, {options.precision}")
    results, _ = score_of(model, val_set, session, recipe_of(options), protocol=options.eval)
    if rank.is_main:
        console.print(described(results))
    if rank.is_main and options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        path = options.output / f"results-{options.eval}.json"
        write_json(path, {**results, "models": options.eval_only, "skipped_images": sorted(val_set.skipped)})
        session.info(f"results: {path}")


def score_of(
    model: nn.Module, val_set: Images, session: Session, recipe: Recipe, *, protocol: str
) -> tuple[dict, Predicted | None]:
    """`evaluate` of a network; prints which images it skips."""
    results = evaluate(
        model,
        val_set,
        session.rank,
        crop=recipe.crop,
        resize=recipe.resize,
        batch_size=250 if session.rank.device.type == "cuda" else 50,
        workers=session.options.workers,
        bf16=session.options.precision == "bf16",
        progress=session.track,
        protocol=protocol,
    )
    session.warn_skipped(val_set.skipped)
    return results


def described(results: Mapping) -> str:
    return (
        f"top-1 {100 * results['top1']:.2f}%, top-5 {100 * results['top5']:.2f}% on {results['images']} images, "
        f"{results['protocol']}"
    )


def complete(options: Options) -> Options:
    """Fill in every option except the folder. Raises ValueError for an option that is not accepted."""
    data = str(options.data or usual_folder(*IMAGENET) or EMBEDDED)
    data = str(EMBEDDED) if Path(data) == EMBEDDED.absolute() else data  # as a run that is resumed has it
    default = "demo" if Path(data) == EMBEDDED else "torchvision-v1"
    recipe_name = one_of("recipe", options.recipe or default, RECIPES)
    recipe = with_values(RECIPES[recipe_name], options.recipe_values, OPTION_OF)
    check_rate(RECIPES[recipe_name], recipe, recipe_name, options.lr)
    one_of("evaluation", options.eval, PROTOCOLS)
    check_training(options)
    if data == SYNTHETIC and options.eval_period:
        raise UserError(f"--eval-period {options.eval_period}: synthetic images are not evaluated; leave it out")
    if options.norm is not None:
        one_of("norm", options.norm, NORMS)
    check_shortcut(options, "ABCD")
    if options.stem is not None:
        one_of("stem", options.stem, STEMS)
    device, processes, precision = choose_machine(options, INFERENCE if options.eval_only else PRECISIONS)
    on_gpu = torch.device(device).type == "cuda"
    shares = processes * options.accumulate
    default_size = recipe.batch_size if on_gpu else 32
    batch_size = options.batch_size or max(1, default_size // (2 * shares)) * 2 * shares  # of pairs, for mixing
    per_part, left = divmod(batch_size, shares)
    in_parts = f"{shares} (processes times --accumulate)"
    size = options.size or recipe.size
    if left:
        raise UserError(f"--batch-size {batch_size}: must be a multiple of {in_parts}")
    batch_norm = options.norm in ("BN", "SyncBN") or options.norm is None and options.weights is None
    if per_part == 1 and size <= 32 and batch_norm:  # a channel of c5 is one number then
        raise UserError(
            f"--batch-size {batch_size}: batch norm has no statistics of one image of {size} pixels; use at least 2 "
            "images, a larger --size or --norm GN"
        )
    if per_part % 2 and (recipe.mixup or recipe.cutmix):
        raise UserError(
            f"--batch-size {batch_size}: recipe {recipe_name} mixes pairs: must be a multiple of {2 * shares}"
        )
    depth = (depth_of_weights(options) or recipe.depth) if options.depth is None else options.depth
    return replace(
        options,
        data=data,
        recipe=recipe_name,
        depth=one_of("depth", depth, DEPTHS),
        batch_size=batch_size,
        epochs=options.epochs or recipe.epochs,
        size=size,
        device=device,
        workers=(12 if on_gpu else 0) if options.workers is None else options.workers,
        precision=precision,
    )


def depth_of_weights(options: Options) -> int | None:
    """The depth of the weights to start from, if there are any and it shows."""
    if options.weights is None:
        return None
    return architecture_of(backbone_part(read_weights(options.weights).state)).get("depth")


def complete_for_evaluation(options: Options) -> Options:
    """Fill in the options for --eval-only; those that are not given come from its first run."""
    first, output, config = options.eval_only[0], options.output, {}
    for run in options.eval_only:
        if not is_named(run) and not Path(run).exists():
            raise UserError(
                f"--eval-only {run}: no such run folder or file; give one, or a named source (torchvision:..)"
            )
    if not is_named(first):
        path = Path(first)
        folder = path if path.is_dir() else path.parent
        if len(options.eval_only) == 1:  # the results of several belong to none of their folders
            output = output or (folder.resolve().with_name("eval-best") if is_best(folder) else folder)
        config = read_yaml(folder / "config.yaml") if (folder / "config.yaml").is_file() else {}
        if config and config.get("recipe") not in RECIPES:
            raise UserError(f"--eval-only {first}: a run of another command; give one of pretrain.py")
    given = {name: getattr(options, name) or config.get(name) for name in ("data", "recipe", "size", "precision")}
    if given["precision"] not in INFERENCE and not options.precision:
        given["precision"] = "fp32"  # publishers of weights evaluate in fp32
    if given["data"] == SYNTHETIC:
        raise UserError(f"--data {SYNTHETIC}: synthetic images show only the speed; give --data DIR to evaluate on")
    if given["data"] is None and not usual_folder(*IMAGENET):
        raise UserError(f"{first} does not say what it was trained on (no config.yaml); give --data DIR")
    if options.recipe:
        given["size"] = options.size
    elif config:
        given["recipe_values"] = values_in(config) if not options.recipe_values else options.recipe_values
    return complete(replace(options, **given, output=output, batch_size=None, accumulate=1))


def recipe_of(options: Options) -> Recipe:
    """The recipe with the changes that options make."""
    recipe = with_values(RECIPES[options.recipe], options.recipe_values, OPTION_OF)
    scale = options.size / recipe.size
    low, high = recipe.shorter_side or (0, 0)
    return replace(
        recipe,
        size=options.size,
        shorter_side=recipe.shorter_side and (round(scale * low), round(scale * high)),
        crop=round(scale * recipe.crop),
        resize=round(scale * recipe.resize),
        clip_grad=recipe.clip_grad if options.clip_grad is None else options.clip_grad or None,
    )


def default_folder(options: Options) -> Path:
    kind = "plain" if options.plain else "r"
    return Path("runs") / f"{data_name(options)}-{kind}{options.depth}-{options.recipe}"


def data_name(options: Options) -> str:
    """A short name of the data: their folder's."""
    path = Path(options.data)
    return (path.parent if ".tar" in path.name else path).resolve().name


def run() -> None:
    main_of(main)


if __name__ == "__main__":
    run()
