"""DetectorConfig: everything that makes a Faster R-CNN except its backbone and weights."""

import math
from dataclasses import dataclass
from typing import ClassVar

from resbackbone.checks import UserError, check_ranges, one_of
from resbackbone.config import Config
from resbackbone.layers import NORMS

BACKBONE_OF: dict[str, dict] = {  # each variant's arguments of `build_resnet_backbone`
    "fpn": {"fpn": True},
    "c4": {"levels": ("c4", "c5")},
    "dc5": {"levels": ("c5",), "dilate_c5": True},
}
VARIANTS = (*BACKBONE_OF, "vgg16")
SINGLE_MAP_ANCHORS = (32, 64, 128, 256, 512)  # pixels
GEOMETRIES = ("torchvision", "detectron2")
BOX_LOSSES = ("smooth_l1", "giou", "diou", "ciou")
# What the weights of a detector's trunk, RPN and box head were trained for.
SHAPE = (
    "variant",
    "anchor_scale",
    "anchor_sides",
    "canonical_scale",
    "rpn_conv_depth",
    "box_conv_layers",
    "representation_size",
    "cascade_ious",
    "bbox_reg_weights",
    "geometry",
    "global_context",
    "image_mean",
    "image_std",
)

# The values that a setting may have, or each of its numbers: smallest, largest, in words.
_POSITIVE, _COUNT, _SHARE = (5e-324, math.inf, "above 0"), (1, math.inf, "at least 1"), (0, 1, "from 0 to 1")
RANGES = {
    "cascade_ious": _SHARE,
    "min_size max_size canonical_scale rpn_conv_depth box_conv_layers representation_size": _COUNT,
    "rpn_pre_nms_top_n_train rpn_pre_nms_top_n_test rpn_post_nms_top_n_train rpn_post_nms_top_n_test": _COUNT,
    "rpn_batch_size_per_image box_batch_size_per_image box_detections_per_img": _COUNT,
    "rpn_nms_thresh rpn_fg_iou_thresh rpn_bg_iou_thresh rpn_score_thresh rpn_positive_fraction": _SHARE,
    "box_nms_thresh box_fg_iou_thresh box_bg_iou_thresh box_score_thresh box_positive_fraction": _SHARE,
    "anchor_scale anchor_sides image_std bbox_reg_weights box_loss_weight": _POSITIVE,
}


@dataclass(frozen=True, kw_only=True)
class DetectorSettings(Config):
    """The settings of a Faster R-CNN (Ren et al. 2015) that do not follow from the data set, as a recipe holds them.

    variant: "fpn" (Lin et al. 2017, Sec. 4), over p2..; "c4", the ResNet paper's own detector (appendix A): RPN on c4,
        RoI features through stage 5; "dc5", on a c5 of stride 16; "vgg16", the paper's baseline, over
        `detection.paper.build_vgg16_backbone()` or `from_timm("vgg16", levels=["c4"])`: RPN on c4, RoI features
        through fc6 and fc7, which `detection.paper.load_vgg16` fills.
    min_size, max_size: images are resized to this shorter side in pixels, and at most this longer one. Of several
        shorter sides training draws one for each image, and inference takes the last.
    resize_in_training: False if training images are resized already.
    image_mean, image_std: of the images, channel by channel, which the detector normalizes. Default: ImageNet's, for
        RGB in 0..1; a backbone of other than three channels needs both.
    anchor_scale: a pyramid level's anchors have the side anchor_scale * stride (8: 32 on p2 .. 512 on p6). On a single
        map the sides are 4, 8, 16, 32 and 64 times anchor_scale.
    anchor_sides: other sides for a single map's anchors, stated at an anchor_scale of 8.
    canonical_scale: the side in pixels of the RoIs that p4 pools (Lin et al. 2017, eq. 1); by default in proportion to
        anchor_scale, 224 for 8. torchvision, detectron2 and mmdetection have 224 whatever their anchors.
    rpn_conv_depth: 3x3 convolutions of the RPN's head (1; torchvision's V2 detectors have 2).
    box_conv_layers: channels of the box head's 3x3 convolutions, which one fully connected layer follows (torchvision's
        V2 detectors: 256, 256, 256, 256); default none, but two fully connected layers. For fpn and dc5.
    box_norm: the norm behind each of these convolutions: "BN", "FrozenBN", "SyncBN", "GN", or None (default).
    representation_size: width of the fully connected layers of the fpn and dc5 (1024) and vgg16 heads (4096).
    geometry: "torchvision": anchors on whole pixels at inferred strides, RoIAlign with 2 x 2 samples a bin;
        "detectron2": unrounded anchors, aligned RoIAlign with as many samples as cells, and single maps not padded
        to their stride. Weights trained with one detect about as well, but not the same, with the other.
    global_context: append the feature of the whole image to that of every region (He et al. 2015, appendix B).
    cascade_ious: for fpn and dc5, a Cascade R-CNN (Cai and Vasconcelos 2018) with a stage for each of these IoUs, from
        which on a region is an object: (0.5, 0.6, 0.7) in the paper; default () is one box head. The first one is
        box_fg_iou_thresh, and box_bg_iou_thresh unless that is set. Each stage regresses one box for all classes from
        those of the stage before.
    bbox_reg_weights: by which the box deltas x, y, w, h are divided; default (10, 10, 5, 5). Stage n of a cascade has
        them n times.
    box_loss: of the box head: "smooth_l1", or of the IoU "giou", "diou" or "ciou" (torchvision.ops).
    box_loss_weight: of the box head's box loss; mmdetection trains its Faster R-CNN with GIoU at a weight of 10.
    rpn_.., box_..: torchvision's thresholds and numbers of proposals, with its names and defaults.
    """

    kind: ClassVar[str] = "detector"
    variant: str = "fpn"
    min_size: int | tuple[int, ...] = 800
    max_size: int = 1333
    resize_in_training: bool = True
    image_mean: tuple[float, ...] | None = None
    image_std: tuple[float, ...] | None = None
    anchor_scale: float = 8.0
    anchor_sides: tuple[float, ...] | None = None
    canonical_scale: int | None = None
    rpn_conv_depth: int = 1
    box_conv_layers: tuple[int, ...] = ()
    box_norm: str | None = None
    representation_size: int | None = None
    geometry: str = "torchvision"
    global_context: bool = False
    cascade_ious: tuple[float, ...] = ()
    box_loss: str = "smooth_l1"
    box_loss_weight: float = 1.0
    rpn_pre_nms_top_n_train: int = 2000
    rpn_pre_nms_top_n_test: int = 1000
    rpn_post_nms_top_n_train: int = 2000
    rpn_post_nms_top_n_test: int = 1000
    rpn_nms_thresh: float = 0.7
    rpn_fg_iou_thresh: float = 0.7
    rpn_bg_iou_thresh: float = 0.3
    rpn_batch_size_per_image: int = 256
    rpn_positive_fraction: float = 0.5
    rpn_score_thresh: float = 0.0
    box_score_thresh: float = 0.05
    box_nms_thresh: float = 0.5
    box_detections_per_img: int = 100
    box_fg_iou_thresh: float = 0.5
    box_bg_iou_thresh: float = 0.5
    box_batch_size_per_image: int = 512
    box_positive_fraction: float = 0.25
    bbox_reg_weights: tuple[float, float, float, float] | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("box_fg_iou_thresh", "box_bg_iou_thresh") if self.cascade_ious else ():
            if getattr(self, name) == getattr(DetectorSettings, name):
                object.__setattr__(self, name, self.cascade_ious[0])
        self._check_ranges()
        one_of("variant", self.variant, VARIANTS)
        one_of("geometry", self.geometry, GEOMETRIES)
        one_of("norm of the box head", self.box_norm, (None, *NORMS))
        one_of("box loss", self.box_loss, BOX_LOSSES)
        if self.cascade_ious and (self.variant not in ("fpn", "dc5") or self.global_context):
            kind = "global_context" if self.global_context else f"variant {self.variant!r}"
            raise UserError(f"cascade_ious are for fpn and dc5 without global_context, not for {kind}")
        if self.cascade_ious and self.cascade_ious[0] != self.box_fg_iou_thresh:
            raise UserError(
                f"cascade_ious begin with {self.cascade_ious[0]}, and box_fg_iou_thresh is {self.box_fg_iou_thresh}: "
                "they are the same threshold; leave box_fg_iou_thresh out"
            )
        if self.box_conv_layers and self.variant not in ("fpn", "dc5"):
            raise UserError(f"box_conv_layers are for fpn and dc5: the box head of {self.variant} has its own layers")
        if self.box_norm and not self.box_conv_layers:
            raise UserError(f"box_norm={self.box_norm!r}: only a box head with box_conv_layers has norms; give both")
        if self.anchor_sides is not None and self.variant == "fpn":
            raise UserError("anchor_sides are a single map's; on a pyramid each level has one, set by anchor_scale")

    def _check_ranges(self) -> None:
        check_ranges(self, RANGES)
        if () in (self.min_size, self.anchor_sides):
            raise UserError("min_size and anchor_sides need at least one number")
        for part in ("rpn", "box"):
            low, high = (getattr(self, f"{part}_{kind}_iou_thresh") for kind in ("bg", "fg"))
            if low > high:
                raise UserError(f"{part}_bg_iou_thresh is {low}; it must be at most {part}_fg_iou_thresh, {high}")


@dataclass(frozen=True, kw_only=True)
class DetectorConfig(DetectorSettings):
    """The settings of one detector: those that are None in a recipe have values here.

    num_classes: real categories, without background; a target's labels are 1..num_classes.
    categories: the data set's (category id, name) in the order of the labels; default (1, "class 1"), ..
    """

    num_classes: int
    categories: tuple[tuple[int, str], ...] = ()

    def __post_init__(self):
        if type(self.num_classes) is not int or self.num_classes < 1:
            raise UserError(f"num_classes is the number of real categories, at least 1, not {self.num_classes!r}")
        if not self.categories:
            names = tuple((label, f"class {label}") for label in range(1, self.num_classes + 1))
            object.__setattr__(self, "categories", names)
        if self.representation_size is None:
            object.__setattr__(self, "representation_size", 4096 if self.variant == "vgg16" else 1024)
        super().__post_init__()
        if self.canonical_scale is None:
            object.__setattr__(self, "canonical_scale", round(224 * self.anchor_scale / 8))
        if (distinct := len(dict(self.categories))) != self.num_classes:
            raise UserError(f"num_classes is {self.num_classes}, but there are {distinct} categories")
