"""Export of a whole detector to one file, ONNX or .pt2: images of any size in, boxes in their own pixels out."""

import math
import os
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import nms, roi_align

from detection.faster_rcnn import fuse_detector
from detection.paper import ContextRoIAlign
from detection.roi_heads import Detections
from detection.saved import description
from resbackbone.checks import UserError, one_of, require
from resbackbone.compat import is_observed
from resbackbone.export import SUFFIXES, check_destination, export_network
from resbackbone.weights import MEAN

INPUT_TYPES = {"uint8": torch.uint8, "float32": torch.float32}
OUTPUTS = ("boxes", "scores", "labels", "count")
LARGEST = 2**15 - 1  # side of an image in pixels; `resized_sides` computes in 32 bits, since OpenVINO does


class ExportedDetector(nn.Module):
    """A detector from a batch of images of one size to boxes on them, in operations that export.

    images [B, C, H, W], uint8 or floats in 0..1, H and W up to LARGEST -> boxes [B, N, 4] x1 y1 x2 y2 in pixels of the
    images, scores [B, N] falling, labels [B, N], count [B]; rows from an image's count on are zeros. N is the largest
    number of detections an image.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, detector: Any):
        super().__init__()
        self.detector, transform = detector, detector.transform
        self.white = white_of(detector)
        self.shorter, self.longer, self.block = transform.min_size[-1], transform.max_size, transform.size_divisible
        both = torch.tensor([transform.image_mean, transform.image_std])[..., None, None]
        self.register_buffer("mean", both[0].clone())
        self.register_buffer("std", both[1].clone())

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        batch, _, *own = images.shape
        if images.dtype == torch.uint8:
            images = images.float() / (255 / self.white)
        images = (images - self.mean) / self.std
        sides = torch.stack([torch.scalar_tensor(side, dtype=torch.int64) for side in own])
        resized = resized_sides(sides, self.shorter, self.longer).clamp(min=1)  # OpenVINO would go on without pixels
        for dim, blocks in enumerate(-(-resized // self.block)):
            count = blocks.item()
            torch._check(count >= 1)
            torch._check(count <= -(-self.longer // self.block))
            images = _resize(images, dim + 2, sides[dim], resized[dim], count * self.block)

        detector, heads = self.detector, self.detector.roi_heads
        maps = detector.backbone(images)
        for x in maps.values():
            torch._check(x.numel() != 0)  # torch 2.11 does not see it
        sizes = resized.to(images.dtype).expand(batch, 2)
        anchors = detector.rpn.anchor_generator.of(list(maps.values()), images.shape[-2:])
        proposals = detector.rpn.proposals(list(maps.values()), anchors, sizes)
        found = heads.detect(lambda regions: self._pooled(maps, regions, sizes), proposals, sizes)
        boxes, scores, labels, count = found
        return boxes * (sides / resized).flip(0).repeat(2), scores, labels, count

    def _pooled(self, maps: dict[str, Tensor], proposals: Tensor, sizes: Tensor) -> Any:
        pool = self.detector.roi_heads.box_roi_pool
        regions = _roi_align(pool, maps, proposals)
        if not isinstance(pool, ContextRoIAlign):
            return regions
        whole = torch.cat((torch.zeros_like(sizes), sizes.flip(1)), 1)
        image_of_region = torch.arange(proposals.shape[0]).repeat_interleave(proposals.shape[1])
        return regions, _roi_align(pool, maps, whole[:, None]), image_of_region


def white_of(detector: Any) -> int:
    """The largest value of the float images that the detector takes: 1, or 255 where its mean is of such images."""
    return 255 if max(detector.transform.image_mean) > 1 else 1


def resized_sides(sides: Tensor, shorter: int, longer: int) -> Tensor:
    """The sides [2], int64, of the resized image, as torchvision has them: floor(side * scale) in fp64.

    scale is min(shorter / min(sides), longer / max(sides)). Where side * scale is a whole number, its fp64 value may be
    less by a bit, and a pixel is lost: 49 * (800 / 49) < 800. OpenVINO has no fp64, so the error of the quotient is
    found by long division, in integers below 2**31.
    """
    low, high = sides.amin(0), sides.amax(0)
    by_shorter = shorter * high - longer * low <= 0
    above, below = torch.where(by_shorter, shorter, longer), torch.where(by_shorter, low, high)  # scale's fraction
    powers = 2 ** torch.arange(16)
    exponent = (above >= below * powers).sum() - 1 - (above * powers[1:] < below).sum()  # floor(log2(scale))
    (_, rest), digits = _divided(above, below), 52 - exponent  # those of 53 in fp64 that are behind the point
    for _ in range(5):
        some = digits.clamp(max=14)
        (_, rest), digits = _divided(rest * 2**some, below), digits - some
    whole, fraction = _divided(sides * above, below)
    log2 = (whole[:, None] >= powers).sum(1) - 1
    error = _divided(sides * rest, below)[0] * torch.where(whole == 2**log2, 4, 2)  # fp64 is finer below a power of 2
    rounded_down = 2 * rest < below
    return whole - ((fraction == 0) & rounded_down & (error > 2 ** (log2 - exponent))).long()


def _divided(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a // b and a % b of integers from 0 on; OpenVINO divides in fp32, by which the quotient may be off by one."""
    quotient = a // b
    rest = a - quotient * b
    quotient = quotient + (rest >= b).long() - (rest < 0).long()
    return quotient, a - quotient * b


def _resize(images: Tensor, dim: int, own: Tensor, resized: Tensor, padded: int) -> Tensor:
    """F.interpolate(mode="bilinear") along one dimension, from `own` to `resized` pixels, then zeros up to `padded`.

    The weights are computed as PyTorch does. ONNX's Resize rounds otherwise, by 1e-4 of the pixels' range.
    """
    to = torch.arange(padded)
    at = ((to + 0.5) * (own / resized) - 0.5).clamp(min=0)
    lower = at.floor().long().minimum(own - 1)
    shape = [-1 if i == dim else 1 for i in range(4)]
    share, inside = (at - lower).view(shape), (to < resized).view(shape)
    upper = images.index_select(dim, (lower + 1).minimum(own - 1))
    return torch.where(inside, images.index_select(dim, lower) * (1 - share) + upper * share, 0.0)


def _roi_align(pool: Any, maps: dict[str, Tensor], regions: Tensor) -> Tensor:
    """What `pool` computes of regions [B, K, 4], level by level in torchvision's operator -> [B * K, C, size, size]."""
    image = torch.arange(regions.shape[0]).repeat_interleave(regions.shape[1])
    regions, levels = regions.flatten(0, 1), len(pool.featmap_names)
    level = pool.level_mapper()([regions])
    empty = (regions[:, 2:] <= regions[:, :2]).any(1)  # padding; OpenVINO would divide by its size
    regions = regions + empty[:, None] * regions.new_tensor([0, 0, 1, 1])
    regions = torch.cat((image[:, None].to(regions.dtype), regions), 1)
    of_level = level == torch.arange(levels)[:, None]  # [levels, B * K]
    sampling, parts = 0 if pool.aligned else pool.sampling_ratio, []
    for name, stride, here in zip(pool.featmap_names, pool.strides, of_level, strict=True):
        few = regions[here.nonzero()[:, 0]]
        parts.append(roi_align(maps[name], few, pool.output_size, 1 / stride, sampling, pool.aligned))
    place = of_level.flatten().cumsum(0).view_as(of_level) - 1  # of each region among the parts
    return torch.cat(parts)[place.gather(0, level[None])[0]]


def nms_one_by_one(boxes: Tensor, valid: Tensor, iou_threshold: float) -> Tensor:
    """`nms_sorted` by torchvision's operator alone, for a .pt2.

    The two boxes of no size, which overlap nothing, are there since torchvision tells torch.export that its nms keeps
    two boxes or more, and the program would refuse fewer.
    """

    def goes_on(problem: Tensor, keep: Tensor, boxes: Tensor, valid: Tensor) -> Tensor:
        return problem < keep.shape[0]

    def body(problem: Tensor, keep: Tensor, boxes: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        i, count = problem[None], keep.shape[1]
        which = torch.cat((valid[i][0].nonzero()[:, 0], torch.arange(count, count + 2)))
        ranks = torch.arange(count + 2, 0, -1, dtype=boxes.dtype)
        some = torch.cat((boxes[i][0], boxes.new_zeros(2, 4)))[which]
        kept = which[nms(some, ranks[which], iou_threshold)]
        row = torch.zeros(count + 2, dtype=torch.bool).scatter(0, kept, torch.ones_like(kept, dtype=torch.bool))[:count]
        return problem + 1, keep.index_copy(0, i, row[None])

    start = torch.zeros((), dtype=torch.int64), torch.zeros_like(valid)
    return torch.ops.higher_order.while_loop(goes_on, body, start, (boxes, valid))[1]


def nms_in_onnx(boxes, valid, iou_threshold: float):
    """`nms_sorted` as ONNX's NonMaxSuppression, each problem an image of one class, and ranks as scores.

    torchvision suppresses above the threshold, which is in fp64; ONNX Runtime above one in fp32, and OpenVINO from one
    in fp32 on. Here it is a neighbour of the nearest fp32 number, with which all three decide alike where that number
    is the IoU, as it often is of boxes on whole pixels.
    """
    import onnxscript

    op: Any = onnxscript.opset18
    nearest = np.float32(iou_threshold)
    threshold = np.nextafter(nearest, np.float32(math.inf if float(nearest) <= iou_threshold else 0))
    count = op.Shape(valid, start=1, end=2)
    ranks = op.Range(op.Squeeze(count), op.Constant(value_int=0), op.Constant(value_int=-1))
    scores = op.Where(valid, op.Cast(ranks, to=1), op.Constant(value_float=0.0))
    found = op.NonMaxSuppression(
        boxes,
        op.Unsqueeze(scores, op.Constant(value_ints=[1])),
        count,
        op.Constant(value_float=float(threshold)),
        op.Constant(value_float=0.0),
    )  # [kept, 3]: problem, class, box
    at = op.Gather(found, op.Constant(value_ints=[0, 2]), axis=1)
    ones = op.Expand(op.Constant(value_int=1), op.Shape(found, start=0, end=1))
    zeros = op.Expand(op.Constant(value_int=0), op.Shape(valid))
    return op.Cast(op.ScatterND(zeros, at, ones), to=9)  # BOOL


def sort_in_onnx(x, *, stable: bool = True, dim: int = -1, descending: bool = False):
    """A stable sort as ONNX's TopK of all values, where of equal ones the first comes first."""
    import onnxscript

    op: Any = onnxscript.opset18
    count = op.Reshape(op.Gather(op.Shape(x), op.Constant(value_int=dim)), op.Constant(value_ints=[1]))
    return op.TopK(x, count, axis=dim, largest=int(descending))


def sigmoid_in_onnx(x):
    """A sigmoid that tells small scores apart, as PyTorch's does; ONNX Runtime's own is 0 from -18 down."""
    import onnxscript

    op: Any = onnxscript.opset18
    return op.Reciprocal(op.Add(op.Exp(op.Neg(x)), op.Constant(value_float=1.0)))


def export_detector(detector: Any, path: str | os.PathLike, *, input_type: str = "uint8") -> None:
    """`FasterRCNN.export`."""
    dtype = INPUT_TYPES[one_of("input type", input_type, INPUT_TYPES)]
    check_destination(path)
    _refuse_changes(detector)
    copied = fuse_detector(deepcopy(detector).cpu().float().to(memory_format=torch.contiguous_format))
    backbone, config = description(copied, fused=True, otherwise="undo the change before export")
    sides = copied.transform.min_size[-1], copied.transform.max_size
    if not all(type(side) is int and side <= LARGEST for side in sides):
        raise UserError(
            f"min_size and max_size are {sides[0]} and {sides[1]}: an export takes whole numbers up to {LARGEST}"
        )
    heads = copied.roi_heads
    metadata = {
        "format": "resbackbone detector",
        "input": {
            "type": input_type,
            "range": [0, 255 if input_type == "uint8" else white_of(copied)],
            "channels": "RGB" if len(config.image_mean or MEAN) == 3 else None,
        },
        "categories": [{"label": i, "id": id, "name": name} for i, (id, name) in enumerate(config.categories, 1)],
        "score_threshold": heads.score_thresh,
        "nms_threshold": heads.nms_thresh,
        "detections_per_image": heads.detections_per_img,
        "resized_to": {"shorter_side": sides[0], "longest_side": sides[1]},
        "detector": config.to_json(),
        "backbone": backbone,
        "weights_source": copied.backbone.weights_source,
    }
    example = torch.zeros(2, len(copied.transform.image_mean), 50, 70, dtype=dtype)
    operators: dict[Any, tuple[Callable, Callable | None]] = {
        torch.ops.resbackbone.nms_sorted.default: (nms_in_onnx, nms_one_by_one),
        torch.ops.aten.sort.stable: (sort_in_onnx, None),
        torch.ops.aten.sigmoid.default: (sigmoid_in_onnx, None),
    }
    network = ExportedDetector(copied).eval()
    export_network(network, path, example, outputs=OUTPUTS, metadata=metadata, operators=operators)


def _refuse_changes(detector: Any) -> None:
    """Raise UserError for what would be captured only in part: hooks, methods of a single module, patches, helpers."""
    for name, module in detector.named_modules():
        what = ", ".join(key for key in vars(module) if callable(getattr(type(module), key, None)))
        if is_observed(module):
            what = what or "hooks"
        elif not getattr(module, "is_as_built", lambda: True)():
            what = what or "a helper, or a function of torchvision, replaced"
        if what:
            raise UserError(
                f"{name or 'the detector'} has {what}, which an exported file would not have: undo this before export"
            )


def onnx_runner(model: Path | bytes) -> Callable[[Tensor], dict[str, Tensor]]:
    """A function that runs an ONNX file with one input in ONNX Runtime on the CPU -> {name of an output: tensor}."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names, [given] = [x.name for x in session.get_outputs()], session.get_inputs()

    def run(images: Tensor) -> dict[str, Tensor]:
        return dict(zip(names, map(torch.from_numpy, session.run(names, {given.name: images.numpy()})), strict=True))

    return run


def load_exported(path: str | os.PathLike) -> Callable[[Tensor], list[dict[str, Tensor]]]:
    """What an exported detector computes, as a function: an .onnx in ONNX Runtime on the CPU, a .pt2 in torch.

    The function takes images [B, C, H, W] of the type that the file was exported for, and returns each image's boxes
    [n, 4] x1 y1 x2 y2 in pixels, scores [n] and labels [n], as the detector does in eval mode. Only for files of your
    own: `torch.export.load` unpickles.

    Raises ValueError if the suffix is unknown or, for an .onnx, onnxruntime is not installed.
    """
    path = Path(path)
    if one_of("suffix", path.suffix, SUFFIXES) == ".pt2":
        run: Callable = torch.export.load(path).module()
    else:
        require("export", "onnxruntime", user="running an .onnx")
        outputs_of = onnx_runner(path)

        def run(images: Tensor) -> list[Tensor]:
            outputs = outputs_of(images)
            return [outputs[name] for name in OUTPUTS]

    return lambda images: Detections(*run(images)).as_list()
