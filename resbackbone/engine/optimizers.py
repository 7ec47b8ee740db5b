"""The optimizers that recipes name."""

import torch
from torch import nn

from resbackbone.checks import one_of
from resbackbone.engine.state import parameter_groups

OPTIMIZERS = ("sgd", "adamw", "lamb")


def build_optimizer(
    model: nn.Module, name: str, *, rate: float, weight_decay: float, decay_norms: bool
) -> torch.optim.Optimizer:
    """SGD with momentum 0.9, AdamW or timm's LAMB for the trainable parameters of `model`, already on its device.

    Without `decay_norms`, norms and biases have no weight decay. LAMB clips the gradient to a norm of 1, as published.
    """
    groups = parameter_groups(model, weight_decay, decay_norms=decay_norms)
    on_gpu = all(parameter.is_cuda for group in groups for parameter in group["params"])
    if one_of("optimizer", name, OPTIMIZERS) == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=0.9, fused=on_gpu)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=rate, fused=on_gpu)
    from timm.optim import Lamb  # slow to import

    return Lamb(groups, lr=rate)
