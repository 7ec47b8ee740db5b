"""The machine: versions, the operators that detectors need, the rates of copies and matrix products."""

import contextlib
import io
from collections.abc import Callable
from functools import partial

import torch
from torch.utils.benchmark import Timer

from resbackbone.tools import doctor
from resbackbone.tools.benchmarks.contest import tf32
from resbackbone.tools.gpu_checks.record import Record, Setting


def check(setting: Setting, record: Record) -> None:
    """doctor.py's checks, then the device's peak rates, for comparison with all other times."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        doctor.main([])
    lines = said.getvalue().splitlines()
    record.detail("doctor", lines)
    failed = [line.split("FAILED", 1)[1].strip() for line in lines if "FAILED" in line]
    # "packages" fails in a checkout that is not installed, which may still work.
    record.row("doctor", "; ".join(failed) or "all works", ok=all(name.startswith("packages:") for name in failed))
    size = 2**30 if setting.on_gpu else 2**26
    source, target = torch.empty(2, size, dtype=torch.uint8, device=setting.device)
    rate = 2 * size / seconds_of(partial(target.copy_, source)) / 1e12
    record.row("copy within the device's memory, read and written", f"{rate:.3g} TB/s")
    side = 8192 if setting.on_gpu else 512
    kinds = [("bf16", torch.bfloat16, False), ("fp32", torch.float32, False)]
    for name, dtype, allowed in [*kinds, *([("fp32 as TF32", torch.float32, True)] if setting.on_gpu else [])]:
        with tf32(allowed):
            a, b = torch.randn(2, side, side, device=setting.device).to(dtype)
            rate = 2 * side**3 / seconds_of(partial(torch.mm, a, b)) / 1e12
        record.row(f"torch.mm, {side} x {side}, {name}", f"{rate:.3g} TFLOP/s")


def seconds_of(run: Callable[[], object]) -> float:
    """The median of one run, after a warm-up."""
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.1).median
