"""Faster R-CNN over a Backbone, a batch at a time: the FPN, C4, DC5 and VGG-16 variants, under torchvision's names."""

import os
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from detection.anchors import Anchors
from detection.batch import Targets, pad_boxes, sizes_of
from detection.box_heads import ConvFCHead, Stage5Head, build_box_head, build_roi_heads
from detection.config import BACKBONE_OF, SHAPE, SINGLE_MAP_ANCHORS, DetectorConfig
from detection.foreign import NOT_A_CLASS, announce_settings, describe_detector, with_settings
from detection.paper import ContextRoIAlign
from detection.roi_align import PyramidRoIAlign
from detection.roi_heads import BatchedRoIHeads, FP32Predictor, is_real
from detection.rpn import FP32RPNHead, SampledRPN
from detection.transforms import InputTransform, check_images, numbers_of
from resbackbone import Backbone, BackboneConfig, ResNetBackbone
from resbackbone.checks import UserError, brief, require
from resbackbone.compat import any_size_in_graphs, is_observed
from resbackbone.engine.checkpoints import last_whole_checkpoint
from resbackbone.layers import ConvBlocks, fuse, same_kind
from resbackbone.memory import keep_freed_memory
from resbackbone.weights import MEAN, STD, Weights, WeightSource, read_weights, write_weights
from resbackbone.weights.fit import fit, with_eps
from resbackbone.weights.sources import is_named

LEVEL_OF = {"c4": "c4", "dc5": "c5", "vgg16": "c4"}  # the single map that a variant uses
PREDICTOR = "roi_heads.box_predictor."  # the layers whose size depends on the number of classes
A_TARGET = 'a dict {"boxes": [n, 4] x1 y1 x2 y2, "labels": [n]}'
BUCKET = 64  # pixels; the sides of a compiled batch are multiples of it
BOX_TYPES = (torch.float32, torch.float64, torch.float16)  # that torchvision takes
TORCHVISIONS = {  # arguments of its FasterRCNN that are modules, and what sets the same here
    "rpn_anchor_generator": "anchor_scale (side over stride, on a pyramid) or anchor_sides (pixels, on a single map)",
    "rpn_head": "rpn_conv_depth",
    "box_roi_pool": "geometry and anchor_scale",
    "box_head": "box_conv_layers, box_norm and representation_size",
    "box_predictor": "num_classes and cascade_ious",
}
# Attributes that a load may reset: outputs do not depend on them, or `_live_settings` has them.
PASSING = {"training", "momentum", "inplace", "warned", "looked", "weights_source", "checkpoint_activations"}
PASSING |= {"num_batches_tracked", "resize_in_training"}
SAVE_STATE = "save detector.state_dict() with torch.save and repeat the change after loading"
AnyDetector = TypeVar("AnyDetector", bound=nn.Module)


class FasterRCNN(GeneralizedRCNN):
    """Faster R-CNN from torchvision's parts; checks its targets, and computes losses in eval mode too.

    Use `build_faster_rcnn` to make one. `config` and `backbone.config` rebuild it.
    """

    _compiled: Callable | None = None  # of losses, after `compile`

    def __init__(self, backbone: Backbone, config: DetectorConfig):
        fpn, c4, as_torchvision = config.variant == "fpn", config.variant == "c4", config.geometry == "torchvision"
        trunk: Any = backbone
        backbone = _with_levels_of(config.variant, backbone)

        strides = [feature.stride for feature in backbone.features.values()]
        sides = [side * config.anchor_scale / 8 for side in config.anchor_sides or SINGLE_MAP_ANCHORS]
        sizes: list[tuple[float, ...]] = [tuple(sides)]
        if fpn:
            sizes = [(config.anchor_scale * stride,) for stride in strides]
        anchors = Anchors(sizes, strides, as_torchvision=as_torchvision)
        pooled = {level: feature for level, feature in backbone.features.items() if level not in ("p6", "p7")}
        pool = (ContextRoIAlign if config.global_context else PyramidRoIAlign)(
            pooled or backbone.features,  # only the RPN uses p6 and p7
            output_size=14 if c4 else 7,
            sampling_ratio=2,
            canonical_scale=cast(int, config.canonical_scale),
            aligned=not as_torchvision,
        )
        head, channels = build_box_head(config, backbone, trunk)
        rpn = SampledRPN(
            anchors,
            FP32RPNHead(backbone.out_channels, anchors.num_anchors_per_location()[0], config.rpn_conv_depth),
            config.rpn_fg_iou_thresh,
            config.rpn_bg_iou_thresh,
            config.rpn_batch_size_per_image,
            config.rpn_positive_fraction,
            {"training": config.rpn_pre_nms_top_n_train, "testing": config.rpn_pre_nms_top_n_test},
            {"training": config.rpn_post_nms_top_n_train, "testing": config.rpn_post_nms_top_n_test},
            config.rpn_nms_thresh,
            config.rpn_score_thresh,
        )
        roi_heads = build_roi_heads(config, pool, head, channels)
        transform = InputTransform(
            config.min_size,
            config.max_size,
            *_normalization(config, backbone),
            size_divisible=backbone.size_divisibility if fpn or as_torchvision else 1,
            resize_in_training=config.resize_in_training,
            fp32_ratios=as_torchvision,
        )
        super().__init__(backbone, rpn, roi_heads, transform)
        self.config = config

    @property
    def categories(self) -> dict[int, str]:
        """The data set's category ids and names, in the order of the labels 1..

        A box predictor of another number of classes that has taken the place of the built one has "class 1", ..
        """
        return dict(_with_classes_of(self).categories)

    @property
    def num_classes(self) -> int:
        """The number of categories, without background, as the box predictor has it."""
        return len(self.categories)

    @property
    def real_categories(self) -> dict[int, str]:
        """`categories` without the outputs that stand for no class, which torchvision's COCO detectors have."""
        return {category: name for category, name in self.categories.items() if name != NOT_A_CLASS}

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None):
        """[3, H, W] RGB floats in 0..1 -> losses in training; in eval mode each image's boxes, labels and scores."""
        check_images(images, self.transform)
        self._check_type(images[0])
        if targets is not None:
            _check_form(targets, len(images))
            self._check_targets(targets)
        elif self.training:
            raise UserError(f"training needs targets: {A_TARGET} for each image")
        sizes = [tuple(image.shape[-2:]) for image in images]
        batch, resized = self.transform(images, targets)
        padded = None if resized is None else Targets.of(resized)
        if self.training and self._compiled is not None and self._is_as_built():
            losses = self._compiled(self, *_in_buckets(batch, cast(Targets, padded)))
            return {name: loss.clone() for name, loss in losses.items()}  # the next replay writes over the graph's own
        detections, losses = self._of_batch(batch, padded)
        return losses if self.training else self.transform.postprocess(detections, batch.image_sizes, sizes)

    def _of_batch(self, batch: ImageList, targets: Targets | None) -> tuple[list[dict], dict[str, Tensor]]:
        """Detections in pixels of the resized images, and losses; one of them empty."""
        maps, given = self.backbone(batch.tensors), None if targets is None else targets.as_list()
        proposals, rpn_losses = self.rpn(batch, maps, targets if isinstance(self.rpn, SampledRPN) else given)
        proposals = pad_boxes(proposals)  # those of torchvision's RPN are a list
        heads, own = self.roi_heads, isinstance(self.roi_heads, BatchedRoIHeads)
        regions = proposals if own else [boxes[is_real(boxes)] for boxes in proposals]
        detections, losses = heads(maps, regions, batch.image_sizes, targets if own else given)
        return detections, {**losses, **rpn_losses}

    def compile(self, **options: Any) -> None:
        """Compile training from the normalized batch to the losses as one graph, which `forward` then uses.

        A batch is padded to multiples of 64 pixels, and its boxes to a power of two, so that few graphs serve all sizes
        and numbers. Losses are those without `compile` where the sides are such multiples already; otherwise there are
        a few more anchors, in the padding. A detector with a part that has been exchanged, hooked or patched goes on
        without the graph. options: those of torch.compile; with `mode="reduce-overhead"` a GPU records a CUDA graph for
        each size and number, and replays it.
        """
        self._compiled = torch.compile(_losses_of_batch, **{"fullgraph": True, **options})

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state.pop("_compiled", None)  # as nn.Module's own
        return state

    def _is_as_built(self) -> bool:
        ours = isinstance(self.rpn, SampledRPN) and isinstance(self.roi_heads, BatchedRoIHeads)
        return ours and self.rpn.is_as_built() and self.roi_heads.is_as_built()

    def export(self, path: str | os.PathLike, *, input_type: str = "uint8") -> None:
        """Write images -> boxes to `path`, a file for ONNX (.onnx) or for `torch.export.load` (.pt2).

        The file holds a fused fp32 copy, with resizing, normalization, RoIAlign and NMS; this detector stays as it is.
        Input: `images` [B, C, H, W], uint8 or, with `input_type="float32"`, floats as this detector takes them; RGB for
        C = 3. B, H and W are free; the images of a batch have one size, with sides from 1 to 32,767 pixels. Outputs:
        `boxes` [B, N, 4] x1 y1 x2 y2 in pixels of the given images, `scores` [B, N] falling, `labels` [B, N] 1.., and
        `count` [B]: rows from it on are zeros. N is `box_detections_per_img`. The thresholds are those of now.

        The file describes itself: `input`, `categories` (id and name of each label), `score_threshold`,
        `nms_threshold`, `detections_per_image`, `resized_to`, `detector` and `backbone` (their configs) and
        `weights_source`. In ONNX these are metadata_props, each a JSON value; in a .pt2 one JSON object,
        `torch.export.load(path, extra_files={"metadata.json": ""})`. A .pt2 needs `import torchvision` before.

        Raises ValueError if the suffix or input type is unknown, the folder does not exist, onnx or onnxscript is not
        installed (for ONNX), or something has been changed since the detector was built that the file would lack: a
        hook, a module of another class, the anchors, ..
        """
        from detection.export import export_detector  # it imports this file

        export_detector(self, path, input_type=input_type)

    def losses(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The training losses in either mode; in eval mode norms use their statistics and images have the test size."""
        modules = [module for module in (self, self.rpn, self.roi_heads) if not module.training]
        for module in modules:
            module.training = True  # these three choose between losses and boxes; norms stay in eval mode
        try:
            return self(images, targets)
        finally:
            for module in modules:
                module.training = False

    def _check_type(self, image: Tensor) -> None:
        """Raise UserError for an image of another type than the weights, unless autocast or the caller's code casts."""
        weight = next(self.backbone.parameters(), image)
        if weight.dtype == image.dtype or torch.is_autocast_enabled(image.device.type):
            return
        ours = type(self.transform) is InputTransform and isinstance(self.backbone, Backbone)
        if ours and weight.is_floating_point() and not is_observed(self.transform, *self.backbone.modules()):
            raise UserError(
                f"the images are {image.dtype} and the detector's weights {weight.dtype}: convert the images with "
                f".to({weight.dtype}), or the detector with .to({image.dtype})"
            )

    def _check_targets(self, targets: list[dict[str, Tensor]]) -> None:
        if torch.compiler.is_compiling():
            return
        classes = self.num_classes

        def labels_fit(labels: Tensor) -> Tensor:
            return ((labels >= 1) & (labels <= classes)).all()

        def boxes_fit(boxes: Tensor) -> Tensor:
            return boxes.isfinite().all() & (boxes[:, 2:] > boxes[:, :2]).all()

        labels, boxes = (torch.cat([t[name] for t in targets]) for name in ("labels", "boxes"))
        if numbers_of(labels_fit(labels) & boxes_fit(boxes)):  # the only wait for a GPU
            return
        for target in targets:
            name = f"image {target['image_id']}: " if "image_id" in target else ""
            if not labels_fit(target["labels"]):
                raise UserError(
                    f"{name}labels {sorted(set(target['labels'].tolist()))}: a label is 1..{classes} "
                    f"({', '.join(list(self.categories.values())[:3])} ..), 0 is background"
                )
            if not boxes_fit(target["boxes"]):
                raise UserError(
                    f"{name}a box x1 y1 x2 y2 is not finite, or has no width or height: {target['boxes'].tolist()}"
                )


def _losses_of_batch(detector: FasterRCNN, images: Tensor, sizes: Tensor, boxes: Tensor, labels: Tensor) -> dict:
    batch = ImageList(images, sizes)  # a tensor: numbers would each need a graph
    return detector._of_batch(batch, Targets(boxes, labels))[1]


def _in_buckets(batch: ImageList, targets: Targets) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `_losses_of_batch` takes, padded so that few graphs serve all batches."""
    height, width = batch.tensors.shape[-2:]
    images = F.pad(batch.tensors, (0, -width % BUCKET, 0, -height % BUCKET))
    boxes, labels, _ = targets
    for tensor, dimensions in ((images, (2, 3)), (boxes, (1,)), (labels, (1,))):
        any_size_in_graphs(tensor, dimensions)
    return images, sizes_of(batch.image_sizes, boxes), boxes, labels


def _check_form(targets: Any, images: int) -> None:
    """Raise UserError unless `targets` has a dict of boxes and labels, tensors that fit together, for each image."""
    if not isinstance(targets, list | tuple) or len(targets) != images:
        given = f"{len(targets)}" if isinstance(targets, list | tuple) else type(targets).__name__
        raise UserError(f"{images} images need a list of {images} targets, not {given}: {A_TARGET} for each image")
    for i, target in enumerate(targets):
        if not isinstance(target, Mapping):
            raise UserError(f"targets[{i}] is {A_TARGET}, not {type(target).__name__}")
        boxes, labels = target.get("boxes"), target.get("labels")
        name = f"image {target['image_id']}" if "image_id" in target else f"targets[{i}]"
        if not isinstance(boxes, Tensor) or boxes.shape[1:] != (4,) or boxes.dtype not in BOX_TYPES:
            raise UserError(
                f"{name}: boxes are a float tensor [n, 4] x1 y1 x2 y2 in pixels, not {_form(boxes)} (none: "
                "torch.zeros(0, 4))"
            )
        if not isinstance(labels, Tensor) or labels.shape != boxes.shape[:1] or labels.dtype != torch.int64:
            raise UserError(
                f"{name}: labels of {len(boxes)} boxes are an int64 tensor [{len(boxes)}], not {_form(labels)}"
            )


def _form(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _with_classes_of(detector: FasterRCNN) -> DetectorConfig:
    """The detector's config, with the box predictor's number of classes and default names if it has another."""
    predictor: Any = detector.roi_heads.box_predictor
    if isinstance(predictor, nn.ModuleList):  # of a cascade
        predictor = predictor[0]
    layer = getattr(predictor, "cls_score", None)
    outputs = getattr(layer, "out_features", None)
    if type(outputs) is not int or outputs - 1 == detector.config.num_classes:
        return detector.config
    return replace(detector.config, num_classes=outputs - 1, categories=())


SAVED_AS: dict[Any, type] = {  # torchvision's classes that ours compute the same as
    nn.Sequential: ConvBlocks,
    FastRCNNConvFCHead: ConvFCHead,
    FastRCNNPredictor: FP32Predictor,
    RPNHead: FP32RPNHead,
    GeneralizedRCNNTransform: InputTransform,
}


def build_faster_rcnn(
    backbone: Backbone, num_classes: int, *, categories: Mapping[int, str] | None = None, **settings
) -> FasterRCNN:
    """Build Faster R-CNN (Ren et al. 2015) over `backbone`; anchors and RoI pooling follow `backbone.features`.

    num_classes: real categories, without background; a target's labels are 1..num_classes.
    categories: the data set's {category id: name}, in the order of the labels; default {1: "class 1", ..}.
    settings: the other fields of `DetectorConfig`: variant, min_size, anchor_scale, box_score_thresh, .. torchvision's
        arguments that are modules (rpn_anchor_generator, box_head, ..) are refused; the message names what is taken.

    The detector runs on the layers of `backbone`, which are not copied: training one trains both. Nothing else of
    `backbone` changes; variant "c4" takes its stage 5 as box head, and the backbone keeps it.

    Raises ValueError for a backbone that does not fit the variant, and for a setting that is not accepted.
    """
    if not isinstance(backbone, Backbone):
        raise UserError(
            f"build_faster_rcnn takes what build_resnet_backbone or from_timm gave, not {type(backbone).__name__}; a "
            "backbone of torchvision's kind, as_torchvision's too, is for torchvision.models.detection.FasterRCNN"
        )
    if not isinstance(categories, Mapping | None):
        raise UserError(f"categories are {{id: name}}, as {{1: 'cat', 2: 'dog'}}, not {brief(categories)}")
    for name, instead in TORCHVISIONS.items():
        if settings.get(name) is not None:
            raise UserError(
                f"{name} is an argument of torchvision's FasterRCNN; here give {instead}, or plug the backbone into "
                f"torchvision's own: FasterRCNN(as_torchvision(backbone), {name}=.., ..)"
            )
    if "trainable_backbone_layers" in settings:
        raise UserError(
            f"trainable_backbone_layers={settings['trainable_backbone_layers']!r} is torchvision's; here the backbone "
            "decides: build_resnet_backbone(.., frozen_through='c2') trains 3 layers, 'stem' 4, None 5"
        )
    if unknown := settings.keys() - TORCHVISIONS.keys() - {field.name for field in fields(DetectorConfig)}:
        raise UserError(
            f"unknown setting {', '.join(sorted(unknown))}; help(detection.config.DetectorConfig) lists the settings"
        )
    if settings.get("box_norm") == "FrozenBN":
        raise UserError("box_norm='FrozenBN' without weights would freeze random layers; choose BN, SyncBN or GN")
    settings = {name: value for name, value in settings.items() if name not in TORCHVISIONS}
    pairs = tuple((categories or {}).items())
    return FasterRCNN(backbone, DetectorConfig(num_classes=num_classes, categories=pairs, **settings))


def _with_levels_of(variant: str, backbone: Backbone) -> Backbone:
    """The backbone with only the maps that the variant uses. Raises UserError if it does not fit the variant."""
    strides = {level: feature.stride for level, feature in backbone.features.items()}
    level, resnet = LEVEL_OF.get(variant), backbone if isinstance(backbone, ResNetBackbone) else None
    if level is None:
        fits = all(name.startswith("p") for name in strides)
    elif resnet is None:
        fits = variant != "c4" and strides == {level: 16}  # only a ResNet can leave out the other levels
    else:
        fits = strides.get(level) == 16 and (variant != "c4" or "c5" in resnet.stage_features)
    if not fits:
        given = ", ".join(f"{name} at stride {stride}" for name, stride in strides.items())
        needed = BACKBONE_OF.get(variant, {"levels": ("c4",)})
        arguments = ", ".join(f"{name}={value!r}" for name, value in needed.items())
        raise UserError(f"variant {variant!r} does not fit this backbone of {given}: build it with {arguments}")
    return backbone if level is None or resnet is None else resnet.with_levels([level])


def _normalization(config: DetectorConfig, backbone: Backbone) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the images. Raises UserError if they are not those of the backbone's channels."""
    channels = _in_channels(backbone)
    colours = channels == 3
    mean = config.image_mean or (MEAN if colours else ())
    std = config.image_std or (STD if colours else ())
    if not len(mean) == len(std) == channels:
        given = [None if value is None else list(value) for value in (config.image_mean, config.image_std)]
        raise UserError(
            f"this backbone takes images of {channels} channels: give image_mean and image_std with {channels} numbers "
            f"each, not {given[0]} and {given[1]}"
        )
    return list(mean), list(std)


def _in_channels(backbone: nn.Module) -> int:
    """The channels of the first convolution, which may have taken the place of the built one."""
    return next((module.in_channels for module in backbone.modules() if isinstance(module, nn.Conv2d)), 3)


def save_detector(detector: FasterRCNN, path: str | Path) -> None:
    """Write a safetensors file with the weights and everything that `load_detector` needs to rebuild the detector.

    Thresholds, sizes, mean, standard deviation and the numbers of channels and classes are written as they are now.
    Raises UserError if something else has been changed since the detector was built (a module, an eps, a padding mode,
    the anchors), which the file cannot state.
    """
    backbone, config = description(detector)
    write_weights(path, detector.state_dict(), {"backbone": backbone, "detector": config.to_json()})


def description(
    detector: FasterRCNN, *, fused: bool = False, otherwise: str = SAVE_STATE
) -> tuple[dict[str, Any], DetectorConfig]:
    """The backbone's config as JSON and the detector's, which rebuild the detector as it is now.

    `fused`: batch norms are folded into convolutions. Raises UserError as `save_detector` does; `otherwise` is what to
    do about a change that no argument makes.
    """
    config, backbone = _with_classes_of(detector), detector.backbone.config.to_json()
    if isinstance(detector.backbone, ResNetBackbone):
        backbone["in_channels"] = _in_channels(detector.backbone)
    built = _outline(detector, backbone, config)
    usual = _live_settings(built)
    if changed := {name: value for name, value in _live_settings(detector).items() if value != usual[name]}:
        config = replace(config, **changed)
        built = _outline(detector, backbone, config)
    if difference := _difference(detector, fuse_detector(built) if fused else built):
        place, found, expected = difference
        raise UserError(
            f"{place} is {found}, and load_detector would make it {expected}: set it with an argument of "
            f"build_faster_rcnn or build_resnet_backbone if there is one, or {otherwise}"
        )
    return backbone, config


def _outline(detector: FasterRCNN, backbone: Mapping[str, Any], config: DetectorConfig) -> FasterRCNN:
    """What `load_detector` would build, without memory for weights; a network of timm is the detector's own."""
    with torch.device("meta"):
        if isinstance(detector.backbone, ResNetBackbone):
            return _built(backbone, config, "this detector")
        return FasterRCNN(detector.backbone, config)


def _live_settings(detector: FasterRCNN) -> dict[str, Any]:
    transform: Any = detector.transform
    rpn: Any = detector.rpn
    heads: Any = detector.roi_heads
    sides = tuple(transform.min_size)
    settings = {
        "min_size": sides[0] if len(sides) == 1 else sides,
        "max_size": transform.max_size,
        "resize_in_training": getattr(transform, "resize_in_training", not transform._skip_resize),
        "image_mean": tuple(map(float, transform.image_mean)),
        "image_std": tuple(map(float, transform.image_std)),
        "bbox_reg_weights": tuple(heads.box_coder.weights),
        "box_score_thresh": heads.score_thresh,
        "box_nms_thresh": heads.nms_thresh,
        "box_detections_per_img": heads.detections_per_img,
        "rpn_score_thresh": rpn.score_thresh,
        "rpn_nms_thresh": rpn.nms_thresh,
    }
    for when, short in (("training", "train"), ("testing", "test")):
        settings[f"rpn_pre_nms_top_n_{short}"] = rpn._pre_nms_top_n[when]
        settings[f"rpn_post_nms_top_n_{short}"] = rpn._post_nms_top_n[when]
    for part, prefix in ((rpn, "rpn"), (heads, "box")):
        settings[f"{prefix}_fg_iou_thresh"] = part.proposal_matcher.high_threshold
        settings[f"{prefix}_bg_iou_thresh"] = part.proposal_matcher.low_threshold
        settings[f"{prefix}_batch_size_per_image"] = part.fg_bg_sampler.batch_size_per_image
        settings[f"{prefix}_positive_fraction"] = part.fg_bg_sampler.positive_fraction
    if ious := detector.config.cascade_ious:
        settings["cascade_ious"] = (settings["box_fg_iou_thresh"], *ious[1:])
    return settings


def _difference(detector: FasterRCNN, built: FasterRCNN) -> tuple[str, Any, Any] | None:
    """The first module, setting of one or tensor's shape that is not as in `built`: its name, as found, as expected."""
    ours, wanted = dict(detector.named_modules()), dict(built.named_modules())
    for name in [*ours, *wanted]:
        found, expected = (type(modules[name]) if name in modules else None for modules in (ours, wanted))
        if found is not expected and SAVED_AS.get(found, found) is not expected:
            return name, found and found.__name__, expected and expected.__name__
    for name, module in ours.items():
        found_settings, expected_settings = _plain_settings(module), _plain_settings(wanted[name])
        for setting in found_settings.keys() & expected_settings.keys():
            if found_settings[setting] != expected_settings[setting]:
                return f"{name}.{setting}", found_settings[setting], expected_settings[setting]
    shapes, expected_shapes = ({k: list(x.shape) for k, x in d.state_dict().items()} for d in (detector, built))
    for key in [*shapes, *expected_shapes]:
        if shapes.get(key) != expected_shapes.get(key):
            return key, shapes.get(key), expected_shapes.get(key)
    return None


def _plain_settings(module: nn.Module) -> dict[str, Any]:
    """The public attributes that are numbers, text or sequences of them: eps, padding_mode, stride, sizes, .."""
    settings = {name: _as_tuples(value) for name, value in vars(module).items() if not name.startswith("_")}
    if isinstance(module, AnchorGenerator):
        settings["cell_anchors"] = _as_tuples([x.tolist() for x in module.cell_anchors])
    return {name: value for name, value in settings.items() if value is not NotImplemented and name not in PASSING}


def _as_tuples(value: Any) -> Any:
    """The value with lists as tuples; NotImplemented if it holds something else than numbers and text."""
    if isinstance(value, list | tuple):
        values = tuple(map(_as_tuples, value))
        return NotImplemented if any(one is NotImplemented for one in values) else values
    return value if value is None or isinstance(value, bool | int | float | str) else NotImplemented


def load_detector(path: WeightSource, *, eps: float | None = None, **settings: Any) -> FasterRCNN:
    """Load the detector that `save_detector` wrote to `path`, or one in a foreign format, in eval mode.

    What a foreign file leaves open goes to `read_weights(path, given_input=.., stride_in_1x1=.., dilate_c5=..)`, whose
    result this takes as well.

    eps: of the norms, where the file does not state it. Of a torchvision detector's file the default is 1e-5, which a
        message says; those that torchvision publishes, and what was trained from them, have 0.
    settings: fields of `DetectorConfig` that a foreign file does not state: anchor_scale, geometry, box_nms_thresh, ..
        A message names what is assumed of them.

    Raises ValueError if the weights are not of a Faster R-CNN that this package builds, or state what is given.
    """
    weights = read_weights(path)
    if eps is not None:
        weights = with_eps(weights, eps)
    if "detector" not in weights.metadata:
        if weights.format == "resbackbone":
            raise UserError(f"{weights.source} does not hold a detector of this package: its metadata describe none")
        weights.announce_assumptions()
        weights = with_settings(weights, settings)
        described = describe_detector(weights)
        announce_settings(weights, described["detector"])
        weights.metadata.update(described)
    elif settings:
        raise UserError(f"weights from {weights.source} state their detector; leave out {', '.join(settings)}")
    detector = detector_for(weights)
    fit(detector, weights)
    return detector.eval()


def detector_for(weights: Weights) -> FasterRCNN:
    """The detector that the metadata of `weights` describe, with random weights."""
    config = DetectorConfig.from_json(weights.metadata["detector"], weights.source)
    return _built(weights.metadata["backbone"], config, weights.source)


def _built(backbone: Mapping[str, Any], config: DetectorConfig, source: str) -> FasterRCNN:
    if config.variant == "c4":
        backbone = {**backbone, **BACKBONE_OF["c4"]}  # a detector's own has level c4 alone: stage 5 is the box head
    if "timm" not in backbone:
        return FasterRCNN(ResNetBackbone(BackboneConfig.from_json(backbone, source)), config)
    require("train", "timm", user="a detector on a timm network")
    from resbackbone.adapters.from_timm import TimmBackbone, TimmConfig  # only here: other detectors need no timm

    return FasterRCNN(TimmBackbone(TimmConfig.from_json(backbone, source)), config)


def read_described_weights(source: str | Path) -> Weights:
    """`read_weights`, with "detector" in the metadata if `load_detector` can build one from them."""
    weights = read_weights(source)
    foreign = "detector" not in weights.metadata and not weights.unknown
    if foreign and not weights.state.keys().isdisjoint(f"{PREDICTOR}{stage}cls_score.weight" for stage in ("", "0.")):
        described = describe_detector(weights)
        announce_settings(weights, described["detector"])
        weights.metadata.update(described)
    return weights


def retarget_detector(
    weights: Weights, categories: Mapping[int, str], *, backbone: Mapping, **options
) -> tuple[FasterRCNN, list[str]]:
    """Build the detector of `read_described_weights` for other categories; also returns the names of new tensors.

    Trunk, pyramid, RPN and box heads start from the weights. The box predictor does if the categories are the same;
    otherwise its per-class layers are new. The weights determine the settings in SHAPE; `options` are the other
    settings of `build_faster_rcnn`, and `backbone` overrides the backbone's configuration (norm, frozen_through). Batch
    norms of pyramid and box head become the trunk's kind: all frozen, or all trainable.

    Raises ValueError if the weights do not fit, or if `options` have a setting in SHAPE with another value than theirs.
    """
    described = DetectorConfig.from_json(weights.metadata["detector"], weights.source)
    pairs = tuple(categories.items())
    same = pairs == described.categories
    shape = {name: getattr(described, name) for name in SHAPE}
    for name in shape.keys() & options.keys():
        if options[name] is not None and _as_tuples(options[name]) != shape[name]:
            raise UserError(
                f"weights from {weights.source} are of a detector with {name}={shape[name]}, but you asked for "
                f"{name}={options[name]}; leave {name} out to use theirs, or start from a backbone's weights"
            )
    backbone = {**weights.metadata["backbone"], **backbone}
    norm = backbone.get("norm", BackboneConfig.norm)
    backbone["fpn_norm"] = same_kind(backbone.get("fpn_norm"), norm)
    shape["box_norm"] = same_kind(described.box_norm, norm)
    retargeted = {"num_classes": len(categories), "categories": pairs, **options, **shape}
    weights.announce_assumptions()
    configs = {"backbone": backbone, "detector": retargeted}
    detector = detector_for(replace(weights, metadata=configs))
    by_class = [key for key in detector.state_dict() if key.startswith(PREDICTOR)]
    if described.cascade_ious:  # whose boxes are for all classes
        by_class = [key for key in by_class if ".cls_score." in key]
    new = () if same else tuple(by_class)
    kept = {key: tensor for key, tensor in weights.state.items() if key not in new}
    fit(detector, replace(weights, state=kept), fresh=new)
    return detector, list(new)


def prepare_for_detection(detector: AnyDetector, *, bf16: bool = False) -> AnyDetector:
    """Prepare a detector for inference, in place: eval mode, batch norms folded into their convolutions.

    With `bf16`, the weights of convolutions and linear layers become bfloat16, as autocast would make them in every
    pass; results are the same, but from then on the detector runs only under autocast. On a CPU the process keeps the
    memory that it frees from then on (`resbackbone.memory.keep_freed_memory`, which also ends that).
    """
    if next(detector.parameters()).device.type == "cpu":
        keep_freed_memory()
    fuse_detector(detector)
    if bf16:
        for module in detector.modules():
            if type(module) in (nn.Conv2d, nn.Linear):
                module.to(torch.bfloat16)
        fuse_detector(detector)  # keeps the weights as they are now
    return detector


def fuse_detector(detector: AnyDetector) -> AnyDetector:
    """`prepare_for_detection` in the precision of the weights, which changes nothing but the detector."""
    detector.eval().requires_grad_(False)
    for module in detector.modules():
        if isinstance(module, Backbone):
            module._fuse()
        elif isinstance(module, Stage5Head | FP32RPNHead | FastRCNNConvFCHead):
            fuse(module)
    return detector


def detector_file(run: str | Path) -> str | Path:
    """The weights of a run: its model.safetensors, or while it trains those of its last complete checkpoint.

    Files, named sources and URLs are returned as they are.
    """
    if is_named(str(run)):
        return run
    run = Path(run)
    if run.is_file():
        return run
    if not run.is_dir():
        raise UserError(f"{run}: no such run folder or file; give one, or a named source (torchvision:..)")
    folder = run if (run / "model.safetensors").is_file() else last_whole_checkpoint(run)
    if folder is None or not (folder / "model.safetensors").is_file():  # --engine detectron2 writes model_final.pth
        raise UserError(f"{run} holds no detector: neither model.safetensors nor a complete checkpoint of one")
    return folder / "model.safetensors"


def run_folder(run: str | Path) -> Path:
    """The folder of a run or of a weight file; for a named source or URL the current one."""
    path = Path() if is_named(str(run)) else Path(run)
    return path if path.is_dir() else path.parent
