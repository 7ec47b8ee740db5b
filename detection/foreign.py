"""Recognise which detector of this package fits Faster R-CNN weights that others published."""

from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from detection.config import BACKBONE_OF
from resbackbone.checks import UserError
from resbackbone.config import BackboneConfig
from resbackbone.weights import Weights
from resbackbone.weights.fit import resolve_architecture, resolve_pyramid
from resbackbone.weights.formats import FORMATS, STAGE5

NOT_A_CLASS = "N/A"  # torchvision's name for the ids that COCO skips: its detectors have outputs for them
# All of Detectron's single-map detectors; torchvision's pyramids have torchvision's numbers, which agree with theirs.
SINGLE_MAP_PROPOSALS = {
    "rpn_pre_nms_top_n_train": 12000,
    "rpn_pre_nms_top_n_test": 6000,
    "rpn_post_nms_top_n_train": 2000,
    "rpn_post_nms_top_n_test": 1000,
}


def describe_detector(weights: Weights) -> dict[str, dict]:
    """The "backbone" and "detector" that `load_detector` builds for foreign weights, in the layout of our own files.

    The format determines the geometry (mmdetection's is detectron2's), names and shapes most of the rest; what remains
    is common to the formats and the default here: shorter sides of 800 pixels, a score of 0.05, 100 detections.
    Categories are COCO's if there are 80, or 90 with the ids that COCO skips, else those the file names, else
    "class 1" and so on. Raises ValueError, naming the tensors, if this package builds no such Faster R-CNN.
    """
    state = weights.state
    if weights.unknown:
        raise UserError(
            f"weights from {weights.source} hold {len(weights.unknown)} tensors that no Faster R-CNN of this package "
            f"has (their trunk and pyramid can be read alone): {', '.join(weights.unknown)}"
        )
    scores = state.get("roi_heads.box_predictor.cls_score.weight")
    if scores is None or scores.dim() != 2:
        raise UserError(
            f"weights from {weights.source} hold no Faster R-CNN: roi_heads.box_predictor is missing; "
            "train a detector that starts from them"
        )
    pyramid = any(key.startswith("backbone.fpn.") for key in state)
    at_c4 = any(key.startswith(f"{STAGE5}layer4.") for key in state)
    variant = "fpn" if pyramid else "c4" if at_c4 else "dc5"
    detector: dict[str, object] = {
        "num_classes": len(scores) - 1,
        "variant": variant,
        "categories": list(_categories(len(scores) - 1, weights.metadata.get("classes")).items()),
        "geometry": FORMATS[weights.format].geometry if weights.format in FORMATS else "torchvision",
    }
    if variant != "c4" and "roi_heads.box_head.fc6.weight" in state:
        detector["representation_size"] = len(state["roi_heads.box_head.fc6.weight"])
    if variant != "fpn":
        detector |= SINGLE_MAP_PROPOSALS
    return {"backbone": _backbone_config(weights, variant).to_json(), "detector": detector}


def _backbone_config(weights: Weights, variant: str) -> BackboneConfig:
    trunk = resolve_architecture(weights)
    if trunk["norm"] != "GN":
        trunk["norm"] = "FrozenBN"
    levels = resolve_pyramid(weights) if variant == "fpn" else {}
    return BackboneConfig(**{**trunk, **BACKBONE_OF[variant], **levels, "frozen_through": "c2"})


def _categories(count: int, names: object) -> dict[int, str]:
    """{category id: name} in the order of the labels."""
    coco = dict(enumerate(FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]))  # 0 is the background
    del coco[0]
    real = {category: name for category, name in coco.items() if name != NOT_A_CLASS}
    if count in (len(coco), len(real)):
        return coco if count == len(coco) else real
    if isinstance(names, list) and len(names) == count:
        return {label: str(name) for label, name in enumerate(names, 1)}
    return {label: f"class {label}" for label in range(1, count + 1)}
