"""ResNet-18/34/50/101/152: an image to the feature maps c2..c5 (He et al. 2015, Table 1)."""

import logging
from collections.abc import Iterable, Iterator
from typing import NamedTuple, cast

from torch import Tensor, nn

from resbackbone.checks import UserError, one_of
from resbackbone.folding import conv_norm_relu, is_unseen, is_worth_reusing
from resbackbone.layers import (
    BATCH_NORMS,
    DeepStem,
    Norm,
    Projection,
    checkpointed,
    conv,
    first_convolution,
    freeze,
    norm_layer,
    shortcut,
)

_log = logging.getLogger("resbackbone")


class Feature(NamedTuple):
    """What one level holds: channels, and its stride in pixels of the image."""

    channels: int
    stride: int


class Layout(NamedTuple):
    """How the blocks of one stage are laid out, beside their widths and stride."""

    norm: Norm
    shortcut: str = "B"  # A, B, C or none (Sec. 3.3 and 4.1), or ResNet-D's
    stride_in_1x1: bool = False  # bottlenecks only: True is the paper's and MSRA's, False torchvision's ("v1.5")
    groups: int = 1  # of the 3x3 (ResNeXt)
    width_per_group: int = 64


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, added to a shortcut (He et al. 2015, Fig. 5 left)."""

    expansion = 1

    def __init__(
        self, in_channels: int, width: int, layout: Layout, *, stride: int = 1, dilation: tuple[int, int] = (1, 1)
    ):
        super().__init__()
        norm = layout.norm
        self.conv1 = conv(in_channels, width, kernel=3, stride=stride, dilation=dilation[0])
        self.bn1 = norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = conv(width, width, kernel=3, dilation=dilation[1]), norm(width)
        self.downsample = shortcut(layout.shortcut, in_channels, width, stride, norm)  # None is the identity

    def forward(self, x: Tensor, spare: bool = False) -> Tensor:  # [B, in_channels, H, W]
        y = conv_norm_relu(self.conv1, self.bn1, self.relu, x)  # [B, width, H/stride, W/stride], rounded up
        return _last(self, (self.conv2, self.bn2, self.relu), y, x, spare)


class Bottleneck(nn.Module):
    """1x1 reduce, 3x3, 1x1 expand, added to a shortcut (He et al. 2015, Sec. 4.1 and Fig. 5 right)."""

    expansion = 4

    def __init__(
        self, in_channels: int, width: int, layout: Layout, *, stride: int = 1, dilation: tuple[int, int] = (1, 1)
    ):
        super().__init__()
        norm, out_channels = layout.norm, width * self.expansion
        width = width * layout.width_per_group // 64 * layout.groups
        stride1, stride2 = (stride, 1) if layout.stride_in_1x1 else (1, stride)
        dilation2 = dilation[1] if layout.stride_in_1x1 else dilation[0]  # dilated if it comes after the lost stride
        self.conv1, self.bn1 = conv(in_channels, width, kernel=1, stride=stride1), norm(width)
        self.conv2 = conv(width, width, kernel=3, stride=stride2, dilation=dilation2, groups=layout.groups)
        self.bn2 = norm(width)
        self.conv3, self.bn3 = conv(width, out_channels, kernel=1), norm(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(layout.shortcut, in_channels, out_channels, stride, norm)  # None is the identity

    def forward(self, x: Tensor, spare: bool = False) -> Tensor:  # [B, in_channels, H, W]
        y = conv_norm_relu(self.conv1, self.bn1, self.relu, x)  # [B, width, H, W]
        y = conv_norm_relu(self.conv2, self.bn2, self.relu, y)  # [B, width, H/stride, W/stride], rounded up
        # -> [B, 4 * 64 * 2^i, H/stride, W/stride]
        return _last(self, (self.conv3, self.bn3, self.relu), y, x, spare)


Step = tuple[nn.Module, nn.Module, nn.Module]  # convolution, norm, ReLU


def _last(block: BasicBlock | Bottleneck, step: Step, y: Tensor, x: Tensor, spare: bool) -> Tensor:
    """relu(norm(conv(y)) + shortcut of x), written over the shortcut where nobody else holds it: over x if `spare`."""
    shortcut = block.downsample
    if shortcut is None:
        return conv_norm_relu(*step, y, lambda: x, spare)
    spare = False
    if is_worth_reusing(x) and isinstance(shortcut, Projection) and type(shortcut).forward is PROJECT:
        spare = len(shortcut) > 1 and is_unseen((shortcut[-2], shortcut[-1], None), shortcut, x=x)
    return conv_norm_relu(*step, y, lambda: shortcut(x), spare)


def _is_discreet(block: nn.Module, x: Tensor) -> bool:
    """Whether nobody sees the block's input x, nor what it returns. Asked before the call: a hook may remove itself."""
    if not is_worth_reusing(x) or type(block).forward not in FORWARDS:
        return False
    assert isinstance(block, BasicBlock | Bottleneck)
    last = (block.conv3, block.bn3) if isinstance(block, Bottleneck) else (block.conv2, block.bn2)
    return is_unseen((*last, block.relu), block, x=x) and is_unseen((block.conv1, block.bn1, block.relu), x=x)


PROJECT, FORWARDS = Projection.forward, (BasicBlock.forward, Bottleneck.forward)  # others if patched or overridden


class Stage(nn.Sequential):
    """The blocks of one stage, one after the other."""

    def forward(self, x: Tensor, recompute: bool = False) -> Tensor:
        """`recompute`: keep no activations of blocks that train, and compute them again in backward."""
        spare = False  # whether nobody else holds x
        for block in self:
            discreet = _is_discreet(block, x)
            if recompute and any(p.requires_grad for p in block.parameters()):
                x = checkpointed(block, x)
            else:
                x = block(x, spare=True) if spare and discreet else block(x)
            spare = discreet
        return x


# Table 1: the kind of block, and how many of them conv2_x .. conv5_x have.
DEPTHS: dict[int, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}
TRUNK_LEVELS = ("c2", "c3", "c4", "c5")
STAGES = dict(zip(TRUNK_LEVELS, ("layer1", "layer2", "layer3", "layer4"), strict=True))  # torchvision's and timm's


class ResNet(nn.Module):
    """Image -> {level: map} for the asked levels among c2..c5; stages above the last of them are not built.

    Input [B, in_channels, H, W] of any size. Output [B, channels, ceil(H/stride), ceil(W/stride)] for each level,
    finest first; `features[level]` holds the channels and stride. Parameters have torchvision's names. Weights start
    as in the paper (Sec. 3.4: He et al. 2015b); `zero_init_residual` starts every block as its shortcut alone.
    `BackboneConfig.trunk()` gives the arguments, with defaults and checked.
    """

    def __init__(
        self,
        depth: int,
        *,
        levels: Iterable[str],
        norm: str,
        eps: float,
        stem: str,
        shortcut: str,
        stride_in_1x1: bool,
        dilate_c5: bool,
        groups: int,
        width_per_group: int,
        in_channels: int,
        zero_init_residual: bool,
        checkpoint_activations: bool,
    ):
        super().__init__()
        block, counts = DEPTHS[depth]
        self.levels = sorted(levels)
        layout = Layout(norm_layer(norm, eps), shortcut, stride_in_1x1, groups, width_per_group)
        self.checkpoint_activations = checkpoint_activations
        self.stage_features: dict[str, Feature] = {}  # of every stage that is built

        self.conv1, self.bn1 = first_convolution(stem, in_channels, layout.norm), layout.norm(64)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        channels, stride = 64, 4  # after the max pool
        for level, count, width in zip(TRUNK_LEVELS, counts, (64, 128, 256, 512), strict=True):
            if level > self.levels[-1]:
                break
            step, dilation = (1 if level == "c2" else 2), (1, 1)
            if level == "c5" and dilate_c5:
                # The stride is given up; what came after it looks twice as far, so the maps agree where both exist.
                step, dilation = 1, (1, 2)
            stage = Stage(block(channels, width, layout, stride=step, dilation=dilation))
            channels, stride = width * block.expansion, stride * step
            for _ in range(1, count):
                stage.append(block(channels, width, layout, dilation=(dilation[1], dilation[1])))
            setattr(self, STAGES[level], stage)
            self.stage_features[level] = Feature(channels, stride)
        self.features = {level: self.stage_features[level] for level in self.levels}  # in the order of forward's maps
        self._initialize(zero_init_residual)
        self.register_load_state_dict_pre_hook(_adapt_before_loading)

    def _initialize(self, zero_init_residual: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and isinstance(module, BasicBlock | Bottleneck):
                last_norm = module.bn2 if isinstance(module, BasicBlock) else module.bn3
                nn.init.zeros_(cast(Tensor, last_norm.weight))

    def stages(self) -> Iterator[tuple[str, nn.Sequential]]:
        """The stages that are built, as ("c2", layer1), ("c3", layer2), ..."""
        for level in self.stage_features:
            yield level, getattr(self, STAGES[level])

    def forward(self, images: Tensor) -> dict[str, Tensor]:  # [B, in_channels, H, W]
        return self.from_stem(self.stem(images))

    def stem(self, images: Tensor) -> Tensor:  # [B, in_channels, H, W] -> [B, 64, H/2, W/2]
        x, last = images, self.conv1
        if isinstance(last, DeepStem) and is_unseen((last[-1], self.bn1, self.relu), last, x=x):
            x, last = last.before_last(x), last[-1]  # whose step the norm and the ReLU can join
        return conv_norm_relu(last, self.bn1, self.relu, x)

    def from_stem(self, x: Tensor) -> dict[str, Tensor]:  # [B, 64, H/2, W/2]
        x = self.maxpool(x)  # [B, 64, H/4, W/4]
        maps = {}
        for level, stage in self.stages():
            recompute = self.checkpoint_activations and self.training and isinstance(stage, Stage)
            x = stage(x, recompute=True) if recompute else stage(x)
            if level in self.levels:
                maps[level] = x
        return maps

    def freeze(self, through: str) -> None:
        """Freeze the stem and every stage up to `through`: "stem", "c2", .. "c5" (see `layers.freeze`)."""
        one_of("frozen_through", through, ("stem", *TRUNK_LEVELS))
        self.conv1, self.bn1 = freeze(self.conv1), freeze(self.bn1)
        for level, stage in self.stages():
            if through != "stem" and level <= through:
                freeze(stage)

    def adapt_state_dict(self, state_dict: dict[str, Tensor], prefix: str = "") -> None:
        """Leave out, in place, what a published file holds beyond this trunk: other stages, the classifier."""
        unbuilt = [name for level, name in STAGES.items() if level not in self.stage_features]
        for name in [*unbuilt, *([] if hasattr(self, "fc") else ["fc"])]:
            for key in [key for key in state_dict if key.startswith(f"{prefix}{name}.")]:
                del state_dict[key]


def sorted_levels(levels: Iterable[str], choices: tuple[str, ...], note: str = "") -> list[str]:
    """The asked levels, finest first, each once. Raises ValueError if one is unknown or none is asked for."""
    if isinstance(levels, str):
        raise UserError(f"levels is a list of names such as {list(choices)}, not the string {levels!r}")
    asked = {one_of("level", level, choices, note) for level in levels}
    if not asked:
        raise UserError(f"no level asked for; choose from {', '.join(choices)}")
    return sorted(asked)


def _adapt_before_loading(module: ResNet, state_dict, prefix, *_):
    module.adapt_state_dict(state_dict, prefix)
    names = [f"{prefix}{name}." for name, part in module.named_modules() if isinstance(part, BATCH_NORMS)]
    held = [name for name in names if f"{name}running_var" in state_dict]
    if held and not any(f"{name}num_batches_tracked" in state_dict for name in held):
        _log.warning(
            "these weights are of frozen batch norms (num_batches_tracked is missing), and the %d batch norms here "
            "train: in training mode they use and change their own statistics; norm='FrozenBN' keeps the weights",
            len(held),
        )
