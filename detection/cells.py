"""Weighted sums over a feature map's cells: what RoIAlign computes, and what the RPN reads around sampled anchors."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def sum_cells(feature: Tensor, cells: Tensor, weights: Tensor) -> Tensor:
    """[B, C, H, W], cells [n, taps] and weights [n, taps] -> [n, C]: row i is the sum of weights[i] * cells[i].

    Cells are integers that count images, rows and columns of the map, in this order; weights take the map's type. On
    a channels-last map every cell is a row of memory, others are copied. Sums are in fp32 or better in both
    directions, also on a bf16 map, and the gradient has the map's type and the channels-last layout.
    """
    return _SumCells.apply(feature, cells, weights.to(feature.dtype))


class _SumCells(torch.autograd.Function):
    @staticmethod
    def forward(ctx, feature, cells, weights):
        ctx.save_for_backward(cells, weights)
        ctx.shape = feature.shape
        rows = feature.permute(0, 2, 3, 1).flatten(0, 2).contiguous()
        return F.embedding_bag(cells, rows, mode="sum", per_sample_weights=weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        # The same kind of sum the other way: of each cell's uses, which sorting brings together. The gradient of
        # PyTorch's embedding_bag takes twice as long, and adds up in bf16.
        cells, weights = ctx.saved_tensors
        batch, channels, height, width = ctx.shape
        used, order = cells.flatten().sort()
        every_cell = torch.arange(batch * height * width, dtype=used.dtype, device=used.device)
        of_map = F.embedding_bag(
            (order // cells.shape[1]).to(used.dtype),
            gradient.contiguous(),
            torch.searchsorted(used, every_cell, out_int32=used.dtype == torch.int32),  # where the uses of each begin
            mode="sum",
            per_sample_weights=weights.flatten()[order],
        )
        return of_map.view(batch, height, width, channels).permute(0, 3, 1, 2), None, None
