"""Feature pyramid: c2..c5 -> p2..p6, or p3..p7 (Lin et al. 2017, Sec. 3; p6 and p7 for RetinaNet, Lin et al. 2017b)."""

from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor, nn

from resbackbone.folding import conv_block
from resbackbone.layers import norm_layer
from resbackbone.resnet import Feature

PYRAMID_LEVELS = ("p2", "p3", "p4", "p5", "p6", "p7")


def trunk_levels_for(levels: Iterable[str]) -> list[str]:
    """The trunk levels that a pyramid of `levels` stands on: the top-down path starts at c5 and ends at the finest."""
    finest = min([*levels, "p5"])
    return [f"c{k}" for k in range(int(finest[1]), 6)]


class FPN(nn.Module):
    """Trunk maps to pyramid maps of equal channels, finest first.

    Every trunk map goes through a 1x1 convolution, takes the next coarser map upsampled (nearest) to its own size,
    whatever that size is, and goes through a 3x3 (Sec. 3). Without p7, p6 is p5 subsampled by two (Sec. 4.1); with
    it, p6 and p7 are 3x3 convolutions of stride 2 that start from `p6_from`, "c5" (RetinaNet's paper, detectron2) or
    "p5" (torchvision). Parameters have torchvision's names: `inner_blocks.0.0`, `layer_blocks.0.0`,
    `extra_blocks.p6`. `norm`, with `eps`, goes behind each convolution, which then has no bias. Between p6
    and p7 there is a ReLU (Lin et al. 2017b), but not in mmdetection's RetinaNets, which need `relu_before_p7=False`.
    """

    def __init__(
        self,
        trunk: dict[str, Feature],
        levels: Iterable[str] = ("p2", "p3", "p4", "p5", "p6"),
        *,
        channels: int = 256,
        norm: str | None = None,
        eps: float = 1e-5,
        p6_from: str = "c5",
        relu_before_p7: bool = True,
    ):
        super().__init__()
        self.levels = sorted(levels)
        self.trunk_levels = trunk_levels_for(self.levels)
        self.relu_before_p7, self.p6_from = relu_before_p7, p6_from
        needs_p5 = p6_from == "p5" if "p7" in self.levels else "p6" in self.levels  # p6 and p7 by convolutions, or not
        wanted = {*self.levels, *(["p5"] if needs_p5 else [])}

        def block(in_channels: int, kernel: int) -> nn.Sequential:
            conv = nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2, bias=norm is None)
            return nn.Sequential(conv, *([] if norm is None else [norm_layer(norm, eps)(channels)]))

        self.inner_blocks, self.layer_blocks, self.extra_blocks = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        strides = {"p6": trunk["c5"].stride * 2, "p7": trunk["c5"].stride * 4}
        for i, level in enumerate(self.trunk_levels):
            name = "p" + level[1]
            strides[name] = trunk[level].stride
            if min(wanted) <= "p5":  # else p6 and p7 come straight from c5, and nothing is merged
                self.inner_blocks[str(i)] = block(trunk[level].channels, 1)
            if name in wanted:
                self.layer_blocks[str(i)] = block(channels, 3)
        if "p7" in self.levels:
            source = trunk["c5"].channels if p6_from == "c5" else channels
            self.extra_blocks["p6"] = nn.Conv2d(source, channels, 3, stride=2, padding=1)
            self.extra_blocks["p7"] = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.features = {level: Feature(channels, strides[level]) for level in self.levels}
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        merged, pyramid = None, {}
        for i in reversed(range(len(self.inner_blocks))):  # from c5 down
            level, lateral = self.trunk_levels[i], self.inner_blocks[str(i)]
            if merged is None:
                merged = conv_block(lateral, maps[level])
            else:
                upsampled = F.interpolate(merged, size=maps[level].shape[-2:], mode="nearest")
                merged = conv_block(lateral, maps[level], total=upsampled)
            if str(i) in self.layer_blocks:
                pyramid["p" + level[1]] = conv_block(self.layer_blocks[str(i)], merged)
        if "p7" in self.levels:
            pyramid["p6"] = self.extra_blocks["p6"](maps["c5"] if self.p6_from == "c5" else pyramid["p5"])
            p6 = F.relu(pyramid["p6"]) if self.relu_before_p7 else pyramid["p6"]
            pyramid["p7"] = self.extra_blocks["p7"](p6)
        elif "p6" in self.levels:
            # torchvision's max pool of 1x1 windows; older versions of torch had no deterministic gradient for that one.
            pyramid["p6"] = pyramid["p5"][:, :, ::2, ::2].clone()
        return {level: pyramid[level] for level in self.levels}
