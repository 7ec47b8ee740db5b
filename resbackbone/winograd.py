"""3x3 convolutions of large maps on a CPU, with a quarter of the multiplications.

Lavin and Gray 2016, "Fast Algorithms for Convolutional Neural Networks", F(4x4, 3x3): 4 x 4 outputs come from a tile of
6 x 6 inputs by 36 multiplications for each pair of channels, not 144. They are 36 products of matrices, [tiles, in] by
[in, out]; before and behind them tiles are multiplied by small matrices that stand for six points. At 0, +-sqrt(1/2),
+-sqrt(2) and infinity rounding errors are 5e-7 of the outputs (root mean square; oneDNN's convolutions have 1e-7 to
3e-7), at the paper's 0, +-1, +-2 and infinity 1e-6; they go with the largest input of a tile.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resbackbone.compat import are_products_precise

OUT, IN = 4, 6  # pixels of a tile's side: of its outputs and of its inputs, which overlap by 2
POINTS = (0.0, 0.5**0.5, -(0.5**0.5), 2**0.5, -(2**0.5))
TILES_AT_ONCE = 256  # for each thread: fewer read all weights too often, of more less stays in the cache
FEWEST_CHANNELS = 256  # with fewer, what goes through memory takes the time that is saved
FEWEST_TILES = 32


def is_faster(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether `conv` of x [B, in, H, W] is a plain 3x3 convolution in fp32 that gains by it, once transformed.

    Each of a tile's 36 numbers has a matrix of weights of its own, which takes time to read: that needs a number of
    tiles for the number of channels.
    """
    if conv.kernel_size != (3, 3) or not conv.padding == conv.stride == conv.dilation == (1, 1) or conv.groups != 1:
        return False
    images, _, height, width = x.shape
    tiles, (fewer, more) = _tiles(height) * _tiles(width), sorted(conv.weight.shape[:2])
    return (
        x.dtype == torch.float32
        and fewer >= FEWEST_CHANNELS
        and images * tiles >= max(FEWEST_TILES, more // 8)
        and height * width >= 0.8 * tiles * OUT**2  # else the tiles are mostly padding
        and are_products_precise()
    )


def transform(weight: Tensor) -> Tensor:
    """Weights [out, in, 3, 3] as `convolve` takes them: [36, in, out], four times the memory."""
    _, of_weights, _ = _matrices(torch.float64)
    transformed = torch.einsum("xj,yi,oaij->yxao", of_weights, of_weights, weight.double().transpose(2, 3))
    return transformed.flatten(0, 1).to(weight.dtype).contiguous()


def convolve(x: Tensor, transformed: Tensor, bias: Tensor, relu: bool) -> Tensor:
    """[relu](conv2d(x) + bias) of x [B, in, H, W], padded with one zero: [B, out, H, W], channels_last."""
    images, _, height, width = x.shape
    down, across = _tiles(height), _tiles(width)
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, across * OUT + 1 - width, 1, down * OUT + 1 - height))
    padded = padded.contiguous()  # F.pad keeps the order in memory that x has
    y = x.new_empty(images, down, OUT, across, OUT, transformed.shape[2])
    at_once = TILES_AT_ONCE * torch.get_num_threads()
    some, rows = max(1, at_once // (down * across)), max(1, at_once // across)  # images; rows of tiles of an image
    for first in range(0, images, some):
        for top in range(0, down, rows):
            part = padded[first : first + some, top * OUT : (top + rows) * OUT + 2]
            place = y[first : first + some, top : top + rows]
            torch.add(_of_tiles(part, transformed), bias, out=place)
            if relu:
                F.relu_(place)
    y = y.view(images, down * OUT, across * OUT, -1)[:, :height, :width].contiguous()
    return y.permute(0, 3, 1, 2)


def _of_tiles(x: Tensor, transformed: Tensor) -> Tensor:
    """x [B, 4 * rows + 2, 4 * columns + 2, in] -> [B, rows, 4, columns, 4, out]."""
    of_inputs, _, of_outputs = _matrices(x.dtype)
    images, height, width, channels = x.shape
    rows, columns, line = height // OUT, width // OUT, x.stride(1)
    # [B * rows, 6, width * in]: the lines of every row of tiles, then their sums
    lines = x.as_strided((images, rows, IN, line), (x.stride(0), OUT * line, line, 1)).flatten(0, 1)
    lines = torch.bmm(of_inputs.expand(len(lines), IN, IN), lines)
    # [6, 6, B * rows, columns, in]: column j of line i of every tile, then their sums
    shape = IN, IN, len(lines), columns, channels
    tiles = lines.as_strided(shape, (channels, line, IN * line, OUT * channels, 1)).reshape(IN, -1)
    tiles = (of_inputs @ tiles).view(IN * IN, -1, channels)
    products = torch.bmm(tiles, transformed)  # [6 * 6, B * rows * columns, out]
    summed = of_outputs @ products.view(IN, -1)  # [4, 6 * B * rows * columns * out]
    summed = of_outputs @ summed.view(OUT, IN, -1)  # [4, 4, B * rows * columns * out]
    return summed.view(OUT, OUT, images, rows, columns, -1).permute(2, 3, 1, 4, 0, 5)


def _tiles(side: int) -> int:
    return -(-side // OUT)


@cache
def _matrices(dtype: torch.dtype) -> list[Tensor]:
    """What tiles [6, 6], weights [6, 3] and outputs [4, 6] are multiplied by (Toom and Cook's algorithm)."""

    def powers(count: int) -> Tensor:  # of each point; infinity has the highest alone
        rows = [[point**k for k in range(count)] for point in POINTS] + [[0.0] * (count - 1) + [1.0]]
        return torch.tensor(rows, dtype=torch.float64, device="cpu")

    matrices = torch.linalg.inv(powers(IN)).T, powers(IN - OUT + 1), powers(OUT).T
    return [matrix.to(dtype).contiguous() for matrix in matrices]
