"""Region proposal network (Ren et al. 2015, Sec. 3): torchvision's, with gradients computed at sampled anchors only."""

import itertools
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import Conv2dNormActivation, clip_boxes_to_image

from detection.boxes import BoxCoder, Matcher, nms_in_groups
from detection.cells import at_least_fp32, rows_of, sum_cells
from detection.patches import BYPASSED, is_patched
from resbackbone.compat import is_observed

ASPECT_RATIOS = (0.5, 1.0, 2.0)
GRID = {name: getattr(AnchorGenerator, name) for name in ("grid_anchors", "set_cell_anchors")}
METHODS = set(BYPASSED[RegionProposalNetwork]) - {"forward"}  # of torchvision's, that `SampledRPN` does not call
CODER = {"weights", "bbox_xform_clip"}  # what a box coder has that nobody changed


class Anchors(AnchorGenerator):
    """Anchors in fp32 for maps of any type, since bf16 resolves 1000 pixels to 4 only.

    torchvision rounds anchors to whole pixels and infers strides as the padded image's size over the map's, rounded
    down, which for p6 is often less than 64; detectron2 does neither. `as_torchvision` selects the convention the
    weights were trained with.
    """

    cell_anchors: list[Tensor]

    def __init__(self, sizes: list[tuple[float, ...]], strides: list[int], *, as_torchvision: bool):
        self.as_torchvision = as_torchvision  # super().__init__ makes anchors by it
        self.last: tuple = None, None  # what the last anchors were made from, and these
        super().__init__(sizes, (ASPECT_RATIOS,) * len(sizes))
        self.strides = strides

    def generate_anchors(self, scales, aspect_ratios, dtype=torch.float32, device="cpu") -> Tensor:
        """Boxes around (0, 0), [ratios * sizes, 4], by ratio (height over width), then by size."""
        scales, ratios = (torch.as_tensor(x, dtype=dtype, device=device) for x in (scales, aspect_ratios))
        heights = (ratios.sqrt()[:, None] * scales).flatten()
        widths = ((1 / ratios.sqrt())[:, None] * scales).flatten()
        boxes = torch.stack((-widths, -heights, widths, heights), 1) / 2
        return boxes.round() if self.as_torchvision else boxes

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Anchors [n, 4] of all levels in turn, the same tensor for every image."""
        device, image_size = feature_maps[0].device, image_list.tensors.shape[-2:]
        cells = [x.shape[-2:] for x in feature_maps]
        shapes = [x.tolist() for x in self.cell_anchors]  # they stay on the CPU: nothing waits for a GPU
        made_from = cells, image_size, device, tuple(self.strides), self.as_torchvision, shapes
        if self.last[0] != made_from or not self._grid_is_torchvisions():
            with torch.inference_mode(False):  # a training step may reuse them after a call under inference_mode
                self.last = made_from, self._made(cells, image_size, device)
        return [self.last[1]] * len(image_list.image_sizes)

    def _grid_is_torchvisions(self) -> bool:
        """Whether the methods that `_made` calls are torchvision's, so that they make the same anchors again."""
        return vars(self).keys().isdisjoint(GRID) and [getattr(type(self), name) for name in GRID] == [*GRID.values()]

    def _made(self, cells: list[torch.Size], image_size: torch.Size, device: torch.device) -> Tensor:
        cell_anchors = self.cell_anchors
        self.set_cell_anchors(torch.float32, device)
        strides = [(stride, stride) for stride in self.strides]
        if self.as_torchvision:
            strides = [(image_size[0] // rows, image_size[1] // columns) for rows, columns in cells]
        steps = [[torch.full((), step, dtype=torch.int64, device=device) for step in pair] for pair in strides]
        try:
            return torch.cat(self.grid_anchors(cells, steps))
        finally:
            self.cell_anchors = cell_anchors


class FP32RPNHead(RPNHead):
    """torchvision's head with outputs in fp32 or better."""

    def forward(self, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Maps [B, C, H, W] -> objectness [B, A, H, W] and box deltas [B, A * 4, H, W], A anchors a cell."""
        objectness, deltas = super().forward(maps)
        return [at_least_fp32(x) for x in objectness], [at_least_fp32(x) for x in deltas]

    def is_plain(self) -> bool:
        """Whether `at` computes what `forward` does: the layers are as built, and nothing is to see them called."""
        if type(self) is not FP32RPNHead or is_observed(*self.modules()):
            return False
        if type(self.conv) is not nn.Sequential or not len(self.conv):
            return False
        layers: list[tuple[Any, int]] = [(self.cls_logits, 1), (self.bbox_pred, 1)]
        blocks: list[Any] = list(self.conv)
        for block in blocks:
            if type(block) is not Conv2dNormActivation or [type(layer) for layer in block] != [nn.Conv2d, nn.ReLU]:
                return False
            layers.append((block[0], 3))
        same_size = all(
            type(layer) is nn.Conv2d
            and layer.kernel_size == (size, size)
            and layer.padding == (size // 2, size // 2)
            and layer.padding_mode == "zeros"
            and layer.stride == layer.dilation == (1, 1)
            and layer.groups == 1
            for layer, size in layers
        )
        return same_size and self.bbox_pred.out_channels == 4 * self.cls_logits.out_channels

    def at(self, around: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
        """The outputs [n, A] and [n, A, 4] at n cells, from the map around each.

        around: [n, S, S, C], S = 3 for one 3x3 convolution, 5 for two, ..; inside: [n, S, S], False outside the map.
        """
        *convolutions, (last, _relu) = self.conv
        for conv, _relu in convolutions:
            inside = inside[:, 1:-1, 1:-1]
            around = F.relu(F.conv2d(around.permute(0, 3, 1, 2), conv.weight, conv.bias)).permute(0, 2, 3, 1)
            around = around * inside[..., None]  # the next convolution pads with zeros
        hidden = F.relu(F.linear(around.flatten(1), last.weight.permute(0, 2, 3, 1).flatten(1), last.bias))
        objectness, deltas = (
            at_least_fp32(F.linear(hidden, layer.weight.flatten(1), layer.bias))
            for layer in (self.cls_logits, self.bbox_pred)
        )
        return objectness, deltas.unflatten(1, (-1, 4))


class SampledRPN(RegionProposalNetwork):
    """torchvision's RPN with the same proposals, losses and gradients, at a lower cost.

    The loss uses at most 256 of an image's 200,000 anchors, and proposals need no gradient. So the head runs on whole
    maps without a graph, and again with one on the cells of the sampled anchors: backward neither keeps nor convolves
    maps that are zero nearly everywhere. Only the boxes with the highest objectness are decoded. From the same random
    state it samples the same anchors as torchvision.

    Where a part has been exchanged, patched or given a hook, so that this would compute something else, torchvision's
    own forward runs.
    """

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.box_similarity = box_iou
        self.box_coder = BoxCoder(weights=(1.0, 1.0, 1.0, 1.0))
        theirs: Any = self.proposal_matcher  # type: ignore[has-type]
        self.proposal_matcher = Matcher(theirs.high_threshold, theirs.low_threshold, allow_low_quality_matches=True)

    def forward(
        self, images: ImageList, features: dict[str, Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Padded images, their maps and targets -> proposals [n, 4] an image in pixels, losses in training mode."""
        if not self._is_as_built():
            return super().forward(images, features, targets)
        maps = list(features.values())
        anchors = self.anchor_generator(images, maps)
        losses = self._losses(maps, anchors, cast(list, targets)) if self.training else {}
        return self._proposals(maps, anchors[0], images.image_sizes), losses

    def _is_as_built(self) -> bool:
        """Whether torchvision's forward would give the same, parts and methods being those this class knows."""
        if is_patched() or not vars(self).keys().isdisjoint(METHODS):
            return False
        if any(getattr(type(self), name) is not getattr(RegionProposalNetwork, name) for name in METHODS):
            return False
        if type(self.anchor_generator) is not Anchors or type(self.box_coder) is not BoxCoder:
            return False
        if not vars(self.box_coder).keys() <= CODER:
            return False
        if is_observed(self.anchor_generator):
            return False
        return not self.training or (isinstance(self.head, FP32RPNHead) and self.head.is_plain())

    @torch.no_grad()
    def _proposals(self, maps: list[Tensor], anchors: Tensor, image_sizes: list[tuple[int, int]]) -> list[Tensor]:
        scores, deltas, anchors_of_best, levels = [], [], [], []
        for level, (objectness, of_level) in enumerate(zip(*self.head(maps), strict=True)):
            objectness = objectness.permute(0, 2, 3, 1).flatten(1)  # [B, H * W * A]
            of_level = of_level.permute(0, 2, 3, 1).reshape(*objectness.shape, 4)
            here, anchors = anchors[: objectness.shape[1]], anchors[objectness.shape[1] :]
            of_best, best = objectness.topk(min(self.pre_nms_top_n(), len(here)), dim=1)
            scores.append(of_best.sigmoid())
            deltas.append(of_level.gather(1, best[..., None].expand(-1, -1, 4)))
            anchors_of_best.append(here[best])
            levels.append(torch.full_like(best[0], level))
        best_deltas, around = torch.cat(deltas, 1), torch.cat(anchors_of_best, 1)
        boxes = self.box_coder.decode_single(best_deltas.flatten(0, 1), around.flatten(0, 1)).view_as(best_deltas)
        of_images = zip(boxes, torch.cat(scores, 1), image_sizes, strict=True)
        return [self._filtered(*of_image, torch.cat(levels)) for of_image in of_images]

    def _filtered(self, boxes: Tensor, scores: Tensor, image_size: tuple[int, int], levels: Tensor) -> Tensor:
        """The boxes [n, 4] of one image, clipped to it, that are large enough, score enough and survive NMS."""
        boxes = clip_boxes_to_image(boxes, image_size)
        large = (boxes[:, 2:] - boxes[:, :2] >= self.min_size).all(1)
        kept = (large & (scores >= self.score_thresh)).nonzero().squeeze(1)
        boxes = boxes[kept]
        return boxes[nms_in_groups(boxes, scores[kept], levels[kept], self.nms_thresh)[: self.post_nms_top_n()]]

    def _losses(self, maps: list[Tensor], anchors: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        labels, matched_boxes = self.assign_targets_to_anchors(anchors, targets)
        positive, negative = (torch.cat(chosen).nonzero().squeeze(1) for chosen in self.fg_bg_sampler(labels))
        sampled = torch.cat((positive, negative))  # indices over images and their anchors
        objectness, deltas = self._at(maps, sampled)
        wanted = self.box_coder.encode_single(
            torch.cat(matched_boxes)[positive], anchors[0][positive % len(anchors[0])]
        )
        deviation = F.smooth_l1_loss(deltas[: len(positive)], wanted, beta=1 / 9, reduction="sum")
        return {
            "loss_objectness": F.binary_cross_entropy_with_logits(objectness, torch.cat(labels)[sampled]),
            "loss_rpn_box_reg": deviation / len(sampled),
        }

    def _at(self, maps: list[Tensor], sampled: Tensor) -> tuple[Tensor, Tensor]:
        """Objectness [n] and box deltas [n, 4] of n anchors, given by index over images, levels, rows, columns, shapes.

        Every level contributes to all n, zeros to those of other levels: sorting by level would wait for the GPU.
        """
        shapes, reach = self.head.cls_logits.out_channels, len(self.head.conv)
        cells = sum(x.shape[-2] * x.shape[-1] for x in maps)
        image, anchor = sampled // (cells * shapes), sampled % (cells * shapes)
        cell, shape = anchor // shapes, anchor % shapes
        around, inside = _surroundings(maps[0], image, cell, reach)
        for finer, x in itertools.pairwise(maps):
            cell = cell - finer.shape[-2] * finer.shape[-1]
            of_level, inside_level = _surroundings(x, image, cell, reach)
            around, inside = around + of_level, inside | inside_level
        objectness, deltas = self.head.at(around, inside)
        every = torch.arange(len(sampled), device=sampled.device)
        return objectness[every, shape], deltas[every, shape]


def _surroundings(feature: Tensor, image: Tensor, cell: Tensor, reach: int) -> tuple[Tensor, Tensor]:
    """[B, C, H, W] and the image and cell [n] of each -> [n, S, S, C], zeros outside the map, and [n, S, S], inside.

    S = 2 * reach + 1. A cell of another level is outside with all its surroundings.
    """
    height, width = feature.shape[-2:]
    step = torch.arange(-reach, reach + 1, device=cell.device)
    rows, columns = ((at[:, None] + step) for at in (cell // width, cell % width))
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None]
    inside &= ((cell >= 0) & (cell < height * width))[:, None, None]
    cells = (image[:, None, None] * height + rows[:, :, None]) * width + columns[:, None]
    # What is outside has a weight of 0 wherever it is read. All in one cell, it would be one long sum for a GPU thread.
    anywhere = torch.arange(cells.numel(), device=cells.device).view_as(cells) % (len(feature) * height * width)
    values = sum_cells(rows_of(feature), cells.where(inside, anywhere).view(-1, 1), inside.view(-1, 1))
    return values.view(*cells.shape, -1), inside


def box_iou(boxes: Tensor, anchors: Tensor) -> Tensor:
    """[n, 4] and [m, 4], x1 y1 x2 y2 -> IoU [n, m], bit-identical to torchvision's; row by row to stay in CPU cache."""
    x1, y1, x2, y2 = anchors.t().contiguous()
    areas = (x2 - x1) * (y2 - y1)
    parts = []
    for some in boxes.split(2 if boxes.device.type == "cpu" else max(1, len(boxes))):
        left, top, right, bottom = some.t()[..., None]
        overlap = torch.minimum(right, x2).sub_(torch.maximum(left, x1)).clamp_(min=0)
        overlap *= torch.minimum(bottom, y2).sub_(torch.maximum(top, y1)).clamp_(min=0)
        union = ((right - left) * (bottom - top) + areas).sub_(overlap)
        parts.append(overlap.div_(union))
    return torch.cat(parts)
