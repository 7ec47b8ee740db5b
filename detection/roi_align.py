"""RoIAlign over a pyramid (He et al. 2017, Mask R-CNN, Sec. 3), as in torchvision or in detectron2."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.poolers import initLevelMapper

from detection.cells import at_least_fp32, rows_of, sum_cells
from detection.patches import is_patched
from resbackbone import Feature


class PyramidRoIAlign(MultiScaleRoIAlign):
    """torchvision's MultiScaleRoIAlign with the backbone's strides, not inferred ones.

    torchvision's kernel computes in fp32, on one thread on a CPU, and on a GPU its backward adds in any order. Here
    every output bin is a weighted sum of cells (`sum_cells`) in the maps' own type and is bit-reproducible; outputs
    and gradients equal torchvision's to rounding. torchvision's own forward runs where it has been patched, and for a
    sampling_ratio of 0 (as many samples as cells) and an output that is not square.

    `aligned` is detectron2's convention: samples sit half a cell lower, at cell centres, and are as many as the region
    has cells; `sampling_ratio` is ignored. torchvision's kernel computes it, or on a GPU under
    `torch.use_deterministic_algorithms` its deterministic version, which takes gigabytes.
    """

    map_levels: Any

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
        self.stride_of = {level: feature.stride for level, feature in features.items()}
        self.scales = [1 / stride for stride in self.strides]  # torchvision infers them from its first image

    @property
    def strides(self) -> list[int]:
        return [self.stride_of[name] for name in self.featmap_names]

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Maps by level and each image's boxes [n, 4] in pixels -> [sum of n, channels, output_size, output_size]."""
        maps = [x[name] for name in self.featmap_names]
        if self.scales is None or self.map_levels is None:  # at the first call, as in torchvision
            self.scales = [1 / stride for stride in self.strides]
            finest = int(math.log2(self.strides[0]))
            self.map_levels = initLevelMapper(
                finest, finest + len(maps) - 1, self.canonical_scale, self.canonical_level
            )
        image = torch.cat([torch.full((len(b),), i, device=b.device) for i, b in enumerate(boxes)])
        if not self.aligned and (is_patched() or self.sampling_ratio < 1 or len(set(self.output_size)) > 1):
            return super().forward(x, boxes, image_shapes)
        regions, level = torch.cat(boxes), self.map_levels(boxes)  # Lin et al. 2017, eq. 1
        if self.aligned:
            return _by_level(level, len(maps), lambda i, few: self._aligned(maps[i], i, regions[few], image[few]))
        cells, weights = self._taps(maps, regions, image, level)
        if regions.device.type == "cpu":  # copying the maps into one table would cost more than it saves
            pooled = _by_level(level, len(maps), lambda i, few: _sums(rows_of(maps[i]), cells[few], weights[few]))
        else:
            rows = [rows_of(feature) for feature in maps]
            begins = [0, *itertools.accumulate(map(len, rows))][:-1]
            pooled = _sums(torch.cat(rows), cells + _of_level(begins, level)[:, None, None], weights)
        return pooled.unflatten(1, self.output_size).permute(0, 3, 1, 2)

    def _aligned(self, feature: Tensor, level: int, regions: Tensor, image: Tensor) -> Tensor:
        feature = at_least_fp32(feature)
        regions = torch.cat((image[:, None], regions), 1).to(feature.dtype)
        return roi_align(feature, regions, self.output_size, self.scales[level], 0, aligned=True)

    def _taps(self, maps: list[Tensor], regions: Tensor, image: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """The cells of its level's map that each bin of each region reads, and their weights, [n, bins, taps] each.

        Along an axis a sample is bilinear between two cells, and a bin the mean of `sampling_ratio` samples.
        """
        bins, samples = self.output_size[0], self.sampling_ratio
        heights, widths = (_of_level([feature.shape[i] for feature in maps], level) for i in (2, 3))
        sizes = torch.stack((widths, heights), 1)[..., None]  # [n, 2, 1], x before y, as in boxes
        corners = (regions / _of_level(self.strides, level)[:, None]).view(-1, 2, 2)  # [n, corner, axis]
        low, extent = corners[:, 0, :, None], (corners[:, 1] - corners[:, 0])[..., None]
        extent = extent.clamp(min=1.0)  # torchvision's unaligned RoIAlign: a region is at least a cell wide
        steps = torch.arange(bins * samples, device=low.device) + 0.5
        at = low + steps * (extent / (bins * samples))  # [n, 2, bins * samples]
        inside = (at >= -1) & (at <= sizes)  # samples further out count as zero
        at = at.clamp(min=0).minimum(sizes - 1)
        lower = at.floor()
        taps = torch.stack((lower, (lower + 1).minimum(sizes - 1)), 3).long()
        shares = torch.stack((1 - (at - lower), at - lower), 3) * (inside / samples)[..., None]
        x, y = taps.view(-1, 2, bins, 2 * samples).unbind(1)
        share_x, share_y = shares.view(-1, 2, bins, 2 * samples).unbind(1)
        rows = (y + (image * heights)[:, None, None]) * widths[:, None, None]
        cells = rows[:, :, None, :, None] + x[:, None, :, None, :]  # [n, y bin, x bin, y tap, x tap]
        weights = share_y[:, :, None, :, None] * share_x[:, None, :, None, :]
        return cells.flatten(3).flatten(1, 2), weights.flatten(3).flatten(1, 2)


def _sums(rows: Tensor, cells: Tensor, weights: Tensor) -> Tensor:  # [m, C], [n, bins, taps] twice -> [n, bins, C]
    return sum_cells(rows, cells.flatten(0, 1), weights.flatten(0, 1)).unflatten(0, cells.shape[:2])


def _of_level(values: Sequence[int], level: Tensor) -> Tensor:
    """values[level], without sending a table to the GPU."""
    picked = torch.full_like(level, values[0])
    for i, value in enumerate(values[1:], 1):
        picked.masked_fill_(level == i, value)
    return picked


def _by_level(level: Tensor, levels: int, pool: Callable[[int, Tensor], Tensor]) -> Tensor:
    """pool(i, the regions of level i) for every level, back in the order of the regions, whose levels are [n]."""
    order = level.argsort(stable=True)
    counts = torch.stack([(level == i).sum() for i in range(levels)]).tolist()
    return torch.cat([pool(i, few) for i, few in enumerate(order.split(counts))])[order.argsort()]
