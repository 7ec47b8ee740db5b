"""Backbone = trunk (+ FPN), and build_resnet_backbone(), the one way to make it."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from resbackbone.checks import UserError, one_of
from resbackbone.export import export_backbone
from resbackbone.fpn import FPN, PYRAMID_LEVELS, trunk_levels_for
from resbackbone.layers import fuse
from resbackbone.resnet import DEPTHS, TRUNK_LEVELS, Feature, ResNet, count_norms, sorted_levels
from resbackbone.weights import read_weights
from resbackbone.weights.fit import backbone_part, fit, pyramid_of, resolve_architecture

FREEZABLE = ("none", "stem", *TRUNK_LEVELS)
DEFAULT_PYRAMID = ("p2", "p3", "p4", "p5", "p6")


class Backbone(nn.Module):
    """What a detector sees of a backbone, whatever its trunk: feature maps by level name, and what they hold.

    A subclass inherits from this and from its trunk, whose forward gives {"c2": map, ..}; with a pyramid on top
    the maps are p2.. instead. `features[level]` is (channels, stride) of what forward returns, in the same order;
    `out_channels` the channels of the coarsest of them (with a pyramid all are equal); `size_divisibility` the
    trunk's total stride: on images padded to it the trunk's maps are exactly H/stride x W/stride (any size is taken).
    """

    fpn: FPN | None
    features: dict[str, Feature]
    size_divisibility: int
    weights_source: str | None = None
    config: dict  # the arguments of `build_resnet_backbone` that make it again, but for the weights

    def forward(self, images: Tensor) -> dict[str, Tensor]:  # [B, channels, H, W]
        maps = super().forward(images)
        return maps if self.fpn is None else self.fpn(maps)

    @property
    def out_channels(self) -> int:
        return list(self.features.values())[-1].channels

    def fuse(self) -> "Backbone":
        """Fold every batch norm into its convolution, in place, for inference; returns self in eval mode."""
        fuse(self.eval())
        return self

    def export(self, path: str | os.PathLike, format: str | None = None) -> None:
        """Write a fused fp32 copy, free in batch, height and width, as "onnx" or "pt2": see `export_backbone`."""
        export_backbone(self, path, format)

    def summary(self) -> str:
        """One line on what trains: `frozen BN 53, trainable BN 0, parameters 23.2 M trainable, 0.2 M frozen`."""
        frozen, trainable = count_norms(self)
        counts = {True: 0, False: 0}
        for parameter in self.parameters():
            counts[parameter.requires_grad] += parameter.numel()
        return (
            f"frozen BN {frozen}, trainable BN {trainable}, "
            f"parameters {counts[True] / 1e6:.1f} M trainable, {counts[False] / 1e6:.1f} M frozen"
        )


class ResNetBackbone(Backbone, ResNet):
    """A ResNet's stages as a Backbone; `build_resnet_backbone` makes it."""

    def __init__(self, depth: int, *, pyramid: Mapping | None, **trunk):
        ResNet.__init__(self, depth, **trunk)
        self.fpn = None if pyramid is None else FPN(self.stage_features, **pyramid)

    @property
    def features(self) -> dict[str, Feature]:  # type: ignore[override]  # a network's own is only read
        return ResNet.features.fget(self) if self.fpn is None else self.fpn.features  # type: ignore[attr-defined]

    @property
    def size_divisibility(self) -> int:  # type: ignore[override]
        return list(self.stage_features.values())[-1].stride

    def adapt_state_dict(self, state_dict: dict[str, Tensor], prefix: str = "") -> None:
        """Also take torchvision's detector names, where the trunk is `body`, and leave out an unwanted pyramid."""
        for key in [key for key in state_dict if key.startswith(f"{prefix}body.")]:
            state_dict[prefix + key.removeprefix(f"{prefix}body.")] = state_dict.pop(key)
        super().adapt_state_dict(state_dict, prefix)
        if self.fpn is None:
            for key in [key for key in state_dict if key.startswith(f"{prefix}fpn.")]:
                del state_dict[key]


def build_resnet_backbone(
    depth: int | None = None,
    *,
    levels: Iterable[str] | None = None,
    fpn: bool = False,
    norm: str | None = None,
    frozen_through: str | None = None,
    weights: str | Path | Mapping[str, Tensor] | None = None,
    stride_in_1x1: bool | None = None,
    eps: float | None = None,
    shortcut: str | None = None,
    dilate_c5: bool = False,
    groups: int | None = None,
    width_per_group: int | None = None,
    in_channels: int | None = None,
    zero_init_residual: bool = False,
    checkpoint_activations: bool = False,
    fpn_channels: int | None = None,
    fpn_norm: str | None = None,
    p6_from: str | None = None,
    relu_before_p7: bool | None = None,
) -> ResNetBackbone:
    """Build a ResNet as multi-scale feature maps; tools, adapters and tests all come through here.

    The trunk yields c2..c5 (He et al. 2015, Table 1), with `fpn` p2..p6 (Lin et al. 2017, Sec. 3). Input
    [B, in_channels, H, W]: RGB floats in 0..1 normalized by `weights.MEAN` and `STD`, H and W in pixels, any size.
    Output {level: [B, channels, ceil(H/stride), ceil(W/stride)]}, finest first; `features[level]` of the result
    holds that level's channels and stride.

    depth: 18, 34, 50, 101 or 152; with weights that tell it, None will do. The same goes for the arguments below
        that are None: what the weights say holds, and asking for something else is an error.
    levels: which of c2..c5, or with `fpn` which of p2..p7, to return; the number is log2 of the stride. What they do
        not need is not built. p7 turns p6 and p7 into convolutions that start from `p6_from`, "c5" (default) or "p5".
        Default: all of the trunk; the pyramid that the weights hold, else p2..p6.
    norm: "BN", "FrozenBN", "SyncBN" or "GN". Default: FrozenBN with weights, BN without.
    frozen_through: None, "stem", "c2" .. "c5": these parts get no gradient and keep their statistics. Default: "c2"
        with weights, None without; "none" freezes nothing, with weights too.
    weights: a file of any known format, a named source (`torchvision:ResNet50_Weights.IMAGENET1K_V2`, `timm:..`,
        `hf:..`, `detectron2:..`, a URL), or a state dict; see `weights.read_weights`.
    stride_in_1x1: where a bottleneck strides. False (default) is torchvision's 3x3, True the paper's first 1x1.
    eps: of the norms (1e-5).
    shortcut: "A", "B" (default), "C" (Sec. 4.1), or "none" for the plain networks of Sec. 3.3.
    dilate_c5: c5 at stride 16, its later 3x3 convolutions dilated by 2 (DC5).
    groups, width_per_group: ResNeXt (32, 4) and wide (1, 128) bottlenecks; default 1, 64.
    in_channels: of the images (3).
    zero_init_residual: start the last norm of each block at zero (Goyal et al. 2017).
    checkpoint_activations: compute each block's activations again in backward instead of keeping them.
    relu_before_p7: whether p7 starts from p6's positive part (True), which mmdetection's RetinaNets leave out.
    fpn_channels, fpn_norm: channels of the pyramid (256) and the norm behind its convolutions (none).

    Raises ValueError for an unknown name or level, for frozen layers without weights, and for weights that are of
    another network than is asked or do not fit, listing every missing, unexpected and mis-shaped key.
    """
    if depth is not None or weights is None:
        one_of("depth", depth, DEPTHS)
    if frozen_through is not None:
        one_of("part to freeze through", frozen_through, FREEZABLE)
    if weights is None:
        _refuse_frozen_random_layers(norm=norm, frozen_through=frozen_through, fpn_norm=fpn_norm)
    loaded = None if weights is None else read_weights(weights)
    trunk = resolve_architecture(
        loaded,
        depth=depth,
        shortcut=shortcut,
        stride_in_1x1=stride_in_1x1,
        groups=groups,
        width_per_group=width_per_group,
        in_channels=in_channels,
        eps=eps,
        norm=norm,
    )
    if loaded is not None:
        loaded.announce_assumptions(stride_in_1x1=stride_in_1x1)
        if norm is None and trunk["norm"] != "GN":
            trunk["norm"] = "FrozenBN"

    pyramid: dict[str, Any] = {
        "levels": DEFAULT_PYRAMID,
        "fpn_channels": 256,
        "fpn_norm": None,
        "p6_from": "c5",
        "relu_before_p7": True,
    }
    if loaded is not None:
        held, stated = pyramid_of(backbone_part(loaded.state)), loaded.metadata.get("backbone", {})
        held |= {"relu_before_p7": loaded.assumed.get("relu_before_p7", True)}
        pyramid |= {name: stated.get(name, value) for name, value in held.items()}
    asked = {"levels": levels, "fpn_channels": fpn_channels, "fpn_norm": fpn_norm, "p6_from": p6_from}
    asked["relu_before_p7"] = relu_before_p7
    pyramid |= {name: value for name, value in asked.items() if value is not None}
    if fpn:
        note = " (a pyramid's levels, with fpn=True)"
        levels = sorted_levels(pyramid["levels"], PYRAMID_LEVELS, note)
    else:
        levels = sorted_levels(TRUNK_LEVELS if levels is None else levels, TRUNK_LEVELS)
    backbone = backbone_from_config(
        {
            **trunk,
            **pyramid,
            "levels": levels,
            "fpn": fpn,
            "frozen_through": frozen_through or ("none" if loaded is None else "c2"),
            "dilate_c5": dilate_c5,
            "zero_init_residual": zero_init_residual,
            "checkpoint_activations": checkpoint_activations,
        }
    )
    if loaded is not None:
        if fpn_norm == "FrozenBN" and not any(key.startswith("fpn.") for key in backbone_part(loaded.state)):
            raise UserError(f"fpn_norm='FrozenBN', but weights from {loaded.source} hold no pyramid to freeze")
        fit(backbone, replace(loaded, state=backbone_part(loaded.state)), fresh=("fpn.",))
        backbone.weights_source = loaded.source
    return backbone


def backbone_from_config(config: Mapping) -> ResNetBackbone:
    """The backbone that `config`, a Backbone's own, describes, with random weights: saved ones are loaded next."""
    trunk = dict(config)
    fpn, levels, frozen_through = trunk.pop("fpn"), trunk.pop("levels"), trunk.pop("frozen_through")
    pyramid = {"channels": trunk.pop("fpn_channels"), "norm": trunk.pop("fpn_norm"), "p6_from": trunk.pop("p6_from")}
    pyramid["relu_before_p7"] = trunk.pop("relu_before_p7", True)  # older files do not have it
    if fpn:
        backbone = ResNetBackbone(**trunk, levels=trunk_levels_for(levels), pyramid={**pyramid, "levels": levels})
    else:
        backbone = ResNetBackbone(**trunk, levels=levels, pyramid=None)
    if frozen_through != "none":
        backbone.freeze(frozen_through)
    backbone.config = dict(config)
    return backbone


def _refuse_frozen_random_layers(**arguments: str | None) -> None:
    for name, value in arguments.items():
        if value == "FrozenBN" or (name == "frozen_through" and value not in (None, "none")):
            raise UserError(f"{name}={value!r} without weights would freeze random layers; give weights, or drop it")
