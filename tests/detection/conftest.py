"""Fixtures that several tests of detection share."""

import pytest
import torch.nn.functional as F
from made import keys_of_torchvisions_draws

from detection import sampling


@pytest.fixture
def torchvisions_samples(monkeypatch):
    """The same anchors and regions are sampled as by torchvision from the same random state.

    And torchvision's loss of fp64 objectness is not rounded to its fp32 labels.
    """
    monkeypatch.setattr(sampling, "random_keys", keys_of_torchvisions_draws)
    theirs = F.binary_cross_entropy_with_logits
    monkeypatch.setattr(
        F, "binary_cross_entropy_with_logits", lambda x, labels, **options: theirs(x, labels.to(x.dtype), **options)
    )
