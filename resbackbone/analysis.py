"""What a network costs (parameters, multiply-adds), and why it trains: its layers' responses and gradients."""

import copy
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from resbackbone.checks import UserError


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


@torch.no_grad()
def layer_responses(model: nn.Module, images: Tensor) -> list[dict]:
    """[{"layer": "layer1.0.conv1", "std": 0.7}, ..] of every 3x3 layer, in order (He et al. 2015, Sec. 4.2, Fig. 7).

    A response is a layer's output on `images`, [B, channels, H, W] as the network takes them, after its norm and
    before the nonlinearity or the addition; `std` is the standard deviation over all its elements. Batch norms use the
    statistics of `images`, as in training, and so make it 1 at initialisation in any network; what they have learned
    is what it shows afterwards. `model`, a network with torchvision's names, is left alone.
    """
    stds: dict[str, float] = {}

    def record(layer: str, response: Tensor) -> None:
        stds[layer] = response.float().std(correction=0).item()

    _observed(model, record)(images)
    return [{"layer": layer, "std": std} for layer, std in stds.items()]


@torch.enable_grad()
def gradient_norms(model: nn.Module, images: Tensor, labels: Tensor) -> list[dict]:
    """[{"layer": "layer1.0.conv1", "norm": 0.02, "relative": 1.3}, ..]: the gradient that each 3x3 layer receives.

    `norm` is the L2 norm of dL/dy, of the cross-entropy L of an image to the response y (see `layer_responses`) of a
    classifier's layer, as root mean square over the images, so it does not depend on how many there are. `relative`
    is to the last of these layers, so that the size of the loss falls out. In a plain network the gradient passes
    through every layer, each of which multiplies it; in a residual one it also reaches each block through the
    additions alone. The paper finds that batch norm keeps it from vanishing in plain networks too (Sec. 4.1); at
    initialisation it grows there towards the first layers, by about a fifth a layer.
    `relative` is None where the last layer receives none. images: [B, 3, H, W] as the network takes them. labels: [B].
    """
    norms: dict[str, float] = {}

    def record(layer: str, response: Tensor) -> None:
        norms.setdefault(layer, 0.0)  # here in the order of the layers; gradients come in the opposite one

        def receive(gradient: Tensor) -> None:
            norms[layer] = (gradient.float().square().sum() / len(images)).sqrt().item()

        response.register_hook(receive)  # gets the gradient of what y is now, whatever is added to it in place

    # Frozen or not, gradients pass through a network whose input wants one.
    logits = _observed(model, record)(images.detach().clone().requires_grad_())
    F.cross_entropy(logits.float(), labels, reduction="sum").backward()
    last = list(norms.values())[-1]
    return [{"layer": name, "norm": norm, "relative": norm / last if last else None} for name, norm in norms.items()]


class _Observed(nn.Module):
    """A norm whose outputs are shown to `record`. A frozen one inside is no longer folded into its convolution."""

    def __init__(self, norm: nn.Module, layer: str, record: Callable[[str, Tensor], None]):
        super().__init__()
        self.norm, self.layer, self.record = norm, layer, record

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        self.record(self.layer, y)
        return y


def _observed(model: nn.Module, record: Callable[[str, Tensor], None]) -> nn.Module:
    """A copy of `model` in training mode that calls record(layer, response) as each 3x3 layer responds."""
    copied = copy.deepcopy(model).train()
    layers = list(_layers_3x3(copied))
    if not layers:
        raise UserError("no 3x3 layer (a convN with its bnN) in this network, whose responses could be measured")
    for layer, parent, norm_name in layers:
        setattr(parent, norm_name, _Observed(getattr(parent, norm_name), layer, record))
    return copied


def _layers_3x3(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Each 3x3 convolution `convN` beside a `bnN`: its full name, the module that holds the two, the norm's name."""
    for prefix, parent in model.named_modules():
        for name, child in parent.named_children():
            norm_name = name.replace("conv", "bn")
            if isinstance(child, nn.Conv2d) and child.kernel_size == (3, 3) and hasattr(parent, norm_name):
                yield f"{prefix}.{name}".lstrip("."), parent, norm_name
