"""What of torchvision this package does the work of without calling it, so that a patch of it would go unnoticed."""

from torchvision.models.detection import rpn
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign, boxes, poolers

from resbackbone.compat import torchvision_detection_utils

utils = torchvision_detection_utils()
BYPASSED = {
    rpn: ("concat_box_prediction_layers", "permute_and_flatten"),
    rpn.RPNHead: ("forward",),
    rpn.RegionProposalNetwork: ("forward", "compute_loss", "filter_proposals", "_get_top_n_idx"),
    utils.BoxCoder: ("encode", "encode_single", "decode", "decode_single"),
    utils.Matcher: ("set_low_quality_matches_",),
    boxes: ("batched_nms", "clip_boxes_to_image", "remove_small_boxes"),
    poolers: ("roi_align",),
    MultiScaleRoIAlign: ("forward",),
    GeneralizedRCNNTransform: ("normalize",),
}
_AS_IMPORTED = [(place, name, getattr(place, name)) for place, names in BYPASSED.items() for name in names]


def is_patched() -> bool:
    """Whether any of BYPASSED has been replaced since it was imported; torchvision's own code then runs."""
    return any(getattr(place, name) is not theirs for place, name, theirs in _AS_IMPORTED)
