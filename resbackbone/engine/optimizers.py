"""The optimizers that recipes name."""

import torch
from torch import nn

from resbackbone.checks import one_of

OPTIMIZERS = ("sgd", "adamw", "lamb")


def build_optimizer(
    model: nn.Module, name: str, *, rate: float, weight_decay: float, decay_norms: bool
) -> torch.optim.Optimizer:
    """SGD with momentum 0.9, AdamW or timm's LAMB for the trainable parameters of `model`, already on its device.

    Without `decay_norms`, norms and biases have no weight decay. LAMB clips the gradient to a norm of 1, as published.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trainable if decay_norms or parameter.ndim > 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}]
    if not decay_norms:
        groups += [{"params": [parameter for parameter in trainable if parameter.ndim <= 1], "weight_decay": 0.0}]
    on_gpu = all(parameter.is_cuda for parameter in trainable)
    if one_of("optimizer", name, OPTIMIZERS) == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=0.9, fused=on_gpu)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=rate, fused=on_gpu)
    from timm.optim import Lamb  # slow to import

    return Lamb(groups, lr=rate)
