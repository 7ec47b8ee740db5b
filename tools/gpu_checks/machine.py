"""What the machine is and can do: versions, the operators that detectors need, rates of copies and matrix products."""

import contextlib
import io
import time
from collections.abc import Callable
from functools import partial

import torch

from resbackbone.tools import doctor
from resbackbone.tools.benchmarks.rounds import tf32
from resbackbone.tools.gpu_checks.record import Record, Setting


def check(setting: Setting, record: Record) -> None:
    """doctor.py's checks, then the device's peak rates, for comparison with all other times."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        status = doctor.main()
    record.detail("doctor", said.getvalue().splitlines())
    failed = [line.split("FAILED", 1)[1].strip() for line in said.getvalue().splitlines() if "FAILED" in line]
    record.row("doctor", "; ".join(failed) or "all works", ok=status == 0 or None)
    size = 2**30 if setting.on_gpu else 2**26
    source, target = torch.empty(2, size, dtype=torch.uint8, device=setting.device)
    seconds = seconds_of(partial(target.copy_, source), setting)
    record.row("copy within the device's memory, read and written", f"{2 * size / seconds / 1e12:.3g} TB/s")
    side = 8192 if setting.on_gpu else 512
    for name, dtype, allowed in (
        ("bf16", torch.bfloat16, False),
        ("fp32", torch.float32, False),
        *([("fp32 as TF32", torch.float32, True)] if setting.on_gpu else []),
    ):
        with tf32(allowed):
            a, b = torch.randn(2, side, side, device=setting.device).to(dtype)
            seconds = seconds_of(partial(torch.mm, a, b), setting)
        record.row(f"torch.mm, {side} x {side}, {name}", f"{2 * side**3 / seconds / 1e12:.3g} TFLOP/s")


def seconds_of(run: Callable[[], object], setting: Setting, repeats: int = 10) -> float:
    """Of one run: the median of `repeats`, after three more."""
    taken = []
    for i in range(repeats + 3):
        synchronize(setting)
        began = time.perf_counter()
        run()
        synchronize(setting)
        if i >= 3:
            taken.append(time.perf_counter() - began)
    return sorted(taken)[repeats // 2]


def synchronize(setting: Setting) -> None:
    if setting.on_gpu:
        torch.cuda.synchronize(setting.device)
