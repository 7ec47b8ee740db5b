"""The anchors and regions that the losses are computed on (Ren et al. 2015, Sec. 3.1.3), a fixed number an image."""

import torch
from torch import Tensor

from detection.boxes import best_of


def sample(labels: Tensor, count: int, positive_fraction: float) -> tuple[Tensor, Tensor, int]:
    """Draw `count` candidates of each image, without replacement, as torchvision's sampler does.

    labels: [B, N]; 1 and above is positive, 0 negative, -1 neither. At most `positive_fraction` of the count are
    positive; negatives fill the rest.

    Returns indices [B, count] into N, positives first; whether each was drawn [B, count], False where an image has too
    few; and the number of places that positives can have, the first ones.
    """
    most = int(count * positive_fraction)
    keys = random_keys(labels)
    chosen, positive = best_of(keys.masked_fill(labels < 1, -1), most)
    drawn_positive = chosen >= 0
    chosen, negative = best_of(keys.masked_fill(labels != 0, -1), count)
    rank = torch.arange(count, device=labels.device)
    drawn_negative = (chosen >= 0) & (rank < count - drawn_positive.sum(1, keepdim=True))
    index = torch.cat((positive, negative), 1)
    drawn, order = torch.cat((drawn_positive, drawn_negative), 1).int().sort(dim=1, descending=True, stable=True)
    drawn = drawn[:, :count] > 0
    return index.gather(1, order[:, :count]).where(drawn, 0), drawn, most


def random_keys(labels: Tensor) -> Tensor:
    """Uniform numbers in 0..1 of the shape and on the device of `labels`; the largest are drawn."""
    return torch.rand(labels.shape, device=labels.device)
