"""RoIAlign over a pyramid (He et al. 2017, Mask R-CNN, Sec. 3): torchvision's or detectron2's, faster on a CPU."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.poolers import initLevelMapper

from detection.cells import sum_cells
from resbackbone import Feature


class PyramidRoIAlign(MultiScaleRoIAlign):
    """torchvision's MultiScaleRoIAlign with the strides that the backbone states, not inferred from sizes.

    On a CPU torchvision's runs on one thread and in fp32. There every output bin is computed as what it is, a
    weighted sum of cells (`sum_cells`), in the maps' own type; outputs and gradients are torchvision's to rounding.

    `aligned` is detectron2's way: samples sit half a cell lower, where cell centres are, and are as many as the region
    has cells; then `sampling_ratio` is not used.
    """

    def __init__(
        self,
        features: Mapping[str, Feature],
        output_size: int,
        sampling_ratio: int,
        canonical_scale: int,
        *,
        aligned: bool = False,
    ):
        super().__init__(list(features), output_size, sampling_ratio, canonical_scale=canonical_scale)
        self.aligned = aligned
        self.strides = [feature.stride for feature in features.values()]
        self.scales = [1 / stride for stride in self.strides]  # torchvision would infer them from its first image
        finest = int(math.log2(self.strides[0]))
        self.map_levels = initLevelMapper(finest, finest + len(self.strides) - 1, canonical_scale=canonical_scale)

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Maps by level, boxes [n, 4] an image in pixels -> [sum of n, channels, output_size, output_size]."""
        maps = [x[name] for name in self.featmap_names]
        if maps[0].device.type != "cpu" and not self.aligned:
            return super().forward(x, boxes, image_shapes)
        all_boxes = torch.cat(boxes)
        image_of_box = torch.cat([torch.full((len(b),), i, device=b.device) for i, b in enumerate(boxes)])
        level_of_box = self.map_levels([all_boxes])  # Lin et al. 2017, eq. 1: the canonical box goes to stride 16
        order, pooled = [], []
        for level, (feature, stride) in enumerate(zip(maps, self.strides, strict=True)):
            chosen = (level_of_box == level).nonzero().squeeze(1)
            order.append(chosen)
            if self.aligned:
                regions = torch.cat((image_of_box[chosen, None].float(), all_boxes[chosen]), 1)
                pooled.append(roi_align(feature.float(), regions, self.output_size, 1 / stride, 0, aligned=True))
            else:
                pooled.append(self._pool(feature, all_boxes[chosen] / stride, image_of_box[chosen]))
        return torch.cat(pooled)[torch.cat(order).argsort()]

    def _pool(self, feature: Tensor, boxes: Tensor, image_of_box: Tensor) -> Tensor:
        """[B, C, H, W] and boxes [n, 4] in cells of it -> [n, C, size, size]."""
        height, width = feature.shape[-2:]
        size = self.output_size[0]
        rows, weights_y = self._axis(boxes[:, 1], boxes[:, 3], height)  # [n, size, 2 * sampling_ratio]
        columns, weights_x = self._axis(boxes[:, 0], boxes[:, 2], width)
        rows = rows + image_of_box.view(-1, 1, 1) * height
        cells = rows[:, :, None, :, None] * width + columns[:, None, :, None, :]  # [n, y bin, x bin, y tap, x tap]
        weights = weights_y[:, :, None, :, None] * weights_x[:, None, :, None, :]
        taps = (2 * self.sampling_ratio) ** 2
        pooled = sum_cells(feature, cells.view(-1, taps), weights.view(-1, taps))
        return pooled.view(len(boxes), size, size, feature.shape[1]).permute(0, 3, 1, 2)

    def _axis(self, low: Tensor, high: Tensor, cells: int) -> tuple[Tensor, Tensor]:
        """The cells that each bin reads along one axis, and their weights: two a sample, bilinear, averaged."""
        size, samples = self.output_size[0], self.sampling_ratio
        extent = (high - low).clamp(min=1.0)  # torchvision's unaligned RoIAlign: a region is a cell wide at least
        at = low[:, None] + (torch.arange(size * samples) + 0.5) * (extent / (size * samples))[:, None]
        inside = (at >= -1) & (at <= cells)  # beyond that a sample counts as zero
        at = at.clamp(0, cells - 1)
        lower = at.floor()
        upper_share = at - lower
        upper = (lower + 1).clamp(max=cells - 1)
        taps = torch.stack((lower, upper), 2).long().view(len(low), size, 2 * samples)
        shares = torch.stack((1 - upper_share, upper_share), 2) * (inside / samples)[..., None]
        return taps, shares.view(len(low), size, 2 * samples)
