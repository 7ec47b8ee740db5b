"""Every private name of torch and torchvision that the library leans on, and what happens where one is missing.

torch 2.11 and torchvision 0.26 are the oldest that are supported. A name of torch that a later version drops costs
speed or a feature, never correctness. torchvision is imported only when it is asked for: the core does without.
"""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from operator import floordiv
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

from resbackbone.checks import BrokenPackage, UserError

_log = logging.getLogger("resbackbone")


def is_transformed() -> bool:
    """Whether a functorch transform, forward-mode AD or a dispatch mode (FlopCounterMode, ..) sees the operations.

    `torch._C._are_functorch_transforms_active`, `torch._C._len_torch_dispatch_stack`,
    `torch.autograd.forward_ad._current_level`. Without them: always, so the ordinary operations run, which compute the
    same.
    """
    try:
        functorch, modes = torch._C._are_functorch_transforms_active(), torch._C._len_torch_dispatch_stack()
        return functorch or modes > 0 or forward_ad._current_level >= 0
    except AttributeError:
        return True


def is_observed(*modules: nn.Module | None) -> bool:
    """Whether anything is to see these modules being called: a hook, on all modules too, a function mode, a patch.

    `nn.Module._forward_hooks` and its like, `torch.nn.modules.module._has_any_global_hook`,
    `torch._C._len_torch_function_stack`. Without them: always, so the modules are called one by one.
    """
    try:
        if torch.nn.modules.module._has_any_global_hook() or torch._C._len_torch_function_stack() and _function_modes():
            return True
        if _steps() != _AS_IMPORTED:
            return True
        return any(
            module is not None
            and bool(has_hooks(module) or module._compiled_call_impl or not _OVERRIDES.isdisjoint(module.__dict__))
            for module in modules
        )
    except AttributeError:
        return True


def has_hooks(module: nn.Module) -> bool:
    """Whether a forward or backward hook is on this module: `nn.Module._forward_hooks` and its like."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _steps() -> tuple:
    """What the modules run, in which tools put their own."""
    convolution = nn.Conv2d.__call__, nn.Conv2d.forward, nn.Conv2d._conv_forward, F.conv2d
    return *convolution, nn.Module._call_impl, nn.ReLU.__call__, nn.ReLU.forward, F.relu


_AS_IMPORTED = _steps()
_OVERRIDES = {"forward", "_conv_forward"}  # of a single module


def _function_modes() -> bool:
    """Whether a torch function mode is active, beside the one of `torch.set_default_device`."""
    from torch.overrides import _get_current_function_mode_stack
    from torch.utils._device import DeviceContext

    return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())


@cache
def gpu_kernels() -> ModuleType | None:
    """`resbackbone.kernels` where Triton works, which takes a C compiler too; otherwise None, and one line says so."""
    try:
        from resbackbone import kernels

        one = torch.ones(1, 1, 1, 1, device="cuda")
        kernels.norm_add_relu(one, None, (one.flatten(),), 0.0, relu=True)
    except Exception as error:  # noqa: BLE001 - Triton's failures have no type of their own
        first = (str(error).splitlines() or [""])[0]
        _log.warning(
            "Triton does not work here (%s: %s); the network runs without its kernels", type(error).__name__, first
        )
        return None
    return kernels


def onednn_convolutions(dtype: torch.dtype) -> Any:
    """oneDNN's convolutions with sum and ReLU in one pass, which torch.compile calls; None where not to be used.

    `torch.ops.mkldnn._convolution_pointwise` and, for a sum in the memory of what is added, `_convolution_pointwise_`;
    `_reorder_convolution_weight`, `_is_mkldnn_bf16_supported`. Without them: None, so convolution, sum and ReLU run one
    after the other.
    """
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return None
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return None
        onednn = torch.ops.mkldnn
        _ = onednn._convolution_pointwise, onednn._convolution_pointwise_, onednn._reorder_convolution_weight
        return onednn if dtype in (torch.float32, torch.bfloat16) else None
    except AttributeError:
        return None


def watched(tensor: torch.Tensor) -> torch.Tensor | None:
    """A second tensor on the memory of `tensor`, by which `is_untouched` tells whether anybody has written to it.

    The memory is marked as copied before it is written, and so it is by whatever writes: in place, through `.data`, a
    view, an optimizer. A pointer that is handed out (`numpy()`, `data_ptr()`) counts as written to.

    `torch._lazy_clone`, `torch._C._is_cow_tensor`, `torch._C._data_address`. Without them: None, so nothing is kept.
    """
    try:
        twin = torch._lazy_clone(tensor.detach())
        return twin if is_untouched(tensor, twin) else None
    except (AttributeError, RuntimeError):  # RuntimeError: memory that cannot be marked, such as a mapped file's
        return None


def is_untouched(tensor: torch.Tensor, twin: torch.Tensor) -> bool:
    """Whether `tensor` still is, in memory and layout, what it was when `watched` gave `twin`."""
    address, is_shared = torch._C._data_address, torch._C._is_cow_tensor  # type: ignore[attr-defined]
    return (
        is_shared(tensor)
        and is_shared(twin)
        and address(tensor) == address(twin)
        and (tensor.dtype, tensor.shape, tensor.stride()) == (twin.dtype, twin.shape, twin.stride())
    )


def are_products_precise() -> bool:
    """Whether fp32 products of matrices are computed in fp32, not in TF32 or bf16, as far as torch tells."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set through torch.backends for some kinds of products alone
        return False


@contextmanager
def any_size_in_exports() -> Iterator[None]:
    """While it is open, torch.export does not take a size of 1, nor an odd one, as a case of its own.

    `torch.fx.experimental._config.patch(backed_size_oblivious=True)`, which torch.onnx sets for its own captures.
    Without it: exported networks refuse images whose coarsest map is a single pixel.
    `torch._meta_registrations.div_rtn`, a division that rounds down: in torch 2.11 it asks for the remainder, so that
    a network with a max-pool takes only sizes like the example's. Without it: nothing to mend.
    """
    with ExitStack() as changes:
        try:
            from torch.fx.experimental import _config

            changes.enter_context(_config.patch(backed_size_oblivious=True))  # type: ignore[attr-defined]
        except (ImportError, AttributeError):
            pass
        shapes: Any = getattr(torch, "_meta_registrations", None)
        if (division := getattr(shapes, "div_rtn", None)) is not None:
            changes.callback(setattr, shapes, "div_rtn", division)
            shapes.div_rtn = floordiv
        yield


def any_size_in_graphs(tensor: torch.Tensor, dimensions: tuple[int, ...]) -> None:
    """Tell torch.compile that these `dimensions` of an input change from call to call, where it has not seen it yet.

    `torch._dynamo.maybe_mark_dynamic`. Without it: the second size costs a second graph.
    """
    if (mark := getattr(getattr(torch, "_dynamo", None), "maybe_mark_dynamic", None)) is not None:
        mark(tensor, dimensions)


def check_torchvision() -> None:
    """Raise BrokenPackage if torchvision cannot be imported: `operator torchvision::nms does not exist`, with a torch
    of another build."""
    try:
        import torchvision  # noqa: F401
    except Exception as error:  # RuntimeError, ImportError, OSError: what its build and torch's disagree in
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BrokenPackage(
            f"torchvision cannot be imported ({reason}); run resbackbone-doctor (python tools/doctor.py), which names "
            "the fix",
            name="torchvision",
        ) from error


def torchvision_detection_utils() -> Any:
    """torchvision.models.detection._utils with BoxCoder, Matcher and encode_boxes. Without it: UserError."""
    try:
        from torchvision.models.detection import _utils
    except ImportError as error:
        raise UserError(
            f"this version of torchvision has no BoxCoder where 0.26 has it ({error}); install 0.26"
        ) from None
    return _utils
