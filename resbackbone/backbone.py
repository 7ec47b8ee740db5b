"""Backbone = trunk (+ FPN), and build_resnet_backbone(), the one way to make it."""

import inspect
import os
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import replace
from types import FrameType
from typing import NoReturn, cast

import torch
from torch import Tensor, nn

from resbackbone.checks import UserError, one_of
from resbackbone.compat import has_hooks
from resbackbone.config import BackboneConfig, CommonConfig, ordered_levels
from resbackbone.export import export_network
from resbackbone.fpn import FPN
from resbackbone.layers import BATCH_NORMS, fuse, same_kind
from resbackbone.memory import keep_freed_memory
from resbackbone.resnet import DEPTHS, TRUNK_LEVELS, Feature, ResNet, sorted_levels
from resbackbone.weights.fit import backbone_part, fit, resolve_architecture, resolve_dilation, resolve_pyramid
from resbackbone.weights.inputs import INPUT
from resbackbone.weights.read import WeightSource, read_weights


class Backbone(nn.Module):
    """What a detector sees of a backbone, whatever its trunk: feature maps by level name, and what they hold.

    A subclass inherits from this and from its trunk, whose forward gives {"c2": map, ..}; with a pyramid on top
    the maps are p2.. instead. `features[level]` is (channels, stride) of what forward returns, in the same order;
    `out_channels` the channels of the coarsest of them (with a pyramid all are equal); `size_divisibility` the
    trunk's total stride: on images padded to it the trunk's maps are exactly H/stride x W/stride (any size is taken).
    `config` is all that builds it again except the weights.
    """

    fpn: FPN | None
    features: dict[str, Feature]
    size_divisibility: int
    weights_source: str | None = None
    config: CommonConfig

    def forward(self, images: Tensor) -> dict[str, Tensor]:  # [B, channels, H, W]
        maps = super().forward(images)
        return maps if self.fpn is None else self.fpn(maps)

    @property
    def out_channels(self) -> int:
        _refuse_torchvisions_usual_names(inspect.currentframe(), [x for x in self.features if x not in ("p6", "p7")])
        return list(self.features.values())[-1].channels

    def fuse(self) -> "Backbone":
        """Fold every batch norm into its convolution, in place, for inference; returns self in eval mode.

        Call it again after changing weights or their dtype: it also keeps them as a CPU wants them (`layers.fuse`).
        And on a CPU the process keeps memory that it frees from then on, until `memory.keep_freed_memory(False)`.
        """
        if next(self.parameters()).device.type == "cpu":
            keep_freed_memory()
        return self._fuse()

    def _fuse(self) -> "Backbone":
        return cast(Backbone, fuse(self.eval()))

    def __prepare_scriptable__(self) -> NoReturn:  # torch.jit.script asks each module for a form to compile
        raise UserError(
            "torch.jit.script cannot compile a backbone: use torch.jit.trace(backbone, images, strict=False), "
            "torch.export.export or backbone.export(path)"
        )

    def export(self, path: str | os.PathLike) -> None:
        """Write images -> feature maps to `path`, a file for ONNX (.onnx) or for `torch.export.load` (.pt2).

        The file holds a fused fp32 copy; this backbone stays as it is. The input is `images` [B, channels, H, W]; the
        outputs have the levels' names, finest first. Batch, height and width are free: with a ResNet any batch from 1
        and any size from 1 x 1 pixel; another trunk may need larger images (VGG-16: 32 x 32), and a .pt2 refuses
        smaller ones.

        The file describes itself: `input` (channel order, range, mean and std that images are normalized by), `levels`
        ({name: {channels, stride}}), `backbone` (its config) and `weights_source`. In ONNX these are metadata_props,
        each a JSON value; in a .pt2 one JSON object, `torch.export.load(path, extra_files={"metadata.json": ""})`.

        Raises ValueError if the suffix is unknown, the folder does not exist, or, for ONNX, onnx or onnxscript is not
        installed.
        """
        copied = deepcopy(self).cpu().float().to(memory_format=torch.contiguous_format)._fuse()
        metadata = {
            "format": "resbackbone",
            "input": INPUT,
            "levels": {level: feature._asdict() for level, feature in self.features.items()},
            "backbone": self.config.to_json(),
            "weights_source": self.weights_source,
        }
        channels = next(module for module in self.modules() if isinstance(module, nn.Conv2d)).in_channels
        example = torch.zeros(2, channels, 64, 96)
        export_network(copied, path, example, outputs=list(self.features), metadata=metadata)

    def summary(self) -> str:
        """One line on what trains: `frozen BN 53, trainable BN 0, parameters 23.2 M trainable, 0.2 M frozen`."""
        modules = list(self.modules())
        frozen = sum(type(m).__name__.startswith("FrozenBatchNorm") for m in modules)  # other libraries' as well
        trainable = sum(isinstance(m, BATCH_NORMS) for m in modules)
        counts = {True: 0, False: 0}
        for parameter in self.parameters():
            counts[parameter.requires_grad] += parameter.numel()
        return (
            f"frozen BN {frozen}, trainable BN {trainable}, "
            f"parameters {counts[True] / 1e6:.1f} M trainable, {counts[False] / 1e6:.1f} M frozen"
        )


def _refuse_torchvisions_usual_names(frame: FrameType | None, levels: list[str]) -> None:
    """Raise UserError if a detector of torchvision asks for `out_channels` and would look for maps called "0", "1", ..

    It finds none, and says so by an IndexError in its first forward. Given pooling with our names, it works.
    """
    caller = frame and frame.f_back
    if caller and str(caller.f_globals.get("__name__")).startswith("torchvision.models.detection."):
        pools = [name for name, value in caller.f_locals.items() if name.endswith("_roi_pool") and value is None]
        if pools:
            raise UserError(
                "torchvision's detectors look for maps called '0', '1', .. unless told otherwise: give them "
                "as_torchvision(backbone), from resbackbone.adapters.torchvision, or "
                f"{' and '.join(pools)} with featmap_names={levels}"
            )


class ResNetBackbone(Backbone, ResNet):
    """The backbone that `config` describes, with random weights: load saved ones next, or `build_resnet_backbone`."""

    config: BackboneConfig

    def __init__(self, config: BackboneConfig):
        ResNet.__init__(self, **config.trunk())
        self.config = config
        self.size_divisibility = list(self.stage_features.values())[-1].stride
        self.fpn = None
        if config.fpn:
            self.fpn = FPN(self.stage_features, **config.pyramid())
            self.features = self.fpn.features
        if config.frozen_through is not None:
            self.freeze(config.frozen_through)

    def freeze(self, through: str) -> None:
        """Freeze the stem and every stage up to `through`, "stem" or "c2" .. "c5"; the config says so too."""
        super().freeze(through)
        order = (None, "stem", *TRUNK_LEVELS)
        if order.index(through) > order.index(self.config.frozen_through):
            self.config = replace(self.config, frozen_through=through)

    def with_levels(self, levels: Iterable[str]) -> "ResNetBackbone":
        """A trunk that gives `levels`, c2..c5, on this backbone's own layers; this backbone keeps its levels.

        The layers are shared, not copied: training one trains both. Freeze this backbone before: the stem's norm that
        `freeze` or `fuse` replaces is replaced in one of the two alone. Raises ValueError for a stage that is not
        built, and if this backbone as a whole has hooks or another forward, which the trunk would not have.
        """
        if has_hooks(self) or "forward" in vars(self):
            raise UserError(
                "this backbone has hooks or a forward of its own, which a trunk on its layers would not have: remove "
                "them before with_levels or build_faster_rcnn, or put them on its stages"
            )
        levels = tuple(sorted_levels(levels, tuple(self.stage_features)))
        with torch.device("meta"):  # an outline: every layer of it is replaced
            trunk = ResNetBackbone(replace(self.config, levels=levels, fpn=False))
        for name, _ in trunk.named_children():
            setattr(trunk, name, getattr(self, name))
        trunk.weights_source, trunk.training = self.weights_source, self.training
        return trunk

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
    frozen_through: str | None = "auto",
    weights: WeightSource | None = None,
    stride_in_1x1: bool | None = None,
    eps: float | None = None,
    stem: str | None = None,
    shortcut: str | None = None,
    dilate_c5: bool | None = None,
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
    holds that level's channels and stride. On a CPU a map may be channels-last whatever the images are: flatten or
    reshape it, since `.view` may fail. Modules are called as torchvision's are, except where `folding.conv_norm_relu`
    joins steps that nobody observes.

    depth: 18, 34, 50, 101 or 152; None takes it from the weights. The same holds for the arguments below that are
        None: they are what the weights say, and asking for something else is an error.
    levels: which of c2..c5, or with `fpn` which of p2..p7, to return; the number is log2 of the stride. What they do
        not need is not built. p7 turns p6 and p7 into convolutions that start from `p6_from`, "c5" (default) or "p5".
        Default: all of the trunk; the pyramid that the weights hold, else p2..p6.
    norm: "BN", "FrozenBN", "SyncBN" or "GN". Default: FrozenBN with weights, BN without.
    frozen_through: "stem", "c2" .. "c5": these parts get no gradient and keep their statistics. None freezes nothing.
        "auto" (default) is "c2" with weights and None without.
    weights: a file of any known format, a named source (`torchvision:ResNet50_Weights.IMAGENET1K_V2`, `timm:..`,
        `hf:..`, `detectron2:..`, a URL), a state dict, or what `weights.read_weights` returned.
    stride_in_1x1: where a bottleneck strides. False (default) is torchvision's 3x3, True the paper's first 1x1.
    eps: of the norms (1e-5).
    stem: "7x7" (default), or "deep": three 3x3 convolutions.
    shortcut: "A", "B" (default), "C" (Sec. 4.1), or "none" for the plain networks of Sec. 3.3. "D" averages pixels
        where B skips them: with a deep stem that is ResNet-D (He et al. 2018, arXiv 1812.01187, Sec. 4.2).
    dilate_c5: c5 at stride 16, its later 3x3 convolutions dilated by 2 (DC5). None: as the weights say.
    groups, width_per_group: ResNeXt (32, 4) and wide (1, 128) bottlenecks; default 1, 64.
    in_channels: of the images (3).
    zero_init_residual: start the last norm of each block at zero (Goyal et al. 2017).
    checkpoint_activations: compute each block's activations again in backward instead of keeping them.
    relu_before_p7: whether p7 starts from p6's positive part (True), which mmdetection's RetinaNets leave out.
    fpn_channels, fpn_norm: channels of the pyramid (256) and the norm behind its convolutions (none). Batch norms in
        the weights' pyramid become `norm`, unless another kind is given.

    Raises ValueError for an unknown name or level, for frozen layers without weights, and for weights that are of
    another network than is asked or do not fit, listing every missing, unexpected and mis-shaped key.
    """
    if depth is not None:
        one_of("depth", depth, DEPTHS)  # before weights are downloaded
    if frozen_through == "auto":
        frozen_through = None if weights is None else "c2"
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
    if loaded is not None and norm is None and trunk["norm"] != "GN":
        trunk["norm"] = "FrozenBN"
    pyramid = resolve_pyramid(
        loaded if fpn else None,
        levels=None if levels is None else ordered_levels(levels, fpn=fpn),
        fpn_channels=fpn_channels,
        fpn_norm=fpn_norm,
        p6_from=p6_from,
        relu_before_p7=relu_before_p7,
    )
    if fpn_norm is None:
        pyramid["fpn_norm"] = same_kind(pyramid.get("fpn_norm"), trunk["norm"])
    config = BackboneConfig(
        **trunk,
        **pyramid,
        fpn=fpn,
        frozen_through=frozen_through,
        dilate_c5=resolve_dilation(loaded, dilate_c5),
        zero_init_residual=zero_init_residual,
        checkpoint_activations=checkpoint_activations,
    )
    if loaded is None:
        _refuse_frozen_random_layers(config)
        return ResNetBackbone(config)
    loaded.announce_assumptions(stride_in_1x1=stride_in_1x1, eps=eps)
    state = backbone_part(loaded.state)
    if not fpn:  # mmdetection's other pyramids
        state = {key: tensor for key, tensor in state.items() if not key.startswith("neck.")}
    loaded = replace(loaded, state=state)
    if fpn_norm == "FrozenBN" and not any(key.startswith("fpn.") for key in loaded.state):
        raise UserError(f"fpn_norm='FrozenBN', but weights from {loaded.source} hold no pyramid to freeze")
    backbone = ResNetBackbone(config)
    fit(backbone, loaded, fresh=("fpn.",))
    backbone.weights_source = loaded.source
    return backbone


def _refuse_frozen_random_layers(config: BackboneConfig) -> None:
    for name in ("norm", "frozen_through", "fpn_norm"):
        value = getattr(config, name)
        if value == "FrozenBN" or (name == "frozen_through" and value is not None):
            raise UserError(
                f"{name}={value!r} without weights would freeze random layers; give weights, or leave it out"
            )
