"""The paper's image classifier: trunk, global average pool, one fully connected layer (He et al. 2015, Table 1)."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from resbackbone.resnet import ResNet
from resbackbone.weights import fit, read_weights


class ResNetClassifier(ResNet):
    """[B, in_channels, H, W] -> logits [B, num_classes]. Parameters have torchvision's names."""

    def __init__(self, depth: int, num_classes: int = 1000, **trunk):
        super().__init__(depth, levels=("c5",), **trunk)
        self.fc = nn.Linear(self.features["c5"].channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        c5 = super().forward(images)["c5"]  # [B, 512 or 2048, H/32, W/32]
        return self.fc(c5.mean((2, 3)))


def build_resnet_classifier(
    depth: int,
    num_classes: int = 1000,
    *,
    weights: str | Path | Mapping[str, Tensor] | None = None,
    norm: str = "BN",
    stride_in_1x1: bool = False,
    shortcut: str = "B",
    groups: int = 1,
    width_per_group: int = 64,
    in_channels: int = 3,
    zero_init_residual: bool = False,
    checkpoint_activations: bool = False,
) -> ResNetClassifier:
    """Build the paper's classifier of a depth in 18, 34, 50, 101, 152; arguments as in `build_resnet_backbone`.

    Raises ValueError for an unknown name, and for weights that do not fit, their `fc` included.
    """
    model = ResNetClassifier(
        depth,
        num_classes,
        norm=norm,
        stride_in_1x1=stride_in_1x1,
        shortcut=shortcut,
        groups=groups,
        width_per_group=width_per_group,
        in_channels=in_channels,
        zero_init_residual=zero_init_residual,
        checkpoint_activations=checkpoint_activations,
    )
    if weights is not None:
        fit(model, read_weights(weights))
    return model
