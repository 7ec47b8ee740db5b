"""What a network costs: parameters, and multiply-adds (the paper's FLOPs, Table 1)."""

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, frozen ones included; statistics of norms are not parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_multiply_adds(module: nn.Module, height: int = 224, width: int = 224, in_channels: int = 3) -> int:
    """Multiply-adds of one image's forward pass, convolutions and matrix products (what the paper calls FLOPs).

    Counted on the meta device, so nothing is computed and `module` is left alone. `height`, `width` in pixels.
    """
    counted = copy.deepcopy(module).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        counted(torch.empty(1, in_channels, height, width, device="meta"))
    return counter.get_total_flops() // 2
