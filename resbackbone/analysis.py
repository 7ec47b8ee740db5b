"""What a network costs (parameters, multiply-adds), and the responses and gradients of its layers."""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from resbackbone.checks import UserError


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, including frozen ones; statistics of norms are not parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_multiply_adds(module: nn.Module, height: int = 224, width: int = 224, in_channels: int = 3) -> int:
    """Multiply-adds of convolutions and matrix products for one image of height x width pixels (the paper's FLOPs).

    Counts on the meta device: nothing is computed and `module` does not change.
    """
    counted = copy.deepcopy(module).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        counted(torch.empty(1, in_channels, height, width, device="meta"))
    return counter.get_total_flops() // 2


@torch.no_grad()
def layer_responses(model: nn.Module, images: Tensor) -> list[dict]:
    """[{"layer": "layer1.0.conv1", "std": 0.7}, ..] of every 3x3 layer, in order (He et al. 2015, Sec. 4.2, Fig. 7).

    A response is a layer's output on `images`, [B, channels, H, W] as the network takes them, after its norm and before
    the nonlinearity or the addition; `std` is the standard deviation of its elements. Batch norms use the statistics of
    `images`, as in training, so it is 1 at initialization in any network and later shows the learned scales. `model`
    has torchvision's names and does not change; what is in a deep stem is left out.
    """
    stds: dict[str, float] = {}

    def record(layer: str, response: Tensor) -> None:
        stds[layer] = response.float().std(correction=0).item()

    _observed(model, record)(images)
    return [{"layer": layer, "std": std} for layer, std in stds.items()]


@torch.enable_grad()
def gradient_norms(model: nn.Module, images: Tensor, labels: Tensor) -> list[dict]:
    """[{"layer": "layer1.0.conv1", "norm": 0.02, "relative": 1.3}, ..]: the gradient that each 3x3 layer receives.

    `norm` is the L2 norm of dL/dy for an image's cross-entropy L and a classifier layer's response y (see
    `layer_responses`), as root mean square over the images. `relative` is its ratio to the last 3x3 layer's, which
    cancels the size of the loss; None if that layer receives no gradient. The paper finds that batch norm keeps
    gradients from vanishing in plain networks too (Sec. 4.1). images: [B, 3, H, W] as the network takes them.
    labels: [B].
    """
    norms: dict[str, float] = {}

    def record(layer: str, response: Tensor) -> None:
        norms.setdefault(layer, 0.0)  # in the order of layers; gradients arrive in the opposite order

        def receive(gradient: Tensor) -> None:
            norms[layer] = (gradient.float().square().sum() / len(images)).sqrt().item()

        response.register_hook(receive)  # of y as it is now, before later in-place additions

    # An input that requires a gradient sends gradients through frozen layers too.
    logits = _observed(model, record)(images.detach().clone().requires_grad_())
    F.cross_entropy(logits.float(), labels, reduction="sum").backward()
    last = list(norms.values())[-1]
    return [{"layer": name, "norm": norm, "relative": norm / last if last else None} for name, norm in norms.items()]


class _Observed(nn.Module):
    """A norm that passes its outputs to `record`. A wrapped frozen norm is not folded into its convolution."""

    def __init__(self, norm: nn.Module, layer: str, record: Callable[[str, Tensor], None]):
        super().__init__()
        self.norm, self.layer, self.record = norm, layer, record

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        self.record(self.layer, y)
        return y


def _observed(model: nn.Module, record: Callable[[str, Tensor], None]) -> nn.Module:
    """A copy of `model` in training mode that calls record(layer, response) for each 3x3 convN with a bnN beside it."""
    copied, count = copy.deepcopy(model).train(), 0
    for prefix, parent in list(copied.named_modules()):
        for name, child in list(parent.named_children()):
            norm = getattr(parent, name.replace("conv", "bn"), None) if name.startswith("conv") else None
            if isinstance(child, nn.Conv2d) and child.kernel_size == (3, 3) and isinstance(norm, nn.Module):
                setattr(parent, name.replace("conv", "bn"), _Observed(norm, f"{prefix}.{name}".lstrip("."), record))
                count += 1
    if not count:
        raise UserError("this network has no 3x3 layer (a convN with its bnN) to measure")
    return copied
