"""ResNets in timm: importing this registers `resbackbone_18` .. `resbackbone_152d` with `timm.create_model`.

The other way, a timm network as a Backbone, is `from_timm`, found here too.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from timm.models import (
    FeatureInfo,
    build_model_with_cfg,
    generate_default_cfgs,
    get_arch_pretrained_cfgs,
    register_model,
)
from torch import Tensor, nn

from resbackbone.adapters.from_timm import TimmBackbone, from_timm
from resbackbone.checks import UserError, one_of
from resbackbone.classifier import ResNetClassifier
from resbackbone.config import BackboneConfig
from resbackbone.resnet import DEPTHS, STAGES, TRUNK_LEVELS, ResNet

TRUNK_ARGUMENTS = ("norm", "eps", "stem", "shortcut", "stride_in_1x1", "groups", "width_per_group", "frozen_through")
KINDS: dict[str, dict[str, str]] = {"": {}, "d": {"stem": "deep", "shortcut": "D"}}  # by the end of timm's names
DILATE_C5 = {32: False, 16: True}  # by timm's output_stride


class TimmFeatures(ResNet):
    """[B, in_chans, H, W] -> a list of maps, those of `out_indices` among c1 (the stem's, stride 2), c2, .. c5."""

    def __init__(self, depth: int, out_indices: int | Iterable[int] = (0, 1, 2, 3, 4), **arguments):
        indices = range(-out_indices, 0) if isinstance(out_indices, int) else out_indices
        self.out_indices = sorted({one_of("out index", i, range(-5, 5)) % 5 for i in indices})
        levels = [level for i, level in enumerate(TRUNK_LEVELS, 1) if i in self.out_indices]
        config = _config(depth, arguments, levels=levels or ["c2"])
        super().__init__(**config.trunk())
        _freeze(self, config)
        info = [{"num_chs": 64, "reduction": 2, "module": "relu"}]
        for level, (channels, stride) in self.stage_features.items():
            info.append({"num_chs": channels, "reduction": stride, "module": STAGES[level]})
        self.feature_info = FeatureInfo(info, tuple(self.out_indices))

    def forward(self, images: Tensor) -> list[Tensor]:  # type: ignore[override]
        stem = self.stem(images)
        maps = {"c1": stem, **self.from_stem(stem)}
        return [maps[f"c{i + 1}"] for i in self.out_indices]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.checkpoint_activations = enable


class TimmClassifier(ResNetClassifier):
    """The classifier with the methods that timm's own have: [B, in_chans, H, W] -> logits [B, num_classes]."""

    set_grad_checkpointing = TimmFeatures.set_grad_checkpointing

    fc: nn.Module  # type: ignore[assignment]

    def __init__(self, depth: int, num_classes: int = 1000, global_pool: str = "avg", **arguments):
        config = _config(depth, arguments)
        super().__init__(config)
        _freeze(self, config)
        self.num_features = self.head_hidden_size = self.features["c5"].channels
        self.reset_classifier(num_classes, global_pool)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """The patterns by which timm gives layers, or stages if `coarse`, learning rates of their own."""
        return {"stem": r"^conv1|bn1", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh last layer; 0 classes leave the pooled features."""
        one_of("global_pool", global_pool, (None, "avg"), " (forward_features gives maps that are not pooled)")
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.fc.to(next(self.parameters()).device)

    def forward_features(self, images: Tensor) -> Tensor:  # [B, 512 or 2048, H/32, W/32]
        return ResNet.forward(self, images)["c5"]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.avgpool(x).flatten(1)
        return x if pre_logits else self.fc(x)


def _config(depth: int, given: Mapping, **more) -> BackboneConfig:
    """timm's arguments as ours. What asks for nothing (drop_rate=0.0) passes, what we do not do is refused."""
    trunk = dict(given)
    trunk["in_channels"] = trunk.pop("in_chans", 3)
    trunk["dilate_c5"] = DILATE_C5[one_of("output_stride", trunk.pop("output_stride", 32), DILATE_C5)]
    for name in [name for name, value in trunk.items() if name not in ("in_channels", "dilate_c5", *TRUNK_ARGUMENTS)]:
        if trunk.pop(name):
            raise UserError(
                f"resbackbone_{depth} does not take {name}={given[name]!r}; it takes num_classes, in_chans, "
                f"global_pool, output_stride, features_only, out_indices, {', '.join(TRUNK_ARGUMENTS)}"
            )
    return BackboneConfig(depth=depth, **trunk, **more)


def _freeze(network: ResNet, config: BackboneConfig) -> None:
    if config.frozen_through is not None:
        network.freeze(config.frozen_through)


def _register(depth: int, kind: str) -> None:
    """Make `timm.create_model("resbackbone_50", ..)` known, its parameters named as those of timm's resnet50 (or 50d).

    features_only=True gives a `TimmFeatures`, otherwise it is a `TimmClassifier`. pretrained=True loads what timm has
    for its own network, and a tag chooses as it does there (`resbackbone_50.a1_in1k`). A file (`checkpoint_path`)
    goes by its names alone: for one with strides in the 1x1, say stride_in_1x1=True. timm loads weights after it has
    made a network, so frozen_through ("stem", "c2" .. "c5") is taken without pretrained=True too.
    """
    name = f"resbackbone_{depth}{kind}"

    def create(pretrained: bool = False, features_only: bool = False, **arguments) -> nn.Module:
        network: Any = TimmFeatures if features_only else TimmClassifier
        unused: Any = ("num_classes", "global_pool") if features_only else None
        return build_model_with_cfg(
            partial(network, depth), name, pretrained, kwargs_filter=unused, **(KINDS[kind] | arguments)
        )

    create.__name__ = create.__qualname__ = name
    globals()[name] = register_model(create)  # timm adds the name to this module's __all__


__all__ = ["TimmBackbone", "TimmClassifier", "TimmFeatures", "from_timm"]
default_cfgs = generate_default_cfgs(  # where timm looks for what a module's networks can load
    {
        f"resbackbone_{depth}{kind}.{name.partition('.')[2]}": cfg
        for depth in DEPTHS
        for kind in KINDS
        for name, cfg in get_arch_pretrained_cfgs(f"resnet{depth}{kind}").items()
    }
)
for depth in DEPTHS:
    for kind in KINDS:
        _register(depth, kind)
