"""Frozen batch norm; convolution, frozen norm, sum and ReLU as one step, the norm folded into the weights."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from resbackbone.compat import is_transformed, onednn_convolution

Affine = tuple[Tensor, Tensor]  # scale and shift of a norm, [channels] each


class FrozenBatchNorm2d(nn.Module):
    """Batch norm whose statistics and affine parameters are constants: y = x * scale + shift, channel by channel.

    It holds buffers only, under nn.BatchNorm2d's names, and has no training mode, so neither `.train()` nor an
    optimizer can thaw it. Behind a convolution it costs nothing: `conv_norm` folds it into the weights.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.fold_cache = FoldCache()
        self.register_load_state_dict_pre_hook(_before_loading)

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """The affine map it stands for, [channels] each, in fp32 or fp64: in half precision a small variance is 0."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        weight, bias, mean, var = (t.to(dtype) for t in (self.weight, self.bias, self.running_mean, self.running_var))
        scale = weight * (var + self.eps).rsqrt()
        return scale, bias - mean * scale

    def forward(self, x: Tensor) -> Tensor:  # [B, channels, H, W]
        scale, shift = (t.to(x.dtype).view(1, -1, 1, 1) for t in self.scale_and_shift())
        return x * scale + shift

    def train(self, mode: bool = True) -> "FrozenBatchNorm2d":
        self.fold_cache.clear()
        return super().train(mode)

    def _apply(self, fn, recurse=True):  # .to(), .cuda(), .half(), ..
        self.fold_cache.clear()
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"


def _before_loading(module, state_dict, prefix, *_):
    module.fold_cache.clear()
    # A trainable batch norm also counts its batches; a constant has nothing to count.
    state_dict.pop(prefix + "num_batches_tracked", None)


class _Convolution(NamedTuple):
    """What a convolution does beside its weights, in the order that F.conv2d takes it."""

    stride: tuple[int, ...]
    padding: Any  # pixels for each dimension, or a word
    dilation: tuple[int, ...]
    groups: int


def folded_conv(
    conv: nn.Conv2d, norm: FrozenBatchNorm2d, x: Tensor, shortcut: Tensor | None = None, relu: bool = False
) -> Tensor:
    """[relu](norm(conv(x)) [+ shortcut]) as one convolution of weights weight * scale with the bias shift.

    x: [B, in_channels, H, W]. shortcut: of the output's shape. `conv` has no bias of its own. The product is taken in
    fp32 (fp64 for fp64 weights) and only then cast, by autocast or to the weight's dtype.

    For backward it keeps x (for a weight that trains), the weight itself and the output where there is a ReLU, which
    is the next layer's input: neither the folded weight, which is made again, nor what was before the ReLU.
    On a CPU what comes out is channels_last, since oneDNN would reorder other maps on the way into and out of every
    layer. A weight that no gradient reaches is folded once and kept (`FoldCache`): a second copy of the weights in
    memory, which `fuse` does without.
    """
    weight = conv.weight
    how = _Convolution(conv.stride, conv.padding, conv.dilation, conv.groups)
    if not _computed_now(x, weight):
        scale, shift = norm.scale_and_shift()
        weight = (weight * scale.view(-1, 1, 1, 1)).to(weight.dtype)
        return add_relu(F.conv2d(x, weight, shift.to(weight.dtype), *how), shortcut, relu)
    x, dtype = _autocast(x, weight.dtype)
    shortcut = None if shortcut is None else shortcut.to(dtype)
    records = torch.is_grad_enabled()
    if records and (weight.requires_grad or x.requires_grad or (shortcut is not None and shortcut.requires_grad)):
        if weight.requires_grad:
            norm.fold_cache.forget_weight()  # an optimizer comes next, and may leave no trace
        scale, shift = norm.fold_cache.scale_and_shift(norm, dtype)
        return _FoldedConv.apply(x, weight, scale, shift, shortcut, relu, how)
    folded, shift = norm.fold_cache.folded(weight, norm, dtype, training=records)
    return _convolve(x, folded, shift, shortcut, relu, how)


def fused_conv(conv: nn.Conv2d, x: Tensor, shortcut: Tensor | None, relu: bool) -> Tensor:
    """The same for a convolution that `fuse` has given its norm."""
    if torch.is_grad_enabled() or not _computed_now(x, conv.weight):
        return add_relu(conv(x), shortcut, relu)
    assert conv.bias is not None  # the norm's shift
    x, dtype = _autocast(x, conv.weight.dtype)
    how = _Convolution(conv.stride, conv.padding, conv.dilation, conv.groups)
    shortcut = None if shortcut is None else shortcut.to(dtype)
    return _convolve(x, _arrange(conv.weight, dtype), conv.bias.to(dtype), shortcut, relu, how)


class FoldCache:
    """Caches the weight and bias folded with one frozen norm, for as long as they are valid.

    They are recomputed for another dtype, and after the weight or a buffer of the norm was replaced, moved, put into
    another memory format or written to in place. PyTorch does not count writes through `.data` (common in averaging
    of weights), so on a CPU the norm and one value of each filter and each input channel are compared as well. A
    write that changes none of these needs `clear`. `.to()`, `.train()`, `.eval()` and loading call it, and so does
    every forward pass that records a gradient for the weight.

    On a GPU that comparison would make the host wait. There only frozen layers in training use the cache, and a write
    to them through `.data` must be followed by `.train()`. Under `no_grad`, and while a CUDA graph is captured (it may
    outlive the cache), everything is computed anew. Copies and pickles of a cache are empty.
    """

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        self._weight: _Kept | None = None
        self._norm: _Kept | None = None

    def forget_weight(self) -> None:
        self._weight = None

    def __reduce__(self):
        return FoldCache, ()

    @torch.inference_mode(False)
    @torch.no_grad()
    def folded(self, weight: Tensor, norm: FrozenBatchNorm2d, dtype: torch.dtype, *, training: bool) -> Affine:
        """The folded weight and the bias, in `dtype`. `training`: whether this pass records a gradient."""

        def fold() -> Affine:
            scale, shift = norm.scale_and_shift()
            return _fold(weight, scale, dtype), shift.to(dtype)

        sources = (weight, *_constants(norm))
        if not _may_keep(sources, training):
            return fold()
        self._weight = kept = _kept(self._weight, dtype, sources, fold)  # another thread may put its own there
        return kept.made

    @torch.no_grad()
    def scale_and_shift(self, norm: FrozenBatchNorm2d, dtype: torch.dtype) -> Affine:
        """The scale in fp32 or better and the shift in `dtype`, for a pass that records a gradient."""

        def make() -> Affine:
            scale, shift = norm.scale_and_shift()
            return scale, shift.to(dtype)

        sources = _constants(norm)
        if sources[0].device.type == "cpu" or not _may_keep(sources, training=True):  # as quick as a comparison
            return make()
        self._norm = kept = _kept(self._norm, dtype, sources, make)
        return kept.made


class _Kept(NamedTuple):
    made: Affine
    state: list
    samples: list[Tensor]
    alive: list  # what `state` knows by id and address, so that nothing else comes to have these


def _constants(norm: FrozenBatchNorm2d) -> tuple[Tensor, ...]:
    return norm.weight, norm.bias, norm.running_mean, norm.running_var


def _may_keep(sources: Iterable[Tensor], training: bool) -> bool:
    on_cpu = all(t.device.type == "cpu" for t in sources)
    inference = any(t.is_inference() for t in sources)  # writes to these are not counted
    return not inference and (on_cpu or (training and not _is_capturing()))


def _is_capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _kept(kept: _Kept | None, dtype: torch.dtype, sources: tuple[Tensor, ...], make: Callable[[], Affine]) -> _Kept:
    """`kept` if it was made of these sources as they are now, else what `make` gives."""
    state = [dtype, *((id(t), t.data_ptr(), t._version, t.stride()) for t in sources)]
    samples = list(_samples(sources))
    if kept is not None and kept.state == state and all(map(torch.equal, kept.samples, samples)):
        return kept
    return _Kept(make(), state, [sample.clone() for sample in samples], [(t, t.untyped_storage()) for t in sources])


def _samples(sources: Iterable[Tensor]) -> Iterator[Tensor]:
    for t in sources:
        if t.device.type == "cpu":  # elsewhere a comparison waits for the device
            yield from (t[:, 0, 0, 0], t[0, :, -1, -1]) if t.dim() == 4 else (t,)


class _FoldedConv(torch.autograd.Function):
    """[relu](conv2d(x, weight * scale, shift) [+ shortcut]); its backward is made of differentiable operations."""

    @staticmethod
    def forward(ctx, x, weight, scale, shift, shortcut, relu, how):
        y = _convolve(x, _fold(weight, scale, shift.dtype), shift, shortcut, relu, how)
        ctx.how, ctx.shape = how, x.shape
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, scale, y if relu else None)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale, y = ctx.saved_tensors
        needs_x, needs_weight, needs_shortcut = (ctx.needs_input_grad[i] for i in (0, 1, 4))
        if y is not None:
            grad = torch.ops.aten.threshold_backward(grad, y, 0)
        grad_x: Tensor | None = None
        grad_weight: Any = None
        if needs_x or needs_weight:
            stride, padding, dilation, groups = ctx.how
            if x is None:
                x = grad.new_empty(1).expand(ctx.shape)  # only its shape is looked at
            grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
                grad,
                x,
                _fold(weight, scale, grad.dtype),
                None,
                stride,
                padding,
                dilation,
                False,
                (0, 0),
                groups,
                (needs_x, needs_weight, False),
            )
        if needs_weight:
            grad_weight = grad_weight.to(scale.dtype).mul_(scale.view(-1, 1, 1, 1)).to(weight.dtype)
        return grad_x, grad_weight, None, None, grad if needs_shortcut else None, None, None


def _fold(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return _arrange(weight * scale.view(-1, 1, 1, 1), dtype)


def _arrange(weight: Tensor, dtype: torch.dtype) -> Tensor:
    on_cpu = weight.device.type == "cpu"
    return weight.to(dtype, memory_format=torch.channels_last if on_cpu else torch.preserve_format)


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor, shortcut: Tensor | None, relu: bool, how: _Convolution
) -> Tensor:
    """[relu](conv2d(x) [+ shortcut]), no gradient recorded."""
    convolution = onednn_convolution(x.dtype) if relu and x.device.type == "cpu" else None
    if convolution is None:
        return add_relu(F.conv2d(x, weight, bias, *how), shortcut, relu)
    # One pass over the map, not three: on AMX a third of a bfloat16 forward pass.
    stride, padding, dilation, groups = how
    if shortcut is None:
        return convolution(x, weight, bias, padding, stride, dilation, groups, "relu", [], "")
    return convolution.binary(x, shortcut, weight, bias, padding, stride, dilation, groups, "add", 1.0, "relu", [], "")


def add_relu(y: Tensor, shortcut: Tensor | None, relu: bool = True) -> Tensor:
    """[relu](y [+ shortcut]), in y's memory: nothing upstream keeps y for its gradient."""
    if shortcut is not None:
        y += shortcut
    return F.relu_(y) if relu else y


def _autocast(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, torch.dtype]:
    """x as autocast would hand it to a convolution, and the dtype of that convolution's weights."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x, dtype
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), dtype


def _computed_now(x: Tensor, weight: Tensor) -> bool:
    """Whether operations on these just compute: no trace, no transform, no tensors of another kind or without data."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    plain = all(type(t) in (Tensor, nn.Parameter) and not t.is_meta for t in (x, weight))
    return (
        plain
        and not is_transformed()
        and forward_ad.unpack_dual(x).tangent is None
        and forward_ad.unpack_dual(weight).tangent is None
    )
