"""Recognise which detector of this package fits Faster R-CNN weights that others published."""

import itertools
import logging
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from detection.anchors import ASPECT_RATIOS
from detection.config import BACKBONE_OF, SINGLE_MAP_ANCHORS, DetectorConfig
from resbackbone.checks import UserError, brief, one_of
from resbackbone.config import BackboneConfig
from resbackbone.weights import Weights
from resbackbone.weights.fit import check_pyramid, resolve_architecture, resolve_dilation, resolve_pyramid
from resbackbone.weights.formats import ANCHOR_RATIOS, FORMATS, STAGE5
from resbackbone.weights.read import has_bottlenecks

_log = logging.getLogger("resbackbone")
NOT_A_CLASS = "N/A"  # torchvision's name for the ids that COCO skips: its detectors have outputs for them
# All of Detectron's single-map detectors; torchvision's pyramids have torchvision's numbers, which agree with theirs.
SINGLE_MAP_PROPOSALS = {
    "rpn_pre_nms_top_n_train": 12000,
    "rpn_pre_nms_top_n_test": 6000,
    "rpn_post_nms_top_n_train": 2000,
    "rpn_post_nms_top_n_test": 1000,
}

CASCADE_IOUS = (0.5, 0.6, 0.7)  # of every published Cascade R-CNN
TRAIN_CASCADE = "train this package's on their trunk and pyramid: tools/train_coco.py --recipe cascade --weights FILE"

# Parts of names that only these detectors' heads have, and what torchvision's builder of the detector begins with.
OTHER_DETECTORS = (
    (("bbox_head.0.",), "Cascade R-CNN that averages logits", ""),
    (("sem_seg_head.",), "Panoptic FPN", ""),
    (("mask_head.",), "Mask R-CNN", "maskrcnn"),
    (("keypoint_head.",), "Keypoint R-CNN", "keypointrcnn"),
    (("bbox_ctrness", "head.ctrness", "bbox_head.conv_centerness"), "FCOS", "fcos"),
    (("head.classification_head.", "head.cls_subnet.", "bbox_head.retina_"), "RetinaNet", "retinanet"),
)


def describe_detector(weights: Weights) -> dict[str, dict]:
    """The "backbone" and "detector" that `load_detector` builds for foreign weights, in the layout of our own files.

    The format determines the geometry (mmdetection's is detectron2's), names and shapes most of the rest; what remains
    is common to the formats and the default here: shorter sides of 800 pixels, a score of 0.05, 100 detections.
    Categories are COCO's if there are 80, or 90 with the ids that COCO skips, else those the file names, else
    "class 1" and so on. Raises ValueError, naming the tensors, if this package builds no such Faster R-CNN.
    """
    state = weights.state
    check_pyramid(weights)
    if weights.unknown:
        raise UserError(f"weights from {weights.source} {_what_they_are(weights)}")
    if stated := weights.metadata.get("not_built"):
        raise UserError(
            f"weights from {weights.source} are of a detector with {stated}: load them with the package that trained "
            "them, or, to build one of this package all the same, give their state dict alone (torch.load) to "
            "read_weights"
        )
    stages = _numbered(state, "roi_heads.box_predictor.{}.cls_score.weight")
    scores = stages[0] if stages else state.get("roi_heads.box_predictor.cls_score.weight")
    if scores is None or scores.dim() != 2:
        raise UserError(
            f"weights from {weights.source} hold no Faster R-CNN: roi_heads.box_predictor is missing; "
            "train a detector that starts from them"
        )
    pyramid = any(key.startswith("backbone.fpn.") for key in state)
    at_c4 = any(key.startswith(f"{STAGE5}layer4.") for key in state)
    variant = "fpn" if pyramid else "c4" if at_c4 else "dc5"
    if variant == "dc5":
        _check_dilation(weights)
    detector: dict[str, object] = {
        "num_classes": len(scores) - 1,
        "variant": variant,
        "categories": list(_categories(len(scores) - 1, weights.metadata.get("classes")).items()),
        "geometry": FORMATS[weights.format].geometry if weights.format in FORMATS else "torchvision",
        "canonical_scale": 224,  # whatever the anchors: in all of these packages
        "rpn_conv_depth": max(1, len(_numbered(state, "rpn.head.conv.{}.0.weight"))),
    }
    anchors, usual = _rows(state.get("rpn.head.cls_logits.weight")), ANCHOR_RATIOS * (1 if pyramid else 5)
    if anchors not in (0, usual) and "anchors" not in weights.metadata:
        raise UserError(
            f"weights from {weights.source} have {anchors} anchors at each place of a map, where published detectors "
            f"of these names have {usual}, and do not state their sizes and ratios: load them with "
            f"{_package_of(weights)} and the anchors they were trained with"
        )
    if variant != "c4":
        detector |= _box_head(state, "roi_heads.box_head.0." if stages else "roi_heads.box_head.")
    if variant != "fpn":
        detector |= SINGLE_MAP_PROPOSALS
    settings = weights.metadata.get("settings", {})
    if unreadable := [name for name, value in settings.items() if value is None]:
        raise UserError(f"weights from {weights.source} state {', '.join(unreadable)}, but not as numbers")
    ious = settings.get("cascade_ious", CASCADE_IOUS if stages else ())
    if len(ious) != len(stages):
        given = f", and cascade_ious is {tuple(ious)}" if "cascade_ious" in settings else ""
        instead = "state its IoUs: load_detector(.., cascade_ious=(..)) with one for each head"
        raise UserError(
            f"weights from {weights.source} have {len(stages) or 'no cascade of'} box heads{given}; "
            f"{instead if stages else 'leave it out'}"
        )
    if stages and _rows(state.get("roi_heads.box_predictor.0.bbox_pred.weight")) > 4:
        raise UserError(
            f"weights from {weights.source} are of a Cascade R-CNN with a box for each class, and this package's have "
            "one for all (detectron2's MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG True): load them with "
            f"the package that trained them, or {TRAIN_CASCADE}, written by convert_weights.py --part backbone"
        )
    detector |= {"cascade_ious": ious, **settings}
    backbone = _backbone_config(weights, variant)
    strides = [2 ** int(level[1]) for level in backbone.levels] if variant == "fpn" else [16]
    detector |= _anchor_settings(weights, strides)
    return {"backbone": backbone.to_json(), "detector": detector}


def with_settings(weights: Weights, settings: Mapping[str, object]) -> Weights:
    """The weights, stating these settings of their detector. Raises ValueError if they state others or show them."""
    shown = {"num_classes", "variant", "rpn_conv_depth"}
    shown |= {"representation_size", "box_conv_layers", "box_norm"}
    accepted = sorted(DetectorConfig.__dataclass_fields__.keys() - shown)
    for name in settings:
        one_of("setting of a detector in a foreign file", name, accepted)
    stated = weights.metadata.get("settings", {})
    anchors = {"anchor_scale", "anchor_sides"} if "anchors" in weights.metadata else set()
    names = {"categories"} if "classes" in weights.metadata else set()
    if known := sorted((stated.keys() | anchors | names) & settings.keys()):
        raise UserError(f"weights from {weights.source} state {', '.join(known)}; leave it out to use theirs")
    outputs = (k for k in weights.state if k.endswith("cls_score.weight"))
    count = _rows(weights.state.get(next(outputs, ""))) - 1
    if (categories := settings.get("categories")) is not None and count > 0:
        if not isinstance(categories, Mapping) or len(categories) != count:
            raise UserError(
                f"categories={brief(categories)}: give {{id: name}} for each of the {count} classes of "
                f"{weights.source}, in the order of the labels"
            )
        settings = {**settings, "categories": list(categories.items())}
    return replace(weights, metadata={**weights.metadata, "settings": {**stated, **settings}})


def add_description(weights: Weights) -> None:
    """Put what `describe_detector` says into the metadata of `weights`, and log what it assumes."""
    described = describe_detector(weights)
    _announce_settings(weights, described["detector"])
    weights.metadata.update(described)


def _announce_settings(weights: Weights, described: Mapping[str, object]) -> None:
    """Log, in one line, the settings in `described` that neither a file nor its publisher states."""
    published = "publisher" in weights.metadata or weights.origins.get("input", "").startswith("torchvision")
    stated, detector = weights.metadata.get("settings", {}), DetectorConfig.from_json(described, weights.source)
    assumed = []
    if "anchors" not in weights.metadata and not {"anchor_scale", "anchor_sides"} & stated.keys():
        sides = "of 8 times the stride" if detector.variant == "fpn" else f"of {SINGLE_MAP_ANCHORS} pixels"
        name = "anchor_scale" if detector.variant == "fpn" else "anchor_sides"
        assumed.append(f"anchors {sides}, height over width 0.5, 1 and 2 ({name})")
    if "geometry" not in stated:
        assumed.append(f"{detector.geometry}'s RoIAlign (geometry, canonical_scale)")
    if detector.cascade_ious and "cascade_ious" not in stated:
        assumed.append(f"stages trained at the IoUs {detector.cascade_ious} (cascade_ious)")
    if "box_nms_thresh" not in stated:
        assumed.append("the usual thresholds and numbers of proposals (box_nms_thresh, rpn_nms_thresh, ..)")
    if assumed and not published:
        _log.warning(
            "weights from %s do not state how their detector was built; assuming %s; if it had others, give them: "
            "load_detector(FILE, anchor_scale=.., ..)",
            weights.source,
            ", ".join(assumed),
        )


def _anchor_settings(weights: Weights, strides: list[int]) -> dict[str, object]:
    """The settings for the anchors that the weights state, which are boxes around (0, 0) for each map; {} if none."""
    if "anchors" not in weights.metadata:
        return {}
    levels = weights.metadata["anchors"]
    if levels is None:
        raise UserError(f"weights from {weights.source} have an anchor_generator that this package does not know")
    sides: list[list[float]] = []
    for level in levels:
        x1, y1, x2, y2 = torch.tensor(level, dtype=torch.float64).reshape(-1, 4).unbind(1)
        shapes = list(zip(((x2 - x1) * (y2 - y1)).sqrt().tolist(), ((y2 - y1) / (x2 - x1)).tolist(), strict=True))
        found = [(round(side, 2), round(ratio, 3)) for side, ratio in shapes]
        sides.append(list(dict.fromkeys(side for side, _ in found)))
        centred = (x1 + x2).abs().max() < 1e-3 and (y1 + y2).abs().max() < 1e-3
        if not centred or found != [(side, ratio) for side in sides[-1] for ratio in ASPECT_RATIOS]:
            raise UserError(
                f"weights from {weights.source} have anchors of (side, height over width) {found}; this package's have "
                f"the ratios {', '.join(map(str, ASPECT_RATIOS))} at each side, in this order"
            )
    if len(sides) == len(strides) == 1:
        return {"anchor_sides": sides[0]} if sides[0] != list(SINGLE_MAP_ANCHORS) else {}
    scales = {round(level[0] / stride, 3) for level, stride in zip(sides, strides, strict=False)}
    if len(sides) != len(strides) or len(scales) != 1 or any(len(level) > 1 for level in sides):
        raise UserError(
            f"weights from {weights.source} have anchors of the sides {sides} on maps of the strides {strides}; on a "
            "pyramid, this package's have one side for each level, in proportion to its stride"
        )
    return {"anchor_scale": float(scales.pop())}


def _check_dilation(weights: Weights) -> None:
    """Raise ValueError unless a detector on c5 alone is DC5 as it is built here; its tensors do not show it."""
    if not resolve_dilation(weights, None):
        raise UserError(
            f"weights from {weights.source} are of a Faster R-CNN on c5 at stride 32, and this package builds DC5, at "
            "stride 16: load them with the package that trained them"
        )
    caffe = resolve_architecture(weights)["stride_in_1x1"] and has_bottlenecks(weights.state)
    if not caffe and weights.format in ("detectron2", "mmdetection"):
        raise UserError(
            f"weights from {weights.source} are of a DC5 without bottlenecks that stride in the 1x1: {weights.format} "
            "dilates other convolutions of stage 5 than networks of this package do"
        )


def _box_head(state: Mapping[str, Tensor], head: str) -> dict[str, object]:
    """The settings of the box head whose names begin with `head`, as names and shapes show them."""
    convolutions = _numbered(state, head + "{}.0.weight")
    linear = f"{head}{len(convolutions) + 1 if convolutions else 'fc6'}.weight"
    found: dict[str, object] = {"representation_size": _rows(state[linear])} if linear in state else {}
    if convolutions:
        found["box_conv_layers"] = [_rows(weight) for weight in convolutions]
    if f"{head}0.1.weight" in state:
        found["box_norm"] = "FrozenBN" if f"{head}0.1.running_var" in state else "GN"
    return found


def _rows(tensor: Tensor | None) -> int:
    return len(tensor) if tensor is not None and tensor.dim() else 0


def _package_of(weights: Weights) -> str:
    return "torchvision" if weights.format in (None, "torchvision", "timm") else weights.format


def _numbered(state: Mapping[str, Tensor], name: str) -> list[Tensor]:
    """The tensors `name` with 0, 1, .. in the place of {}, up to the first that is missing."""
    return [state[key] for key in itertools.takewhile(state.__contains__, map(name.format, itertools.count()))]


def _what_they_are(weights: Weights) -> str:
    """What weights with unknown tensors are, and what to do with them."""
    unknown = weights.unknown
    for marks, kind, builder in OTHER_DETECTORS:
        name = next((key for mark in marks for key in unknown if mark in key), None)
        if name is None:
            continue
        if "roi_heads.box_predictor.0.cls_score.weight" in weights.state:
            kind, builder = f"Cascade {kind}", ""
        package = _package_of(weights)
        if package == "torchvision" and builder:
            version = "_v2" if any(".0.1." in key for key in unknown) else ""  # its heads have norms
            package = f"torchvision.models.detection.{builder}_resnet50_fpn{version}"
        own = f"torchvision's {kind.replace(' ', '').replace('-', '')}" if builder else "detectron2's"
        plug = "as_torchvision" if builder else "adapters.detectron2"
        train = f"train {own} on their trunk and pyramid, which build_resnet_backbone reads and {plug} plugs in"
        return (
            f"are of a {kind} ({name} and {len(unknown) - 1} more tensors), and this package builds Faster R-CNN and "
            f"detectron2's Cascade R-CNN: load them with {package}, or "
            f"{TRAIN_CASCADE if kind.startswith('Cascade') else train}"
        )
    return (
        f"hold {len(unknown)} tensors that no Faster R-CNN of this package has (their trunk and pyramid can be read "
        f"alone): {', '.join(unknown)}"
    )


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
