"""RoIAlign over a pyramid (He et al. 2017, Mask R-CNN, Sec. 3), as in torchvision or in detectron2."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign, box_area, roi_align
from torchvision.ops.poolers import LevelMapper

from detection.cells import at_least_fp32, pick, sum_cells
from detection.patches import is_patched
from resbackbone import Feature


def image_of_each(boxes: Sequence[Tensor]) -> Tensor:
    """The number of its image for each of the boxes [n, 4] of some images, [sum of n]."""
    return torch.cat([torch.full((len(b),), i, device=b.device) for i, b in enumerate(boxes)])


class Levels(LevelMapper):
    """torchvision's, without a tensor on the CPU, which would cut a CUDA graph in two."""

    def __call__(self, boxlists: Sequence[Tensor]) -> Tensor:
        """Each image's boxes [n, 4] -> their levels, 0 the finest, [sum of n] (Lin et al. 2017, eq. 1)."""
        sides = torch.cat([box_area(boxes) for boxes in boxlists]).sqrt()
        level = (self.lvl0 + torch.log2(sides / self.s0) + self.eps).floor()
        return level.clamp(self.k_min, self.k_max).long() - self.k_min


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

    def forward(
        self, x: dict[str, Tensor], boxes: list[Tensor] | Tensor, image_shapes: list[tuple[int, int]]
    ) -> Tensor:
        """Maps by level and each image's boxes [n, 4] in pixels -> [sum of n, channels, output_size, output_size]."""
        maps = [x[name] for name in self.featmap_names]
        boxes, map_levels = list(boxes), self.level_mapper()
        if self.scales is None:
            self.scales = [1 / stride for stride in self.strides]
        if not torch.compiler.is_compiling():  # a graph that keeps it would not serve the second call
            self.map_levels = map_levels  # from the first call on, as in torchvision
        if not self.aligned and (is_patched() or self.sampling_ratio < 1 or len(set(self.output_size)) > 1):
            return super().forward(x, boxes, image_shapes)
        image = image_of_each(boxes)
        regions, level = torch.cat(boxes), map_levels(boxes)
        if self.aligned:
            return self._aligned(maps, regions, image, level)
        cells, weights = self._taps(maps, regions, image, level)
        return sum_cells(maps, level, cells, weights).unflatten(1, self.output_size).permute(0, 3, 1, 2)

    def level_mapper(self) -> Any:
        """`Levels`, or what has been set in its place."""
        if self.map_levels is not None:
            return self.map_levels
        finest = int(math.log2(self.strides[0]))
        coarsest = finest + len(self.featmap_names) - 1
        return Levels(finest, coarsest, self.canonical_scale, self.canonical_level)

    def _aligned(self, maps: list[Tensor], regions: Tensor, image: Tensor, level: Tensor) -> Tensor:
        """torchvision's kernel on every map; of regions without a size, as those of other levels become, it reads none.

        Sorting the regions by level would wait for the GPU.
        """
        pooled: Any = 0
        for i, feature in enumerate(map(at_least_fp32, maps)):
            here = torch.cat((image[:, None], regions), 1).to(feature.dtype) * (level == i)[:, None]
            pooled = pooled + roi_align(feature, here, self.output_size, self.scales[i], 0, aligned=True)
        return pooled

    def _taps(self, maps: list[Tensor], regions: Tensor, image: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """The cells of its level's map that each bin of each region reads, and their weights, [n, bins, taps] each.

        Along an axis a sample is bilinear between two cells, and a bin the mean of `sampling_ratio` samples.
        """
        bins, samples = self.output_size[0], self.sampling_ratio
        heights, widths = (pick([feature.shape[i] for feature in maps], level) for i in (2, 3))
        sizes = torch.stack((widths, heights), 1)[..., None]  # [n, 2, 1], x before y, as in boxes
        corners = (regions / pick(self.strides, level)[:, None]).view(-1, 2, 2)  # [n, corner, axis]
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
