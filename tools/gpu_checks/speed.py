"""What the machine has, and times beside torchvision, timm and detectron2 by tools/benchmark.py."""

import contextlib
import io
import json
import shlex
import time

from resbackbone.checks import UserError, require
from resbackbone.tools import doctor
from resbackbone.tools.benchmarks.contest import BF16, COMPILED, TF32
from resbackbone.tools.benchmarks.report import failures_of, label_of, reference_of, rows_of
from resbackbone.tools.gpu_checks.record import Record, Setting

SPARE = 15  # seconds from the end of a contest's budget to the time limit of the part
JOBS = {  # of benchmark.py: batch sizes and modes
    "detector-training": ((1, 2, 16), (BF16, TF32)),
    "detector-inference": ((1, 2, 16), (BF16, TF32)),
    "training": ((8,), (BF16, TF32)),
    "inference": ((8,), (BF16, TF32)),
    "imagenet": ((256,), (BF16, COMPILED)),
}
TOY = ["--rounds", "1", "--height", "64", "--width", "96", "--depth", "18"]


def machine(setting: Setting, record: Record) -> None:
    """doctor.py's checks. "packages" fails in a checkout that is not installed, which may still work."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        doctor.main([])
    lines = said.getvalue().splitlines()
    record.detail("doctor", lines)
    failed = [line.split("FAILED", 1)[1].strip() for line in lines if "FAILED" in line]
    record.row("doctor", "; ".join(failed) or "all works", ok=all(name.startswith("packages:") for name in failed))


def beside_peers(setting: Setting, record: Record) -> None:
    """The job of benchmark.py that the part is named after.

    Batch sizes and modes run one by one, so that rows are kept if the time runs out.
    """
    require("train", "timm", user="this part")
    from resbackbone.tools import benchmark

    sizes, modes = JOBS[setting.part]
    effort = ["--rounds", "4"] if setting.on_gpu else TOY
    for size in setting.batches(*sizes):
        for mode in modes if setting.on_gpu else modes[:1]:
            words = ["--jobs", setting.part, "--batch-sizes", str(size), "--modes", mode]
            budget = ["--budget", str(max(1, setting.until - SPARE - time.time()))]
            output = setting.scratch / f"{mode}-{size}"
            place = ["--device", setting.device, "--output", str(output), "--quiet"]
            with contextlib.suppress(UserError):  # it names the failures, which benchmark.json has too
                benchmark.main([*words, *effort, *budget, *place])
            content = json.loads((output / "benchmark.json").read_text())
            record.detail(shlex.join(words), content)
            for result in content["contests"]:
                add_rows(result, record)
            if not content["contests"]:
                record.row(shlex.join(words), "no time left")


def add_rows(result: dict, record: Record) -> None:
    """A row for each contender, with its ratio to the fastest other package, and for each that failed."""
    for row in rows_of(result):
        ratio = f", {row.ratio[1]:.2f} of {reference_of(result)}'s" if row.ratio else ""
        record.row(f"{label_of(result)}: {row.name}", f"{1000 * row.seconds:.4g} ms{ratio}")
    for line in failures_of(result):
        record.row(line, "failed", "no failure", ok=False)
