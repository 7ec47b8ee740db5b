"""What the config in a checkpoint of mmengine says (mmdetection, mmpretrain, ..); it is parsed, and nothing of it runs.

As in `configs`, each setting that can change the network has a table of the values that this package computes.
"""

import ast
import json
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from resbackbone.checks import UserError, require
from resbackbone.weights.arguments import ANY, check_known, harmless, stated_by_arguments, stated_input
from resbackbone.weights.inputs import describe_input

WHERE = "mmengine config"
LONGEST = 2_000_000  # characters of a config; published ones have 20,000
LONGEST_LIST = 100  # that a product makes
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}

BACKBONE: dict[str, Sequence] = {
    "type": ("ResNet", "ResNeXt", "ResNetV1c", "ResNetV1d"),
    "stem_channels": (64,),
    "base_channels": (64,),
    "style": ("pytorch", "caffe"),
    "contract_dilation": (False,),
    "conv_cfg": ({"type": "Conv"}, {"type": "Conv2d"}),
    "act_cfg": ({"type": "ReLU"}, {"type": "ReLU", "inplace": True}),
    "norm_cfg": ANY,
    "strides": ANY,
    "dilations": ANY,
    # Shapes show them, or only training uses them
    **harmless(
        "depth in_channels deep_stem avg_down expansion num_stages out_indices groups base_width frozen_stages "
        "norm_eval with_cp zero_init_residual pretrained init_cfg drop_path_rate stage_with_dcn _scope_ _delete_"
    ),
}
NECK: dict[str, Sequence] = {
    "type": ("FPN",),
    "add_extra_convs": (False, True, "on_input", "on_output"),  # "on_lateral" has on_output's tensors
    "relu_before_extra_convs": (False, True),
    "upsample_cfg": ({"mode": "nearest"}, {"mode": "nearest", "scale_factor": 2}),
    "conv_cfg": BACKBONE["conv_cfg"],
    "end_level": (-1, 3),
    "norm_cfg": ANY,
    **harmless("in_channels out_channels num_outs start_level no_norm_on_lateral init_cfg dim _scope_ _delete_"),
}
NORM: dict[str, Sequence] = {
    "type": ("BN", "BN2d", "SyncBN", "MMSyncBN", "GN"),
    "num_groups": (32,),
    "eps": ANY,
    **harmless("requires_grad momentum _scope_"),
}
PIXELS: dict[str, Sequence] = {
    "mean": ANY,
    "std": ANY,
    **dict.fromkeys(("bgr_to_rgb", "rgb_to_bgr", "to_rgb"), (False, True)),
    **harmless(
        "type pad_size_divisor pad_value pad_mask mask_pad_value pad_seg seg_pad_value boxtype2tensor non_blocking "
        "batch_augments size size_divisor test_cfg num_classes to_onehot pad_val seg_pad_val format_shape to_float32 "
        "blending view_labels mask_stride pairwise_size pairwise_dilation pairwise_color_thresh bottom_pixels_removed "
        "_scope_ _delete_"
    ),
}
READ_AS_RGB = ("ActionDataPreprocessor",)  # its frames; other images are read as BGR
DILATED_C5 = ([1, 2, 2, 1], [1, 1, 1, 2])  # strides and dilations of a ResNet with DC5

# Of a Faster R-CNN: where its config has a setting, the field of a DetectorConfig, and its type.
SETTINGS: dict[str, tuple[str, type[int] | type[float]]] = {
    "test_cfg.rpn.nms_pre": ("rpn_pre_nms_top_n_test", int),
    "test_cfg.rpn.nms_post": ("rpn_post_nms_top_n_test", int),  # mmdetection 2.0's, as max_num, nms_thr and iou_thr
    "test_cfg.rpn.max_num": ("rpn_post_nms_top_n_test", int),
    "test_cfg.rpn.max_per_img": ("rpn_post_nms_top_n_test", int),
    "test_cfg.rpn.nms_thr": ("rpn_nms_thresh", float),
    "test_cfg.rpn.nms.iou_threshold": ("rpn_nms_thresh", float),
    "test_cfg.rcnn.score_thr": ("box_score_thresh", float),
    "test_cfg.rcnn.nms.iou_thr": ("box_nms_thresh", float),
    "test_cfg.rcnn.nms.iou_threshold": ("box_nms_thresh", float),
    "test_cfg.rcnn.max_per_img": ("box_detections_per_img", int),
}

# Of a Faster R-CNN too: each part of its config with the values that this package computes, as in BACKBONE.
Table = Mapping[str, Any]  # of accepted values, or of the table of a part
NMS: Table = {"type": ("nms",), "class_agnostic": (False,), **harmless("iou_threshold iou_thr split_thr")}
LOSS: Table = {"type": ("CrossEntropyLoss",), **harmless("loss_weight use_mask reduction class_weight ignore_index")}
BOX_CODER: Table = {
    "type": ("DeltaXYWHBBoxCoder",),
    "target_means": ([0, 0, 0, 0],),
    "clip_border": (True,),
    "add_ctr_clamp": (False,),
    **harmless("target_stds ctr_clamp use_box_type _scope_"),
}
ANCHORS = "scales", "ratios", "strides"  # "anchor_scales" .. in the head, before it had an anchor_generator
RPN_HEAD: Table = {
    "type": ("RPNHead",),
    "target_means": BOX_CODER["target_means"],
    "target_stds": ([1, 1, 1, 1],),
    "bbox_coder": {**BOX_CODER, "target_stds": ([1, 1, 1, 1],)},
    "loss_cls": {**LOSS, "use_sigmoid": (True,)},
    **harmless("in_channels feat_channels num_convs anchor_generator anchor_scales anchor_ratios anchor_strides"),
    **harmless("loss_bbox reg_decoded_bbox init_cfg _scope_"),
}
BOX_HEAD: Table = {
    "type": ("Shared2FCBBoxHead", "BBoxHead"),
    "target_means": BOX_CODER["target_means"],
    "bbox_coder": BOX_CODER,
    "loss_cls": {**LOSS, "use_sigmoid": (False,)},
    "reg_class_agnostic": (False,),
    "roi_feat_size": (7, [7, 7]),
    **dict.fromkeys(("cls_predictor_cfg", "reg_predictor_cfg"), ({"type": "Linear"},)),
    **harmless("in_channels fc_out_channels num_classes target_stds loss_bbox reg_decoded_bbox init_cfg _scope_"),
}
RPN_TEST: Table = {
    "nms": NMS,
    "nms_across_levels": (False,),
    "min_bbox_size": (0,),
    **harmless("nms_pre nms_post max_num max_per_img nms_thr"),
}
RCNN_TEST: Table = {"nms": NMS, **harmless("score_thr max_per_img mask_thr_binary")}
# What stands in a pipeline that tests it. This package resizes; where images are read and normalised is in `_input`.
TRANSFORMS: Table = {
    "Resize": {"keep_ratio": (True,), "interpolation": ("bilinear",), **harmless("type scale img_scale backend")},
    "MultiScaleFlipAug": {"flip": (False,), **harmless("type img_scale transforms")},
    **harmless("LoadImageFromFile LoadImageFromNDArray LoadAnnotations RandomFlip Normalize Pad ImageToTensor"),
    **harmless("DefaultFormatBundle Collect PackDetInputs"),
}


def faster_rcnn(backbone: Mapping, *, c4: bool) -> Table:
    """The table of `model` with this backbone, whose box head starts with stage 5 if `c4`."""
    side = 14 if c4 else 7
    align: Table = {
        "type": ("RoIAlign",),
        "pool_mode": ("avg",),
        "aligned": (True,),
        **dict.fromkeys(("output_size", "out_size"), (side, [side, side])),
        **dict.fromkeys(("sampling_ratio", "sample_num"), (0, -1)),
    }
    extractor: Table = {
        "type": ("SingleRoIExtractor",),
        "roi_layer": align,
        "featmap_strides": ([4, 8, 16, 32], [16]),
        "finest_scale": (56,),
        **harmless("out_channels init_cfg"),
    }
    shared: Table = {
        "type": ("ResLayer",),
        "stage": (3,),
        "stride": (2,),
        "dilation": (1,),
        "style": (backbone.get("style", "pytorch"),),
        "norm_cfg": (backbone.get("norm_cfg"),),
        **harmless("depth norm_eval with_cp pretrained init_cfg"),
    }
    roi_head: Table = {
        "type": ("StandardRoIHead",),
        "bbox_roi_extractor": extractor,
        "bbox_head": {**BOX_HEAD, "with_avg_pool": (c4,)},
        "shared_head": shared,
        **harmless("init_cfg _scope_"),
    }
    return {
        "type": ("FasterRCNN",),
        "rpn_head": RPN_HEAD,
        "roi_head": roi_head,
        "test_cfg": {"rpn": RPN_TEST, "rcnn": RCNN_TEST, **harmless("type")},  # a loop's type, in mmengine
        **harmless("backbone neck data_preprocessor train_cfg pretrained init_cfg _scope_ _delete_"),
    }


class Unreadable(NamedTuple):
    """What stands where the config has no plain value: code, or a name that the text does not define."""

    text: str

    def __repr__(self) -> str:
        return " ".join(self.text.split())


def stated_by_meta(meta: Mapping) -> dict[str, Any]:
    """What a checkpoint's "meta" says: backbone and input of mmengine's config, classes of its data set.

    It is mmengine's (or mmcv's) if it has a version of one of its packages, or a config of its layout; else it is some
    training's arguments. Raises ValueError that names the part if mmengine's config cannot be read, or is of a network
    that this package has not.
    """
    key = "cfg" if "cfg" in meta else "config"
    config = meta.get(key)
    has_version = any(re.fullmatch(r"mm\w+_version", str(name)) for name in meta)
    if isinstance(config, str):
        config = _parse(config, is_mmengines=has_version)
    model = config.get("model") if isinstance(config, Mapping) else None
    has_layout = isinstance(model, Mapping) and not {"type", "backbone"}.isdisjoint(model)
    unreadable = isinstance(model, Unreadable) or (isinstance(config, Mapping) and config.get("model", "") is None)
    if has_layout or unreadable or (has_version and config not in (None, "")):
        stated = stated_by_mmengine(config)
    else:
        stated = stated_by_arguments("meta", {**meta, key: config})
    data = meta["dataset_meta"] if isinstance(meta.get("dataset_meta"), dict) else meta  # of mmdetection 3, and 2
    classes = data.get("CLASSES", data.get("classes"))
    if isinstance(classes, list | tuple) and all(isinstance(name, str) for name in classes):
        stated["classes"] = list(classes)
    return stated


def _parse(text: str, *, is_mmengines: bool) -> Any:
    """The values of a config in JSON, Python or YAML; None for other text, such as a path."""
    if text.lstrip().startswith("{"):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise UserError("its meta has a config that is not readable JSON") from None
    if is_mmengines or re.search(r"^\w+\s*=", text, re.MULTILINE):
        return parse_config(text)
    if not re.search(r"^\w+:\s", text, re.MULTILINE):
        return None
    require("detection", "yaml", user="a checkpoint with a config in YAML")
    import yaml

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError):
        raise UserError("its meta has a config that is not readable YAML") from None


def parse_config(text: str) -> dict[str, Any]:
    """The values that the assignments of a Python config give, as far as they are plain: the rest is Unreadable."""
    values: dict[str, Any] = {}
    # mmcv 1 puts paths of files between the lines.
    lines = [line for line in text.splitlines() if not line.strip().endswith(".py")]
    try:
        if len(text) > LONGEST:
            raise ValueError(f"{len(text)} characters long")
        for statement in ast.parse("\n".join(lines)).body:
            if isinstance(statement, ast.Assign) and all(isinstance(name, ast.Name) for name in statement.targets):
                value = _value(statement.value, values)
                values |= {name.id: value for name in statement.targets if isinstance(name, ast.Name)}
            elif not isinstance(statement, ast.Expr) or not isinstance(statement.value, ast.Constant):
                names = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
                values |= dict.fromkeys(names, Unreadable(ast.unparse(statement)))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"its {WHERE} is not readable ({' '.join(str(error).split())[:80]})") from None
    if "_base_" in values:
        raise UserError(f"its {WHERE} refers to other files (_base_), which are not in the checkpoint")
    return values


def stated_by_mmengine(config: Any) -> dict[str, Any]:
    """The backbone and the input of a config as `parse_config` gives it."""
    backbone = _part(_part(config, "", "model"), "model.", "backbone")
    where = f"{WHERE}'s model.backbone"
    backbone = {**backbone, "type": _type(backbone)}
    check_known(where, backbone, BACKBONE)
    caffe = backbone.get("style") == "caffe"
    facts: dict[str, Any] = {"stride_in_1x1": caffe}
    if backbone.get("depth") is not None:
        facts["depth"] = backbone["depth"]
    facts |= _stated_by_norm(where, backbone.get("norm_cfg"))
    layout = [backbone.get(key) or usual for key, usual in (("strides", [1, 2, 2, 2]), ("dilations", [1] * 4))]
    layout = [list(numbers) if isinstance(numbers, list | tuple) else [numbers] for numbers in layout]
    bottlenecks = backbone.get("depth") in (50, 101, 152)
    if layout == [*DILATED_C5] and caffe and bottlenecks:  # others dilate other convolutions
        facts["dilate_c5"] = True
    elif layout[0] != [1, 2, 2, 2][: len(layout[0])] or layout[1] != [1] * len(layout[1]):
        raise UserError(f"its {where} has strides {layout[0]} and dilations {layout[1]}; no network here does")
    stated = {"backbone": facts, "input": _input(config), **_stated_of_detector(config)}
    neck = config["model"].get("neck")
    try:
        facts |= _stated_by_neck(neck, eps=facts.get("eps", 1e-5)) if neck is not None else {}
    except UserError as error:  # the trunk can be read all the same
        stated["no_pyramid"] = str(error)
    return {**stated, "stated_by": f"the {WHERE} in the file"}


def _stated_of_detector(config: Mapping) -> dict[str, Any]:
    """{"anchors": boxes [x1, y1, x2, y2] around (0, 0) for each map, "settings": fields of a DetectorConfig}.

    What cannot be read is None, and "not_built" names what no detector here has: only who builds the detector minds.
    """
    stated: dict[str, Any] = {}
    model = {"test_cfg": config.get("test_cfg"), **config["model"]}  # beside the model before mmdetection 2.7
    older = {"type": "AnchorGenerator", **{key: value_at(model, f"rpn_head.anchor_{key}") for key in ANCHORS}}
    generator = value_at(model, "rpn_head.anchor_generator", older if older["scales"] is not None else None)
    if generator is not None:
        lists: list[Any] = [generator.get(key) if isinstance(generator, Mapping) else None for key in ANCHORS]
        readable = all(isinstance(x, list) and all(type(y) in (int, float) and y > 0 for y in x) for x in lists)
        known = readable and _type(generator) == "AnchorGenerator" and set(generator) <= {*ANCHORS, "type", "_scope_"}
        stated["anchors"] = [boxes_around_zero(stride, *lists[:2]) for stride in lists[2]] if known else None
    settings, unknown = _resize(config)
    said: dict[str, list[str]] = {}
    for path, (name, take) in SETTINGS.items():
        if (value := value_at(model, path)) is not None:
            number = take(value) if type(value) in (int, float) else None
            said.setdefault(name, []).append(f"{path} {_short(value)}")
            if settings.setdefault(name, number) != number or (take is int and number is not None and number <= 0):
                both = " and ".join(said[name])
                unknown.append(f"{both} in its {WHERE}; detectors of this package have one number above 0")
    head = "roi_head.bbox_head"
    if (stds := value_at(model, f"{head}.bbox_coder.target_stds", value_at(model, f"{head}.target_stds"))) is not None:
        readable = isinstance(stds, list) and all(type(std) in (int, float) and std > 0 for std in stds)
        settings["bbox_reg_weights"] = [1 / std for std in stds] if readable else None
    if value_at(model, "roi_head.bbox_roi_extractor.roi_layer") is not None:
        settings["geometry"] = "detectron2"  # mmcv's RoIAlign is aligned, and with 0 samples takes one a cell
    c4 = value_at(model, "roi_head.shared_head") is not None
    unknown += _unknown_parts("model", model, faster_rcnn(model["backbone"], c4=c4))
    return stated | ({"settings": settings} if settings else {}) | ({"not_built": unknown[0]} if unknown else {})


def _unknown_parts(where: str, values: Mapping, table: Table) -> Iterator[str]:
    """Each key and value that a table of accepted values does not have, as a message's part."""
    for key, value in values.items():
        known, value = table.get(key), _type(values) if key == "type" else value
        said = f"{where}.{key} {_short(value)} in its {WHERE}"
        if value is None:
            continue
        if key not in table:
            yield f"{said}, which this package does not know"
        elif isinstance(known, Mapping) and isinstance(value, Mapping):
            yield from _unknown_parts(f"{where}.{key}", value, known)
        elif isinstance(known, Mapping) or (known and value not in known):
            yield f"{said}; detectors of this package have {'a dict' if isinstance(known, Mapping) else repr(known[0])}"


def _resize(config: Mapping) -> tuple[dict[str, Any], list[str]]:
    """{"min_size": .., "max_size": ..} of the images that the config tests with, and what no detector here does."""
    paths = ("test_dataloader.dataset.pipeline", "data.test.pipeline", "test_pipeline")
    where, steps = next(((path, found) for path in paths if (found := value_at(config, path)) is not None), ("", []))
    settings: dict[str, Any] = {}
    unknown = []
    for step in [part for part in _dicts(steps) if isinstance(_type(part), str)]:
        known = TRANSFORMS.get(_type(step))
        here = f"{where}'s {_type(step)}"
        unknown += [f"{here} in its {WHERE}, which this package does not know"] if known is None else []
        unknown += _unknown_parts(here, step, known) if known else []
        if (scale := step.get("scale", step.get("img_scale"))) is not None:
            pair = isinstance(scale, list) and len(scale) == 2 and all(type(x) is int and x > 0 for x in scale)
            settings |= {"min_size": min(scale), "max_size": max(scale)} if pair else {"min_size": None}
    if steps and not settings:
        unknown.append(f"{where} without the size of a Resize in its {WHERE}; detectors of this package resize images")
    return settings, unknown


def value_at(values: Any, path: str, default: Any = None) -> Any:
    """The value at a path like `model.backbone` in nested tables; what is Unreadable on the way is returned."""
    for name in path.split("."):
        if not isinstance(values, Mapping) or name not in values:
            return values if isinstance(values, Unreadable) else default
        values = values[name]
    return values


def boxes_around_zero(stride: float, scales: list[float], ratios: list[float]) -> list[list[float]]:
    """[x1, y1, x2, y2] of the area (stride * scale) ** 2 and each ratio of height to width."""
    sides = [(stride * scale / ratio**0.5 / 2, stride * scale * ratio**0.5 / 2) for scale in scales for ratio in ratios]
    return [[-x, -y, x, y] for x, y in sides]


def _stated_by_neck(neck: Any, *, eps: float) -> dict[str, Any]:
    where = f"{WHERE}'s model.neck"
    if not isinstance(neck, Mapping):
        raise UserError(f"its {where} is {_short(neck)}; this package builds FPN alone")
    neck = {**neck, "type": _type(neck)}
    if neck["type"] == "GlobalAveragePooling":
        return {}
    check_known(where, neck, NECK)
    norm = _stated_by_norm(where, neck.get("norm_cfg"))
    if norm.get("eps", eps) != eps:
        raise UserError(
            f"its {where} has norm_cfg with eps {norm['eps']:g}; pyramids have the backbone's here, {eps:g}"
        )
    facts: dict[str, Any] = {"relu_before_p7": bool(neck.get("relu_before_extra_convs"))}
    if norm.get("norm") == "GN":
        facts["fpn_norm"] = "GN"
    merged, start, outs = neck.get("in_channels"), neck.get("start_level") or 0, neck.get("num_outs")
    if not neck.get("add_extra_convs") and isinstance(merged, list) and type(start) is type(outs) is int:
        laterals = len(merged) - start
        if outs - laterals not in (0, 1):
            raise UserError(
                f"its {where} has num_outs {outs} and start_level {start}; without add_extra_convs, pyramids of this "
                f"package have {laterals} or {laterals + 1} levels"
            )
        facts["levels"] = [f"p{6 - laterals + i}" for i in range(outs)]
    if extra := neck.get("add_extra_convs"):
        facts["p6_from"] = "p5" if extra == "on_output" else "c5"
    return facts


def _stated_by_norm(where: str, norm: Any) -> dict[str, Any]:
    if norm is None:
        return {}
    if not isinstance(norm, Mapping):
        raise UserError(f"its {where} has norm_cfg {_short(norm)}, which is not readable")
    norm = {**norm, "type": _type(norm)}
    check_known(f"{where}.norm_cfg", norm, NORM)
    eps = norm.get("eps", 1e-5)
    if type(eps) not in (int, float) or eps < 0:
        raise UserError(f"its {where}.norm_cfg has eps {_short(eps)}, not a number")
    return {"norm": "GN" if norm["type"] == "GN" else "BN", "eps": float(eps)}


def _input(config: Mapping) -> dict[str, Any]:
    """The one input that the config describes, in a data_preprocessor (mmdetection 3) or an img_norm_cfg (2)."""
    inputs = []
    for part in _dicts(config):
        kind = _type(part)
        if kind == "LoadImageFromFile":
            for key, usual in (("color_type", ("color", "color_ignore_orientation")), ("channel_order", ("bgr",))):
                if part.get(key, usual[0]) not in usual:
                    raise UserError(f"its {WHERE}'s LoadImageFromFile has {key} {_short(part[key])}, not {usual[0]!r}")
        if "mean" in part and (kind in (None, "Normalize") or str(kind).lower().endswith("preprocessor")):
            where = f"{WHERE}'s {kind or 'dict with mean and std'}"
            check_known(where, part, PIXELS)
            swaps = [part[key] for key in ("bgr_to_rgb", "rgb_to_bgr", "to_rgb") if part.get(key) is not None]
            default = kind in (None, "Normalize")  # mmcv's
            order = "RGB" if any(swaps or [default]) != (kind in READ_AS_RGB) else "BGR"
            inputs.append(stated_input(where, part.get("mean"), part.get("std"), order=order, top=255))
    if not inputs:
        raise UserError(f"its {WHERE} has no mean and std that can be read: no data_preprocessor and no img_norm_cfg")
    if any(other != inputs[0] for other in inputs):
        described = sorted({describe_input(given) for given in inputs})
        raise UserError(f"its {WHERE} describes more than one input: {'; '.join(described)}")
    return inputs[0]


def _part(values: Any, path: str, name: str) -> Mapping:
    value = values.get(name) if isinstance(values, Mapping) else None
    if not isinstance(value, Mapping):
        raise UserError(f"its {WHERE} has {path}{name} {_short(value)}, not a dict that can be read")
    return value


def _type(values: Any) -> Any:
    """The type of a part, without the packages that it may name: mmdet.ResNet is ResNet."""
    kind = values.get("type") if isinstance(values, Mapping) else None
    return kind.rpartition(".")[2] if isinstance(kind, str) else kind


def _dicts(value: Any) -> Iterator[Mapping]:
    if isinstance(value, Mapping):
        yield value
    if isinstance(value, Mapping | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _dicts(part)


def _short(value: Any) -> str:
    return repr(value)[:80]


def _value(node: ast.expr, known: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant():
            return node.value
        case ast.List() | ast.Tuple() | ast.Set():
            return [_value(item, known) for item in node.elts]
        case ast.Dict(keys=keys, values=items):
            pairs = zip(keys, items, strict=True)
            return _dict([(key and _value(key, known), _value(item, known)) for key, item in pairs])
        case ast.Call(func=ast.Name(id="dict"), args=[]):
            return _dict([(word.arg, _value(word.value, known)) for word in node.keywords])
        case ast.Call(func=ast.Name(id="dict"), args=[ast.Dict() as only]) if not node.keywords:
            return _value(only, known)
        case ast.Name(id=name) if name in known:
            return known[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand) if type(x := _value(operand, known)) in (int, float):
            return -x
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            x, y = _value(left, known), _value(right, known)
            if isinstance(op, ast.Mult) and {type(x), type(y)} == {list, int}:  # [1.0] * 3
                items, times = (x, y) if isinstance(x, list) else (y, x)
                if 0 <= times * len(items) <= LONGEST_LIST:
                    return items * times
            numbers = all(type(number) in (int, float) for number in (x, y))
            if numbers and not (isinstance(op, ast.Div) and y == 0):
                return OPERATORS[type(op)](x, y)
    return Unreadable(ast.unparse(node))


def _dict(pairs: list[tuple[Any, Any]]) -> Any:
    """A dict of (key, value); a value without a key is `**value`."""
    values: dict[Any, Any] = {}
    for key, value in pairs:
        if key is None and isinstance(value, Mapping):
            values |= value
        elif isinstance(key, str):
            values[key] = value
        elif key is None or isinstance(key, list | Mapping | Unreadable):
            return Unreadable(f"**{_short(value)}")
        else:
            values[str(key)] = value
    return values
