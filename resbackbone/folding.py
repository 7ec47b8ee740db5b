"""Frozen batch norm; and convolution, frozen norm, sum and ReLU in fewer steps where nobody can tell."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resbackbone import winograd
from resbackbone.compat import gpu_kernels, is_observed, is_transformed, onednn_convolutions
from resbackbone.kept import kept_weights


class FrozenBatchNorm2d(nn.Module):
    """Batch norm whose statistics and affine parameters are constants: y = x * scale + shift, channel by channel.

    It holds buffers only, under nn.BatchNorm2d's names, and has no training mode, so neither `.train()` nor an
    optimizer can thaw it. `.half()` and `.bfloat16()` leave the constants in fp32, where a small variance is not 0.
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
        self.register_load_state_dict_pre_hook(_forget_batches)

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """The affine map it stands for, [channels] each, in fp32 or fp64."""
        return _scale_and_shift(self.weight, self.bias, self.running_mean, self.running_var, self.eps)

    def forward(self, x: Tensor) -> Tensor:  # [B, channels, H, W]
        return _normalized(x, self.weight, self.bias, self.running_mean, self.running_var, self.eps)

    def _apply(self, fn, recurse=True):  # .to(), .cuda(), .half(), ..
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, value in self._buffers.items():
            if value is not None and value.is_floating_point() and value.element_size() < 4:
                self._buffers[name] = cast(Tensor, before[name]).to(value.device, torch.float32)
        return self

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"


@torch.fx.wrap  # a traced graph calls it, and does not look inside
def _normalized(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    reduced = x.dtype in (torch.bfloat16, torch.float16) and weight.dtype == torch.float32
    records = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias, mean, var))
    if not records and (reduced or x.dtype == weight.dtype) and x.dim() == 4 and not torch.jit.is_tracing():
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)  # one kernel, but it would keep x for backward
    scale, shift = (t.to(x.dtype).view(1, -1, 1, 1) for t in _scale_and_shift(weight, bias, mean, var, eps))
    return x * scale + shift


def _scale_and_shift(weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(weight.dtype, torch.float32)
    weight, bias, mean, var = (t.to(dtype) for t in (weight, bias, mean, var))
    scale = weight * (var + eps).rsqrt()
    return scale, bias - mean * scale


def _forget_batches(module, state_dict, prefix, *_):
    # A trainable batch norm also counts its batches; a constant has nothing to count.
    state_dict.pop(prefix + "num_batches_tracked", None)


def conv_norm(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    """norm(conv(x)), as `conv_norm_relu`."""
    return conv_norm_relu(conv, norm, None, x)


def conv_norm_relu(
    conv: nn.Module,
    norm: nn.Module,
    relu: nn.Module | None,
    x: Tensor,
    shortcut: Callable[[], Tensor | None] | None = None,
    spare: bool = False,
) -> Tensor:
    """relu(norm(conv(x)) + shortcut()), in fewer steps where the norm is frozen, or fused into the convolution.

    x: [B, in_channels, H, W]. shortcut: gives a tensor of the output's shape, or None; `spare` says that nobody else
    holds it, so the sum may be written over it. Each call decides anew, by what the modules are at that moment: the
    steps are joined only if all of them are exactly nn.Conv2d with zero padding and no bias of its own,
    FrozenBatchNorm2d and nn.ReLU, their tensors are ordinary ones, and nothing observes them: no hook on them or on all
    modules, no parametrization, patch, transform or mode. Otherwise the modules are called one by one. Nothing is kept
    from one call to the next, so nothing can be stale; `KeptWeights` tell by themselves whether they are.

    On a CPU the norm's scale goes into the weights (in fp32, or fp64 for fp64 weights, and only then into the dtype of
    the convolution) and its shift into the bias; the result is channels_last, since oneDNN would reorder other maps on
    the way into and out of every layer. On a GPU, norm, sum and ReLU are one kernel. For backward only x is kept (for a
    weight that trains) and, where there is a ReLU, the output, which is the next layer's input anyway.

    One thing can be told: oneDNN's ReLU turns NaN into 0, as under torch.compile with frozen weights. Gradients, and so
    the checks in training, keep NaN. Winograd's algorithm, after `layers.fuse`, spreads NaN and infinity.
    """
    added: Tensor | None = None
    if plain := _is_plain(conv, norm, relu, x):
        assert isinstance(conv, nn.Conv2d)
        added = shortcut() if shortcut is not None else None
        records = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, conv.weight, added))
        outputs = x.numel() // conv.in_channels * conv.out_channels // (conv.stride[0] * conv.stride[1])
        arguments = conv, norm, relu is not None, x, added, records
        if x.device.type == "cpu" and (records or isinstance(norm, nn.Identity) or outputs >= conv.weight.numel()):
            return _on_cpu(*arguments, spare)  # of few outputs, a norm takes less time than folding
        if x.device.type == "cuda" and (records or outputs >= LARGE) and x.dtype != torch.float64 and gpu_kernels():
            return _on_gpu(*arguments)
    y = norm(conv(x))
    if not plain and shortcut is not None:
        added = shortcut()  # after the norm, as in torchvision's blocks: hooks see this order
    if added is not None:
        y += added
    return y if relu is None else relu(y)


def conv_block(block: nn.Module, x: Tensor, total: Tensor | None = None) -> Tensor:
    """block(x), or total + block(x) in the memory of `total`, which nobody else holds.

    Where `block` is a Sequential of a convolution, perhaps a norm and perhaps a ReLU, no gradient is recorded, and
    conv_norm_relu would join the steps, they and the sum (which then has no ReLU behind it) are one step. Without a sum
    they are joined only after `layers.fuse`.
    """
    if isinstance(block, nn.Sequential) and len(block) and _is_eager(x) and x.device.type == "cpu":
        conv, *behind = block
        relu = behind.pop() if behind and total is None and type(behind[-1]) is nn.ReLU else None
        norm = behind.pop() if behind else _NO_NORM
        usual = not behind and type(block).forward is SEQUENTIAL_FORWARD and not is_observed(block)
        wanted = not torch.is_grad_enabled() and (total is not None or kept_weights(conv) is not None)
        if usual and wanted and _is_plain(conv, norm, relu, x):
            return _on_cpu(cast(nn.Conv2d, conv), norm, relu is not None, x, total, False, spare=total is not None)
    y = block(x)
    return y if total is None else total.add_(y)


_NO_NORM, SEQUENTIAL_FORWARD = nn.Identity(), nn.Sequential.forward


def is_worth_reusing(x: Tensor) -> bool:
    """Whether x is a large map on a CPU and no gradient is recorded: writing over it saves new memory."""
    return _is_eager(x) and x.device.type == "cpu" and x.numel() >= WORTH_LOOKING and not torch.is_grad_enabled()


def is_unseen(step: tuple[nn.Module, nn.Module, nn.Module | None], *around: nn.Module, x: Tensor) -> bool:
    """Whether nobody sees x on its way through `step` (convolution, norm, ReLU) in the modules `around`."""
    return _is_plain(*step, x) and not is_observed(*around)


WORTH_LOOKING = 2**20  # elements of a map; below it, looking who holds it takes longer than new memory
LARGE = 2**22  # elements of a map; below it, a GPU waits for the host, and torch's own operations start sooner


def _constants(norm: nn.Module) -> tuple:
    buffers = norm._buffers  # an attribute of the module would take long to look up
    return tuple(buffers.get(name) for name in ("weight", "bias", "running_mean", "running_var"))


def _is_plain(conv: nn.Module, norm: nn.Module, relu: nn.Module | None, x: Tensor) -> bool:
    """Whether these modules and tensors are the ordinary ones, and nobody sees what happens between them."""
    if not _is_eager(x):
        return False
    if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros" or x.dim() != 4:
        return False
    if any(type(pair) is not tuple or len(pair) != 2 for pair in (conv.stride, conv.padding, conv.dilation)):
        return False
    if relu is not None and type(relu) is not nn.ReLU:
        return False
    weight, bias = conv.weight, conv.bias
    if type(norm) is FrozenBatchNorm2d:
        if FrozenBatchNorm2d.forward is not FROZEN_FORWARD:  # patched
            return False
        constants = _constants(norm)
        if bias is not None or not all(type(t) is Tensor and not t.requires_grad for t in constants):
            return False
    elif type(norm) is not nn.Identity or type(bias) is not nn.Parameter:
        return False
    return (
        not (bias is not None and torch.is_grad_enabled() and (bias.requires_grad or weight.requires_grad))
        and type(weight) in ORDINARY
        and not (x.is_meta or weight.is_meta)
        and (x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type))
        and not is_observed(conv, norm, relu)
        and not is_transformed()
    )


def _is_eager(x: Tensor) -> bool:
    return type(x) in ORDINARY and not (torch.compiler.is_compiling() or torch.jit.is_tracing())


ORDINARY = (Tensor, nn.Parameter)
FROZEN_FORWARD = FrozenBatchNorm2d.forward


class _Convolution(NamedTuple):
    """What a convolution does beside its weights, in the order that F.conv2d takes it."""

    stride: tuple[int, ...]
    padding: Any  # pixels for each dimension
    dilation: tuple[int, ...]
    groups: int


def _on_cpu(
    conv: nn.Conv2d,
    norm: nn.Module,
    relu: bool,
    x: Tensor,
    shortcut: Tensor | None,
    records: bool,
    spare: bool,
) -> Tensor:
    weight, how = conv.weight, _Convolution(conv.stride, conv.padding, conv.dilation, conv.groups)
    dtype = weight.dtype
    if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype("cpu")
        x = x.to(dtype)
    shortcut = None if shortcut is None else shortcut.to(dtype)
    if isinstance(norm, FrozenBatchNorm2d):
        scale, shift = norm.scale_and_shift()
        if records:
            return _FoldedConv.apply(x, weight, scale, shift.to(dtype), shortcut, relu, how)
        return _convolve(x, _fold(weight, scale, dtype), shift.to(dtype), shortcut, relu, how, spare)
    assert conv.bias is not None  # the norm's shift
    if records:
        return _add_relu(conv(x), shortcut, relu)
    return _convolve(x, _weights_for(x, conv, dtype, how), conv.bias.to(dtype), shortcut, relu, how, spare)


def _weights_for(x: Tensor, conv: nn.Conv2d, dtype: torch.dtype, how: _Convolution) -> Tensor:
    """The weights of `conv` in `dtype`, after `layers.fuse` in the layout in which x is convolved fastest."""
    weight, kept = conv.weight, kept_weights(conv)

    def packed() -> Tensor:
        ordered = torch.empty_like(weight, dtype=dtype, memory_format=torch.channels_last).copy_(weight)
        arguments = how.padding, how.stride, how.dilation, how.groups, list(x.shape)
        return onednn._reorder_convolution_weight(ordered, *arguments)

    if kept is not None and winograd.is_faster(conv, x):
        return kept.get("winograd", lambda: winograd.transform(weight))
    if kept is not None and x.numel() and (onednn := onednn_convolutions(dtype)) is not None:
        return kept.get((dtype, how), packed)
    return weight.to(dtype, memory_format=torch.channels_last)


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
    return (weight * scale.view(-1, 1, 1, 1)).to(dtype, memory_format=torch.channels_last)


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shortcut: Tensor | None,
    relu: bool,
    how: _Convolution,
    spare: bool = False,
) -> Tensor:
    """[relu](conv2d(x) [+ shortcut]), no gradient recorded; the shortcut may be written over if it is `spare`."""
    if weight.dim() == 3:
        y = winograd.convolve(x, weight, bias, relu and shortcut is None)
        return y if shortcut is None else _add_relu(y, shortcut, relu)
    onednn = onednn_convolutions(x.dtype) if relu or spare or weight.is_mkldnn else None
    if onednn is None:
        return _add_relu(F.conv2d(x, weight, bias, *how), shortcut, relu)
    # One pass over the map, not three: on AMX a third of a bfloat16 forward pass.
    stride, padding, dilation, groups = how
    arguments: tuple = weight, bias, padding, stride, dilation, groups
    if shortcut is None:
        return onednn._convolution_pointwise(x, *arguments, "relu" if relu else "none", [], "")
    arguments = *arguments, "add", 1.0, "relu" if relu else None, [], ""
    if spare:  # new memory is slow: the system gives it page by page
        return onednn._convolution_pointwise_.binary(shortcut, x, *arguments)
    return onednn._convolution_pointwise.binary(x, shortcut, *arguments)


def _add_relu(y: Tensor, shortcut: Tensor | None, relu: bool) -> Tensor:
    """[relu](y [+ shortcut]), in y's memory: nothing upstream keeps y for its gradient."""
    if shortcut is not None:
        y += shortcut
    return F.relu_(y) if relu else y


def _on_gpu(conv: nn.Conv2d, norm: nn.Module, relu: bool, x: Tensor, shortcut: Tensor | None, records: bool) -> Tensor:
    y = F.conv2d(x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
    shortcut = None if shortcut is None else shortcut.to(y.dtype)
    constants, eps = ((conv.bias,), 0.0) if isinstance(norm, nn.Identity) else (_constants(norm), norm.eps)
    step = _NormAddReLU.apply if records else partial(_NormAddReLU.forward, None)
    return step(y, shortcut, constants, eps, relu, gpu_kernels())


class _NormAddReLU(torch.autograd.Function):
    """[relu](norm(y) [+ shortcut]) in the memory of y, which nothing upstream keeps for its gradient; on a GPU."""

    @staticmethod
    def forward(ctx, y, shortcut, constants, eps, relu, kernels):
        if shortcut is not None:
            shortcut = shortcut.contiguous(memory_format=kernels.memory_format_of(y))
        z = kernels.norm_add_relu(y, shortcut, constants, eps, relu)
        if ctx is None:  # no gradient is recorded
            return z
        ctx.mark_dirty(y)
        weight, var = (constants[0], constants[3]) if len(constants) == 4 else (None, None)
        ctx.save_for_backward(z if relu else None, weight, var)
        ctx.eps, ctx.kernels, ctx.memory_format = eps, kernels, kernels.memory_format_of(z)
        return z

    @staticmethod
    def backward(ctx, grad):
        z, weight, var = ctx.saved_tensors
        needs_shortcut = ctx.needs_input_grad[1]
        if not torch.is_grad_enabled():
            grad = grad.contiguous(memory_format=ctx.memory_format)
            grads = ctx.kernels.norm_add_relu_backward(grad, z, weight, var, ctx.eps, needs_shortcut)
        else:  # by differentiable operations, for a second derivative
            grad = grad if z is None else torch.ops.aten.threshold_backward(grad, z, 0)
            scale = 1 if weight is None else (weight * (var + ctx.eps).rsqrt()).to(grad.dtype).view(1, -1, 1, 1)
            grads = grad * scale, grad if needs_shortcut else None
        return *grads, None, None, None, None
