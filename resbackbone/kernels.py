"""Norm, sum and ReLU behind a convolution as one GPU kernel (Triton), forward and backward. `compat` imports it.

Maps are [B, C, H, W] in one piece, channels-last or contiguous, all of one call alike. A kernel sees a table: with
channels last, rows are pixels and columns channels; otherwise rows are the channels of each image and columns pixels.
Arithmetic is in fp32.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS, TILE = 256, 4096  # of a block: at most, elements


@triton.jit
def _block(rows, columns, channels, LAST: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """The elements of this program's block by their places, which of them exist, and the channel of each line."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    column = tl.program_id(1) * C + tl.arange(0, C)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    channel = tl.minimum(column, columns - 1) if LAST else row % channels
    return at, inside, channel


@triton.jit
def _forward(
    y, shortcut, weight, bias, mean, var, eps, rows, columns, channels,
    LAST: tl.constexpr, NORM: tl.constexpr, ADD: tl.constexpr, RELU: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """y = [relu](y * scale + shift [+ shortcut]); without NORM the scale is 1 and the shift `bias`."""
    at, inside, channel = _block(rows, columns, channels, LAST, R, C)
    value = tl.load(y + at, inside, 0).to(tl.float32)
    shift = tl.load(bias + channel).to(tl.float32)
    if NORM:
        scale = tl.load(weight + channel).to(tl.float32) / tl.sqrt(tl.load(var + channel).to(tl.float32) + eps)
        shift -= tl.load(mean + channel).to(tl.float32) * scale
        value *= scale[None, :] if LAST else scale[:, None]
    value += shift[None, :] if LAST else shift[:, None]
    if ADD:
        value += tl.load(shortcut + at, inside, 0).to(tl.float32)
    if RELU:
        value = tl.where(value <= 0, 0.0, value)  # NaN stays
    tl.store(y + at, value.to(y.dtype.element_ty), inside)


@triton.jit
def _backward(
    grad, z, grad_y, grad_shortcut, weight, var, eps, rows, columns, channels,
    LAST: tl.constexpr, NORM: tl.constexpr, ADD: tl.constexpr, RELU: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """grad_shortcut = grad where z is positive; grad_y = grad_shortcut * scale."""
    at, inside, channel = _block(rows, columns, channels, LAST, R, C)
    value = tl.load(grad + at, inside, 0)
    if RELU:
        value = tl.where(tl.load(z + at, inside, 0) <= 0, 0.0, value).to(grad.dtype.element_ty)
    if ADD:
        tl.store(grad_shortcut + at, value, inside)
    if NORM:
        scale = tl.load(weight + channel).to(tl.float32) / tl.sqrt(tl.load(var + channel).to(tl.float32) + eps)
        value = value.to(tl.float32) * (scale[None, :] if LAST else scale[:, None])
    tl.store(grad_y + at, value.to(grad_y.dtype.element_ty), inside)


def norm_add_relu(y: Tensor, shortcut: Tensor | None, constants: tuple[Tensor, ...], eps: float, relu: bool) -> Tensor:
    """[relu](norm(y) [+ shortcut]), written over y and returned.

    constants: the norm's weight, bias, running mean and running variance; or a bias alone, which is then added.
    """
    weight, bias, mean, var = constants if len(constants) == 4 else constants * 4
    options = {"NORM": len(constants) == 4, "ADD": shortcut is not None, "RELU": relu}
    _run(_forward, y, (y, y if shortcut is None else shortcut, weight, bias, mean, var, eps), options)
    return y


def norm_add_relu_backward(
    grad: Tensor, z: Tensor | None, weight: Tensor | None, var: Tensor | None, eps: float, needs_shortcut: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients of y and of the shortcut, from that of the result. z: the result where there is a ReLU."""
    masked = torch.empty_like(grad) if needs_shortcut and z is not None and weight is not None else None
    grad_y = torch.empty_like(grad)
    options = {"NORM": weight is not None, "ADD": masked is not None, "RELU": z is not None}
    tensors = (grad if tensor is None else tensor for tensor in (z, grad_y, masked, weight, var))
    _run(_backward, grad, (grad, *tensors, eps), options)
    if not needs_shortcut:
        return grad_y, None
    return grad_y, (grad if z is None else grad_y) if masked is None else masked


def memory_format_of(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _run(kernel, x: Tensor, arguments: tuple, options: dict[str, bool]) -> None:
    batch, channels, height, width = x.shape
    last = memory_format_of(x) == torch.channels_last
    rows, columns = (batch * height * width, channels) if last else (batch * channels, height * width)
    if not rows or not columns:
        return
    across = min(COLUMNS, 1 << (columns - 1).bit_length())
    down = TILE // across
    grid = -(-rows // down), -(-columns // across)
    with nullcontext() if x.device.index == torch.cuda.current_device() else torch.cuda.device_of(x):
        kernel[grid](*arguments, rows, columns, channels, LAST=last, R=down, C=across, **options)
