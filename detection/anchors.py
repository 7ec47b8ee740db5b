"""Anchors (Ren et al. 2015, Sec. 3.1.1): the reference boxes of every cell of every map."""

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from detection.cells import pick
from detection.patches import keeps

ASPECT_RATIOS = (0.5, 1.0, 2.0)
GRID = {name: getattr(AnchorGenerator, name) for name in ("grid_anchors", "set_cell_anchors")}


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
        return [self.of(feature_maps, image_list.tensors.shape[-2:])] * len(image_list.tensors)

    def of(self, maps: list[Tensor], image_size: torch.Size) -> Tensor:
        """Anchors [n, 4], x1 y1 x2 y2 in pixels, by level, row, column and shape; kept until a size changes."""
        device, cells = maps[0].device, [x.shape[-2:] for x in maps]
        if torch.compiler.is_compiling():
            return self._made(cells, image_size, device)
        made_from = cells, image_size, device, tuple(self.strides), self.as_torchvision, self.shapes()
        if self.last[0] != made_from or not self.is_as_built():  # unpatched, `_made` gives the same again
            with torch.inference_mode(False):  # a training step may reuse them after a call under inference_mode
                self.last = made_from, self._made(cells, image_size, device)
        return self.last[1]

    @torch.compiler.assume_constant_result
    def shapes(self) -> list[list[list[float]]]:
        """The boxes of a cell on each level, as numbers: the tensors stay on the CPU, and nothing waits for a GPU."""
        return [x.tolist() for x in self.cell_anchors]

    @torch.compiler.assume_constant_result
    def is_as_built(self) -> bool:
        """Whether torchvision's methods that `_made` stands for are unchanged."""
        return keeps(self, GRID)

    def _made(self, cells: list[torch.Size], image_size: torch.Size, device: torch.device) -> Tensor:
        strides = [(stride, stride) for stride in self.strides]
        if self.as_torchvision:
            strides = [(image_size[0] // rows, image_size[1] // columns) for rows, columns in cells]
        if not self.is_as_built():
            self.set_cell_anchors(torch.float32, device)
            steps = [[torch.tensor(step, device=device) for step in pair] for pair in strides]
            return torch.cat(self.grid_anchors(cells, steps))
        made = []
        for size, pair, shapes in zip(cells, strides, self.shapes(), strict=True):
            y, x = (torch.arange(n, device=device) * step for n, step in zip(size, pair, strict=True))
            centres = torch.stack(torch.meshgrid(x, y, indexing="xy"), 2)  # [rows, columns, 2]
            numbers = [side for box in shapes for side in box]
            if torch.compiler.is_compiling():  # a copy would begin with a tensor on the CPU
                boxes = pick(numbers, torch.arange(len(numbers), dtype=torch.float32, device=device))
            else:
                boxes = torch.tensor(numbers).to(device, non_blocking=True)
            made.append((centres[:, :, None, None] + boxes.view(-1, 2, 2)).view(-1, 4))
        return torch.cat(made)
