"""The paper's image classifier: trunk, global average pool, one fully connected layer (He et al. 2015, Table 1)."""

from dataclasses import replace

from torch import Tensor, nn

from resbackbone.checks import UserError
from resbackbone.config import BackboneConfig
from resbackbone.resnet import ResNet
from resbackbone.weights import WeightSource, read_weights
from resbackbone.weights.fit import fit, resolve_architecture, resolve_dilation


class ResNetClassifier(ResNet):
    """[B, in_channels, H, W] -> logits [B, num_classes]. Parameters have torchvision's names."""

    def __init__(self, config: BackboneConfig, num_classes: int = 1000):
        config = replace(config, levels=("c5",))
        super().__init__(**config.trunk())
        self.config = config
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(self.features["c5"].channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]  # logits, where a trunk gives maps
        c5 = super().forward(images)["c5"]  # [B, 512 or 2048, H/32, W/32]
        return self.fc(self.avgpool(c5).flatten(1))


def build_resnet_classifier(
    depth: int | None = None,
    num_classes: int | None = None,
    *,
    weights: WeightSource | None = None,
    norm: str | None = None,
    stride_in_1x1: bool | None = None,
    eps: float | None = None,
    stem: str | None = None,
    shortcut: str | None = None,
    groups: int | None = None,
    width_per_group: int | None = None,
    in_channels: int | None = None,
    zero_init_residual: bool = False,
    checkpoint_activations: bool = False,
    new_classes: bool = False,
) -> ResNetClassifier:
    """Build the paper's classifier; arguments as in `build_resnet_backbone`.

    What is None comes from the weights, or is the default: 1000 classes, norm "BN", and so on. Raises ValueError for
    an unknown name, and for weights that are of another network than is asked or do not fit, their `fc` included. With
    `new_classes`, an `fc` for another number of classes, or none, is no error: it starts from random weights.
    """
    loaded = None if weights is None else read_weights(weights)
    trunk = resolve_architecture(
        loaded,
        depth=depth,
        stem=stem,
        shortcut=shortcut,
        stride_in_1x1=stride_in_1x1,
        groups=groups,
        width_per_group=width_per_group,
        in_channels=in_channels,
        eps=eps,
        norm=norm,
    )
    config = BackboneConfig(
        **trunk,
        dilate_c5=resolve_dilation(loaded, None),
        zero_init_residual=zero_init_residual,
        checkpoint_activations=checkpoint_activations,
    )
    if loaded is None:
        return ResNetClassifier(config, 1000 if num_classes is None else num_classes)
    classes = len(loaded.state["fc.weight"]) if "fc.weight" in loaded.state else None
    if new_classes and num_classes not in (None, classes):
        loaded = replace(loaded, state={key: loaded.state[key] for key in loaded.state if not key.startswith("fc.")})
        classes = num_classes
    if classes is None:
        raise UserError(f"weights from {loaded.source} hold no classifier: fc.weight is missing")
    if num_classes not in (None, classes):
        raise UserError(
            f"weights from {loaded.source} are for num_classes={classes}, but you asked for num_classes={num_classes}"
        )
    loaded.announce_assumptions(stride_in_1x1=stride_in_1x1)
    model = ResNetClassifier(config, classes)
    fit(model, loaded, fresh=("fc.",) if new_classes else ())
    return model
