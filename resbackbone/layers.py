"""The parts of a residual network that are not the network: convolution + norm, frozen batch norm, shortcuts."""

from collections import OrderedDict
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from resbackbone.checks import UserError, one_of
from resbackbone.compat import is_observed
from resbackbone.folding import FrozenBatchNorm2d, conv_block, conv_norm, conv_norm_relu
from resbackbone.kept import keep_weights

Norm = Callable[[int], nn.Module]
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def _group_norm(channels: int, eps: float = 1e-5) -> nn.GroupNorm:
    if channels % 32:
        raise UserError(
            f"norm GN has 32 groups, and a layer here has {channels} channels (of fpn_channels, box_conv_layers or "
            "width_per_group): give multiples of 32, or another norm"
        )
    return nn.GroupNorm(32, channels, eps)  # 32 groups as in Wu and He 2018


NORMS: dict[str, Callable[..., nn.Module]] = {
    "BN": nn.BatchNorm2d,
    "FrozenBN": FrozenBatchNorm2d,
    "SyncBN": nn.SyncBatchNorm,
    "GN": _group_norm,
}


def norm_layer(name: str, eps: float = 1e-5) -> Norm:
    """The norm called `name` as a function of the channel count. Raises ValueError if there is none of that name."""
    return partial(NORMS[one_of("norm", name, NORMS)], eps=eps)


def same_kind(norm: str | None, wanted: str) -> str | None:
    """`wanted` in place of `norm` if both are batch norms, which hold the same tensors; otherwise `norm`."""
    return norm if norm is None or "GN" in (norm, wanted) else wanted


def conv(in_channels: int, out_channels: int, *, kernel: int, stride: int = 1, dilation: int = 1, groups: int = 1):
    """A convolution that keeps H and W up to its stride, without bias: a norm follows."""
    padding = dilation * (kernel - 1) // 2
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding, dilation, groups, bias=False)


class DeepStem(nn.Sequential):
    """Three 3x3 convolutions in place of the 7x7 (He et al. 2018, arXiv 1812.01187, Sec. 4.2), named as in timm.

    The norm and the ReLU behind the last of them are the network's own, as behind a 7x7.
    """

    def forward(self, x: Tensor) -> Tensor:  # [B, in_channels, H, W] -> [B, 64, H/2, W/2]
        return self[6](self.before_last(x))

    def before_last(self, x: Tensor) -> Tensor:  # -> [B, 32, H/2, W/2]
        x = conv_norm_relu(self[0], self[1], self[2], x)
        return conv_norm_relu(self[3], self[4], self[5], x)


STEMS = ("7x7", "deep")


def first_convolution(option: str, in_channels: int, norm: Norm) -> nn.Module:
    """The convolution that an image goes through first, with stride 2 to 64 channels: one, or three of 3x3."""
    if option == "7x7":
        return conv(in_channels, 64, kernel=7, stride=2)
    first = conv(in_channels, 32, kernel=3, stride=2), norm(32), nn.ReLU(inplace=True)
    return DeepStem(*first, conv(32, 32, kernel=3), norm(32), nn.ReLU(inplace=True), conv(32, 64, kernel=3))


class PaddedIdentity(nn.Module):
    """Shortcut A (He et al. 2015, Sec. 3.3): the input subsampled, new channels filled with zeros; no parameters."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.new_channels, self.stride = out_channels - in_channels, stride

    def forward(self, x: Tensor) -> Tensor:  # [B, in_channels, H, W] -> [B, out_channels, H/stride, W/stride]
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))


class Projection(nn.Sequential):
    """Shortcuts B, C and D: a 1x1 convolution and its norm, named by their places as in published files.

    B and C stride in the convolution. D averages 2 x 2 pixels before it, fewer at an odd border, so that none is left
    out (He et al. 2018, Sec. 4.2).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: Norm, *, averages: bool = False):
        before: list[nn.Module] = []
        if averages:
            pool = nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False)
            before, stride = [pool if stride == 2 else nn.Identity()], 1
        super().__init__(*before, conv(in_channels, out_channels, kernel=1, stride=stride), norm(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        if len(self) < 2:
            return super().forward(x)
        *before, convolution, norm = self
        for module in before:
            x = module(x)
        return conv_norm(convolution, norm, x)

    def __getitem__(self, index):  # Sequential would call __init__ for a slice
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)


class ConvBlocks(nn.Sequential):
    """Blocks of a convolution, perhaps a norm and a ReLU, and other modules, one after the other."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = conv_block(block, x)
        return x


class NoShortcut(nn.Module):
    """A plain network's block adds nothing."""

    def forward(self, x: Tensor) -> None:
        return None


SHORTCUTS = ("A", "B", "C", "D", "none")


def shortcut(option: str, in_channels: int, out_channels: int, stride: int, norm: Norm) -> nn.Module | None:
    """What a block adds to its output (He et al. 2015, Sec. 4.1): None is the identity.

    A pads with zeros where the shape changes, B projects there, C projects everywhere, "none" is a plain network. D is
    ResNet-D's: it averages where B skips pixels.
    """
    if option == "none":
        return NoShortcut()
    changes = stride != 1 or in_channels != out_channels
    if option == "C" or (option in ("B", "D") and changes):
        return Projection(in_channels, out_channels, stride, norm, averages=option == "D")
    return PaddedIdentity(in_channels, out_channels, stride) if changes else None


def freeze(module: nn.Module) -> nn.Module:
    """Stop `module` from changing: no parameter trains, and every batch norm in it becomes a FrozenBatchNorm2d.

    Outputs are those of eval mode: statistics, affine parameters and eps carry over. Works in place, save where
    `module` itself is a batch norm; use what it returns. Raises ValueError for a batch norm that a frozen one cannot
    stand for: one of a subclass, with hooks, or without statistics.
    """
    if isinstance(module, BATCH_NORMS):
        if not _can_freeze(module):
            raise UserError(
                f"{type(module).__name__} cannot be frozen: it is of another class than {BATCH_NORMS[1].__name__}, has "
                "hooks or a parametrization, or keeps no statistics; freeze first, then change the network"
            )
        frozen = FrozenBatchNorm2d(module.num_features, module.eps).to(cast(Tensor, module.running_var))
        frozen.load_state_dict({**frozen.state_dict(), **module.state_dict()})  # without affine parameters, 1 and 0
        return frozen
    for name, child in module.named_children():
        setattr(module, name, freeze(child))
    return module.requires_grad_(False)


def _can_freeze(norm: nn.Module) -> bool:
    return type(norm) in BATCH_NORMS and norm.running_var is not None and not is_observed(norm)


@torch.no_grad()
def fuse(module: nn.Module) -> nn.Module:
    """Fold every batch norm in `module` into the convolution before it, for inference; works in place.

    Pairs are `convN` with `bnN`, and neighbours in a Sequential. Outputs are those of eval mode; afterwards there
    is no such norm left to train or to load. Each pair becomes a new convolution: tied weights, and state dicts taken
    before, stay as they are. A pair that is not plain stays: with hooks or parametrizations, or of other classes.

    On a CPU the weights of convolutions with a bias, these and others, are also kept as it computes with them
    (`kept.KeptWeights`), until they change; such convolutions are new ones too. After changing them, or their dtype,
    call it again.
    """
    for child in module.children():
        fuse(child)
    children = dict(module.named_children())
    if isinstance(module, nn.Sequential):
        pairs = list(zip(list(children)[:-1], list(children)[1:], strict=True))
    else:
        pairs = [(name, name.replace("conv", "bn")) for name in children if name.startswith("conv")]
    for conv_name, norm_name in pairs:
        convolution, norm = children[conv_name], children.get(norm_name)
        deep = convolution if isinstance(convolution, DeepStem) and not is_observed(convolution) else None
        convolution = convolution if deep is None else deep[-1]
        if type(convolution) is not nn.Conv2d or is_observed(convolution, norm):
            continue
        if norm is None or not (type(norm) is FrozenBatchNorm2d or _can_freeze(norm)):
            continue
        frozen = cast(FrozenBatchNorm2d, freeze(norm))
        scale, shift = frozen.scale_and_shift()
        if convolution.bias is not None:
            shift = shift + convolution.bias * scale
        weight = convolution.weight
        fused = deepcopy(convolution, {id(weight): weight})  # whoever shares the convolution keeps what it has
        fused.weight = nn.Parameter((weight * scale.view(-1, 1, 1, 1)).to(weight.dtype), requires_grad=False)
        fused.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=False)
        keep_weights(fused)
        # Another trunk may share a deep stem, but not the norm behind it (`ResNetBackbone.with_levels`).
        setattr(module, conv_name, fused if deep is None else DeepStem(*deep[:-1], fused))
        setattr(module, norm_name, nn.Identity())
    for name, child in module.named_children():
        if type(child) is not nn.Conv2d or child.bias is None or child.weight.device.type != "cpu":
            continue
        if not is_observed(child):
            if "kept_weights" not in vars(child):  # not a copy made here
                setattr(module, name, child := deepcopy(child))
            keep_weights(child)
    return module


def checkpointed(module: nn.Module, x: Tensor) -> Tensor:
    """module(x) that keeps no activations and computes them again in backward; statistics still count once."""
    return checkpoint(module, x, use_reentrant=False, context_fn=lambda: (nullcontext(), _statistics_untouched(module)))


@contextmanager
def _statistics_untouched(module: nn.Module):
    # It computes on copies. Taking the statistics away would save fewer tensors than forward did: checkpoint objects.
    norms = [m for m in module.modules() if isinstance(m, BATCH_NORMS)]
    kept = [(norm, name, buffer) for norm in norms for name, buffer in norm.named_buffers(recurse=False)]
    for norm, name, buffer in kept:
        setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, name, buffer in kept:
            setattr(norm, name, buffer)
