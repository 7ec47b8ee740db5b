"""Faster R-CNN over a Backbone: the FPN, C4, DC5 and VGG-16 variants, on torchvision's detector classes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN as TorchvisionFasterRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

from detection.boxes import BoxCoder
from detection.cells import at_least_fp32
from detection.foreign import NOT_A_CLASS, describe_detector
from detection.paper import ContextHead, ContextRoIAlign, VGGHead
from detection.roi_align import PyramidRoIAlign
from detection.rpn import Anchors, FP32RPNHead, SampledRPN
from detection.transforms import InputTransform
from resbackbone import Backbone
from resbackbone.backbone import backbone_from_config
from resbackbone.checks import UserError, one_of, require
from resbackbone.engine.checkpoints import last_whole_checkpoint
from resbackbone.layers import fuse
from resbackbone.resnet import ResNet
from resbackbone.weights import MEAN, STD, Weights, read_weights, write_weights
from resbackbone.weights.fit import fit
from resbackbone.weights.sources import is_named

BACKBONE_OF = {  # what each variant asks of `build_resnet_backbone`
    "fpn": {"fpn": True},
    "c4": {"levels": ("c4", "c5")},
    "dc5": {"levels": ("c5",), "dilate_c5": True},
}
VARIANTS = (*BACKBONE_OF, "vgg16")
LEVEL_OF = {"c4": "c4", "dc5": "c5", "vgg16": "c4"}  # the one map of a variant
SHAPE = ("variant", "anchor_scale", "anchor_sides", "representation_size", "geometry", "global_context")
PREDICTOR = "roi_heads.box_predictor."  # the layers that follow the number of classes
GEOMETRIES = ("torchvision", "detectron2")
AnyDetector = TypeVar("AnyDetector", bound=nn.Module)
SINGLE_MAP_ANCHORS = (32, 64, 128, 256, 512)  # pixels, where one map serves all sizes


class FasterRCNN(TorchvisionFasterRCNN):
    """torchvision's FasterRCNN that checks its targets and also gives losses in eval mode.

    `num_classes` counts real categories (background is the detector's own), `categories` maps the data set's
    category ids to names in the order of labels 1.., and `config` holds the arguments that build it again. Made by
    `build_faster_rcnn`.
    """

    categories: dict[int, str]
    config: dict

    def __init__(self, backbone: Backbone, **options):
        super().__init__(backbone, **options)
        rpn = self.rpn  # type: ignore[has-type]  # torchvision's
        self.rpn = SampledRPN(
            rpn.anchor_generator,
            rpn.head,
            rpn.proposal_matcher.high_threshold,
            rpn.proposal_matcher.low_threshold,
            rpn.fg_bg_sampler.batch_size_per_image,
            rpn.fg_bg_sampler.positive_fraction,
            rpn._pre_nms_top_n,
            rpn._post_nms_top_n,
            rpn.nms_thresh,
            rpn.score_thresh,
        )
        self.roi_heads.box_coder = BoxCoder(self.roi_heads.box_coder.weights)
        own = self.transform  # type: ignore[has-type]
        self.transform = InputTransform(
            own.min_size,
            own.max_size,
            own.image_mean,
            own.image_std,
            size_divisible=own.size_divisible,
            _skip_resize=own._skip_resize,
        )

    @property
    def num_classes(self) -> int:
        return len(self.categories)

    @property
    def real_categories(self) -> dict[int, str]:
        """`categories` without the outputs that stand for no class, which torchvision's COCO detectors have."""
        return {category: name for category, name in self.categories.items() if name != NOT_A_CLASS}

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None):
        """[3, H, W] RGB floats in 0..1 -> losses in training mode, in eval mode boxes, labels and scores an image."""
        if targets is not None:
            self._check_targets(targets)
        elif self.training:
            raise UserError('training needs targets: {"boxes": [n, 4] x1 y1 x2 y2, "labels": [n]} for each image')
        sizes = [tuple(image.shape[-2:]) for image in images]
        batch, targets = self.transform(images, targets)
        maps = self.backbone(batch.tensors)
        proposals, rpn_losses = self.rpn(batch, maps, targets)
        detections, losses = self.roi_heads(maps, proposals, batch.image_sizes, targets)
        if self.training:
            return {**losses, **rpn_losses}
        return self.transform.postprocess(detections, batch.image_sizes, sizes)

    def losses(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The training losses, in either mode: in eval mode norms use their statistics and images the test size."""
        modules = [module for module in (self, self.rpn, self.roi_heads) if not module.training]
        for module in modules:
            module.training = True  # of these three alone: it is they who choose between losses and boxes
        try:
            return self(images, targets)
        finally:
            for module in modules:
                module.training = False

    def _check_targets(self, targets: list[dict[str, Tensor]]) -> None:
        sound = [
            ((target["labels"] >= 1) & (target["labels"] <= self.num_classes)).all()
            & torch.isfinite(target["boxes"]).all()
            & (target["boxes"][:, 2:] > target["boxes"][:, :2]).all()
            for target in targets
        ]
        if not sound or torch.stack(sound).all():  # a GPU is waited for once
            return
        for target in targets:
            labels, boxes = target["labels"], target["boxes"]
            name = f"image {target['image_id']}: " if "image_id" in target else ""
            if labels.numel() and (labels.min() < 1 or labels.max() > self.num_classes):
                raise UserError(
                    f"{name}labels {sorted(set(labels.tolist()))}: a label is 1..{self.num_classes} "
                    f"({', '.join(list(self.categories.values())[:3])} ..), 0 is background"
                )
            if not torch.isfinite(boxes).all():
                raise UserError(f"{name}a box has coordinates that are not finite: {boxes.tolist()}")
            if not (boxes[:, 2:] > boxes[:, :2]).all():
                raise UserError(f"{name}a box x1 y1 x2 y2 without width or height: {boxes.tolist()}")


class FP32Predictor(FastRCNNPredictor):
    """Class scores and box deltas in fp32 or better: bf16 holds 1000 pixels to the nearest 4."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, deltas = super().forward(x)
        return at_least_fp32(scores), at_least_fp32(deltas)


class Stage5Head(nn.Module):
    """Stage 5 on every region, then the mean: the C4 detector's box head (He et al. 2015, appendix A)."""

    def __init__(self, stage: nn.Sequential, channels: int):
        super().__init__()
        self.layer4, self.channels = stage, channels

    def forward(self, regions: Tensor) -> Tensor:  # [N, 1024, 14, 14] -> [N, 2048]
        return self.layer4(regions).mean((2, 3))


def build_faster_rcnn(
    backbone: Backbone,
    num_classes: int,
    *,
    variant: str = "fpn",
    categories: Mapping[int, str] | None = None,
    min_size: int = 800,
    max_size: int = 1333,
    resize_in_training: bool = True,
    anchor_scale: float = 8.0,
    anchor_sides: Sequence[float] | None = None,
    representation_size: int | None = None,
    geometry: str = "torchvision",
    global_context: bool = False,
    **options,
) -> FasterRCNN:
    """Build Faster R-CNN (Ren et al. 2015) over `backbone`; anchors and RoI pooling follow `backbone.features`.

    num_classes: real categories, without background; a target's labels are 1..num_classes.
    categories: the data set's {category id: name}, in the order of the labels; default {1: "class 1", ..}.
    variant: "fpn" (Lin et al. 2017, Sec. 4), over p2..; "c4", the paper's own detector (appendix A): RPN on c4, RoI
        features through stage 5, which moves from the backbone into the box head; "dc5", on a c5 of stride 16;
        "vgg16", the paper's baseline, over `detection.paper.build_vgg16_backbone()` or `from_timm("vgg16",
        levels=["c4"])`: RPN on c4, RoI features through fc6 and fc7, which `detection.paper.load_vgg16` fills.
    min_size, max_size: pixels of the shorter and at most of the longer side, for images that come as they are.
    resize_in_training: False where training images come resized already.
    anchor_scale: a pyramid level's anchors have the side anchor_scale * stride (8: 32 on p2 .. 512 on p6); RoIs go
        to levels in the same proportion. On a single map the sides are 4, 8, 16, 32 and 64 times anchor_scale.
    anchor_sides: the sides of a single map's anchors where they are others, at an anchor_scale of 8.
    representation_size: width of the two fully connected layers of the fpn and dc5 (1024) and vgg16 heads (4096).
    geometry: "torchvision": anchors on whole pixels at inferred strides, RoIAlign with 2 x 2 samples a bin;
        "detectron2": anchors as they are, aligned RoIAlign with as many samples as cells, and single maps not padded
        to their stride. Weights trained with one give about as good, but not the same, detections with the other.
    global_context: every region's feature has its whole image's behind it (He et al. 2015, appendix B).
    options: torchvision's own (rpn_..., box_...: thresholds, numbers of proposals), passed through.

    Raises ValueError for a backbone that does not fit the variant, and for a class count that is not 1 or more.
    """
    one_of("variant", variant, VARIANTS)
    one_of("geometry", geometry, GEOMETRIES)
    if not isinstance(num_classes, int) or num_classes < 1:
        raise UserError(f"num_classes is the number of real categories, at least 1, not {num_classes!r}")
    categories = dict(categories or {label: f"class {label}" for label in range(1, num_classes + 1)})
    if len(categories) != num_classes:
        raise UserError(f"num_classes is {num_classes}, but there are {len(categories)} categories")
    if anchor_sides is not None and variant == "fpn":
        raise UserError("anchor_sides are a single map's; on a pyramid each level has one, set by anchor_scale")
    if representation_size is None:
        representation_size = 4096 if variant == "vgg16" else 1024
    backbone_config = dict(backbone.config)
    box_head: Any = _take_stage5(backbone) if variant == "c4" else None
    _use_levels_of(variant, backbone)

    sizes: list[tuple[float, ...]]
    if variant == "fpn":
        sizes = [(anchor_scale * feature.stride,) for feature in backbone.features.values()]
    else:
        sizes = [tuple(side * anchor_scale / 8 for side in anchor_sides or SINGLE_MAP_ANCHORS)]
    strides = [feature.stride for feature in backbone.features.values()]
    anchors = Anchors(sizes, strides, as_torchvision=geometry == "torchvision")
    pooled = {level: feature for level, feature in backbone.features.items() if level not in ("p6", "p7")}
    pool = (ContextRoIAlign if global_context else PyramidRoIAlign)(
        pooled or backbone.features,  # p6 and p7 are the RPN's alone
        output_size=14 if variant == "c4" else 7,
        sampling_ratio=2,
        canonical_scale=round(224 * anchor_scale / 8),
        aligned=geometry == "detectron2",
    )
    if box_head is None:
        box_head = (VGGHead if variant == "vgg16" else TwoMLPHead)(backbone.out_channels * 7 * 7, representation_size)
    head_channels = box_head.channels if variant == "c4" else representation_size
    if global_context:
        box_head, head_channels = ContextHead(box_head), 2 * head_channels
    detector = FasterRCNN(
        backbone,
        rpn_anchor_generator=anchors,
        rpn_head=FP32RPNHead(backbone.out_channels, anchors.num_anchors_per_location()[0]),
        box_roi_pool=pool,
        box_head=box_head,
        box_predictor=FP32Predictor(head_channels, num_classes + 1),
        min_size=min_size,
        max_size=max_size,
        image_mean=list(MEAN),
        image_std=list(STD),
        size_divisible=1 if geometry == "detectron2" and variant != "fpn" else backbone.size_divisibility,
        _skip_resize=not resize_in_training,
        **options,
    )
    detector.categories = categories
    detector.config = {
        "backbone": backbone_config,
        "detector": {
            "num_classes": num_classes,
            "variant": variant,
            "categories": list(categories.items()),  # pairs: JSON would turn the ids into strings
            "min_size": min_size,
            "max_size": max_size,
            "resize_in_training": resize_in_training,
            "anchor_scale": anchor_scale,
            "anchor_sides": None if anchor_sides is None else list(anchor_sides),
            "representation_size": representation_size,
            "geometry": geometry,
            "global_context": global_context,
            **options,
        },
    }
    return detector


def _take_stage5(backbone: Backbone) -> Stage5Head:
    """Move stage 5 out of the trunk; one that was not built is built, if no weights were meant for it."""
    if not isinstance(backbone, ResNet) or backbone.fpn is not None:
        raise UserError("variant 'c4' runs stage 5 of a ResNet on regions: build the backbone with fpn=False")
    if "c5" in backbone.stage_features:
        channels = backbone.stage_features["c5"].channels
        return Stage5Head(backbone.detach_stage("c5"), channels)
    if backbone.weights_source is not None:
        raise UserError("variant 'c4' needs stage 5 and its weights: build the backbone with levels=('c4', 'c5')")
    whole = backbone_from_config({**backbone.config, "levels": ["c5"]})
    return Stage5Head(cast(nn.Sequential, whole.layer4), whole.stage_features["c5"].channels)


def _use_levels_of(variant: str, backbone: Backbone) -> None:
    levels = list(backbone.features)
    if variant == "fpn":
        if not all(level.startswith("p") for level in levels):
            raise UserError(f"variant 'fpn' needs pyramid levels, the backbone gives {', '.join(levels)}: use fpn=True")
        return
    level = LEVEL_OF[variant]
    if level not in levels:
        raise UserError(f"variant {variant!r} needs level {level}, the backbone gives {', '.join(levels)}")
    if backbone.features[level].stride != 16:
        raise UserError(f"variant {variant!r} needs {level} at stride 16: build the backbone with dilate_c5=True")
    if isinstance(backbone, ResNet):
        backbone.levels = [level]
    elif levels != [level]:
        raise UserError(f"variant {variant!r} needs level {level} alone: build the backbone with levels=[{level!r}]")


def save_detector(detector: FasterRCNN, path: str | Path) -> None:
    """Write a safetensors file that holds the weights and all that `load_detector` needs to build them a detector."""
    write_weights(path, detector.state_dict(), detector.config)


def load_detector(path: str | Path) -> FasterRCNN:
    """The detector that `save_detector` wrote to `path`, or one of a foreign format (`read_weights`), in eval mode.

    ValueError if the weights are not of a Faster R-CNN that this package builds.
    """
    weights = read_weights(path)
    if "detector" not in weights.metadata:
        if weights.format == "resbackbone":
            raise UserError(f"{path} does not hold a detector of this package: its metadata describe none")
        weights.announce_assumptions()
        weights.metadata.update(describe_detector(weights))
    detector = _described(weights, weights.metadata["backbone"], weights.metadata["detector"])
    fit(detector, weights)
    return detector.eval()


def read_described_weights(source: str | Path) -> Weights:
    """`read_weights`, with "detector" in the metadata wherever `load_detector` would build one of them."""
    weights = read_weights(source)
    foreign = "detector" not in weights.metadata and not weights.unknown
    if foreign and f"{PREDICTOR}cls_score.weight" in weights.state:
        weights.metadata.update(describe_detector(weights))
    return weights


def retarget_detector(
    weights: Weights, categories: Mapping[int, str], *, backbone: Mapping, **options
) -> tuple[FasterRCNN, list[str]]:
    """The detector of `read_described_weights` for other categories, and the names of its tensors that are new.

    Trunk, pyramid, RPN and box head start from the weights; so does the box predictor if the categories are the same,
    and else it is new. What makes the detector's shape (SHAPE) is the weights'; `options` are the others that
    `build_faster_rcnn` takes, and `backbone` what is to change of the backbone's configuration (norm, frozen_through).
    """
    described = weights.metadata["detector"]
    same = dict(categories) == dict(map(tuple, described["categories"]))
    shape = {name: described[name] for name in SHAPE if name in described}
    asked = {"num_classes": len(categories), "categories": list(categories.items()), **options, **shape}
    weights.announce_assumptions()
    detector = _described(weights, {**weights.metadata["backbone"], **backbone}, asked)
    kept = {key: tensor for key, tensor in weights.state.items() if same or not key.startswith(PREDICTOR)}
    fit(detector, replace(weights, state=kept), fresh=() if same else (PREDICTOR,))
    return detector, [key for key in detector.state_dict() if key.startswith(PREDICTOR) and not same]


def _described(weights: Weights, backbone: Mapping, detector: Mapping) -> FasterRCNN:
    try:
        return build_faster_rcnn(_backbone(backbone), **detector)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{weights.source} describes a detector this version cannot build ({error!r})") from None


def _backbone(config: Mapping) -> Backbone:
    if "timm" not in config:
        return backbone_from_config(config)
    require("train", "timm", user="a detector on a timm network")
    from resbackbone.adapters.from_timm import timm_backbone_from_config  # only here: other detectors do without timm

    return timm_backbone_from_config(config)


def prepare_for_detection(detector: AnyDetector, *, bf16: bool = False) -> AnyDetector:
    """Make a detector ready for detecting alone, in place: eval mode, batch norms folded into their convolutions.

    With `bf16`, convolutions and linear layers get the weights in bfloat16 that autocast would otherwise make of them
    in every pass; the same is computed, and from here on under autocast only.
    """
    detector.eval().requires_grad_(False)
    for module in detector.modules():
        if isinstance(module, Backbone):
            module.fuse()
        elif isinstance(module, Stage5Head):
            fuse(module)
    for module in detector.modules() if bf16 else ():
        if type(module) in (nn.Conv2d, nn.Linear):
            module.to(torch.bfloat16)
    return detector


def detector_file(run: str | Path) -> str | Path:
    """The weights of a run: its model.safetensors, or while it trains those of its last whole checkpoint.

    A file, a named source or a URL is what it is.
    """
    if is_named(str(run)):
        return run
    run = Path(run)
    if run.is_file():
        return run
    if not run.is_dir():
        raise UserError(f"{run}: no such run folder or file")
    folder = run if (run / "model.safetensors").is_file() else last_whole_checkpoint(run)[0]
    if folder is None:
        raise UserError(f"{run} holds no detector: neither model.safetensors nor a whole checkpoint is there")
    return folder / "model.safetensors"
