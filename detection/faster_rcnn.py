"""Faster R-CNN over a Backbone, a batch at a time: the FPN, C4, DC5 and VGG-16 variants, under torchvision's names."""

import os
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList

from detection.anchors import Anchors
from detection.batch import A_TARGET, Targets, check_form, check_targets, pad_boxes, sizes_of
from detection.box_heads import Stage5Head, build_box_head, build_roi_heads
from detection.config import BACKBONE_OF, SINGLE_MAP_ANCHORS, DetectorConfig
from detection.foreign import NOT_A_CLASS
from detection.paper import ContextRoIAlign
from detection.roi_align import PyramidRoIAlign
from detection.roi_heads import BatchedRoIHeads, is_real
from detection.rpn import FP32RPNHead, SampledRPN
from detection.transforms import InputTransform, check_images
from resbackbone import Backbone, ResNetBackbone
from resbackbone.checks import UserError, brief
from resbackbone.compat import any_size_in_graphs, is_observed
from resbackbone.layers import fuse
from resbackbone.memory import keep_freed_memory
from resbackbone.weights import MEAN, STD

if TYPE_CHECKING:
    from detection.predict import Prediction

LEVEL_OF = {"c4": "c4", "dc5": "c5", "vgg16": "c4"}  # the single map that a variant uses
BUCKET = 64  # pixels; the sides of a compiled batch are multiples of it
TORCHVISIONS = {  # arguments of its FasterRCNN that are modules, and what sets the same here
    "rpn_anchor_generator": "anchor_scale (side over stride, on a pyramid) or anchor_sides (pixels, on a single map)",
    "rpn_head": "rpn_conv_depth",
    "box_roi_pool": "geometry and anchor_scale",
    "box_head": "box_conv_layers, box_norm and representation_size",
    "box_predictor": "num_classes and cascade_ious",
}
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
        return dict(with_classes_of(self).categories)

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
            check_form(targets, len(images))
            if not torch.compiler.is_compiling():
                check_targets(targets, list(self.categories.values()))
        elif self.training:
            raise UserError(f"training needs targets: {A_TARGET} for each image")
        sizes = [tuple(image.shape[-2:]) for image in images]
        batch, resized = self.transform(images, targets)
        padded = None if resized is None else Targets.of(resized)
        trains = self.training and torch.is_grad_enabled()  # a validation loss is not worth a graph of its own
        if trains and self._compiled is not None and self._is_as_built():
            shapes = str(self.rpn.anchor_generator.shapes())
            losses = self._compiled(self, shapes, *_in_buckets(batch, cast(Targets, padded)))
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

    @overload
    def predict(
        self, images: list | tuple, *, score: float = ..., batch_size: int = ..., precision: str | None = ...
    ) -> "list[Prediction]": ...

    @overload
    def predict(
        self, images: Any, *, score: float = ..., batch_size: int = ..., precision: str | None = ...
    ) -> "Prediction | Any": ...

    def predict(self, images: Any, *, score: float = 0.5, batch_size: int = 1, precision: str | None = None) -> Any:
        """Find objects: a `predict.Prediction` for an image, and a list of them for a list or a folder.

        images: a file (str or Path), a folder (the images in it, sorted by name), or a list of any of these:
            - a PIL image of any mode;
            - an array [H, W, 3] in RGB (of OpenCV's BGR give `frame[:, :, ::-1]`), [H, W, 4] with alpha, which is
              dropped, or gray [H, W]; uint8, or floats in 0..1;
            - a tensor [3, H, W], [4, H, W] or [1, H, W] of the same, on any device.
            PIL images and files are turned as their EXIF orientation says.
        score: the lowest score of the boxes that are returned, in 0..1. To compute AP, give 0: it counts all that the
            detector finds (from `box_score_thresh` of its config on).
        batch_size: images read at a time; those of equal size go through the network together.
        precision: "fp32", or "bf16" for autocast; by default bf16 where the device computes in it, as in the commands.

        Boxes are those of tools/detect.py. The detector computes on the device of its weights, in eval mode and without
        gradients, and stays as it is: each call makes a copy with folded norms (0.1 s with a ResNet-18 on a CPU core).
        Before a loop over single images, as those of a camera, call
        `detection.faster_rcnn.prepare_for_detection(detector)` once; then there is no copy.

        Raises UserError (BadImage for a file) for an image that cannot be read, a URL, a video, an empty folder, other
        types and shapes, and floats that are not finite or not in 0..1.
        """
        from detection.predict import predict  # it imports this file

        return predict(self, images, score=score, batch_size=batch_size, precision=precision)

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
        parts = (self.rpn, self.rpn.anchor_generator, self.roi_heads) if ours else ()
        hooked = is_observed(*self.backbone.modules(), *self.roi_heads.modules())  # a graph does not see later hooks
        return ours and not hooked and all(part.is_as_built() for part in parts)

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


def _losses_of_batch(
    detector: FasterRCNN, shapes: str, images: Tensor, sizes: Tensor, boxes: Tensor, labels: Tensor
) -> dict:
    """The losses of images [B, 3, H / BUCKET, BUCKET, W / BUCKET, BUCKET].

    Compiling takes twice as long where the compiler cannot see that the sides are multiples. Other `shapes` of anchors,
    which are constants of a graph, make another graph.
    """
    if not shapes:  # only what is looked at is compared before the next call
        raise ValueError("no anchors")
    batch = ImageList(images.flatten(4).flatten(2, 3), sizes)  # a tensor: numbers would each need a graph
    return detector._of_batch(batch, Targets(boxes, labels))[1]


def _in_buckets(batch: ImageList, targets: Targets) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `_losses_of_batch` takes, padded so that few graphs serve all batches."""
    height, width = batch.tensors.shape[-2:]
    images = F.pad(batch.tensors, (0, -width % BUCKET, 0, -height % BUCKET))
    images = images.unflatten(3, (-1, BUCKET)).unflatten(2, (-1, BUCKET))
    boxes, labels, _ = targets
    for tensor, dimensions in ((images, (2, 4)), (boxes, (1,)), (labels, (1,))):
        any_size_in_graphs(tensor, dimensions)
    return images, sizes_of(batch.image_sizes, boxes), boxes, labels


def with_classes_of(detector: FasterRCNN) -> DetectorConfig:
    """The detector's config, with the box predictor's number of classes and default names if it has another."""
    predictor: Any = detector.roi_heads.box_predictor
    if isinstance(predictor, nn.ModuleList):  # of a cascade
        predictor = predictor[0]
    layer = getattr(predictor, "cls_score", None)
    outputs = getattr(layer, "out_features", None)
    if type(outputs) is not int or outputs - 1 == detector.config.num_classes:
        return detector.config
    return replace(detector.config, num_classes=outputs - 1, categories=())


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
    channels = in_channels_of(backbone)
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


def in_channels_of(backbone: nn.Module) -> int:
    """The channels of the first convolution, which may have taken the place of the built one."""
    return next((module.in_channels for module in backbone.modules() if isinstance(module, nn.Conv2d)), 3)


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
