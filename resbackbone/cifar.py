"""The paper's CIFAR-10 networks, 6n+2 layers deep, residual and plain (He et al. 2015, Sec. 4.2 and Table 6)."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from resbackbone.checks import UserError, one_of
from resbackbone.layers import SHORTCUTS, conv, conv_norm, norm_layer
from resbackbone.resnet import BasicBlock, Layout
from resbackbone.weights import WeightSource, read_weights, write_weights
from resbackbone.weights.fit import architecture_of, fit

CIFAR_DEPTHS = (20, 32, 44, 56, 110, 1202)  # Table 6
STAGES = {"layer1": (16, 1), "layer2": (32, 2), "layer3": (64, 2)}  # channels, stride
INPUT = {"channel_order": "RGB", "range": [0.0, 1.0], "mean": "mean_image", "std": [1.0, 1.0, 1.0]}


class CifarResNet(nn.Module):
    """[B, 3, 32, 32] -> logits [B, num_classes]: a 3x3 stem, three stages of 2n 3x3 layers, average pool and fc.

    Sizes other than 32 work too. The input is RGB in 0..1 less the training set's mean image, which a file written by
    `save_cifar_resnet` holds: `mean_image` [3, 32, 32], None where nobody said. `config` makes the network again.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(self, depth: int, *, shortcut: str = "A", num_classes: int = 10):
        super().__init__()
        one_of("depth", depth, CIFAR_DEPTHS, " (the paper's for CIFAR-10; for ImageNet: build_resnet_classifier)")
        layout = Layout(norm_layer("BN"), one_of("shortcut", shortcut, SHORTCUTS))
        self.config: dict[str, Any] = {"depth": depth, "shortcut": shortcut, "num_classes": num_classes}
        self.mean_image: Tensor | None = None

        self.conv1, self.bn1 = conv(3, 16, kernel=3), layout.norm(16)
        channels = 16
        for name, (width, stride) in STAGES.items():
            stage = nn.Sequential(BasicBlock(channels, width, layout, stride=stride))
            for _ in range(1, (depth - 2) // 6):
                stage.append(BasicBlock(width, width, layout))
            setattr(self, name, stage)
            channels = width
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # the paper's reference [13]; fc keeps PyTorch's own
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, H, W]
        x = F.relu_(conv_norm(self.conv1, self.bn1, images))  # [B, 16, H, W]
        x = self.layer1(x)  # [B, 16, H, W]
        x = self.layer2(x)  # [B, 32, H/2, W/2], rounded up
        x = self.layer3(x)  # [B, 64, H/4, W/4], rounded up
        return self.fc(x.mean((2, 3)))


def build_cifar_resnet(
    depth: int | None = None,
    *,
    shortcut: str | None = None,
    weights: WeightSource | None = None,
    num_classes: int | None = None,
) -> CifarResNet:
    """Build one of the paper's CIFAR-10 networks. With weights, what is None is what they say.

    depth: 20, 32, 44, 56, 110 or 1202; no other 6n+2, although the rule would give it.
    shortcut: "A" (default, as the paper uses here), "B", "C" (Sec. 4.1), or "none" for the plain network.
    weights: a file or state dict with the names conv1, bn1, layer1..3, fc (or `linear`), bare or under `module.`; or
        another source that `weights.read_weights` takes. A foreign file does not tell its input: its publisher does.
    num_classes: 10.

    Raises ValueError for an unknown depth or shortcut, and for weights of another network than is asked, or that do
    not fit, naming every missing, unexpected and mis-shaped key.
    """
    asked: dict[str, Any] = {"depth": depth, "shortcut": shortcut, "num_classes": num_classes}
    asked = {name: value for name, value in asked.items() if value is not None}
    if weights is None:
        return CifarResNet(**{"depth": depth, **asked})

    loaded = read_weights(weights)
    known = _described_by(loaded.state)
    if "depth" not in known:
        raise UserError(f"weights from {loaded.source} are of no CIFAR network: it has layer1, layer2, layer3 and fc")
    if "shortcut" not in known and "shortcut" in loaded.metadata.get("cifar", {}):
        known["shortcut"] = loaded.metadata["cifar"]["shortcut"]
    for name, value in asked.items():
        if known.get(name, value) != value:
            raise UserError(
                f"weights from {loaded.source} are for {name}={known[name]}, but you asked for {name}={value}"
            )
    model = CifarResNet(**{**known, **asked})
    state = {name: tensor for name, tensor in loaded.state.items() if name != "mean_image"}
    fit(model, replace(loaded, state=state))
    model.mean_image = loaded.state.get("mean_image")
    return model


def save_cifar_resnet(
    model: CifarResNet, path: str | os.PathLike, *, mean_image: Tensor, classes: Sequence[str], recipe: str
) -> None:
    """Write `model` as safetensors that `build_cifar_resnet(weights=path)` makes it from again.

    mean_image: [3, 32, 32], what was subtracted from images in 0..1. recipe: a sentence on how it was trained.
    """
    metadata = {"cifar": model.config, "num_classes": len(classes), "classes": list(classes), "recipe": recipe}
    write_weights(path, {**model.state_dict(), "mean_image": mean_image}, {**metadata, "input": INPUT})


def _described_by(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of `build_cifar_resnet` that names and shapes show; {} if the network is none of these."""
    blocks = [{key.split(".")[1] for key in state if key.startswith(f"{stage}.")} for stage in STAGES]
    n = len(blocks[0])
    fc = state.get("fc.weight")
    if not n or any(len(stage) != n for stage in blocks) or fc is None or fc.dim() != 2:
        return {}
    if any(key.startswith("layer4.") for key in state):
        return {}
    known = {"depth": 6 * n + 2, "num_classes": len(fc)}
    # B and C have parameters; A and none have not, and look the same.
    return known | {name: value for name, value in architecture_of(state).items() if name == "shortcut"}
