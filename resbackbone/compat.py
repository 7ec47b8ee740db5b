"""Every private name of torch and torchvision that the library leans on, and what happens where one is missing.

torch 2.11 and torchvision 0.26 are the oldest that are supported. A name of torch that a later version drops costs
speed or a feature, never correctness. torchvision is imported only when it is asked for: the core does without.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from resbackbone.checks import BrokenPackage, UserError


def is_transformed() -> bool:
    """Whether a functorch transform or a dispatch mode (FlopCounterMode, ..) is to see the operations.

    `torch._C._are_functorch_transforms_active`, `torch._C._len_torch_dispatch_stack`. Without them: always, so the
    ordinary operations run, which compute the same.
    """
    try:
        return torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack() > 0
    except AttributeError:
        return True


def onednn_convolution(dtype: torch.dtype) -> Any:
    """oneDNN's convolution with sum and ReLU in one pass, which torch.compile calls; None where it is not to be used.

    `torch.ops.mkldnn._convolution_pointwise`, `torch.ops.mkldnn._is_mkldnn_bf16_supported`. Without them: None, so
    convolution, sum and ReLU run one after the other.
    """
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return None
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return None
        return torch.ops.mkldnn._convolution_pointwise if dtype in (torch.float32, torch.bfloat16) else None
    except AttributeError:
        return None


def any_size_in_exports() -> AbstractContextManager:
    """While it is open, torch.export does not take a size of 1 as a case of its own.

    `torch.fx.experimental._config.patch(backed_size_oblivious=True)`, which torch.onnx sets for its own captures.
    Without it: exported networks refuse images whose coarsest map is a single pixel.
    """
    try:
        from torch.fx.experimental import _config

        return _config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    except (ImportError, AttributeError):
        return nullcontext()


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
