"""What of torchvision this package does the work of without calling it, so that a patch of it would go unnoticed."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torchvision.models.detection import roi_heads, rpn
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign, boxes, poolers

from resbackbone.compat import torchvision_detection_utils

utils = torchvision_detection_utils()
BYPASSED = {
    rpn: ("concat_box_prediction_layers", "permute_and_flatten"),
    rpn.RPNHead: ("forward",),
    rpn.RegionProposalNetwork: (
        "forward",
        "assign_targets_to_anchors",
        "compute_loss",
        "filter_proposals",
        "_get_top_n_idx",
    ),
    roi_heads: ("fastrcnn_loss",),
    roi_heads.RoIHeads: (
        "forward",
        "add_gt_proposals",
        "assign_targets_to_proposals",
        "check_targets",
        "postprocess_detections",
        "select_training_samples",
        "subsample",
    ),
    utils.BoxCoder: ("encode", "encode_single", "decode", "decode_single"),
    utils.Matcher: ("__call__", "set_low_quality_matches_"),
    utils.BalancedPositiveNegativeSampler: ("__call__",),
    boxes: ("batched_nms", "box_iou", "clip_boxes_to_image", "nms", "remove_small_boxes"),
    poolers: ("roi_align",),
    poolers.LevelMapper: ("__call__",),
    MultiScaleRoIAlign: ("forward",),
    GeneralizedRCNNTransform: ("forward", "batch_images", "normalize"),
}
_AS_IMPORTED = [(place, name, getattr(place, name)) for place, names in BYPASSED.items() for name in names]
OWNERS = (utils.__name__, "detection.boxes")
# The attributes of an unchanged helper: (name in its part, class, attributes).
_HELPERS = (
    ("proposal_matcher", utils.Matcher, {*vars(utils.Matcher(0.5, 0.5))}),
    ("fg_bg_sampler", utils.BalancedPositiveNegativeSampler, {*vars(utils.BalancedPositiveNegativeSampler(1, 0.5))}),
    ("box_coder", utils.BoxCoder, {*vars(utils.BoxCoder((1.0,) * 4))}),
)


def is_patched() -> bool:
    """Whether any of BYPASSED has been replaced since it was imported; torchvision's own code then runs."""
    return any(getattr(place, name) is not theirs for place, name, theirs in _AS_IMPORTED)


def keeps(part: Any, methods: Mapping[str, Any]) -> bool:
    """Whether `part` runs these `methods`, {name: function}: its class has them, and it none of its own."""
    return vars(part).keys().isdisjoint(methods) and all(getattr(type(part), n) is m for n, m in methods.items())


def is_as_built(part: Any, base: type[nn.Module]) -> bool:
    """Whether torchvision's forward of `part`, whose class derives from `base`, computes what our own stands for."""
    methods = {name: getattr(base, name) for name in BYPASSED[base] if name != "forward"}
    if is_patched() or not keeps(part, methods) or part.box_similarity is not boxes.box_iou:
        return False
    for name, kind, settings in _HELPERS:
        helper = getattr(part, name)
        if not isinstance(helper, kind) or type(helper).__module__ not in OWNERS or not vars(helper).keys() <= settings:
            return False
    return True
