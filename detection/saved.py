"""Detectors in files: saved, loaded, and given other classes to start a training from."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from detection.box_heads import ConvFCHead
from detection.config import BACKBONE_OF, SHAPE, DetectorConfig
from detection.faster_rcnn import FasterRCNN, fuse_detector, in_channels_of, with_classes_of
from detection.foreign import add_description, with_settings
from detection.roi_heads import FP32Predictor
from detection.rpn import FP32RPNHead
from detection.transforms import InputTransform
from resbackbone import BackboneConfig, ResNetBackbone
from resbackbone.checks import UserError, require, sibling
from resbackbone.engine.checkpoints import last_whole_checkpoint
from resbackbone.image_io import SUFFIXES
from resbackbone.layers import ConvBlocks, same_kind
from resbackbone.weights import Weights, WeightSource, read_weights, write_weights
from resbackbone.weights.fit import fit, with_eps
from resbackbone.weights.sources import is_named

PREDICTOR = "roi_heads.box_predictor."  # the layers whose size depends on the number of classes
# Attributes that a load may reset: outputs do not depend on them, or `_live_settings` has them.
PASSING = {"training", "momentum", "inplace", "warned", "looked", "weights_source", "checkpoint_activations"}
PASSING |= {"num_batches_tracked", "resize_in_training"}
SAVED_AS: dict[Any, type] = {  # torchvision's classes that ours compute the same as
    nn.Sequential: ConvBlocks,
    FastRCNNConvFCHead: ConvFCHead,
    FastRCNNPredictor: FP32Predictor,
    RPNHead: FP32RPNHead,
    GeneralizedRCNNTransform: InputTransform,
}
SAVE_STATE = "save detector.state_dict() with torch.save and repeat the change after loading"


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
    config, backbone = with_classes_of(detector), detector.backbone.config.to_json()
    if isinstance(detector.backbone, ResNetBackbone):
        backbone["in_channels"] = in_channels_of(detector.backbone)
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
    """Load a run's detector, the one that `save_detector` wrote to a file, or one in a foreign format, in eval mode.

    path: a run's folder (its final weights, or while it trains those of its last complete checkpoint) or `best/` in
        it, a file, or a named source such as torchvision:FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1. What a foreign
        file leaves open goes to `read_weights(file, given_input=.., stride_in_1x1=.., dilate_c5=..)`, whose result
        this takes as well.

    eps: of the norms, where the file does not state it. Of a torchvision detector's file the default is 1e-5, which a
        message says; those that torchvision publishes, and what was trained from them, have 0.
    settings: fields of `DetectorConfig` that a foreign file does not state: anchor_scale, geometry, box_nms_thresh, ..,
        and categories as {id: name}, in the order of the labels. A message names what is assumed of them.

    Raises ValueError if there is no such folder or file, and if the weights are not of a Faster R-CNN that this package
    builds, or state what is given.
    """
    if place := settings.keys() & {"device", "map_location"}:
        raise UserError(f"load_detector takes no {min(place)}: give the device to .to() of its result, as .to('cuda')")
    weights = read_weights(detector_file(path) if isinstance(path, str | os.PathLike) else path)
    if eps is not None:
        weights = with_eps(weights, eps)
    if "detector" not in weights.metadata:
        if weights.format == "resbackbone":
            raise UserError(f"{weights.source} does not hold a detector of this package: its metadata describe none")
        weights.announce_assumptions()
        weights = with_settings(weights, settings)
        add_description(weights)
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
        add_description(weights)
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


def detector_file(run: str | os.PathLike) -> str | os.PathLike:
    """The weights of a run: its model.safetensors, or while it trains those of its last complete checkpoint.

    Files, named sources and URLs are returned as they are.
    """
    if is_named(str(run)):
        return run
    run = Path(run)
    if run.is_file():
        return run
    if not run.is_dir():
        raise UserError(
            f"{run}: no such run folder or file{sibling(run)}; give one, or a named source (torchvision:..)"
        )
    folder = run if (run / "model.safetensors").is_file() else last_whole_checkpoint(run)
    if folder is None or not (folder / "model.safetensors").is_file():  # --engine detectron2 writes model_final.pth
        raise UserError(f"{run} holds no detector: neither model.safetensors nor a complete checkpoint of one")
    return folder / "model.safetensors"


def run_folder(run: str | Path) -> Path:
    """The folder of a run or of a weight file; for a named source or URL the current one.

    Raises UserError for the file of an image.
    """
    if Path(run).suffix.lower() in SUFFIXES:
        raise UserError(f"{run}: is an image; the run's folder or weight file comes first, as in: runs/mine {run}")
    path = Path() if is_named(str(run)) else Path(run)
    return path if path.is_dir() else path.parent
