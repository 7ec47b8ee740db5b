"""Train Faster R-CNN on COCO-format data and evaluate it; without --data, on the built-in data set.

python tools/train_coco.py                                            the built-in data set, minutes on a CPU
python tools/train_coco.py --data my_folder --weights torchvision:FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1  own data
python tools/train_coco.py --data coco --depth 50 --weights torchvision:ResNet50_Weights.IMAGENET1K_V1
python tools/train_coco.py --data my_folder --backbone timm:convnext_tiny --weights timm:convnext_tiny.fb_in22k
python tools/train_coco.py --data coco --depth 50 --output runs/mine --resume     resumes where it stopped
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from resbackbone.cli.command import Auto, Hidden, console, main_of, parse, progress_console
from resbackbone.cli.errors import from_option
from resbackbone.cli.options import (
    MAY_DIFFER,
    MachineOptions,
    RunOptions,
    check_training,
    choose_machine,
    launch_command,
    training_options,
)
from resbackbone.cli.recipes import as_config, check_rate, difference, values_of, with_values
from resbackbone.cli.training import Session, about_built_in_data, prepare_run

import torch
from torch import Tensor, nn

from detection.coco import CocoImages
from detection.config import BACKBONE_OF, SHAPE, VARIANTS, DetectorConfig, DetectorSettings
from detection.data import EMBEDDED, embedded_data, find_coco, open_checked, train_batches
from detection.data_report import data_section
from detection.evaluate import (
    Evaluation,
    detect,
    evaluate,
    results_summary,
    results_table,
    validation_losses,
    write_results,
)
from detection.faster_rcnn import FasterRCNN, build_faster_rcnn, prepare_for_detection
from detection.foreign import NOT_A_CLASS
from detection.gallery import save_pictures
from detection.layouts import FILES, Data, Files, data_of, describe_layout, find_split
from detection.paper import VGG16_DEPTH, build_vgg16_backbone, load_vgg16
from detection.planning import (
    ANCHOR_SCALES,
    LEAST_UPDATES,
    SMALLEST,
    about_share,
    choose_anchor_scale,
    make_plan,
    seconds_of,
    sides_for,
)
from detection.recipes import RECIPES, Recipe, default_recipe
from detection.report import write_report
from detection.sampler import TrainBatches
from detection.saved import load_detector, read_described_weights, retarget_detector, save_detector
from detection.scoring import BACKENDS
from detection.statistics import leaked_images
from detection.synthetic import SYNTHETIC, SyntheticImages, synthetic_batches
from detection.transforms import TrainTransform
from resbackbone import build_resnet_backbone
from resbackbone.checks import UserError, one_of, require
from resbackbone.config import FREEZABLE
from resbackbone.engine import loop
from resbackbone.engine.average import build_average
from resbackbone.engine.device import autocast
from resbackbone.engine.distributed import Rank, distributed, from_main, gather, share_buffers
from resbackbone.engine.optimizers import OPTIMIZERS, build_optimizer
from resbackbone.engine.state import TrainState, seed_step
from resbackbone.engine.task import Task
from resbackbone.image_io import BadImage
from resbackbone.layers import NORMS
from resbackbone.logs import silenced
from resbackbone.memory import keep_freed_memory
from resbackbone.report.numbers import percent
from resbackbone.resnet import DEPTHS
from resbackbone.weights import Weights
from resbackbone.weights.file import is_ours
from resbackbone.weights.fit import architecture_of, backbone_part, resolve_architecture
from resbackbone.weights.sources import locate

ENGINES = ("torchvision", "detectron2")
OPTION_OF = {  # values of a recipe that are options of the command
    "schedule.rate": "lr",
    "schedule.steps": "steps",
    "schedule.milestones": "milestones",
    "schedule.warmup_steps": "warmup_steps",
    "detector.variant": "variant",
    "detector.anchor_scale": "anchor_scale",
    "backbone.depth": "depth",
    **{f"backbone.{name}": name for name in ("norm", "frozen_through")},
    **{name: name for name in ("batch_size", "optimizer", "weight_decay", "clip_grad", "ema", "checkpoint_period")},
}
SCHEDULE = ("lr", "epochs", "steps", "milestones", "warmup_steps")  # options that `Recipe.schedule_for` takes
A_DETECTOR = "torchvision:FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1"
DEFAULT_MINUTES = 10.0
FITTED = ("scratch", "small")  # recipes whose image size --minutes chooses on a CPU
OTHER_SECONDS = 20  # of a run, for what is not measured: imports, pictures and report
Batch = tuple[list[Tensor], list[dict]]  # images, targets
read_once = lru_cache(maxsize=1)(read_described_weights)  # for all that ask on the way from options to detector


@dataclass(frozen=True)
class DataOptions:
    data: Auto[Path] = None
    """Folder of images and boxes as COCO, YOLO (or its data.yaml), Pascal VOC, Roboflow, CVAT, Label Studio or FiftyOne
    write them, or a COCO .json beside its images; without a validation split, one image in ten is held out for it. Or
    synthetic: random numbers, to measure the speed without loading images. Default: $DETECTRON2_DATASETS/coco,
    $COCO_DIR or ./datasets/coco, else the built-in data set."""
    train_json: Auto[Path] = None
    """A COCO file in any place, in place of --data. Default: --data finds it."""
    train_images: Auto[Path] = None
    """Folder of the images that --train-json names. Default: that of the file."""
    val_json: Auto[Path] = None
    """The COCO file to validate on. Default: one image in ten of --train-json."""
    val_images: Auto[Path] = None
    """Folder of the images that --val-json names. Default: --train-images, else that of the file."""
    keep_empty: bool = False
    """Train on images without objects too."""
    repeat_factor: float = 0.0
    """Draw images of classes that appear in less than this share of the images more often (LVIS: 0.001); 0: all equally
    often."""
    skip_bad_images: bool = False
    """Skip images that cannot be read; their names and number are printed."""
    workers: Auto[int] = None
    """Processes that load images, for each GPU. Default: 6 with a GPU, 0 on a CPU."""


@dataclass(frozen=True)
class NetworkOptions:
    backbone: Auto[str] = None
    """timm:NAME trains any network of timm that has feature maps, such as timm:tf_efficientnet_lite0, under the pyramid
    of fpn instead of a ResNet. Its --weights are timm:NAME too, or a file (.safetensors, .pth) with timm's names.
    Default: that of --weights if they are a detector's on such a network, else a ResNet of --depth."""
    depth: Auto[int] = None
    """18, 34, 50, 101 or 152 (vgg16: 16). Default: that of --weights, else the recipe's (50; 18 for scratch
    and short)."""
    variant: Auto[str] = None
    """fpn, c4 (the ResNet paper's detector), dc5 or vgg16 (the paper's baseline). Default: that of --weights if they
    are a detector's, else the recipe's (fpn)."""
    weights: Auto[str] = None
    """Initial weights: a file (.safetensors, .pth, ..) or named source (torchvision:ResNet50_Weights.IMAGENET1K_V1) of
    a backbone, a classifier or a Faster R-CNN with any classes: a run's model.safetensors,
    torchvision:FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1. Default: random."""
    norm: Auto[str] = None
    """BN, FrozenBN, SyncBN or GN (--backbone: BN or FrozenBN), also for the pyramid and box head of weights that have
    batch norms there. Default: FrozenBN with a detector's weights; else the recipe's (v2: SyncBN), or FrozenBN with
    weights and BN without."""
    frozen_through: Auto[str] = None
    """stem, c2 .. c5, or none. Default: none without weights; with them the recipe's (c2; vgg16: stem)."""


@dataclass(frozen=True)
class TrainingOptions:
    recipe: Auto[str] = None
    """1x, 2x, 3x, rsb, v2, v2-100ep, cascade, fast, small, scratch, short, or the ResNet paper's paper-r101-c4,
    paper-r101-c4-context or paper-vgg16-c5. Default: 1x, for under 40,000 images small; scratch for fpn on a CPU,
    unless --weights are a detector's; on the built-in data set short. The options below change values of it; any other
    is set by its name, as in --recipe.detector.box-nms-thresh 0.6."""
    print_recipe: bool = False
    """Print the recipe with every value, as a file for --config, and stop."""
    recipe_values: Hidden[str] = ()
    batch_size: Auto[int] = None
    """Images per update, over all GPUs; the recipe's learning rate and number of updates are scaled with it. Default:
    the recipe's (16; small, scratch, short: 8); on a CPU 2, but 8 for images of up to 256 pixels."""
    accumulate: int = 1
    """Split each process's images into this many parts, one after the other, to save GPU memory. The loss is the mean
    of the parts' losses. Each part is normalized alone: its loss, and the statistics of norms that train."""
    lr: Auto[float] = None
    """Learning rate, for this batch size."""
    epochs: Auto[float] = None
    """Length of the schedule in passes over the training images; drops of the learning rate move in proportion."""
    steps: Auto[int] = None
    """Length of the schedule in updates, instead of --epochs."""
    minutes: Auto[float] = None
    """Length of the run instead of --epochs or --steps: timed updates decide on the number of updates. With the recipes
    scratch and small on a CPU, the boxes decide on image size and anchors, unless these are given. Default: 10 on a CPU
    without --recipe, --epochs or --steps."""
    milestones: Auto[tuple[int, ...]] = None
    """Updates after which the learning rate falls to a tenth."""
    warmup_steps: Auto[int] = None
    """Updates over which the learning rate rises."""
    image_size: Auto[int] = None
    """Shorter side of test images in pixels; the recipe's other sizes change in proportion."""
    anchor_scale: Auto[float | Literal["auto"]] = None
    """Sides of the anchors in strides of their level (8: 32 pixels on p2 .. 512 on p6), or auto, which fits them to the
    boxes. Default: that of a detector in --weights, else the recipe's, or auto where --minutes decides."""
    optimizer: Auto[str] = None
    """sgd, adamw or lamb. Give --lr with it."""
    weight_decay: Auto[float] = None
    """Weight decay."""
    clip_grad: Auto[float] = None
    """Clip the gradient to this norm; 0 does not clip."""
    ema: Auto[float] = None
    """Evaluate and keep a moving average of the weights with this decay, such as 0.9998 (less at first); 0: none."""
    engine: str = "torchvision"
    """Detector: torchvision (this package's own, of torchvision's parts) or detectron2's, if it is installed."""
    checkpoint_period: Auto[int] = None
    """Updates between checkpoints. Default: the recipe's (5000; small: 500; scratch, short: 200)."""
    compile: bool = False
    """Compile the detector and its losses as one graph (torch.compile): minutes at the start for faster updates."""
    cuda_graphs: bool = False
    """Compile, and replay forward and backward as CUDA graphs, one for each size of a batch: for few images a GPU."""


@dataclass(frozen=True)
class EvaluationOptions:
    eval_period: int = 0
    """Updates between evaluations; 0 evaluates at the end only. With intermediate evaluations, best/ in the run's
    folder keeps the weights of the highest AP."""
    early_stop: int = 0
    """Stop after this many evaluations in a row without a higher AP; 0: never. Needs --eval-period."""
    val_loss: bool = False
    """Compute the losses on the validation images too, at every evaluation, which takes about twice as long."""
    coco_backend: str = "hotcoco"
    """Scorer: hotcoco, or pycocotools, which gives the same numbers about a hundred times slower."""
    pictures: int = 12
    """Number of pictures with predictions beside ground truth to draw at the end."""


@dataclass(frozen=True)
class Options(DataOptions, NetworkOptions, TrainingOptions, EvaluationOptions, RunOptions, MachineOptions):
    """Train Faster R-CNN on COCO-format data and evaluate it."""


def main(argv: list[str] | None = None) -> None:
    """Options -> a trained detector and its AP, in a run folder; in one process, or in one for each GPU."""
    options = parse(Options, argv)
    read_once.cache_clear()
    if options.print_recipe:
        options = replace(options, recipe=complete(options).recipe)
        console.print(as_config(options, recipe_of(options), OPTION_OF))
        return
    may_differ = MAY_DIFFER | {"pictures", "coco_backend", "compile", "cuda_graphs", "minutes", *FILES}
    launch_command(train, training_options(options, argv, complete, default_folder, may_differ))


def train(rank: Rank, options: Options) -> None:
    """Data -> detector -> updates -> evaluation, in every process; rank 0 writes."""
    session = prepare_run(rank, options, default=default_folder(options))
    train_set, val_set = open_data(session)
    minutes = options.minutes
    if minutes is not None:
        session.options = options = from_main(partial(planned, session, train_set, val_set), rank)
    elif options.anchor_scale == "auto":
        session.options = options = from_main(partial(with_fitted_anchors, session, train_set), rank)
    recipe = recipe_of(options)
    train_set.transform = TrainTransform(**asdict(recipe.augmentation))
    if minutes is None and (changes := difference(RECIPES[options.recipe], recipe, options, OPTION_OF)):
        session.info(f"recipe: {options.recipe}, but {changes}")
    seed_step(options.seed, 0, 0)  # every rank starts from the same weights
    if options.engine == "detectron2":
        detector = build_with_detectron2(session, recipe, train_set.categories)
    elif session.checkpoint is None:
        detector = build(options, recipe, train_set.categories, session.info)
    else:
        detector = load_detector(session.checkpoint / "model.safetensors")
        if dict(detector.categories) != train_set.categories:
            raise UserError(
                f"{session.checkpoint}: was trained on other categories than those of {data_of(vars(options))}; "
                "give its data, or another --output"
            )
    read_once.cache_clear()
    detector.to(rank.device, memory_format=torch.channels_last).train()
    session.info(f"backbone: {detector.backbone.summary()}")
    if options.cuda_graphs:
        detector.compile(mode="reduce-overhead")
    elif options.compile:
        detector.compile()

    given = {name: getattr(options, name) for name in SCHEDULE}
    schedule = recipe.schedule_for(options.batch_size, images=len(train_set), **given)
    if options.recipe == "small" and not options.weights:
        session.info(f"weights: random; with so few images, start from a detector: --weights {A_DETECTOR}")
    rate, decay, norms = schedule.rate, recipe.weight_decay, recipe.decay_norms
    optimizer = build_optimizer(detector, recipe.optimizer, rate=rate, weight_decay=decay, decay_norms=norms)
    more: dict[str, Any] = {"clip_grad": recipe.clip_grad, "scaled": options.precision == "fp16"}
    average = build_average(detector, recipe.ema) if recipe.ema else None
    state = TrainState(distributed(detector, rank), optimizer, rank, average=average, **more)
    task = Detection(session, train_set, val_set)
    more = {"training_images": len(train_set), "validation_images": len(val_set), "classes": len(train_set.categories)}
    run = session.train(task, state, schedule, **more, train_annotations_sha256=train_set.fingerprint)

    if options.data == SYNTHETIC:
        session.info("nothing is evaluated: synthetic images show only the speed")
        session.finish({})
    else:
        try:
            loop.evaluate(task, state, run, final=True)
        except BadImage as error:
            again = f"the training is complete; --resume --output {session.folder} evaluates it again"
            raise BadImage(f"{error}; {again}") from None
        if rank.is_main:
            task.save(state.evaluated, session.folder)
            finish(session, task.evaluation, val_set)
    run.close()


def about(data: Data) -> AbstractContextManager[None]:
    """Put --data in front of a UserError, unless other options name the files."""
    return nullcontext() if isinstance(data, Files) else from_option("--data")


def open_data(session: Session) -> tuple[Any, Any]:
    """The images to train on and to evaluate on, checked, without augmentation."""
    options, rank = session.options, session.rank
    data = data_of(vars(options)) or EMBEDDED
    if options.data == SYNTHETIC:
        return SyntheticImages(), SyntheticImages()
    if options.data == EMBEDDED:
        session.info(about_built_in_data(EMBEDDED, "files in COCO's, YOLO's or Pascal VOC's format"))
        from_main(embedded_data, rank)
    else:
        with about(data):
            session.info(f"data:  {describe_layout(data)}")
    opened = partial(open_checked, data, skip_bad_images=options.skip_bad_images)
    with about(data):
        train_set = from_main(partial(opened, "train", keep_empty=options.keep_empty), rank)
        val_set = from_main(partial(opened, "val", keep_empty=True, categories=train_set.categories), rank)
    session.info(f"train: {train_set.summary()}\nval:   {val_set.summary()}")
    if rank.is_main:
        session.warn_skipped({*train_set.broken})
        if leaked := leaked_images(train_set, val_set):
            session.warn(f"{leaked} of {len(val_set)} images of val are also in train: the AP will be too high")
    session.skipped.update(train_set.broken)
    return train_set, val_set


def planned(session: Session, train_set: CocoImages, val_set: CocoImages) -> Options:
    """The options with what --minutes leaves open: image size, anchors and number of updates. Prints the plan."""
    options, recipe = session.options, recipe_of(session.options)
    session.info(f"plan:  timing updates, to plan for {options.minutes:g} minutes")
    detector, update_seconds, detect_seconds = timers(session, recipe, train_set, val_set)
    size_by_name = any(item.startswith("detector.min_size=") for item in options.recipe_values)
    fpn, fitted = options.variant == "fpn", options.recipe in FITTED and session.rank.device.type == "cpu"
    free_size = fitted and options.image_size is None and not size_by_name
    free_anchors = fpn and (options.anchor_scale == "auto" or fitted and options.anchor_scale is None)
    usual = smallest = shorter_side(recipe.detector)
    if source := detector_in(options):
        free_anchors = False  # the weights are of anchors of their own
        smallest = min(smallest, shorter_side(source))
    plan = make_plan(
        train_set,
        seconds_left=lambda: 60 * options.minutes - (time.monotonic() - session.began) - OTHER_SECONDS,
        batch_size=options.batch_size,
        sides=sides_for(train_set, min(smallest, SMALLEST)) if free_size else [usual],
        aspect=recipe.detector.max_size / usual,
        scales=ANCHOR_SCALES if free_anchors else [detector.config.anchor_scale],
        levels=list(detector.backbone.features) if fpn else [],
        least_updates=LEAST_UPDATES["detector" if source else "backbone"],
        update_seconds=update_seconds,
        detect_seconds=detect_seconds,
        images_to_test=math.ceil(len(val_set) / session.rank.ranks) * (2 if options.val_loss else 1),
        eval_period=options.eval_period,
    )
    chosen: dict[str, Any] = {"anchor_scale": plan.anchor_scale, "steps": plan.steps}
    if not size_by_name:
        chosen["image_size"] = plan.image_size
    flags = {"recipe": options.recipe, "batch_size": options.batch_size, **chosen}
    same = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in flags.items())
    lines = [f"plan:  {options.minutes:g} minutes", *plan.reasons, f"equivalent flags: {same}"]
    session.info("\n       ".join(lines))
    return replace(options, minutes=None, **chosen)


def timers(
    session: Session, recipe: Recipe, train_set: CocoImages, val_set: CocoImages
) -> tuple[FasterRCNN, Callable[[int], float], Callable[[int], float]]:
    """A detector to throw away, and functions of a shorter side: the seconds of its updates and of its detections."""
    options, alone = session.options, session.rank._replace(rank=0, ranks=1)
    detector = built_to_plan(options, recipe, train_set)
    detector.to(alone.device, memory_format=torch.channels_last).train()
    optimizer = build_optimizer(detector, recipe.optimizer, rate=0.0, weight_decay=0.0, decay_norms=False)
    state, task = TrainState(detector, optimizer, alone), Detection(session, train_set, val_set)

    def losses(part: Batch) -> Mapping[str, Tensor]:
        with autocast(alone.device, options.precision):
            return task.losses(detector, part)

    def update_seconds(side: int) -> float:
        train_set.transform = TrainTransform(**asdict(recipe.at_size(side).augmentation))
        order = TrainBatches(train_set, batch_size=options.batch_size // session.rank.ranks, seed=options.seed)
        batches = train_batches(train_set, order, workers=options.workers, device=alone.device)
        return seconds_of(lambda: state.update(losses, task.parts(next(batches)), learning_rate=0.0))

    def detect_seconds(side: int) -> float:
        bf16, sizes = options.precision == "bf16", recipe.at_size(side).detector
        prepared = prepare_for_detection(copy.deepcopy(detector), bf16=bf16)
        prepared.transform.min_size, prepared.transform.max_size = (side,), sizes.max_size
        readable = next((i for i in range(len(val_set)) if not isinstance(val_set[i], BadImage)), None)
        if readable is None:
            return 0.0
        try:
            return seconds_of(lambda: detect(prepared, [val_set[readable][0]], [0], alone.device, bf16=bf16))
        finally:
            keep_freed_memory(False)

    return detector, update_seconds, detect_seconds


def with_fitted_anchors(session: Session, train_set: CocoImages) -> Options:
    """The options with the anchor scale that suits the boxes."""
    options, recipe = session.options, recipe_of(session.options)
    levels = list(built_to_plan(options, recipe, train_set).backbone.features)
    side, longest = shorter_side(recipe.detector), recipe.detector.max_size
    scale, share = choose_anchor_scale(train_set, ANCHOR_SCALES, levels, side, longest)
    session.info(f"anchors: --anchor-scale {scale:g}; {about_share(share)}")
    return replace(options, anchor_scale=scale)


def built_to_plan(options: Options, recipe: Recipe, train_set: CocoImages) -> FasterRCNN:
    """A throwaway copy of the detector to be trained; messages about weights are printed only for the real one."""
    with silenced("resbackbone"):
        return build(options, recipe, train_set.categories, lambda line: None)


class Detection(Task):
    """A detector on COCO-format images."""

    def __init__(self, session: Session, train_set: CocoImages, val_set: CocoImages):
        self.session, self.options, self.rank = session, session.options, session.rank
        self.train_set, self.val_set = train_set, val_set
        self.evaluation: Evaluation | None = None
        about_data = partial(data_section, {"train": train_set, "val": val_set})
        self.about_data = cache(about_data) if self.options.data != SYNTHETIC else None

    def batches(self, start: int) -> Iterator[Batch]:
        if self.options.data == SYNTHETIC:
            sizes = recipe_of(self.options).augmentation
            height = sizes.crop_size or max(sizes.short_sides)
            width = sizes.crop_size or min(sizes.max_size, round(height * 4 / 3))  # as most of COCO's
            count = self.options.batch_size // self.rank.ranks
            return synthetic_batches(count, height=height, width=width, device=self.rank.device)
        share = {"rank": self.rank.rank, "ranks": self.rank.ranks, "start": start}
        rare = self.options.repeat_factor
        order = TrainBatches(
            self.train_set,
            batch_size=self.options.batch_size,
            seed=self.options.seed,
            repeat_threshold=rare,
            **share,
        )
        if rare:
            some = f"{order.repeated} of {len(self.train_set)} images are drawn more often than once an epoch"
            none = f"every class is in at least {100 * rare:g} % of the images, so none is drawn more often"
            self.session.info(f"repeat: {some if order.repeated else none}")
        return train_batches(self.train_set, order, workers=self.options.workers, device=self.rank.device)

    def parts(self, batch: Batch) -> list[Batch]:
        images, targets = batch
        size = len(images) // self.options.accumulate
        return [(images[i : i + size], targets[i : i + size]) for i in range(0, len(images), size)]

    def losses(self, model: nn.Module, part: Batch) -> Mapping[str, Tensor]:
        return model(*part)

    def after_update(self, batch: Batch, step: int) -> Mapping[str, float]:
        self.session.warn_skipped({message for target in batch[1] for message in target["skipped"]})
        return {}

    def bad_batch(self, batch: Batch) -> tuple[dict[str, Tensor], str]:
        images, targets = batch
        tensors = {f"image_{i}": image for i, image in enumerate(images)}
        for name in ("boxes", "labels"):
            tensors |= {f"{name}_{i}": target[name] for i, target in enumerate(targets)}
        return tensors, f"images {', '.join(str(target['image_id']) for target in targets)}"

    def save(self, model: Any, folder: Path) -> None:
        if isinstance(model, FasterRCNN):
            save_detector(model, folder / "model.safetensors")
        else:
            model.save(folder)  # detectron2's

    def evaluate(self, model: Any, *, final: bool) -> dict:
        share_buffers(model, self.rank)
        bf16 = self.options.precision == "bf16"
        how: dict[str, Any] = {"workers": self.options.workers, "bf16": bf16, "progress": self.session.track}
        detector = prepare_for_detection(copy.deepcopy(model), bf16=bf16)
        losses = {}
        try:
            evaluation = evaluate(detector, self.val_set, self.rank, backend=self.options.coco_backend, **how)
            if self.options.val_loss:
                losses = validation_losses(detector, self.val_set, self.rank, **how)
        finally:
            if self.rank.device.type == "cpu":
                keep_freed_memory(False)  # a training keeps so much more at once that it would fragment
        skipped = gather(self.session.skipped, self.rank)
        if skipped is not None:
            evaluation.results["skipped_training_images"] = sorted(set().union(*skipped))
        self.evaluation = evaluation
        return evaluation.results["bbox"] | losses

    def score(self, result: Mapping) -> float | None:
        return result["AP"]

    def summary(self, result: Mapping) -> str:
        return f"AP {percent(result['AP'])}, AP50 {percent(result['AP50'])}"

    def write_report(self, folder: Path) -> None:
        write_report(folder, self.val_set, self.evaluation, self.about_data)


def finish(session: Session, evaluation: Evaluation, val_set: CocoImages) -> None:
    """Write the results and pictures of a training, and print the results."""
    folder, results = session.folder, evaluation.results
    write_results(folder, results, evaluation.detections)
    save_pictures(folder / "pictures", val_set, evaluation.detections, count=session.options.pictures)
    ap, ap50 = (percent(results["bbox"][name]) for name in ("AP", "AP50"))
    session.finish({"AP, AP50": f"{ap}, {ap50}"})
    session.info(results_table(results))
    console.print(results_summary(results))


def complete(options: Options) -> Options:
    """Fill in every option except the folder. Raises ValueError for an option that is not accepted."""
    check_training(options)
    data = data_of(vars(options)) or find_coco() or EMBEDDED
    data = EMBEDDED if data == EMBEDDED.absolute() else data  # as a run that is resumed has it
    own_engine = one_of("engine", options.engine, ENGINES) == "torchvision"
    device, processes, precision = choose_machine(options if own_engine else replace(options, precision="fp32"))
    kind = torch.device(device).type
    minutes = minutes_for(options, data, kind)
    recipe_name = one_of("recipe", options.recipe or recipe_for(options, data, kind), RECIPES)
    recipe = recipe_of(replace(options, recipe=recipe_name))
    given = architecture_of_weights(options, recipe)
    variant = one_of("variant", options.variant or given.get("variant", recipe.detector.variant), VARIANTS)
    one_of("COCO backend", options.coco_backend, BACKENDS)
    one_of("norm", options.norm or "BN", NORMS)
    one_of("frozen_through", options.frozen_through or "none", ("none", "auto", *FREEZABLE[1:]))
    if not 0 <= options.repeat_factor <= 1:
        raise UserError(f"--repeat-factor {options.repeat_factor:g}: must be a share of the images, from 0 to 1")
    try:
        replace(recipe.detector, variant=variant)
    except UserError as error:
        raise UserError(f"--variant {variant} does not fit recipe {recipe_name}: {error}") from None
    if options.cuda_graphs and kind != "cuda":
        raise UserError("--cuda-graphs: needs an NVIDIA GPU; on other devices use --compile")
    if data == SYNTHETIC and options.eval_period:
        raise UserError(f"--eval-period {options.eval_period}: synthetic images are not evaluated; leave it out")
    backbone = options.backbone or given.get("backbone")
    if backbone is not None:
        check_backbone(replace(options, backbone=backbone, variant=variant), recipe)
    if not own_engine:
        check_detectron2(options, variant, recipe)
    if options.anchor_scale == "auto" and (variant != "fpn" or data == SYNTHETIC):
        raise UserError("--anchor-scale auto: is for fpn and real data; give a number, or leave it out")
    norms = (options.norm or recipe.backbone.norm, recipe.backbone.fpn_norm, recipe.detector.box_norm)
    if minutes is not None and processes > 1 and "SyncBN" in norms:
        raise UserError(f"--minutes {minutes:g}: cannot time SyncBN in one of {processes} processes; give --steps")
    depths = [VGG16_DEPTH] if variant == "vgg16" else list(DEPTHS)
    default_depth = VGG16_DEPTH if variant == "vgg16" else given.get("depth", recipe.backbone.depth)
    small_images = shorter_side(recipe.detector) <= 256
    batch_size = recipe.batch_size if kind == "cuda" or small_images else 2
    shares = processes * options.accumulate
    total = options.batch_size or max(1, batch_size // shares) * shares
    if total % shares:
        raise UserError(f"--batch-size {total}: must be a multiple of {shares} (processes times --accumulate)")
    return replace(
        options,
        data=None if isinstance(data, Files) else data,
        recipe=recipe_name,
        variant=variant,
        backbone=backbone,
        depth=None if backbone else one_of("depth", options.depth or default_depth, depths),
        batch_size=total,
        minutes=minutes,
        checkpoint_period=options.checkpoint_period or recipe.checkpoint_period,
        device=device,
        workers=(6 if kind == "cuda" else 0) if options.workers is None else options.workers,
        precision=precision,
    )


def minutes_for(options: Options, data: Data, kind: str) -> float | None:
    """The time that the training is planned for, if it is, on this kind of device."""
    length = next((name for name in ("epochs", "steps") if getattr(options, name) is not None), None)
    unplanned = data == SYNTHETIC or options.engine != "torchvision" or options.compile or options.cuda_graphs
    if options.minutes is None:
        default = kind == "cpu" and options.recipe is None and length is None
        return DEFAULT_MINUTES if default and not unplanned and data != EMBEDDED else None
    given = f"--minutes {options.minutes:g}"
    if length and options.resume:
        progress_console.print(f"{given}: the resumed run keeps its plan; give a new --output to plan again")
        return None
    if length:
        raise UserError(f"{given} and --{length} {getattr(options, length):g}: give one of them")
    if not 0 < options.minutes < math.inf:
        raise UserError(f"{given}: must be a finite number above 0")
    if unplanned:
        raise UserError(f"{given}: give --steps for synthetic data, --engine detectron2, --compile and --cuda-graphs")
    return options.minutes


def recipe_of(options: Options) -> Recipe:
    """The named recipe with the values that options set. Raises ValueError for one that is not accepted."""
    named = recipe = RECIPES[options.recipe]
    by_name = {item.partition("=")[0] for item in options.recipe_values}
    if None not in (options.epochs, options.steps):
        raise UserError(f"--epochs {options.epochs:g} and --steps {options.steps} are both a length; give one")
    if options.epochs is not None and not 0 < options.epochs < math.inf:
        raise UserError(f"--epochs {options.epochs:g}: must be a finite number above 0")
    if options.image_size is not None:
        if "detector.min_size" in by_name:
            raise UserError(f"--image-size {options.image_size}: --recipe.detector.min-size sets the same; give one")
        recipe = recipe.at_size(options.image_size)
    recipe = with_values(recipe, options.recipe_values, OPTION_OF)
    if options.anchor_scale not in (None, "auto"):
        recipe = replace(recipe, detector=replace(recipe.detector, anchor_scale=float(options.anchor_scale)))
    changes = {name: getattr(options, name) for name in ("optimizer", "weight_decay", "clip_grad", "ema")}
    changes = {name: value for name, value in changes.items() if value is not None}
    if options.clip_grad == 0:
        changes["clip_grad"] = None
    if options.optimizer not in (None, named.optimizer) and "decay_norms" not in by_name:
        changes["decay_norms"] = options.optimizer == "sgd"
    recipe = replace(recipe, **changes)
    one_of("optimizer", recipe.optimizer, OPTIMIZERS)
    check_rate(named, recipe, options.recipe, options.lr)
    if options.milestones is not None and recipe.schedule.cosine:
        raise UserError("--milestones: the learning rate follows a cosine; give --recipe.schedule.cosine False too")
    return recipe


def recipe_for(options: Options, data: Data, kind: str) -> str:
    """The name of the default recipe for this data, kind of device, network and weights."""
    if data == EMBEDDED:
        return "short"
    if data == SYNTHETIC:
        return "1x"
    own_fpn = options.engine == "torchvision" and options.variant in (None, "fpn")
    if kind == "cpu" and own_fpn and detector_in(options) is None:
        return "scratch"
    with about(data):
        return default_recipe(find_split(data, "train").reader.count_images())


def shorter_side(detector: DetectorSettings) -> int:
    """Of test images, in pixels."""
    return detector.min_size if isinstance(detector.min_size, int) else detector.min_size[-1]


def detector_in(options: Options) -> DetectorConfig | None:
    """The detector that --weights hold; None without, and for those of a backbone."""
    weights = described_weights(options)
    if weights is None or "detector" not in weights.metadata:
        return None
    return DetectorConfig.from_json(weights.metadata["detector"], weights.source)


def architecture_of_weights(options: Options, recipe: Recipe) -> dict:
    """The "depth" or "backbone" and the "variant" of --weights, if one of these options was left out."""
    given = None not in (options.depth or options.backbone, options.variant)
    variant = options.variant or recipe.detector.variant
    weights = None if given else described_weights(replace(options, variant=variant))
    if weights is None:
        return {}
    if "detector" not in weights.metadata or options.engine == "detectron2":
        depth = architecture_of(backbone_part(weights.state)).get("depth")
        return {} if depth is None else {"depth": depth}
    trunk = weights.metadata["backbone"]
    network = {"backbone": f"timm:{trunk['timm']}"} if "timm" in trunk else {"depth": trunk["depth"]}
    return {**network, "variant": weights.metadata["detector"]["variant"]}


def described_weights(options: Options) -> Weights | None:
    """What --weights holds; None without, and for those that `load_vgg16` and `from_timm` read."""
    if not options.weights or options.variant == "vgg16":
        return None
    file = Path(options.weights)
    if options.backbone and (file.is_dir() or options.weights.startswith("hf:")):
        file = locate(options.weights)[0]
    return None if options.backbone and not is_ours(file) else read_once(options.weights)


def check_backbone(options: Options, recipe: Recipe) -> None:
    """Raise ValueError if --backbone is no network of timm, or another option does not go with it."""
    given = f"--backbone {options.backbone}"
    if not options.backbone.startswith("timm:"):
        raise UserError(f"{given}: give timm:NAME, a network of timm; this package's ResNets are --depth 18, 50, ..")
    if options.depth is not None:
        raise UserError(f"--depth {options.depth}: is for ResNets, and the network is {options.backbone}; leave it out")
    if options.variant != "fpn":
        raise UserError(f"--variant {options.variant}: {given} is for fpn; leave one of them out")
    if options.engine != "torchvision":
        raise UserError(f"{given}: --engine {options.engine} has ResNets alone; leave one of them out")
    norm = options.norm or recipe.backbone.norm
    if norm not in (None, "BN", "FrozenBN"):
        raise UserError(f"{given}: its norm can be BN or FrozenBN, not {norm}; give --norm BN")
    for name in ("stem", "shortcut"):
        if getattr(recipe.backbone, name) is not None:
            raise UserError(f"--recipe.backbone.{name}: is for ResNets, and the network is {options.backbone}")
    with from_option(f"{given}:"):
        require("train", "timm", user=options.backbone)
        from resbackbone.adapters.from_timm import check_name  # only here: a ResNet needs no timm

        check_name(options.backbone.removeprefix("timm:"))


def check_detectron2(options: Options, variant: str, recipe: Recipe) -> None:
    """Raise ValueError if detectron2 is not installed or does not support an option."""
    if variant not in BACKBONE_OF or recipe.detector.anchor_sides is not None:
        raise UserError(f"--engine detectron2 cannot train {variant} with anchor_sides; leave --engine out")
    if options.val_loss:
        raise UserError("--val-loss: --engine detectron2 has losses in training only; leave the option out")
    if options.compile or options.cuda_graphs:
        raise UserError("--compile, --cuda-graphs: --engine detectron2 cannot be compiled; leave them out")
    if options.precision not in (None, "fp32"):
        raise UserError(f"--precision {options.precision}: --engine detectron2 trains in fp32; leave the option out")
    if find_spec("detectron2") is None:
        raise UserError(
            "--engine detectron2: detectron2 is not installed; build it with pip install "
            "--no-build-isolation git+https://github.com/facebookresearch/detectron2"
        )


def default_folder(options: Options) -> Path:
    network = options.backbone.removeprefix("timm:") if options.backbone else f"r{options.depth}"
    place = Path(str(data_of(vars(options)))).resolve()
    name = f"{place.stem if place.is_file() else place.name}-{network}-{options.variant}-{options.recipe}"
    return Path("runs") / (name if options.engine == "torchvision" else f"{name}-{options.engine}")


def build(options: Options, recipe: Recipe, categories: dict[int, str], say: Callable[[str], None]) -> FasterRCNN:
    """Build the detector of a new run; `say` gets a line about a detector's weights."""
    frozen_through = options.frozen_through or (recipe.backbone.frozen_through if options.weights else "auto")
    settings = {**vars(recipe.detector), "variant": options.variant, "resize_in_training": False}
    weights = described_weights(options)
    if weights is not None and "detector" in weights.metadata:
        frozen = {"frozen_through": "c2" if frozen_through == "auto" else frozen_through}
        if frozen_through == "auto" and options.backbone:
            frozen = {}  # as the detector has it: timm does not show the order of every network's parts
        check_values_for(weights, options, recipe, say)
        return build_from_detector(options, weights, categories, say, backbone=frozen, **settings)
    if weights is not None:
        others = [key for key in weights.state if not key.startswith("backbone.")]
        if 0 < len(others) < len(weights.state):  # a detector's
            some = f"{', '.join(others[:3])}, .. ({len(others)})"
            say(f"weights: only the backbone's, from {options.weights}; left out: {some}")
    if options.variant == "vgg16":
        if options.norm is not None:
            raise UserError(f"--norm {options.norm}: VGG-16 has no norms; leave the option out")
        if not options.weights and frozen_through not in ("auto", "none"):
            raise UserError(f"--frozen-through {frozen_through} without --weights freezes random layers; leave it out")
        if frozen_through == "auto":
            frozen_through = "stem" if options.weights else None
        backbone = build_vgg16_backbone(frozen_through=frozen_through)
    elif options.backbone:
        from resbackbone.adapters.from_timm import from_timm  # only here: a ResNet needs no timm

        backbone = from_timm(
            options.backbone.removeprefix("timm:"),
            fpn=True,
            weights=options.weights,
            norm=options.norm or recipe.backbone.norm,
            frozen_through=None if frozen_through == "none" else frozen_through,
            **recipe.backbone.arguments(fpn=True),
        )
    else:
        backbone = build_resnet_backbone(
            options.depth,
            norm=options.norm or recipe.backbone.norm,
            frozen_through=frozen_through,
            weights=options.weights,
            **{**BACKBONE_OF[options.variant], **recipe.backbone.arguments(fpn=options.variant == "fpn")},
        )
    detector = build_faster_rcnn(backbone, len(categories), categories=categories, **settings)
    if options.variant == "vgg16" and options.weights:
        load_vgg16(detector, options.weights)
    return detector


def check_values_for(weights: Weights, options: Options, recipe: Recipe, say: Callable[[str], None]) -> None:
    """Raise ValueError if a value that was set contradicts the detector in `weights`, whose architecture is used.

    `say` gets a line about the recipe's own values that do.
    """
    source = DetectorConfig.from_json(weights.metadata["detector"], weights.source)
    kept = {f"detector.{name}": getattr(source, name) for name in SHAPE}
    asked, usual = values_of(recipe), values_of(replace(recipe, detector=DetectorSettings()))
    differing = [name for name in kept if asked[name] not in (usual[name], kept[name])]
    if recipe.backbone.norm is not None and options.norm is None:
        differing.append("backbone.norm")
    if options.anchor_scale not in (None, source.anchor_scale):
        raise UserError(
            f"--anchor-scale {options.anchor_scale}: the detector in {options.weights} has {source.anchor_scale}; "
            "leave the option out"
        )
    for item in options.recipe_values:
        name, _, text = item.partition("=")
        if name.startswith("backbone.") or name in kept and asked[name] not in (None, kept[name]):
            has = f" has {kept[name]}" if name in kept else " comes with its backbone"
            raise UserError(f"--recipe.{name} {text}: the detector in {options.weights}{has}; leave the option out")
    stages, theirs = len(recipe.detector.cascade_ious), len(source.cascade_ious) or 1
    if stages not in (0, theirs):
        raise UserError(
            f"--recipe {options.recipe} trains {stages} box heads, and the detector in {options.weights} has {theirs}: "
            "give another recipe, or the weights of its backbone alone (convert_weights.py --part backbone)"
        )
    if differing:
        say(f"recipe: without its {', '.join(differing)}: the weights determine the architecture")


def build_with_detectron2(session: Session, recipe: Recipe, categories: dict[int, str]):
    """detectron2's detector, with the weights of the run's checkpoint if it is resumed."""
    from detection.detectron2_engine import Detectron2Detector, detectron2_config  # the package is optional

    device = session.rank.device
    config = detectron2_config(session.options, recipe, num_classes=len(categories), device=device)
    detector = Detectron2Detector(config, categories)
    if session.checkpoint is not None:
        detector.load(session.checkpoint)
    return detector


def build_from_detector(
    options: Options, weights: Weights, categories: dict[int, str], say: Callable[[str], None], **parts
) -> FasterRCNN:
    """Build the detector in --weights, with a new box predictor if its classes differ."""
    trunk = weights.metadata["backbone"]
    network = f"timm:{trunk['timm']}" if "timm" in trunk else None
    if options.backbone != network:
        raise UserError(
            f"--backbone {options.backbone}: the detector in {options.weights} is on {network or 'a ResNet'}; leave it "
            "out"
        )
    if network is None:
        trunk = resolve_architecture(weights, depth=options.depth, norm=options.norm)
    source = weights.metadata["detector"]
    if options.variant != source["variant"]:
        raise UserError(
            f"--variant {options.variant}: the detector in {options.weights} is {source['variant']}; leave it out"
        )
    parts["backbone"]["norm"] = options.norm or ("GN" if trunk["norm"] == "GN" else "FrozenBN")
    parts = {name: value for name, value in parts.items() if name not in SHAPE}
    built, new = retarget_detector(weights, categories, **parts)
    count = sum(name != NOT_A_CLASS for _, name in source["categories"])
    changed = f"; new, for {len(categories)} others: {', '.join(new)}" if new else ""
    say(f"weights: a detector of {count} classes, from {options.weights}{changed}")
    return built


def run() -> None:
    main_of(main)


if __name__ == "__main__":
    run()
