"""A moving average of a network's weights and statistics, kept beside the network while it trains."""

from torch import nn


def build_average(model: nn.Module, decay: float, *, after: int | None = None):
    """timm's ModelEmaV3 of `model`, already on its device: weights and buffers; `.module` is a network in eval mode.

    Update s keeps `decay` of the average, at first less: 1 - s^(-2/3). So at update 1,000 about the last 100 count, at
    90,000 the last 2,000. With `after`, the average copies the network up to that update and then keeps `decay`.
    """
    from timm.utils import ModelEmaV3  # slow to import, and most runs have no average

    return ModelEmaV3(model, decay=decay, update_after_step=after or 0, use_warmup=after is None)
