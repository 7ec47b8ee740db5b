"""What the config.yaml says that detectron2 writes beside its checkpoints.

As in `configs`, each setting that can change the network has a table of the values that this package computes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from resbackbone.checks import UserError, require
from resbackbone.weights.arguments import check_known, harmless, stated_input
from resbackbone.weights.mmengine import boxes_around_zero, value_at

WHERE = "config.yaml"
NORMS = {"FrozenBN": "BN", "BN": "BN", "SyncBN": "BN", "nnSyncBN": "BN", "naiveSyncBN": "BN", "GN": "GN"}
BACKBONE: dict[str, dict[str, Sequence]] = {
    "BACKBONE": {
        "NAME": ("build_resnet_backbone", "build_resnet_fpn_backbone", "build_retinanet_resnet_fpn_backbone"),
        **harmless("FREEZE_AT"),
    },
    "RESNETS": {
        "NORM": tuple(NORMS),
        "STRIDE_IN_1X1": (True, False),
        "RES5_DILATION": (1, 2),
        "STEM_OUT_CHANNELS": (64,),
        "DEFORM_ON_PER_STAGE": ([False] * 4,),
        # Shapes show them, or they are of deformable convolutions
        **harmless(
            "DEPTH OUT_FEATURES NUM_GROUPS WIDTH_PER_GROUP RES2_OUT_CHANNELS DEFORM_MODULATED DEFORM_NUM_GROUPS"
        ),
    },
    "FPN": {"NORM": ("", *NORMS), "FUSE_TYPE": ("sum",), **harmless("IN_FEATURES OUT_CHANNELS")},
}
# Of a Faster R-CNN: the field of a DetectorConfig that a setting is,
SETTINGS = {
    "MODEL.RPN.PRE_NMS_TOPK_TEST": "rpn_pre_nms_top_n_test",
    "MODEL.RPN.POST_NMS_TOPK_TEST": "rpn_post_nms_top_n_test",
    "MODEL.RPN.NMS_THRESH": "rpn_nms_thresh",
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": "box_score_thresh",
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": "box_nms_thresh",
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": "bbox_reg_weights",
    "TEST.DETECTIONS_PER_IMAGE": "box_detections_per_img",
    "INPUT.MIN_SIZE_TEST": "min_size",
    "INPUT.MAX_SIZE_TEST": "max_size",
}
# and what no detector here does otherwise.
DETECTOR: dict[str, Sequence] = {
    "MODEL.META_ARCHITECTURE": ("GeneralizedRCNN",),
    "MODEL.PROPOSAL_GENERATOR.NAME": ("RPN",),
    "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": (0,),
    "MODEL.ANCHOR_GENERATOR.NAME": ("DefaultAnchorGenerator",),
    "MODEL.ANCHOR_GENERATOR.OFFSET": (0,),
    "MODEL.RPN.HEAD_NAME": ("StandardRPNHead",),
    "MODEL.RPN.IN_FEATURES": (["p2", "p3", "p4", "p5", "p6"], ["res4"], ["res5"]),
    "MODEL.RPN.BBOX_REG_WEIGHTS": ([1, 1, 1, 1],),
    "MODEL.ROI_HEADS.NAME": ("StandardROIHeads", "Res5ROIHeads"),
    "MODEL.ROI_HEADS.IN_FEATURES": (["p2", "p3", "p4", "p5"], ["res4"], ["res5"]),
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": ("ROIAlignV2",),
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": (7, 14),  # 14 before a C4 head
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": (0,),
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": (False,),
    "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": (False,),
}
# The same of a Cascade R-CNN.
CASCADE_SETTINGS = {
    **{theirs: ours for theirs, ours in SETTINGS.items() if ours != "bbox_reg_weights"},
    "MODEL.ROI_BOX_CASCADE_HEAD.IOUS": "cascade_ious",
}
CASCADE: dict[str, Sequence] = {
    **DETECTOR,
    "MODEL.ROI_HEADS.NAME": ("CascadeROIHeads",),
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": (True,),
    "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS": ([[10, 10, 5, 5], [20, 20, 10, 10], [30, 30, 15, 15]],),
}


def stated_by_detectron2(path: Path) -> dict[str, Any]:
    """What a config.yaml says of the network beside it, in the layout of our own files' metadata.

    {} if there is no such file, or if detectron2 did not write it. Raises ValueError that names a value of the backbone
    which this package does not compute with. One of the detector is kept, as its trunk can be read all the same.
    """
    config = _read(path)
    if not isinstance(value_at(config, "MODEL.META_ARCHITECTURE"), str):
        return {}
    parts: dict[str, Mapping] = {}
    for section, known in BACKBONE.items():
        parts[section] = value_at(config, f"MODEL.{section}")
        if not isinstance(parts[section], Mapping):
            raise UserError(f"its {WHERE} has MODEL.{section} {parts[section]!r:.80}, not a table")
        check_known(f"{WHERE}'s MODEL.{section}", parts[section], known)
    resnet, pyramid = parts["RESNETS"], parts["FPN"]
    backbone: dict[str, Any] = {"stride_in_1x1": resnet.get("STRIDE_IN_1X1", True), "eps": 1e-5}
    backbone["norm"] = NORMS[resnet.get("NORM", "FrozenBN")]
    if resnet.get("DEPTH") is not None:
        backbone["depth"] = resnet["DEPTH"]
    if resnet.get("RES5_DILATION", 1) == 2:
        backbone["dilate_c5"] = True
        if not backbone["stride_in_1x1"]:
            raise UserError(
                f"its {WHERE} has RES5_DILATION 2 and STRIDE_IN_1X1 False: detectron2 then dilates the first block of "
                "stage 5 too, which no network here does"
            )
    if NORMS.get(pyramid.get("NORM", "")) == "GN":
        backbone["fpn_norm"] = "GN"
    order = value_at(config, "INPUT.FORMAT")
    if order not in ("BGR", "RGB"):
        raise UserError(f"its {WHERE} has INPUT.FORMAT {order!r:.80}; this package converts BGR and RGB")
    mean, std = (value_at(config, f"MODEL.{name}") for name in ("PIXEL_MEAN", "PIXEL_STD"))
    settings: dict[str, Any] = {}
    cascade = value_at(config, "MODEL.ROI_HEADS.NAME") in CASCADE["MODEL.ROI_HEADS.NAME"]
    for theirs, ours in (CASCADE_SETTINGS if cascade else SETTINGS).items():
        if (value := value_at(config, theirs)) is not None:
            numbers = value if isinstance(value, list) else [value]
            settings[ours] = value if all(type(x) in (int, float) for x in numbers) else None
    if value_at(config, "MODEL.ROI_BOX_HEAD.POOLER_TYPE") == "ROIAlignV2":
        settings["geometry"] = "detectron2"
    stated = {
        "backbone": backbone,
        "input": stated_input(WHERE, mean, std, order=order, top=255),
        "stated_by": f"the {WHERE} beside it",
        "anchors": _anchors(config),
        "settings": settings,
    }
    for name, accepted in (CASCADE if cascade else DETECTOR).items():
        value = value_at(config, name)
        if value is not None and value not in accepted:
            stated["not_built"] = f"{name} {value!r:.80} in its {WHERE}; detectors of this package have {accepted[0]!r}"
    if value_at(config, "INPUT.MIN_SIZE_TEST") == 0:
        stated["not_built"] = f"INPUT.MIN_SIZE_TEST 0 in its {WHERE}; detectors of this package resize images"
    return stated


def _read(path: Path) -> Any:
    if not path.is_file():
        return {}
    require("detection", "yaml", user=f"{path} beside a checkpoint of detectron2")
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
        return {}  # not detectron2's, which is plain


def _anchors(config: Any) -> list | None:
    """Boxes [x1, y1, x2, y2] around (0, 0) for each map; None if they cannot be read."""
    maps = value_at(config, "MODEL.RPN.IN_FEATURES")
    of_maps = []
    for name in ("SIZES", "ASPECT_RATIOS"):
        levels = value_at(config, f"MODEL.ANCHOR_GENERATOR.{name}")
        if not isinstance(maps, list) or not isinstance(levels, list) or len(levels) not in (1, len(maps)):
            return None
        if not all(
            isinstance(level, list) and all(type(x) in (int, float) and x > 0 for x in level) for level in levels
        ):
            return None
        of_maps.append(levels * len(maps) if len(levels) == 1 else levels)
    return [boxes_around_zero(1, *level) for level in zip(*of_maps, strict=True)]
