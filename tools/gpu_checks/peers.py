"""Speed beside torchvision, timm and detectron2 by tools/benchmark.py, and the time that compiling takes."""

import contextlib
import dataclasses
import json
import shlex
import time

import torch

from resbackbone.checks import UserError, require
from resbackbone.tools.benchmarks.contest import BF16, COMPILED, OWN, TF32, package_of, relative_difference, tf32
from resbackbone.tools.benchmarks.networks import Workload, classifier
from resbackbone.tools.benchmarks.report import reference_of, rows_of
from resbackbone.tools.gpu_checks.record import Record, Setting

SPARE = 15  # seconds from the end of a contest's budget to the time limit of the part


def contests(setting: Setting, record: Record, job: str, size: int, *modes: str) -> None:
    """Run a job of benchmark.py in each mode: a row for each of our contenders, all rounds in the details.

    Modes run one by one, so that rows are kept if the time runs out. Raises torch.OutOfMemoryError if a contender ran
    out of memory, once the rows are written.
    """
    require("train", "timm", user="this part")
    from resbackbone.tools import benchmark

    output = setting.scratch / "benchmark"
    for mode in modes if setting.on_gpu else modes[:1]:
        words = ["--jobs", job, "--batch-sizes", str(size), "--modes", mode]
        argv = [*words, "--device", setting.device, "--output", str(output), "--quiet"]
        argv += ["--rounds", "4" if setting.on_gpu else "1", "--budget", str(max(1, setting.left() - SPARE))]
        if not setting.on_gpu:
            argv += ["--height", "64", "--width", "96", "--depth", "18"]
        with contextlib.suppress(UserError):  # it names the failures, which benchmark.json has too
            benchmark.main(argv)
        content = json.loads((output / "benchmark.json").read_text())
        record.detail(shlex.join(words), content)
        for line in {*content["skipped"]} - {row["what"] for row in record.content["rows"]}:
            record.row(line, "left out")
        for result in content["contests"]:
            add_rows(result, record)


def add_rows(result: dict, record: Record) -> None:
    """A row for each of our contenders, with its ratio to the fastest other package, and for all without times."""
    what = f"{result['job']}, {result['batch_size']} images, {result['mode']}"
    own = [row for row in rows_of(result) if package_of(row.name) == OWN]
    for row in own:
        ratio = f", {row.ratio[1]:.2f} of {reference_of(result)}'s" if row.ratio else ""
        record.row(what + row.name.removeprefix(OWN), f"{1000 * row.seconds:.4g} ms{ratio}")
    if not own:
        record.row(what, "not measured")
    for name, reason in result["failed"].items():
        record.row(f"{what}: {name}", reason, "no failure", ok=False)
    for reason in result["failed"].values():
        if reason.startswith("OutOfMemoryError"):
            raise torch.OutOfMemoryError(reason)


def detector_training(setting: Setting, record: Record) -> None:
    """A training step of 1, 2 and 16 images, in bf16 and TF32."""
    for size in setting.batches(1, 2, 16):
        contests(setting, record, "detector-training", size, BF16, TF32)


def detector_inference(setting: Setting, record: Record) -> None:
    """Detection on 1, 2 and 16 images, in bf16 and TF32."""
    for size in setting.batches(1, 2, 16):
        contests(setting, record, "detector-inference", size, BF16, TF32)


def backbones(setting: Setting, record: Record) -> None:
    """c2..c5 of 8 images, in training and inference."""
    for job in ("training", "inference"):
        contests(setting, record, job, setting.batches(8)[0], BF16, TF32)


def imagenet(setting: Setting, record: Record) -> None:
    """ResNet-50's training step at 256 images, eager and compiled."""
    contests(setting, record, "imagenet", setting.batches(256)[0], BF16, COMPILED)


def compiled(setting: Setting, record: Record) -> None:
    """Compile a classifier's step: the time, and the loss beside eager. `imagenet` then finds it cached."""
    require("train", "timm", user="this part")
    work = Workload(BF16, setting.device, 50 if setting.on_gpu else 18, 800, 1216, setting.batches(256)[0])
    compiled = dataclasses.replace(work, mode=COMPILED)
    for package in (OWN, "torchvision", "timm"):
        with tf32(True):  # as `imagenet` sets it: the cache distinguishes the two
            eager = classifier(work, package).run()
            step = classifier(compiled, package)
            began = time.monotonic()
            difference = relative_difference(step.run(), eager)
        took = f"{time.monotonic() - began:.0f} s, less if cached{setting.beside}"
        record.row(f"{package}: compiling ResNet-{work.depth} and a step", took)
        record.at_most(f"{package}: loss of the first step, beside eager", difference, 0.03)
        del step, eager
