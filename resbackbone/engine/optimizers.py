"""The optimizers that recipes name."""

from collections.abc import Mapping

import torch
from torch import nn

from resbackbone.checks import one_of

OPTIMIZERS = ("sgd", "adamw", "lamb")


def build_optimizer(
    model: nn.Module,
    name: str,
    *,
    rate: float,
    weight_decay: float,
    decay_norms: bool,
    rate_scales: Mapping[str, float] | None = None,
) -> torch.optim.Optimizer:
    """SGD with momentum 0.9, AdamW or timm's LAMB for the trainable parameters of `model`, already on its device.

    Without `decay_norms`, norms and biases have no weight decay. LAMB clips the gradient to a norm of 1, as published.
    `rate_scales`: {name of a parameter: what its learning rate is multiplied by}, as "lr_scale" of its group.
    """
    scales = rate_scales or {}
    by_group: dict[tuple[float, float], list[nn.Parameter]] = {(1.0, weight_decay): []}
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = weight_decay if decay_norms or parameter.ndim > 1 else 0.0
            by_group.setdefault((scales.get(key, 1.0), decay), []).append(parameter)
    groups = [
        {"params": own, "weight_decay": decay, "lr_scale": scale} for (scale, decay), own in by_group.items() if own
    ]
    on_gpu = all(parameter.is_cuda for group in groups for parameter in group["params"])
    if one_of("optimizer", name, OPTIMIZERS) == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=0.9, fused=on_gpu)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=rate, fused=on_gpu)
    from timm.optim import Lamb  # slow to import

    return Lamb(groups, lr=rate)
