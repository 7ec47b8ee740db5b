"""Weighted sums over a feature map's cells: what RoIAlign computes, and what the RPN reads around sampled anchors."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def rows_of(feature: Tensor) -> Tensor:
    """[B, C, H, W] -> [B * H * W, C], a row a cell: the map's own memory where it is channels-last, else a copy."""
    return feature.permute(0, 2, 3, 1).flatten(0, 2)


def sum_cells(rows: Tensor, cells: Tensor, weights: Tensor) -> Tensor:
    """Rows [m, C], cells [n, taps], which number them, and weights [n, taps] -> [n, C], sums of weights * rows.

    Weights are cast to the rows' type. Forward and backward add in fp32 or better, also for bf16 rows, and always in
    the same order, so results are bit-reproducible on a GPU too.
    """
    if rows.device.type == "mps":  # has no embedding_bag
        return (rows[cells] * weights.to(rows.dtype)[..., None]).sum(1)
    return _SumCells.apply(rows, cells, weights.to(rows.dtype))


class _SumCells(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, cells, weights):
        ctx.save_for_backward(cells, weights)
        ctx.count = len(rows)
        return F.embedding_bag(cells, rows.contiguous(), mode="sum", per_sample_weights=weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        # Sorting brings each cell's uses together, so the gradient is an embedding_bag too. PyTorch's own gradient of
        # embedding_bag takes twice as long and adds in bf16.
        cells, weights = ctx.saved_tensors
        used, order = cells.flatten().sort(stable=True)
        every_cell = torch.arange(ctx.count, dtype=used.dtype, device=used.device)
        of_rows = F.embedding_bag(
            (order // cells.shape[1]).to(used.dtype),
            gradient.contiguous(),
            torch.searchsorted(used, every_cell, out_int32=used.dtype == torch.int32),  # the first use of each cell
            mode="sum",
            per_sample_weights=weights.flatten()[order],
        )
        return of_rows, None, None


def at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
