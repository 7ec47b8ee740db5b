"""Train a ResNet to classify images, as ImageNet's, and evaluate it. Without --data it trains on an embedded data set.

python tools/pretrain.py                                              the embedded data set, some minutes on a CPU
python tools/pretrain.py --depth 101 --data imagenet --recipe paper --eval 10crop
python tools/pretrain.py --depth 50 --data 'imagenet/train-{000000..000146}.tar' --recipe a3 --accumulate 2
python tools/pretrain.py --depth 50 --output runs/mine --resume       goes on where it stopped
python tools/pretrain.py --eval-only runs/r101 runs/r152 --eval multiscale      an ensemble of two
"""

import json
import os
import platform
import shlex
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from benchmarks.machine import commit
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from detection.crops import make_shape_crops
from resbackbone.atomic import write_atomically
from resbackbone.checks import one_of
from resbackbone.classification.evaluate import PROTOCOLS, evaluate
from resbackbone.classification.images import LAYOUT, SYNTHETIC, Images, open_images, train_batches
from resbackbone.classification.recipes import RECIPES, Recipe
from resbackbone.classification.report import Predictions, write_report
from resbackbone.classification.training import build_average, build_loss
from resbackbone.classification.transforms import TrainAugment, to_model_input
from resbackbone.classifier import ResNetClassifier, build_resnet_classifier
from resbackbone.report.run import RunLog
from resbackbone.report.summary import print_summary
from resbackbone.resnet import DEPTHS
from resbackbone.training import loop
from resbackbone.training.command import be_quiet, console, main_of, notes, parse, refuse_command, to_config, track
from resbackbone.training.distributed import (
    Rank,
    broadcast,
    count_processes,
    distributed,
    launch,
    native_precision,
    share_buffers,
)
from resbackbone.training.optimizers import build_optimizer
from resbackbone.training.options import RunOptions, check_counts, claim_folder, resume_point, resumed, wants_resume
from resbackbone.training.run import Run, read_yaml
from resbackbone.training.state import NonFinite, TrainState, seed_step
from resbackbone.weights import read_weights, settle, write_weights
from resbackbone.weights.sources import is_named
from resbackbone.weights.write import architecture_name

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
    or synthetic: no data at all, for the speed. Default: $IMAGENET_DIR, ./datasets/imagenet, else the embedded set."""
    depth: int | None = None
    """18, 34, 50, 101 or 152. Default: the recipe's (50; demo: 18)."""
    recipe: str | None = None
    """paper, torchvision-v1, torchvision-v2, a1, a2, a3 or demo. Default: torchvision-v1; demo on the embedded set."""
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
    """Go on without images that cannot be read; they are named and counted."""


@dataclass(frozen=True)
class Options(RunOptions, Training):
    """Train a ResNet to classify images and evaluate it; without --data, on an embedded data set."""


def main(argv: list[str] | None = None) -> None:
    """Options -> a trained classifier and its accuracy, in a run folder; in one process, or in one for each GPU."""
    options = parse(Options, argv)
    if options.eval_only:
        options = complete_for_evaluation(options)
        launch(
            evaluate_only, (options,), device=options.device, processes=count_processes(options.device, options.gpus)
        )
        return
    options = complete(options)
    if wants_resume(options):
        options = complete(resumed(options, argv, default=default_folder(options), may_differ=MAY_DIFFER))
    launch(train, (options,), device=options.device, processes=count_processes(options.device, options.gpus))


def train(rank: Rank, options: Options) -> None:
    """Images -> classifier -> updates -> evaluation, in every process; rank 0 writes."""
    be_quiet(options)
    say = notes.print if rank.is_main else lambda *_: None
    draw_embedded_set(options, rank, say)
    claimed = {"default": default_folder(options), "resume": options.resume}
    folder = broadcast(claim_folder(options.output, **claimed) if rank.is_main else None, rank)
    recipe = recipe_of(options)
    say(f"run:   {folder}")
    train_set, val_set = (
        open_images(options.data, split, skip_bad_images=options.skip_bad_images) for split in ("train", "val")
    )
    if train_set.classes != val_set.classes:
        raise ValueError(f"--data {options.data}: the classes of its training and validation images differ")
    say(f"train: {train_set.summary()}\nval:   {val_set.summary()}")
    for message in sorted(train_set.skipped | val_set.skipped) if rank.is_main else ():
        console.print(f"skipped {message}")

    last = broadcast(resume_point(folder) if rank.is_main and options.resume else None, rank)
    seed_step(options.seed, 0, 0)  # every rank starts from the same weights
    model, metadata = build(options, recipe, train_set.classes, last and last / "model.safetensors")
    metadata |= {"recipe": {"name": options.recipe, **asdict(recipe)}, "accuracy": []}
    model.to(rank.device, memory_format=torch.channels_last).train()
    say(f"{metadata['architecture']}, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")

    schedule = recipe.schedule(len(train_set), options.batch_size, options.epochs)
    average = build_average(model, schedule.steps, schedule.warmup_steps) if recipe.ema else None
    if average is not None and last is not None:
        average.module.load_state_dict(load_file(last / "average.safetensors"))
    if options.compile:
        model.compile()
    optimizer = build_optimizer(
        model,
        recipe.optimizer,
        rate=schedule.rate,
        weight_decay=recipe.weight_decay,
        decay_norms=recipe.decay_norms,
    )
    state = TrainState(distributed(model, rank), optimizer, rank)
    if last is not None:
        state.load(last)
    steps = schedule.steps if options.max_steps is None else options.max_steps
    say(
        f"{'resumed at step ' + str(state.step) if last else 'from step 0'} to {steps}: {options.batch_size} images an "
        f"update{f' in {options.accumulate} parts' if options.accumulate > 1 else ''} on {rank.ranks} "
        f"{rank.device.type}, {options.precision}, learning rate {schedule.rate:g}"
    )
    effective = {**asdict(schedule), "milestones": list(schedule.milestones), "torch": str(torch.__version__)}
    effective["train_set_sha256"] = train_set.fingerprint
    if last is not None and rank.is_main and fingerprint_of(folder) != train_set.fingerprint:
        raise ValueError(f"--data {options.data}: the run in {folder} was trained on other images")
    kept = to_config(replace(options, output=None, resume=False, config=None))  # who starts from it starts a new run
    kept.pop("eval_only")
    run = Run(folder, {**kept, "effective": effective}, resumed_step=state.step, writes=rank.is_main)

    losses_of_mixed = build_loss(state.model, recipe, len(train_set.classes))
    skipped = set(train_set.skipped)

    def losses(part: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        pixels, labels = part
        return losses_of_mixed(to_model_input(pixels, rank.device), labels)

    def parts_of(batch: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
        return list(zip(*(tensor.chunk(options.accumulate) for tensor in batch), strict=True))

    def after_update(batch: tuple[Tensor, Tensor]) -> None:
        if average is not None:
            average.update(model, step=state.step)
        for message in sorted(train_set.skipped - skipped):
            console.print(f"skipped {message}")
            skipped.add(message)

    def save_model(to: Path) -> None:
        write_weights(to / "model.safetensors", model.state_dict(), metadata)
        if average is not None:
            save_file({k: v.contiguous() for k, v in average.module.state_dict().items()}, to / "average.safetensors")

    def checkpoint() -> None:
        run.save(state, save_model)
        if rank.is_main and not options.eval_period:  # else evaluations write it
            write_report(folder, network=metadata["architecture"])

    def score(protocol: str) -> dict:
        began = time.monotonic()
        tested = model if average is None else average.module
        share_buffers(tested, rank)
        predicted: list[Tensor] = []
        results = score_of([tested], val_set, rank, options, recipe, protocol=protocol, seen=predicted.append)
        run.record(state.step, {**results, "seconds": time.monotonic() - began}, kind="eval")
        if rank.is_main:
            best = predicted[0].numpy()
            shown = Predictions(val_set.classes, val_set.labels, best, None, val_set.read, val_set.name)
            write_report(folder, network=metadata["architecture"], results=results, predictions=shown)
        return results

    loop.train(
        state,
        train_batches(
            train_set,
            batch_size=options.batch_size // rank.ranks,
            transform=augmentation(recipe),
            seed=options.seed,
            rank=rank.rank,
            ranks=rank.ranks,
            start=state.step,
            workers=options.workers,
            repeats=recipe.repeats,
            device=rank.device,
        ),
        losses,
        schedule=schedule,
        steps=steps,
        images_per_update=options.batch_size,
        seed=options.seed,
        bf16=options.precision == "bf16",
        rank=rank,
        run=run,
        periods=loop.Periods(options.log_period, options.checkpoint_period, options.eval_period),
        checkpoint=checkpoint,
        evaluate=lambda: described(score("1crop")),
        bad_batch=lambda batch, error: save_batch(*batch, folder, error, rank),
        parts_of=parts_of,
        after_update=after_update,
    )

    results = None if options.data == SYNTHETIC else score(options.eval)
    if results is None:
        say("nothing is evaluated: synthetic images show the speed alone")
        if rank.is_main:
            why_not = "Nothing is evaluated: synthetic images show the speed alone."
            write_report(folder, network=metadata["architecture"], why_not=why_not)
            print_summary(folder, {}, {"report": "report.html"})
    elif rank.is_main:
        where = f"{data_name(options)}, {len(val_set)} validation images, {options.eval}"
        metadata["accuracy"] = [
            {"data": where, "metric": metric, "value": round(100 * results[key], 3), "published": "this run"}
            for key, metric in (("top1", "top-1"), ("top5", "top-5"))
        ]
        tested = model if average is None else average.module
        write_weights(folder / "model.safetensors", tested.state_dict(), metadata)
        write_results(folder / "results.json", results)
        say(f"row of MODEL_ZOO.md:\n{zoo_row(options, folder, metadata, results, train_set, val_set, rank)}")
        files = {"classifier": "model.safetensors", "results": "results.json", "report": "report.html"}
        print_summary(folder, {"top-1, top-5": f"{100 * results['top1']:.2f}%, {100 * results['top5']:.2f}%"}, files)
        console.print(described(results))
    run.close()


def complete(options: Options) -> Options:
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
            raise ValueError(f"--plain has no shortcuts, --shortcut {options.shortcut} asks for them; leave one out")
    least_one = ("batch_size", "accumulate", "epochs", "max_steps", "checkpoint_period", "log_period")
    check_counts(options, least=1, names=least_one)
    check_counts(options, least=0, names=("eval_period", "seed", "workers"))
    check_counts(options, least=32, names=("size",))
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    processes = count_processes(device, options.gpus)  # says so if the device is not there
    on_gpu = torch.device(device).type == "cuda"
    shares = processes * options.accumulate
    default_size = recipe.batch_size if on_gpu else 32
    batch_size = options.batch_size or max(1, default_size // (2 * shares)) * 2 * shares  # of pairs, for mixing
    per_part, left = divmod(batch_size, shares)
    in_parts = f"{processes} processes and {options.accumulate} parts (--accumulate)"
    if left:
        raise ValueError(f"--batch-size {batch_size} does not divide evenly over {in_parts}")
    if per_part % 2 and (recipe.mixup or recipe.cutmix):
        raise ValueError(f"--batch-size {batch_size}: recipe {recipe_name} mixes pairs, and over {in_parts} it is odd")
    return replace(
        options,
        data=data,
        recipe=recipe_name,
        depth=one_of("depth", recipe.depth if options.depth is None else options.depth, DEPTHS),
        batch_size=batch_size,
        epochs=options.epochs or recipe.epochs,
        size=options.size or recipe.size,
        device=device,
        workers=(12 if on_gpu else 0) if options.workers is None else options.workers,
        precision=one_of("precision", options.precision or native_precision(device), ("fp32", "bf16")),
    )


def fingerprint_of(folder: Path) -> str:
    """The checksum of the classes and labels that the run in `folder` was trained on."""
    return str(read_yaml(folder / "config.yaml").get("effective", {}).get("train_set_sha256"))


def find_imagenet() -> str | None:
    """ImageNet where its users keep it: $IMAGENET_DIR, ./datasets/imagenet; None if in neither."""
    places = [os.environ.get("IMAGENET_DIR"), "datasets/imagenet"]
    return next((place for place in places if place and Path(place).is_dir()), None)


def draw_embedded_set(options: Options, rank: Rank, say) -> None:
    """Say what is trained on if it is the embedded set, and draw it if it is not there."""
    if Path(options.data) != EMBEDDED:
        return
    say(f"data: the embedded set in {EMBEDDED}; for real images give --data DIR, which should hold {LAYOUT}")
    if not EMBEDDED.exists():
        say("drawing it first, some thousand images")
    if rank.is_main:
        EMBEDDED.parent.mkdir(exist_ok=True)
        make_shape_crops(EMBEDDED)
    broadcast(None, rank)


def recipe_of(options: Options) -> Recipe:
    """The recipe with what options change in it."""
    recipe = RECIPES[options.recipe]
    scale = options.size / recipe.size
    if scale != 1:
        side = recipe.shorter_side and tuple(round(scale * length) for length in recipe.shorter_side)
        sizes = {"crop": round(scale * recipe.crop), "resize": round(scale * recipe.resize), "shorter_side": side}
        recipe = replace(recipe, size=options.size, **sizes)
    return replace(recipe, ema=recipe.ema or options.ema)


def augmentation(recipe: Recipe) -> TrainAugment:
    return TrainAugment(
        recipe.size,
        shorter_side=recipe.shorter_side,
        colour=recipe.colour,
        auto_augment=recipe.auto_augment,
        erase=recipe.erase,
    )


def build(
    options: Options, recipe: Recipe, classes: list[str], checkpoint: Path | None
) -> tuple[ResNetClassifier, dict]:
    """The classifier a run starts or goes on from, and what its files say about it."""
    asked = {
        "depth": options.depth,
        "norm": options.norm,
        "shortcut": "none" if options.plain else options.shortcut,
        "stride_in_1x1": options.stride_in_1x1 or None,
    }
    source = checkpoint or options.weights
    weights = None if source is None else read_weights(source)
    if checkpoint and weights.metadata.get("classes") != classes:
        raise ValueError(f"{checkpoint}: was trained on other classes than those of {options.data}")
    zero_init = recipe.zero_init_residual and not options.plain
    model = build_resnet_classifier(num_classes=len(classes), weights=weights, zero_init_residual=zero_init, **asked)
    trunk = settle(weights, **asked)
    return model, {
        "architecture": architecture_name(trunk),
        "backbone": trunk,
        "num_classes": len(classes),
        "classes": classes,
        "source": f"tools/pretrain.py on {data_name(options)}",
    }


def score_of(
    models: list[nn.Module], val_set: Images, rank: Rank, options: Options, recipe: Recipe, *, protocol: str, **seen
):
    """The accuracy of one network, or of the averaged scores of several; names the images that it went on without."""
    skipped = set(val_set.skipped)
    results = evaluate(
        models,
        val_set,
        rank,
        protocol=protocol,
        **seen,
        crop=recipe.crop,
        resize=recipe.resize,
        batch_size=250 if rank.device.type == "cuda" else 50,
        workers=options.workers,
        bf16=options.precision == "bf16",
        progress=lambda items, total: track(items, total, "evaluate", shown=rank.is_main),
    )
    for message in sorted(val_set.skipped - skipped):
        console.print(f"skipped {message}")
    return results


def complete_for_evaluation(options: Options) -> Options:
    """What evaluation needs and was left out is that of the first run, if there is one."""
    paths = [Path(source) for source in options.eval_only if not is_named(source)]
    files = [(path if path.is_dir() else path.parent) / "config.yaml" for path in paths]
    config = next((read_yaml(file) for file in files if file.is_file()), {})
    if options.data is None:
        refuse_command("data", config.get("data"), options.eval_only[0])
    given = {name: getattr(options, name) or config.get(name) for name in ("data", "recipe", "size", "precision")}
    given["precision"] = given["precision"] or "fp32"  # as publishers of weights evaluate theirs
    if given["data"] == SYNTHETIC:
        raise ValueError(f"--data {SYNTHETIC}: synthetic images show the speed alone; give --data DIR to evaluate on")
    if given["data"] is None and not find_imagenet():
        raise ValueError(
            f"{options.eval_only[0]} does not say what it was trained on (no config.yaml); give --data DIR"
        )
    if options.recipe:
        given["size"] = options.size
    return complete(replace(options, **given, batch_size=None, accumulate=1))


def evaluate_only(rank: Rank, options: Options) -> None:
    """Classifiers and images -> accuracy, in every process; rank 0 writes."""
    be_quiet(options)
    recipe = recipe_of(options)
    files = [str(Path(run) / "model.safetensors") if Path(run).is_dir() else run for run in options.eval_only]
    val_set = open_images(options.data, "val", skip_bad_images=options.skip_bad_images)
    models = []
    for file in files:
        weights = read_weights(file)
        model = build_resnet_classifier(num_classes=len(val_set.classes), weights=weights)
        of_folders = "recipe" in weights.metadata  # in our files; elsewhere they are named otherwise
        if of_folders and weights.metadata["classes"] != val_set.classes:
            raise ValueError(f"{file}: was trained on other classes than those of {options.data}")
        models.append(model.to(rank.device, memory_format=torch.channels_last))
    say = notes.print if rank.is_main else lambda *_: None
    say(f"{' and '.join(files)} on {val_set.summary()}, {options.precision}")
    for message in sorted(val_set.skipped) if rank.is_main else ():
        console.print(f"skipped {message}")
    results = score_of(models, val_set, rank, options, recipe, protocol=options.eval)
    if rank.is_main:
        console.print(described(results))
    target = options.output
    if target is None and len(files) == 1 and not is_named(options.eval_only[0]):
        target = Path(files[0]).parent
    if rank.is_main and target is not None:
        target.mkdir(parents=True, exist_ok=True)
        write_results(target / f"results-{options.eval}.json", {**results, "models": list(options.eval_only)})
        say(f"results: {target / f'results-{options.eval}.json'}")


def default_folder(options: Options) -> Path:
    kind = "plain" if options.plain else "r"
    return Path("runs") / f"{data_name(options)}-{kind}{options.depth}-{options.recipe}"


def data_name(options: Options) -> str:
    """A short name of the data: their folder's."""
    path = Path(options.data)
    return (path.parent if ".tar" in path.name else path).resolve().name


def described(results: dict) -> str:
    return (
        f"top-1 {100 * results['top1']:.2f}%, top-5 {100 * results['top5']:.2f}% on {results['images']} images, "
        f"{results['protocol']}"
    )


def write_results(path: Path, results: dict) -> None:
    write_atomically(path, json.dumps(results, indent=2) + "\n")


def zoo_row(
    options: Options, folder: Path, metadata: dict, results: dict, train_set: Images, val_set: Images, rank: Rank
) -> str:
    """This run as a row of MODEL_ZOO.md: data, network, command, top-1, top-5, time, commit, hardware, metrics."""
    device = torch.cuda.get_device_name(rank.device) if rank.device.type == "cuda" else platform.machine()
    words = ["--config", str(folder / "config.yaml")] if options.resume else sys.argv[1:]  # what makes it anew
    cells = [
        f"{data_name(options)}, {len(train_set)} + {len(val_set)} images",
        f"{metadata['architecture']}, {options.recipe}, {options.eval}",
        f"`{shlex.join(['python', 'tools/pretrain.py', *words])}`",
        f"{100 * results['top1']:.2f}",
        f"{100 * results['top5']:.2f}",
        f"{RunLog(folder).total('seconds') / 60:.1f} min",
        commit() or "",
        f"{rank.ranks} x {device}, {options.precision}, torch {torch.__version__}",
        f"[metrics]({folder / 'metrics.jsonl'})",
    ]
    return f"| {' | '.join(cells)} |"


def save_batch(pixels: Tensor, labels: Tensor, folder: Path, error: NonFinite, rank: Rank) -> str:
    """Keep the images and labels of a batch that went wrong; returns a clause that names the file."""
    path = loop.keep_bad_batch({"images": pixels, "labels": labels}, folder, error, rank)
    return f"{error.terms} on rank {rank.rank}, its images are saved in {path}"


if __name__ == "__main__":
    main_of(main)
