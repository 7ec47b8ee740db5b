"""Faster R-CNN trained by detectron2 on our backbones, with the data, schedule and scores of our own trainer.

`CocoImages` reads the annotations; detectron2 loads, augments, trains and checkpoints; `detection.evaluate` evaluates.
Importing this needs detectron2.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import detectron2
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_train_loader
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.engine import HookBase, SimpleTrainer, create_ddp_model, hooks
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.structures import BoxMode
from detectron2.utils.env import seed_all_rng
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from detection.coco import CocoImages
from detection.evaluate import Evaluation, evaluate
from detection.recipes import RECIPES, Recipe
from detection.report import write_report
from resbackbone import build_resnet_backbone
from resbackbone.adapters.detectron2 import INPUT, NORMS
from resbackbone.atomic import write_atomically
from resbackbone.checks import UserError, one_of
from resbackbone.config import FREEZABLE
from resbackbone.engine.checkpoints import KEPT
from resbackbone.engine.distributed import Rank, share_buffers
from resbackbone.engine.loop import describe, memory
from resbackbone.engine.run import Run
from resbackbone.engine.state import mean_of, parameter_groups, seed_step
from resbackbone.engine.stopwatch import Stopwatch
from resbackbone.report.numbers import percent
from resbackbone.resnet import DEPTHS

CONFIGS = Path(detectron2.__file__).parent / "model_zoo" / "configs"  # its model_zoo module needs an old setuptools
BASES = {"fpn": "Base-RCNN-FPN.yaml", "c4": "Base-RCNN-C4.yaml", "dc5": "Base-RCNN-DilatedC5.yaml"}
KEYS = {  # torchvision's names, as recipes have them, and detectron2's
    "representation_size": "MODEL.ROI_BOX_HEAD.FC_DIM",
    "rpn_batch_size_per_image": "MODEL.RPN.BATCH_SIZE_PER_IMAGE",
    "rpn_pre_nms_top_n_train": "MODEL.RPN.PRE_NMS_TOPK_TRAIN",
    "rpn_pre_nms_top_n_test": "MODEL.RPN.PRE_NMS_TOPK_TEST",
    "rpn_post_nms_top_n_train": "MODEL.RPN.POST_NMS_TOPK_TRAIN",
    "rpn_post_nms_top_n_test": "MODEL.RPN.POST_NMS_TOPK_TEST",
    "box_batch_size_per_image": "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE",
    "box_positive_fraction": "MODEL.ROI_HEADS.POSITIVE_FRACTION",
    "box_score_thresh": "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
}
LOSSES = {  # detectron2's names, and those of the other engine's metrics
    "loss_cls": "loss_classifier",
    "loss_box_reg": "loss_box_reg",
    "loss_rpn_cls": "loss_objectness",
    "loss_rpn_loc": "loss_rpn_box_reg",
}


def train_with_detectron2(session, *, train_set: CocoImages, val_set: CocoImages) -> tuple[Evaluation, Run]:
    """Data -> detector -> updates -> evaluation, in every process; `session` is that of tools/train_coco.py.

    Besides the files of any run, the folder gets detectron2.yaml (all its settings), log.txt and detectron2's
    checkpoints, the last of which is model_final.pth. A resumed run sees the images in another order.
    """
    rank, options, folder = session.rank, session.options, session.folder
    recipe = RECIPES[options.recipe]
    schedule = recipe.schedule_for(options.batch_size, images=len(train_set))
    steps = schedule.steps if options.max_steps is None else options.max_steps
    cfg = detectron2_config(options, recipe, num_classes=len(train_set.categories), device=rank.device)
    cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = schedule.rate, steps, tuple(schedule.milestones)
    cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.WARMUP_FACTOR = schedule.warmup_steps, schedule.warmup_factor
    cfg.OUTPUT_DIR = str(folder)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (register(train_set),), (register(val_set),)

    seed_step(options.seed, 0, 0)  # every rank starts from the same weights
    model = build_model(cfg)
    session.info(model.backbone.body.summary())
    if recipe.optimizer == "sgd":
        optimizer = build_optimizer(cfg, model)
    else:  # detectron2 has no AdamW
        optimizer = torch.optim.AdamW(parameter_groups(model, recipe.weight_decay, decay_norms=False), lr=schedule.rate)
    rates = LambdaLR(optimizer, lambda step: schedule.learning_rate(step) / schedule.rate)
    devices = [rank.device.index] if rank.device.type == "cuda" else None
    trainer = SimpleTrainer(
        create_ddp_model(model, device_ids=devices, broadcast_buffers=False),
        build_detection_train_loader(cfg),
        optimizer,
    )
    trainer.register_hooks([hooks.LRScheduler(optimizer, rates)])  # before loading: it has a state
    checkpointer = DetectionCheckpointer(model, str(folder), trainer=trainer)
    start = 0
    if options.resume and checkpointer.has_checkpoint():
        checkpointer.resume_or_load("", resume=True)
        start = trainer.iter + 1
        cfg.SEED = options.seed + start  # so that the first images do not come again
        trainer.reset_data_loader(lambda: build_detection_train_loader(cfg))

    effective = {**asdict(schedule), "milestones": list(schedule.milestones), "torch": str(torch.__version__)}
    effective |= {"detectron2": detectron2.__version__, "train_annotations_sha256": train_set.fingerprint}
    run = session.open_run(start, effective | {"validation": val_set.origin})
    if rank.is_main:
        write_atomically(folder / "detectron2.yaml", cfg.dump())
    session.info(
        f"{f'resumed at step {start}' if start else 'from step 0'} to {steps}: {options.batch_size} images per update "
        f"on {rank.ranks} {rank.device.type}, fp32, learning rate {schedule.rate:g}, by detectron2"
    )

    def score(step: int) -> Evaluation:
        began = time.monotonic()
        share_buffers(model, rank)
        evaluation = evaluate(
            Detector(model, cfg, val_set.categories),  # type: ignore[arg-type]  # it has the methods that are used
            val_set,
            rank,
            workers=options.workers,
            backend=options.coco_backend,
            progress=session.track,
        )
        run.record(step, {**evaluation.results["bbox"], "seconds": time.monotonic() - began}, kind="eval")
        return evaluation

    def score_if_due(trainer: SimpleTrainer) -> None:
        step = trainer.iter + 1
        if options.eval_period and step % options.eval_period == 0 and step < steps:
            evaluation = score(step)
            if rank.is_main:
                write_report(folder, val_set, evaluation)
            bbox = evaluation.results["bbox"]
            session.info(f"step {step}: AP {percent(bbox['AP'])}, AP50 {percent(bbox['AP50'])}")

    with logs_in(folder / "log.txt", rank), session.progress(steps, start) as progress:
        trainer.register_hooks(
            [
                None if recipe.clip_grad is None else ClipGradients(recipe.clip_grad),
                Metrics(run, progress.update, options) if rank.is_main else None,
                hooks.PeriodicCheckpointer(checkpointer, options.checkpoint_period, max_to_keep=KEPT),
                hooks.CallbackHook(after_step=score_if_due),
            ]
        )
        seed_all_rng((options.seed + start + rank.rank) % 2**31)  # augmentation, and sampling of regions
        try:
            trainer.train(start, steps)
        except FloatingPointError as error:
            raise UserError(" ".join(str(error).split())) from None
        evaluation = score(max(start, steps))

    return evaluation, run


def detectron2_config(options, recipe: Recipe, *, num_classes: int, device: torch.device) -> CfgNode:
    """The config of detectron2's own Faster R-CNN of the variant, with the changes of options and recipe."""
    cfg = get_cfg()
    cfg.merge_from_file(str(CONFIGS / BASES[options.variant]))
    asked = dict(recipe.detector)
    scale = asked.pop("anchor_scale", 8.0) / 8
    settings = {**INPUT, **{KEYS[name]: value for name, value in asked.items()}}
    cfg.merge_from_list([word for setting in settings.items() for word in setting])

    basic = DEPTHS[options.depth][0].expansion == 1
    norm = options.norm or recipe.norm or ("FrozenBN" if options.weights else "BN")
    frozen_through = options.frozen_through or ("c2" if options.weights else "none")
    frozen_through = None if frozen_through == "none" else frozen_through
    model = cfg.MODEL
    model.DEVICE = str(device)
    model.BACKBONE.NAME = "build_resbackbone_fpn" if options.variant == "fpn" else "build_resbackbone"
    model.BACKBONE.FREEZE_AT = FREEZABLE.index(one_of("part to freeze through", frozen_through, FREEZABLE))
    model.RESBACKBONE.WEIGHTS = options.weights or ""
    model.RESNETS.DEPTH, model.RESNETS.NORM = options.depth, one_of("norm", norm, NORMS)
    model.RESNETS.RES2_OUT_CHANNELS = 64 if basic else 256
    # None, which takes it from the weights, is no value of a config.
    stem = build_resnet_backbone(options.depth, levels=["c2"], weights=options.weights)
    model.RESNETS.STRIDE_IN_1X1 = stem.config.stride_in_1x1
    if options.variant == "fpn" and recipe.pyramid:
        model.RPN.IN_FEATURES = list(recipe.pyramid["levels"])
        model.FPN.OUT_CHANNELS = recipe.pyramid["fpn_channels"]
    elif options.variant == "c4":
        model.ROI_HEADS.NAME = "ResBackboneRes5ROIHeads"
    sizes = model.ANCHOR_GENERATOR.SIZES[: len(model.RPN.IN_FEATURES)]
    model.ANCHOR_GENERATOR.SIZES = [[size * scale for size in of_level] for of_level in sizes]
    model.ROI_HEADS.NUM_CLASSES = num_classes

    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = tuple(recipe.short_sides), recipe.min_size
    cfg.INPUT.MAX_SIZE_TRAIN = cfg.INPUT.MAX_SIZE_TEST = recipe.max_size
    cfg.DATALOADER.NUM_WORKERS = options.workers
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = not options.keep_empty
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.WEIGHT_DECAY = options.batch_size, recipe.weight_decay
    cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SEED = options.checkpoint_period, options.seed
    return cfg


def register(dataset: CocoImages) -> str:
    """Register the images with detectron2, replacing any of the same name; returns that name."""
    name = str(dataset.annotation_file) + (f":{dataset.part}" if dataset.part else "")
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.pop(name, None)
    DatasetCatalog.register(name, lambda: dataset_dicts(dataset))
    MetadataCatalog.get(name).thing_classes = dataset.class_names
    return name


def dataset_dicts(dataset: CocoImages) -> list[dict]:
    """The images as detectron2 lists them: `category_id` is the label less one, 0..N-1, whatever the file's ids."""
    entries = []
    for index in range(len(dataset)):
        target, (width, height) = dataset.target(index), dataset.widths_heights[index].tolist()
        annotations = [
            {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": label - 1}
            for box, label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True)
        ]
        entry = {"file_name": str(dataset.path(index)), "image_id": target["image_id"], "annotations": annotations}
        entries.append({**entry, "width": width, "height": height})
    return entries


class Detector(nn.Module):
    """A detectron2 model as `evaluate` takes detectors: [3, H, W] RGB in 0..1 -> boxes, labels 1..N and scores."""

    def __init__(self, model: nn.Module, cfg: CfgNode, categories: dict[int, str]):
        super().__init__()
        self.model, self.categories = model, categories
        self.resize = ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        outputs = self.model([self._entry(image) for image in images])
        found = [output["instances"] for output in outputs]
        return [{"boxes": x.pred_boxes.tensor, "labels": x.pred_classes + 1, "scores": x.scores} for x in found]

    def _entry(self, image: Tensor) -> dict:
        pixels = (image * 255).round().byte().permute(1, 2, 0).cpu().numpy()  # the pixels of the file
        height, width, _ = pixels.shape
        resized = self.resize.get_transform(pixels).apply_image(pixels)
        return {"image": torch.from_numpy(resized.copy()).permute(2, 0, 1), "height": height, "width": width}


class Metrics(HookBase):
    """Every `log_period` updates a line of metrics.jsonl, with the other engine's names, and one of progress."""

    def __init__(self, run: Run, progress: Callable[[int, str | None], None], options):
        self.run, self.progress, self.options = run, progress, options
        self.recent: list[dict[str, float]] = []

    def before_train(self) -> None:
        self.device = next(self.trainer.model.parameters()).device
        self.stopwatch = Stopwatch(self.device)
        self.trainer.model.register_forward_pre_hook(lambda *_: self.stopwatch.start())
        self.trainer.model.register_forward_hook(self._after_forward)

    def before_step(self) -> None:
        self.began = time.monotonic()

    def _after_forward(self, model: nn.Module, *_) -> None:
        if model.training:  # not in an evaluation
            self.stopwatch.lap("forward")

    def after_backward(self) -> None:
        self.stopwatch.lap("backward")

    def after_step(self) -> None:
        self.stopwatch.lap("optimizer")
        step = self.trainer.iter + 1
        latest = {name: value for name, (value, _) in self.trainer.storage.latest().items()}
        values = {LOSSES.get(name, name): value for name, value in latest.items() if name.startswith("loss_")}
        seconds = {"seconds": time.monotonic() - self.began, "data_seconds": latest["data_time"]}
        self.recent.append({"loss": latest["total_loss"], **values, **seconds})
        if step % self.options.log_period and step != self.trainer.max_iter:
            self.progress(step, None)
            return
        record = {**mean_of(self.recent), **self.stopwatch.take(len(self.recent)), "lr": latest["lr"]}
        record |= memory(self.device)
        record["images_per_second"] = self.options.batch_size / record["seconds"]
        self.run.record(step, record)
        self.progress(step, describe(record, None))
        self.recent = []


class ClipGradients(HookBase):
    """Clips the norm of all gradients together to `limit`."""

    def __init__(self, limit: float):
        self.limit = limit

    def after_backward(self) -> None:
        nn.utils.clip_grad_norm_(self.trainer.model.parameters(), self.limit)


@contextmanager
def logs_in(path: Path, rank: Rank) -> Iterator[None]:
    """Send detectron2's log, tracebacks included, to a file instead of the terminal."""
    handler = logging.FileHandler(path) if rank.is_main else logging.NullHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s: %(message)s"))
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore")]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()
