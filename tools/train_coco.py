"""Train Faster R-CNN on COCO-format data and evaluate it. Without --data it trains on the built-in data set.

python tools/train_coco.py                                            the built-in data set, minutes on a CPU
python tools/train_coco.py --data my_folder --weights torchvision:FasterRCNN_ResNet50_FPN_Weights.COCO_V1   own classes
python tools/train_coco.py --data coco --depth 50 --weights torchvision:ResNet50_Weights.IMAGENET1K_V1
python tools/train_coco.py --data coco --depth 50 --output runs/mine --resume     continues where it stopped
"""

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from resbackbone.cli.command import be_quiet, console, main_of, parse, progress_console, to_config, track
from resbackbone.cli.errors import from_option
from resbackbone.cli.options import check_counts, claim_folder, resume_point, resumed, wants_resume

import torch

from detection.annotations import count_images
from detection.config import BACKBONE_OF, VARIANTS
from detection.data import EMBEDDED, embedded_data, find_coco, open_checked, train_batches
from detection.evaluate import Evaluation, evaluate, results_summary, results_table, write_results
from detection.faster_rcnn import (
    FasterRCNN,
    build_faster_rcnn,
    load_detector,
    prepare_for_detection,
    read_described_weights,
    retarget_detector,
    save_detector,
)
from detection.foreign import NOT_A_CLASS
from detection.layouts import LAYOUT, describe_layout, find_split
from detection.paper import VGG16_DEPTH, build_vgg16_backbone, load_vgg16
from detection.recipes import RECIPES, SMALL_DATA, Recipe, default_recipe
from detection.report import save_pictures, write_report
from detection.sampler import TrainBatches
from detection.scoring import BACKENDS
from detection.transforms import TrainTransform
from resbackbone import build_resnet_backbone
from resbackbone.checks import UserError, one_of
from resbackbone.engine import loop
from resbackbone.engine.device import arithmetic, choose_device, choose_precision, use_deterministic
from resbackbone.engine.distributed import (
    Rank,
    count_processes,
    distributed,
    from_main,
    gather,
    launch,
    share_buffers,
)
from resbackbone.engine.optimizers import build_optimizer
from resbackbone.engine.run import Run, read_yaml
from resbackbone.engine.state import NonFinite, TrainState, seed_step
from resbackbone.report.numbers import percent
from resbackbone.report.summary import summary
from resbackbone.resnet import DEPTHS
from resbackbone.weights import Weights
from resbackbone.weights.fit import architecture_of, backbone_part, resolve_architecture

ENGINES = ("torchvision", "detectron2")
A_DETECTOR = "torchvision:FasterRCNN_ResNet50_FPN_Weights.COCO_V1"
MAY_DIFFER = {  # from the run that is resumed: where it runs and how long, and getting past a broken image
    *("data", "output", "max_steps", "device", "gpus", "workers", "skip_bad_images", "resume", "config"),
    *("checkpoint_period", "eval_period", "log_period", "pictures", "coco_backend"),
}


@dataclass(frozen=True)
class Options:
    """Train Faster R-CNN on COCO-format data and evaluate it; without --data, on the built-in data set."""

    data: Path | None = None
    """Folder with COCO's annotations/instances_{train,val}2017.json, train2017/ and val2017/, Roboflow's
    {train,valid}/_annotations.coco.json, or annotations/instances_{train,val}.json, train/ and val/; without a
    validation split, one image in ten is held out for it. Default: $DETECTRON2_DATASETS/coco, $COCO_DIR or
    ./datasets/coco, else the built-in data set."""
    depth: int | None = None
    """18, 34, 50, 101 or 152 (vgg16: 16). Default: that of --weights, else the recipe's (50; short: 18)."""
    variant: str | None = None
    """fpn, c4 (the ResNet paper's detector), dc5 or vgg16 (the paper's baseline). Default: that of --weights where they
    are a detector's, else the recipe's (fpn)."""
    engine: str = "torchvision"
    """Whose detector and trainer: torchvision (this package's own loop) or detectron2, where that is installed."""
    recipe: str | None = None
    """1x, 2x, 3x, small, short, or the ResNet paper's paper-r101-c4, paper-r101-c4-context or paper-vgg16-c5. Default:
    1x; small (12 epochs, 16,000 images at least) for under 40,000 images; short on the built-in data set."""
    weights: str | None = None
    """What to start from: a backbone's or a classifier's file (.safetensors, .pth, ..) or named source
    (torchvision:ResNet50_Weights.IMAGENET1K_V1), or a Faster R-CNN's, of these or other classes: a run's
    model.safetensors, torchvision:FasterRCNN_ResNet50_FPN_Weights.COCO_V1. Default: random."""
    norm: str | None = None
    """BN, FrozenBN, SyncBN or GN. Default: FrozenBN with weights, else the recipe's (BN)."""
    frozen_through: str | None = None
    """auto, none, stem or c2 .. c5. auto (default) is the recipe's with weights (c2; vgg16: stem), none without."""
    output: Path | None = None
    """The run's folder. Default: a new one under runs/."""
    max_steps: int | None = None
    """Stop after this many updates, wherever the schedule is then."""
    batch_size: int | None = None
    """Images an update, over all GPUs; rate and steps follow. Default: the recipe's (16); 2 on a CPU but for short."""
    checkpoint_period: int | None = None
    """Updates between checkpoints. Default: the recipe's (5000; short: 200)."""
    eval_period: int = 0
    """Updates between evaluations; 0 evaluates at the end only."""
    log_period: int = 20
    """Updates between lines of metrics."""
    pictures: int = 12
    """Pictures of predictions beside ground truth to draw at the end."""
    coco_backend: str = "hotcoco"
    """What scores: hotcoco, or pycocotools, whose numbers are the same and which takes some hundred times as long."""
    seed: int = 0
    """Weights, order, augmentation and sampling are functions of it."""
    device: str | None = None
    """cuda, cuda:N, cpu or mps. Default: all GPUs if there are any."""
    gpus: int | None = None
    """How many of this machine's GPUs. Default: all."""
    workers: int | None = None
    """Processes that load images, for each GPU. Default: 6 with a GPU, 0 on a CPU."""
    precision: str | None = None
    """fp32, bf16, or fp16 for GPUs without bf16 such as V100 and T4 (both autocast). Default: bf16 where the device
    computes in it."""
    deterministic: bool = False
    """Use only deterministic algorithms, so that a GPU repeats a run bit for bit (slower). A CPU always does."""
    keep_empty: bool = False
    """Train on images without objects too."""
    skip_bad_images: bool = False
    """Skip images that cannot be read; name and count them."""
    resume: bool = False
    """Continue the run in --output (default: the latest of this name) from its last checkpoint."""
    config: Path | None = None
    """YAML file with options, such as another run's config.yaml; flags override it."""
    quiet: bool = False
    """Print only warnings, errors and the result."""


def main(argv: list[str] | None = None) -> None:
    """Options -> a trained detector and its AP, in a run folder; in one process, or in one for each GPU."""
    options = complete(parse(Options, argv))
    if wants_resume(options):
        options = complete(resumed(options, argv, default=default_folder(options), may_differ=MAY_DIFFER))
    launch(train, (options,), device=options.device, processes=count_processes(options.device, options.gpus))


def train(rank: Rank, options: Options) -> None:
    """Data -> detector -> updates -> evaluation, in every process; rank 0 writes."""
    be_quiet(options)
    use_deterministic(options.deterministic)
    say = progress_console.print if rank.is_main else lambda *_: None
    if options.data == EMBEDDED:
        say(
            f"data: the built-in data set in {EMBEDDED}; to train on yours, give --data DIR, which should hold {LAYOUT}"
        )
        if not EMBEDDED.exists():
            say("drawing it first (a few thousand images)")
        from_main(embedded_data, rank)
    claimed = {"default": default_folder(options), "resume": options.resume}
    folder = from_main(lambda: claim_folder(options.output, **claimed), rank)
    recipe = RECIPES[options.recipe]
    say(f"run:   {folder}")
    if options.data != EMBEDDED:
        with from_option("--data"):
            say(f"data:  {describe_layout(options.data)}")

    transform = TrainTransform(recipe.short_sides, recipe.max_size)
    images = {"keep_empty": options.keep_empty, "skip_bad_images": options.skip_bad_images}
    train_set = from_main(lambda: open_checked(options.data, "train", transform=transform, **images), rank)
    images |= {"keep_empty": True, "categories": train_set.categories}
    val_set = from_main(lambda: open_checked(options.data, "val", **images), rank)
    say(f"train: {train_set.summary()}\nval:   {val_set.summary()}")
    if options.engine == "detectron2":
        detectron2_engine().train_with_detectron2(rank, options, folder, train_set=train_set, val_set=val_set)
        return

    last = from_main(lambda: resume_point(folder), rank) if options.resume else None
    seed_step(options.seed, 0, 0)  # every rank starts from the same weights
    if last is None:
        detector = build(options, recipe, train_set.categories, say)
    else:
        detector = load_detector(last / "model.safetensors")
    if dict(detector.categories) != train_set.categories:
        raise UserError(f"{last}: was trained on other categories than those of {options.data}")
    detector.to(rank.device, memory_format=torch.channels_last).train()
    say(detector.backbone.summary())

    optimizer = build_optimizer(
        detector,
        recipe.optimizer,
        rate=recipe.schedule.rate,
        weight_decay=recipe.weight_decay,
        decay_norms=recipe.optimizer == "sgd",  # as in Detectron
    )
    fp16 = options.precision == "fp16"
    state = TrainState(distributed(detector, rank), optimizer, rank, clip_grad=recipe.clip_grad, scaled=fp16)
    if last is not None:
        state.load(last)
    schedule = recipe.schedule_for(options.batch_size, images=len(train_set))
    steps = schedule.steps if options.max_steps is None else options.max_steps
    effective = {**asdict(schedule), "milestones": list(schedule.milestones), **arithmetic(rank.device)}
    if options.recipe == "small":
        epochs = schedule.steps * options.batch_size / len(train_set)
        say(
            f"recipe: small, the one for data under {SMALL_DATA:,} images: {schedule.steps} updates, {epochs:.0f} "
            f"epochs of these {len(train_set)}; --recipe and --max-steps choose others"
        )
        if not options.weights:
            say(f"weights: random; so few images are better started from a detector: --weights {A_DETECTOR}")
    say(
        f"{'resumed at step ' + str(state.step) if last else 'from step 0'} to {steps}: {options.batch_size} images an "
        f"update on {rank.ranks} {rank.device.type}, {options.precision}, learning rate {schedule.rate:g}"
    )
    batches = TrainBatches(
        train_set,
        batch_size=options.batch_size,
        seed=options.seed,
        rank=rank.rank,
        ranks=rank.ranks,
        start=state.step,
    )
    effective["train_annotations_sha256"] = train_set.fingerprint
    effective["validation"] = val_set.origin
    if last is not None and fingerprint_of(folder) != train_set.fingerprint and rank.is_main:
        raise UserError(f"--data {options.data}: the run in {folder} was trained on other annotations")
    kept = replace(options, output=None, resume=False, config=None)  # a run that starts from this file is a new one
    config = {**to_config(kept), "effective": effective}
    run = Run(folder, config, resumed_step=state.step, writes=rank.is_main)

    def checkpoint() -> None:
        run.save(state, lambda to: save_detector(detector, to / "model.safetensors"))
        if rank.is_main and not options.eval_period:  # else evaluations write it
            write_report(folder)

    def score() -> Evaluation:
        began = time.monotonic()
        share_buffers(detector, rank)
        bf16 = options.precision == "bf16"
        evaluation = evaluate(
            prepare_for_detection(copy.deepcopy(detector), bf16=bf16),
            val_set,
            rank,
            workers=options.workers,
            bf16=bf16,
            backend=options.coco_backend,
            progress=lambda items, total: track(items, total, "evaluate", shown=rank.is_main),
        )
        run.record(state.step, {**evaluation.results["bbox"], "seconds": time.monotonic() - began}, kind="eval")
        return evaluation

    def score_on_the_way() -> str:
        evaluation = score()
        if rank.is_main:
            write_report(folder, val_set, evaluation)
        bbox = evaluation.results["bbox"]
        return f"AP {percent(bbox['AP'])}, AP50 {percent(bbox['AP50'])}"

    skipped: set[str] = set()

    def say_what_is_skipped(batch: tuple[list, list[dict]]) -> None:
        for message in sorted({m for target in batch[1] for m in target["skipped"]} - skipped):
            console.print(f"skipped {message}")
            skipped.add(message)

    loop.train(
        state,
        train_batches(train_set, batches, workers=options.workers, device=rank.device),
        lambda batch: state.model(*batch),
        schedule=schedule,
        steps=steps,
        images_per_update=options.batch_size,
        seed=options.seed,
        precision=options.precision,
        rank=rank,
        run=run,
        periods=loop.Periods(options.log_period, options.checkpoint_period, options.eval_period),
        checkpoint=checkpoint,
        evaluate=score_on_the_way,
        bad_batch=lambda batch, error: save_batch(*batch, folder, error, rank),
        after_update=say_what_is_skipped,
    )

    evaluation = score()
    unread = gather(skipped, rank)
    if rank.is_main:
        results, detections = evaluation.results, evaluation.detections
        results["skipped_training_images"] = sorted(set().union(*unread))
        save_detector(detector, folder / "model.safetensors")
        write_results(folder, results, detections)
        save_pictures(folder / "pictures", val_set, detections, count=options.pictures)
        write_report(folder, val_set, evaluation)
        if results["skipped_training_images"]:
            say(f"{len(results['skipped_training_images'])} training images could not be read and were skipped")
        ap, ap50 = (percent(results["bbox"][name]) for name in ("AP", "AP50"))
        files = {"detector": "model.safetensors", "results": "results.json", "report": "report.html"}
        progress_console.print(summary(folder, {"AP, AP50": f"{ap}, {ap50}"}, {**files, "pictures": "pictures"}))
        progress_console.print(results_table(results))
        console.print(results_summary(results))
    run.close()


def complete(options: Options) -> Options:
    """Every option that was left out gets its value, but for the folder; ValueError for one that is not there."""
    data = options.data or find_coco() or EMBEDDED
    if options.recipe is not None:
        recipe_name = one_of("recipe", options.recipe, RECIPES)
    elif data == EMBEDDED:
        recipe_name = "short"
    else:
        with from_option("--data"):
            recipe_name = default_recipe(count_images(find_split(data, "train").annotations))
    recipe = RECIPES[recipe_name]
    held = architecture_of_weights(options, recipe)
    variant = one_of("variant", options.variant or held.get("variant", recipe.variant), VARIANTS)
    one_of("COCO backend", options.coco_backend, BACKENDS)
    if one_of("engine", options.engine, ENGINES) == "detectron2":
        if variant not in BACKBONE_OF or "anchor_sides" in recipe.detector:
            raise UserError(f"--engine detectron2 trains no {variant} of --recipe {recipe_name}; leave the engine out")
        detectron2_engine().check_options(options)
    depth = held.get("depth", recipe.depth)
    depth, depths = (VGG16_DEPTH, [VGG16_DEPTH]) if variant == "vgg16" else (depth, DEPTHS)
    device = choose_device(options.device)
    processes = count_processes(device, options.gpus)
    on_gpu = torch.device(device).type == "cuda"
    batch_size = recipe.batch_size if on_gpu or recipe_name == "short" else 2
    batch_size = options.batch_size or max(1, batch_size // processes) * processes  # every process gets as many
    precision = options.precision or ("fp32" if options.engine == "detectron2" else None)
    check_counts(options, least=1, names=("max_steps", "batch_size", "checkpoint_period", "log_period"))
    check_counts(options, least=0, names=("eval_period", "pictures", "seed", "workers"))
    return replace(
        options,
        data=data,
        recipe=recipe_name,
        variant=variant,
        depth=one_of("depth", depth if options.depth is None else options.depth, depths),
        batch_size=batch_size,
        checkpoint_period=options.checkpoint_period or recipe.checkpoint_period,
        device=device,
        workers=(6 if on_gpu else 0) if options.workers is None else options.workers,
        precision=choose_precision(precision, device),
    )


def architecture_of_weights(options: Options, recipe: Recipe) -> dict:
    """What --weights tell of "depth" and "variant", if one of these options was left out."""
    if not options.weights or None not in (options.depth, options.variant):
        return {}
    if "vgg16" in (options.variant, recipe.variant):
        return {}
    weights = read_described_weights(options.weights)
    if "detector" not in weights.metadata or options.engine == "detectron2":
        told = architecture_of(backbone_part(weights.state))
        return {"depth": told["depth"]} if "depth" in told else {}
    if "timm" in weights.metadata["backbone"]:
        raise UserError(f"--weights {options.weights}: a detector on a timm network; give one on a ResNet")
    return {"depth": weights.metadata["backbone"]["depth"], "variant": weights.metadata["detector"]["variant"]}


def detectron2_engine():
    """The module that trains with detectron2, which is optional; ValueError if it is not there."""
    try:
        from detection import detectron2_engine
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "detectron2":
            raise
        raise UserError(
            "--engine detectron2: detectron2 is not installed; pip install --no-build-isolation "
            "git+https://github.com/facebookresearch/detectron2 builds it"
        ) from None
    return detectron2_engine


def fingerprint_of(folder: Path) -> str:
    """The checksum of the annotations that the run in `folder` was trained on."""
    return str(read_yaml(folder / "config.yaml").get("effective", {}).get("train_annotations_sha256"))


def default_folder(options: Options) -> Path:
    name = f"{options.data.resolve().name}-r{options.depth}-{options.variant}-{options.recipe}"
    return Path("runs") / (name if options.engine == "torchvision" else f"{name}-{options.engine}")


def build(options: Options, recipe: Recipe, categories: dict[int, str], say: Callable[[str], None]) -> FasterRCNN:
    """The detector a new run starts from; `say` is told which of its tensors a detector's weights do not fill."""
    frozen_through = options.frozen_through or "auto"
    if frozen_through == "auto" and options.weights:
        frozen_through = recipe.frozen_through
    sizes = {"min_size": recipe.min_size, "max_size": recipe.max_size, "resize_in_training": False}
    weights = read_described_weights(options.weights) if options.weights and options.variant in BACKBONE_OF else None
    if weights is not None and "detector" in weights.metadata:
        frozen = {"frozen_through": "c2" if frozen_through == "auto" else frozen_through}
        return build_from_detector(options, weights, categories, say, backbone=frozen, **sizes, **recipe.detector)
    if options.variant == "vgg16":
        if options.norm is not None:
            raise UserError(f"--norm {options.norm}: VGG-16 has no norms; leave the option out")
        if not options.weights and frozen_through not in ("auto", "none"):
            raise UserError(f"--frozen-through {frozen_through} without --weights would freeze random layers")
        if frozen_through == "auto":
            frozen_through = "stem" if options.weights else None
        backbone = build_vgg16_backbone(frozen_through=frozen_through)
    else:
        backbone = build_resnet_backbone(
            options.depth,
            norm=options.norm or recipe.norm,
            frozen_through=frozen_through,
            weights=options.weights,
            **BACKBONE_OF[options.variant],
            **(recipe.pyramid if options.variant == "fpn" else {}),
        )
    detector = build_faster_rcnn(
        backbone,
        len(categories),
        variant=options.variant,
        categories=categories,
        **sizes,
        **recipe.detector,
    )
    if options.variant == "vgg16" and options.weights:
        load_vgg16(detector, options.weights)
    return detector


def build_from_detector(
    options: Options,
    weights: Weights,
    categories: dict[int, str],
    say: Callable[[str], None],
    *,
    backbone: dict,
    **detector,
) -> FasterRCNN:
    """The detector that --weights hold, with a new box predictor if it is of other classes."""
    trunk, held = resolve_architecture(weights, depth=options.depth, norm=options.norm), weights.metadata["detector"]
    if options.variant != held["variant"]:
        raise UserError(f"--variant {options.variant}: {options.weights} hold a detector of variant {held['variant']}")
    norm = options.norm or ("GN" if trunk["norm"] == "GN" else "FrozenBN")
    built, new = retarget_detector(weights, categories, backbone={**backbone, "norm": norm}, **detector)
    count = sum(name != NOT_A_CLASS for _, name in held["categories"])
    of = f"{count} classes; new, for {len(categories)} others: {', '.join(new)}"
    say(f"weights: {options.weights} hold a detector of {of if new else 'these classes: all of it is started from'}")
    return built


def save_batch(images: list, targets: list[dict], folder: Path, error: NonFinite, rank: Rank) -> str:
    """Keep the images and boxes of a batch that went wrong; returns a clause that names them."""
    tensors = {f"image_{i}": image for i, image in enumerate(images)}
    for name in ("boxes", "labels"):
        tensors |= {f"{name}_{i}": target[name] for i, target in enumerate(targets)}
    path = loop.keep_bad_batch(tensors, folder, error, rank)
    ids = ", ".join(str(target["image_id"]) for target in targets)
    return f"{error.terms} on rank {rank.rank} for images {ids}, saved in {path}"


def run() -> None:
    main_of(main)


if __name__ == "__main__":
    run()
