"""Region proposal network (Ren et al. 2015, Sec. 3) over a batch, with gradients computed at sampled anchors only."""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import Conv2dNormActivation

from detection.anchors import Anchors
from detection.batch import Targets, needed, pad_boxes, sizes_of
from detection.boxes import BoxCoder, best_of, box_loss, clip, gather_boxes, is_large
from detection.cells import at_least_fp32, pick, sum_cells
from detection.matching import match_with
from detection.nms import nms_sorted
from detection.patches import is_as_built
from detection.sampling import sample
from resbackbone.compat import is_observed
from resbackbone.layers import ConvBlocks


class FP32RPNHead(RPNHead):
    """torchvision's head with outputs in fp32 or better."""

    def __init__(self, in_channels: int, num_anchors: int, conv_depth: int = 1):
        super().__init__(in_channels, num_anchors, conv_depth)
        self.conv: Any = ConvBlocks(*self.conv)

    def forward(self, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Maps [B, C, H, W] -> objectness [B, A, H, W] and box deltas [B, A * 4, H, W], A anchors a cell."""
        objectness, deltas = super().forward(maps)
        return [at_least_fp32(x) for x in objectness], [at_least_fp32(x) for x in deltas]

    @torch.compiler.assume_constant_result
    def is_plain(self) -> bool:
        """Whether `at` computes what `forward` does: the layers are as built, and no hook or patch observes them."""
        if type(self) is not FP32RPNHead or is_observed(*self.modules()):
            return False
        if type(self.conv) not in (ConvBlocks, nn.Sequential) or not len(self.conv):
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
    """torchvision's RPN with the same proposals, losses and gradients, at a lower cost and without loops over images.

    The loss uses at most 256 of an image's 200,000 anchors, and proposals need no gradient. So the head runs on whole
    maps without a graph, and again with one on the cells of the sampled anchors: backward neither keeps nor convolves
    maps that are zero nearly everywhere. Only the boxes with the highest objectness are decoded.

    Where a part has been exchanged, patched or given a hook, so that this would compute something else, torchvision's
    own forward runs.
    """

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.box_coder = BoxCoder(weights=(1.0, 1.0, 1.0, 1.0))

    def forward(
        self, images: ImageList, features: dict[str, Tensor], targets: Targets | list[dict[str, Tensor]] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Padded images, their maps and targets -> proposals [B, K, 4] in pixels, and the losses in training mode.

        K is the same for all images, at most `post_nms_top_n()` (`needed`); an image with fewer proposals has boxes
        without size.
        """
        targets = None if targets is None else Targets.of(targets)
        if not self.is_as_built():
            of_images, losses = super().forward(images, features, None if targets is None else targets.as_list())
            return pad_boxes(of_images), losses
        maps = list(features.values())
        anchors = self.anchor_generator.of(maps, images.tensors.shape[-2:])
        losses = self._losses(maps, anchors, targets) if self.training and targets is not None else {}
        return self.proposals(maps, anchors, sizes_of(images.image_sizes, anchors)), losses

    @torch.compiler.assume_constant_result
    def is_as_built(self) -> bool:
        """Whether torchvision's forward would give the same, parts and methods being those this class knows."""
        if not is_as_built(self, RegionProposalNetwork) or is_observed(self.anchor_generator):
            return False
        if type(self.anchor_generator) is not Anchors or "forward" in vars(self.anchor_generator):
            return False
        return not self.training or (isinstance(self.head, FP32RPNHead) and self.head.is_plain())

    @torch.no_grad()
    def proposals(self, maps: list[Tensor], anchors: Tensor, sizes: Tensor) -> Tensor:
        """Maps, their anchors [A, 4] and the images' heights and widths [B, 2] in pixels -> proposals [B, K, 4].

        By falling objectness: the best on each level that are large enough, score enough and survive NMS there.
        """
        offsets, around, scores, real = [], [], [], []
        count, after = self.pre_nms_top_n(), 0
        for objectness, deltas in zip(*self.head(maps), strict=True):
            objectness = objectness.permute(0, 2, 3, 1).flatten(1)  # [B, H * W * A]
            deltas = deltas.permute(0, 2, 3, 1).reshape(objectness.shape[0], -1, 4)
            here, after = anchors[after : after + objectness.shape[1]], after + objectness.shape[1]
            best, index = best_of(objectness, count)
            exists = index < objectness.shape[1]
            index = index.where(exists, 0)
            offsets.append(gather_boxes(deltas, index))
            around.append(here[index])
            scores.append(best)
            real.append(exists)
        of_lists, reference = torch.stack(scores, 1).sigmoid(), torch.stack(around, 1)  # [B, levels, count], [.., 4]
        lists = self.box_coder.decode_single(torch.stack(offsets, 1).flatten(0, 2), reference.flatten(0, 2))
        lists = clip(lists.view_as(reference), sizes[:, None, None])
        kept = torch.stack(real, 1) & is_large(lists, self.min_size) & (of_lists >= self.score_thresh)
        kept = nms_sorted(lists.flatten(0, 1), kept.flatten(0, 1), self.nms_thresh).view_as(kept)
        most = min(self.post_nms_top_n(), len(maps) * count)
        best, index = best_of(of_lists.masked_fill(~kept, -1).flatten(1), most, in_order=True)
        places = most if self.training else needed((best >= 0).sum(1), most)  # training samples from all
        return gather_boxes(lists.flatten(1, 2), index).where((best >= 0)[..., None], 0)[:, :places]

    def _losses(self, maps: list[Tensor], anchors: Tensor, targets: Targets) -> dict[str, Tensor]:
        sampler: Any = self.fg_bg_sampler
        matches = match_with(self.proposal_matcher, targets, anchors[None])
        labels = matches.clamp(min=-1).add(1).clamp(max=1).masked_fill(matches < -1, -1)  # 1 object, 0 background
        index, drawn, most = sample(labels, sampler.batch_size_per_image, sampler.positive_fraction)
        objectness, deltas = self._at(maps, index)  # [B, S], [B, S, 4]
        wanted = labels.gather(1, index)
        positive = (drawn & (wanted == 1))[:, :most]
        places = index[:, :most]
        truth = gather_boxes(targets.boxes, matches.gather(1, places).clamp(min=0))
        error = F.binary_cross_entropy_with_logits(objectness, wanted.to(objectness.dtype), reduction="none")
        number = drawn.sum().clamp(min=1)
        return {
            "loss_objectness": error.where(drawn, 0).sum() / number,
            "loss_rpn_box_reg": box_loss(self.box_coder, deltas[:, :most], anchors[places], truth, positive) / number,
        }

    def _at(self, maps: list[Tensor], index: Tensor) -> tuple[Tensor, Tensor]:
        """Objectness [B, S] and box deltas [B, S, 4] of anchors [B, S] of each image, by level, row, column, shape."""
        shapes, reach = self.head.cls_logits.out_channels, len(self.head.conv)
        cell, shape = (index // shapes).flatten(), (index % shapes).flatten()
        image = torch.arange(index.numel(), device=index.device) // index.shape[1]
        begins = [0, *itertools.accumulate(x.shape[-2] * x.shape[-1] for x in maps)][:-1]
        level = torch.zeros_like(cell)
        for begin in begins[1:]:
            level += cell >= begin
        cell = cell - pick(begins, level)
        height, width = (pick([x.shape[i] for x in maps], level)[:, None, None] for i in (2, 3))
        step = torch.arange(-reach, reach + 1, device=index.device)
        row = cell[:, None, None] // width + step[:, None]  # [n, S, 1], S = 2 * reach + 1
        column = cell[:, None, None] % width + step  # [n, 1, S]
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)  # [n, S, S]
        cells = (image[:, None, None] * height + row) * width + column
        # What is outside has a weight of 0 wherever it is read. All in one cell, it would be one long sum for a GPU.
        anywhere = torch.arange(cells.numel(), device=cells.device).view_as(cells) % (len(maps[0]) * height * width)
        values = sum_cells(
            maps, level, cells.where(inside, anywhere).flatten(1)[..., None], inside.flatten(1)[..., None]
        )
        objectness, deltas = self.head.at(values.unflatten(1, inside.shape[1:]), inside)
        every = torch.arange(len(shape), device=shape.device)
        return objectness[every, shape].view_as(index), deltas[every, shape].view(*index.shape, 4)
