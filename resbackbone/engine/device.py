"""Device and precision: choice, autocast, TF32, deterministic algorithms."""

import os
from collections.abc import Collection

import torch
import torch.utils.deterministic

from resbackbone.checks import UserError, one_of
from resbackbone.engine.provenance import commit, hardware

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
INFERENCE = ("fp32", "bf16")  # precisions for detecting and classifying


def choose_device(asked: str | None) -> str:
    """`asked` ("cuda", "cuda:1", "cpu" or "mps"); by default "cuda" (all GPUs) if there is one, else "cpu".

    Raises ValueError if torch or this machine lacks the device.
    """
    if asked is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(asked)
    except RuntimeError:
        place = None
    kind = one_of("device", place.type if place else asked, ("cuda", "cpu", "mps"), " (cuda:0 is the first GPU)")
    if kind == "cuda":
        count = torch.cuda.device_count()
        if count == 0:
            raise UserError(f"{asked}: this torch finds no GPU; python tools/doctor.py says why")
        if place is not None and (place.index or 0) >= count:
            raise UserError(f"{asked}: this machine has {count} GPUs, cuda:0 to cuda:{count - 1}")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError("mps: this torch finds no Apple GPU; leave the device out to compute on the CPU")
    return asked


def choose_precision(asked: str | None, device: str, among: Collection[str] = tuple(PRECISIONS)) -> str:
    """`asked`, by default the device's `native_precision`. Raises ValueError if it is not `among` the accepted ones."""
    precision = one_of("precision", asked or native_precision(device), among)
    if torch.device(device).type == "mps" and precision != "fp32":
        raise UserError(f"{precision}: mps computes in fp32 only; leave the precision out")
    if torch.device(device).type == "cpu" and precision == "fp16":
        raise UserError(f"{precision}: needs a GPU, as a CPU is dozens of times slower with it; give fp32 or bf16")
    return precision


def native_precision(device: str) -> str:
    """ "bf16" if the device computes faster in it than in fp32, else "fp32".

    Intel's AVX-512 multiplies bf16 no faster than fp32, so Intel's processors need AMX; AMD's do not.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return "bf16" if _is_ampere_or_later(device) else "fp32"
    features = torch.cpu.get_capabilities() if kind == "cpu" and hasattr(torch.cpu, "get_capabilities") else {}
    avx512 = features.get("avx512_bf16") and "Intel" not in features.get("cpu_name", "")
    return "bf16" if features.get("amx_bf16") or avx512 else "fp32"


def _is_ampere_or_later(device: str | torch.device) -> bool:
    """Whether an NVIDIA GPU has bf16 and TF32."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """A context in which a network with fp32 weights computes in `precision`."""
    dtype = PRECISIONS[precision]
    enabled = dtype != torch.float32
    return torch.autocast(device.type, dtype if enabled else torch.bfloat16, enabled=enabled)


def use(device: torch.device) -> None:
    """Make `device` current, and let fp32 convolutions and matrix products on a GPU use TF32 (inputs of 11 bits).

    NVIDIA_TF32_OVERRIDE=0 in the environment forbids TF32.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # pinned memory and events belong to the current device
        torch.set_float32_matmul_precision("high")


def use_deterministic(on: bool) -> None:
    """Make runs on a GPU repeat bit for bit. Call this before anything runs there.

    torch then raises RuntimeError for operators without a deterministic version.
    """
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by torch
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # saves time


def arithmetic(device: torch.device) -> dict[str, str | int | None]:
    """What a run's last bits depend on: commit, hardware, version of torch, operations that use TF32, CPU threads."""
    used = []
    if device.type == "cuda" and _is_ampere_or_later(device) and os.environ.get("NVIDIA_TF32_OVERRIDE") != "0":
        used += ["convolutions"] if torch.backends.cudnn.allow_tf32 else []
        used += ["matrix products"] if torch.get_float32_matmul_precision() != "highest" else []
    threads = {"threads": torch.get_num_threads()} if device.type == "cpu" else {}
    made = {"commit": commit(), "hardware": hardware(device), "torch": str(torch.__version__)}
    return {**made, "tf32": " and ".join(used) or "not used", **threads}
