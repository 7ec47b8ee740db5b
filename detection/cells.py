"""Weighted sums over cells of feature maps: what RoIAlign computes, and what the RPN reads around sampled anchors."""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def rows_of(feature: Tensor) -> Tensor:
    """[B, C, H, W] -> [B * H * W, C], a row a cell: the map's own memory where it is channels-last, else a copy."""
    return feature.permute(0, 2, 3, 1).flatten(0, 2)


def sum_cells(maps: list[Tensor], level: Tensor, cells: Tensor, weights: Tensor) -> Tensor:
    """Maps [B, C, H, W]; the map of each group of sums, level [n]; its cells [n, sums, taps] -> [n, sums, C].

    cells number the rows of the level's map (`rows_of`); weights [n, sums, taps] are cast to the maps' type. Forward
    and backward add in fp32 or better, also for bf16 maps, and always in the same order, so results are
    bit-reproducible on a GPU too. Raises RuntimeError where a second derivative is asked for.
    """
    rows = [rows_of(feature) for feature in maps]
    if rows[0].device.type != "cpu" and len(rows) > 1:  # on a CPU, copying the maps would cost more than it saves
        begins = [0, *itertools.accumulate(x.shape[0] for x in rows)][:-1]
        rows, cells, level = [torch.cat(rows)], cells + pick(begins, level)[:, None, None], torch.zeros_like(level)
    if rows[0].device.type == "mps":  # has no embedding_bag
        return (rows[0][cells] * weights.to(rows[0].dtype)[..., None]).sum(2)
    return torch.ops.resbackbone.sum_cells(rows, level, cells, weights.to(rows[0].dtype))


@torch.library.custom_op("resbackbone::sum_cells", mutates_args=())
def _sum_cells(rows: list[Tensor], level: Tensor, cells: Tensor, weights: Tensor) -> Tensor:
    if len(rows) == 1:
        return _sums(rows[0], cells, weights)
    order, counts = _by_level(level, len(rows))
    shares = (part[order].split(counts) for part in (cells, weights))
    sums = torch.cat([_sums(*of_level) for of_level in zip(rows, *shares, strict=True)])
    return torch.empty_like(sums).index_copy_(0, order, sums)


@_sum_cells.register_fake
def _(rows, level, cells, weights):
    return rows[0].new_empty((*cells.shape[:2], rows[0].shape[1]))


@torch.library.custom_op("resbackbone::sum_cells_backward", mutates_args=())
def _sum_cells_backward(
    gradient: Tensor, level: Tensor, cells: Tensor, weights: Tensor, counts: list[int]
) -> list[Tensor]:
    if len(counts) == 1:
        return [_gradient(gradient, cells, weights, counts[0])]
    order, regions = _by_level(level, len(counts))
    shares = (part[order].split(regions) for part in (gradient, cells, weights))
    return [_gradient(*of_level) for of_level in zip(*shares, counts, strict=True)]


@_sum_cells_backward.register_fake
def _(gradient, level, cells, weights, counts):
    return [gradient.new_empty((count, gradient.shape[2])) for count in counts]


def _keep(ctx, inputs, output) -> None:
    rows, level, cells, weights = inputs
    ctx.save_for_backward(level, cells, weights)
    ctx.counts = [x.shape[0] for x in rows]  # `len` would fix them in a compiled graph


def _backward(ctx, gradient):
    gradients = torch.ops.resbackbone.sum_cells_backward(gradient, *ctx.saved_tensors, ctx.counts)
    return gradients, None, None, None


_sum_cells.register_autograd(_backward, setup_context=_keep)


def _sums(rows: Tensor, cells: Tensor, weights: Tensor) -> Tensor:  # [m, C], [n, sums, taps] twice -> [n, sums, C]
    sums = F.embedding_bag(cells.flatten(0, 1), rows.contiguous(), mode="sum", per_sample_weights=weights.flatten(0, 1))
    return sums.unflatten(0, cells.shape[:2])


def _gradient(gradient: Tensor, cells: Tensor, weights: Tensor, count: int) -> Tensor:  # -> [count, C]
    """Sorting brings each cell's uses together, so the gradient is an embedding_bag too.

    PyTorch's own gradient of embedding_bag takes twice as long and adds in bf16.
    """
    used, order = cells.flatten().sort(stable=True)
    every_cell = torch.arange(count, dtype=used.dtype, device=used.device)
    return F.embedding_bag(
        (order // cells.shape[2]).to(used.dtype),
        gradient.flatten(0, 1).contiguous(),
        torch.searchsorted(used, every_cell, out_int32=used.dtype == torch.int32),  # the first use of each cell
        mode="sum",
        per_sample_weights=weights.flatten()[order],
    )


def _by_level(level: Tensor, levels: int) -> tuple[Tensor, list[int]]:
    """The order that sorts by level, and the number on each level."""
    return level.argsort(stable=True), torch.bincount(level, minlength=levels).tolist()


def pick(values: Sequence[float], level: Tensor) -> Tensor:
    """values[level] in the type of `level`, without sending a table to the GPU."""
    picked = torch.full_like(level, values[0])
    for i, value in enumerate(values[1:], 1):
        picked.masked_fill_(level == i, value)
    return picked


def at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
