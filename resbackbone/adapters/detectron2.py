"""The backbones in detectron2: importing this registers them, and adds MODEL.RESBACKBONE to its default config.

MODEL.BACKBONE.NAME     "build_resbackbone" (res2..res5), "build_resbackbone_fpn" (p2..p6) or
                        "build_retinanet_resbackbone_fpn" (p3..p7), where detectron2 has "build_resnet_backbone", ..
MODEL.ROI_HEADS.NAME    "ResBackboneRes5ROIHeads": C4 on this package's stage 5
MODEL.RESBACKBONE.WEIGHTS   what `build_resnet_backbone(weights=)` takes; "" for none

The trunk follows MODEL.RESNETS, MODEL.FPN and MODEL.BACKBONE.FREEZE_AT; a key it cannot follow is a ValueError. Where
RES5_DILATION is 2 and STRIDE_IN_1X1 False, the first block of res5 is not dilated, as in torchvision's networks.
"""

import logging
import math
from typing import Any

from detectron2.config import CfgNode
from detectron2.config.defaults import _C as DEFAULTS
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, ROI_HEADS_REGISTRY, Backbone
from detectron2.modeling.roi_heads import Res5ROIHeads
from torch import Tensor

from resbackbone.backbone import ResNetBackbone, build_resnet_backbone
from resbackbone.checks import UserError, one_of
from resbackbone.config import FREEZABLE, BackboneConfig
from resbackbone.resnet import DEPTHS
from resbackbone.weights import MEAN, STD

_log = logging.getLogger("resbackbone")
LEVELS = {"res2": "c2", "res3": "c3", "res4": "c4", "res5": "c5"}
NORMS = {"BN": "BN", "FrozenBN": "FrozenBN", "SyncBN": "SyncBN", "nnSyncBN": "SyncBN", "GN": "GN"}
INPUT = {  # what weights here are made for, in detectron2's units
    "INPUT.FORMAT": "RGB",
    "MODEL.PIXEL_MEAN": [round(255 * value, 3) for value in MEAN],
    "MODEL.PIXEL_STD": [round(255 * value, 3) for value in STD],
}


def add_resbackbone_config(cfg: CfgNode) -> None:
    """Add MODEL.RESBACKBONE to a config made before this module was imported; later ones have it."""
    if "RESBACKBONE" not in cfg.MODEL:
        cfg.MODEL.RESBACKBONE = CfgNode({"WEIGHTS": ""})


class ResBackbone(Backbone):
    """A backbone of this package under detectron2's level names: [B, 3, H, W] -> {"res4": map} or {"p2": map, ..}."""

    def __init__(self, body: ResNetBackbone):
        super().__init__()
        self.body = body
        self.names = {level: level.replace("c", "res") for level in body.features}
        self.register_load_state_dict_pre_hook(_refuse_another_model)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {self.names[level]: x for level, x in self.body(images).items()}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {self.names[level]: ShapeSpec(channels=c, stride=s) for level, (c, s) in self.body.features.items()}

    @property
    def size_divisibility(self) -> int:  # as detectron2's: only under a pyramid are images padded
        return 0 if self.body.fpn is None else self.body.size_divisibility


def _refuse_another_model(module: ResBackbone, state_dict: dict, prefix: str, *_) -> None:
    # detectron2's checkpointer leaves out what does not match and goes on: here that would be random, frozen layers.
    wanted = [prefix + name for name in module.state_dict() if not name.endswith("num_batches_tracked")]
    if missing := [name for name in wanted if name not in state_dict]:
        raise UserError(
            f"the checkpoint lacks {len(missing)} of the backbone's {len(wanted)} tensors in its shape, the first "
            f"{missing[0]}: MODEL.WEIGHTS takes a checkpoint of this very model; other weights go into "
            "MODEL.RESBACKBONE.WEIGHTS, with MODEL.WEIGHTS ''"
        )


@BACKBONE_REGISTRY.register()
def build_resbackbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResBackbone:
    """The trunk's MODEL.RESNETS.OUT_FEATURES, any of res2..res5."""
    levels = [LEVELS[one_of("OUT_FEATURES", name, LEVELS)] for name in cfg.MODEL.RESNETS.OUT_FEATURES]
    if cfg.MODEL.ROI_HEADS.NAME == "Res5ROIHeads" and levels == ["c4"] and _weights(cfg):
        _log.warning("Res5ROIHeads starts from a random stage 5; ROI_HEADS.NAME ResBackboneRes5ROIHeads has a trained")
    return ResBackbone(_build(cfg, input_shape.channels, levels=levels))


@BACKBONE_REGISTRY.register()
def build_resbackbone_fpn(cfg: CfgNode, input_shape: ShapeSpec) -> ResBackbone:
    """A pyramid on MODEL.FPN.IN_FEATURES, res2..res5 or fewer of the coarsest, and p6 from p5 (Faster R-CNN)."""
    return ResBackbone(_build(cfg, input_shape.channels, levels=[*_pyramid(cfg), "p6"], fpn=True))


@BACKBONE_REGISTRY.register()
def build_retinanet_resbackbone_fpn(cfg: CfgNode, input_shape: ShapeSpec) -> ResBackbone:
    """The same, with p6 and p7 by convolutions from res5 (RetinaNet)."""
    return ResBackbone(_build(cfg, input_shape.channels, levels=[*_pyramid(cfg), "p6", "p7"], fpn=True))


@ROI_HEADS_REGISTRY.register()
class ResBackboneRes5ROIHeads(Res5ROIHeads):
    """detectron2's C4 head, on this package's stage 5 and its weights."""

    @classmethod
    def _build_res5_block(cls, cfg: CfgNode):
        trunk = _build(cfg, len(cfg.MODEL.PIXEL_MEAN), levels=["c5"], frozen_through=None, dilate_c5=False)
        return trunk.layer4, trunk.out_channels


def _pyramid(cfg: CfgNode) -> list[str]:
    names = list(cfg.MODEL.FPN.IN_FEATURES)
    one_of("MODEL.FPN.IN_FEATURES", names, [list(LEVELS)[i:] for i in range(4)])
    one_of("MODEL.FPN.FUSE_TYPE", cfg.MODEL.FPN.FUSE_TYPE, ["sum"])
    return [f"p{name[3]}" for name in names]


def _weights(cfg: CfgNode) -> str:
    return cfg.MODEL.get("RESBACKBONE", {}).get("WEIGHTS", "")


def _build(cfg: CfgNode, in_channels: int, **arguments) -> ResNetBackbone:
    resnets, weights = cfg.MODEL.RESNETS, _weights(cfg)
    block, _ = DEPTHS[one_of("MODEL.RESNETS.DEPTH", resnets.DEPTH, DEPTHS)]
    supported = {"STEM_OUT_CHANNELS": 64, "RES2_OUT_CHANNELS": 64 * block.expansion, "DEFORM_ON_PER_STAGE": [False] * 4}
    supported["STEM_TYPE"] = "basic"  # a key of DeepLab's configs
    for name, value in supported.items():
        if (found := resnets.get(name, value)) != value:
            raise UserError(f"MODEL.RESNETS.{name} {found}: at depth {resnets.DEPTH} only {value} is supported")
    arguments = {
        "norm": NORMS[one_of("MODEL.RESNETS.NORM", resnets.NORM, NORMS)],
        "frozen_through": FREEZABLE[one_of("MODEL.BACKBONE.FREEZE_AT", cfg.MODEL.BACKBONE.FREEZE_AT, range(6))],
        "stride_in_1x1": resnets.STRIDE_IN_1X1 and block.expansion > 1,  # a basic block has no 1x1
        "dilate_c5": one_of("MODEL.RESNETS.RES5_DILATION", resnets.RES5_DILATION, (1, 2)) == 2,
        "groups": resnets.NUM_GROUPS,
        "width_per_group": resnets.WIDTH_PER_GROUP,
        "in_channels": in_channels,
        "fpn_channels": cfg.MODEL.FPN.OUT_CHANNELS,
        "fpn_norm": NORMS[one_of("MODEL.FPN.NORM", cfg.MODEL.FPN.NORM, NORMS)] if cfg.MODEL.FPN.NORM else None,
        "p6_from": "c5",
        **arguments,
    }
    if weights:
        _check_input(cfg)
    elif cfg.MODEL.WEIGHTS:  # a checkpoint of this model, which detectron2 loads next: nothing random stays
        return ResNetBackbone(BackboneConfig(depth=resnets.DEPTH, **arguments))
    return build_resnet_backbone(resnets.DEPTH, weights=weights or None, **arguments)


def _check_input(cfg: CfgNode) -> None:
    wanted: Any
    for key, wanted in INPUT.items():
        section, name = key.rsplit(".", 1)
        found = cfg[section][name]
        same = found == wanted if name == "FORMAT" else len(found) == 3 and math.dist(found, wanted) < 0.1
        if not same:
            settings = ", ".join(f"{key} {value}" for key, value in INPUT.items())
            raise UserError(f"{key} {found}: MODEL.RESBACKBONE.WEIGHTS are made for other images; set {settings}")


add_resbackbone_config(DEFAULTS)
