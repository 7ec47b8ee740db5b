"""What every test shares: a fixed seed, the folder of real images, and networks whose norms are not the identity."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn


@pytest.fixture
def data() -> Path:
    """The folder of real images that the machine's owner names."""
    folder = os.environ.get("RESBACKBONE_TEST_DATA")
    if not folder:
        pytest.skip("RESBACKBONE_TEST_DATA is unset: it names a folder of real images")
    return Path(folder)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def randomised() -> Callable[[nn.Module], nn.Module]:
    """Puts numbers into every batch norm, so that a statistic or an affine parameter left out shows; in eval mode."""

    def randomise(model: nn.Module) -> nn.Module:
        for module in model.modules():
            if isinstance(getattr(module, "running_var", None), torch.Tensor):
                with torch.no_grad():
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_(0, 0.2)
                    module.running_mean.normal_(0, 0.2)
                    module.running_var.uniform_(0.5, 1.5)
        return model.eval()

    return randomise
