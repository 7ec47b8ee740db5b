"""This package beside its peers (those installed): time and memory of the same jobs, in a table of ratios.

python tools/benchmark.py                                             on the CPU; half an hour
python tools/benchmark.py --jobs training --modes fp32 --rounds 9 --output runs/benchmark
python tools/benchmark.py --device cuda --budget 500                  within 9 minutes
python tools/benchmark.py --device cuda --jobs detector-training --batch-sizes 1 2 16
python tools/benchmark.py --height 64 --width 96 --depth 18 --rounds 1      a quick check; ignore its figures

All packages get the same weights, inputs and settings, and their outputs are compared before anything is timed. They
take turns in an order that is shuffled each round. A ratio is the median over the rounds of time / time of the fastest
other package, ONNX Runtime and OpenVINO not counted: below 1 is faster. Packages that fail are named at the end; the
rest is measured. docs/benchmarks.md describes the jobs.
"""

import importlib.util
import math
import shlex
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from resbackbone.cli.command import Several, console, main_of, parse, progress_console
from resbackbone.cli.errors import from_option

import torch

from resbackbone.atomic import write_atomically, write_json
from resbackbone.checks import UserError, one_of
from resbackbone.engine.device import choose_device
from resbackbone.resnet import DEPTHS
from resbackbone.tools.benchmarks import contest, detectors, networks, runtimes, scoring
from resbackbone.tools.benchmarks.contest import BF16, COMPILED, FUSED, GPU_MODES, OWN, TF32, Job, Workload
from resbackbone.tools.benchmarks.machine import describe
from resbackbone.tools.benchmarks.report import failures_of, label_of, markdown

PEERS = ("torchvision", "timm", "detectron2", *runtimes.RUNTIMES, "pycocotools")
BACKBONE_MODES = ("fp32", "fp32-channels-last", TF32, BF16, COMPILED)
DETECTOR_MODES = ("fp32", TF32, BF16)
# Training comes first: the fused networks' setting of memory, even when it is undone, leaves gaps that others may use.
JOBS = {
    "training": Job(
        "Backbone training step: ResNet-{depth}, stem and c2 frozen, {height} x {width}",
        (OWN, "torchvision", "timm", "detectron2"),
        partial(networks.backbone, True),
        BACKBONE_MODES,
    ),
    "detector-training": Job(
        "Faster R-CNN ResNet-{depth} FPN training step, {height} x {width}",
        (OWN, "torchvision", "detectron2"),
        partial(detectors.contender, True),
        DETECTOR_MODES,
        tolerance=1e-5,
    ),
    "imagenet": Job(
        "ImageNet training step: ResNet-{depth}, 224 x 224",
        (OWN, "torchvision", "timm"),
        networks.classifier,
        (BF16, COMPILED),
        batch_size=256,
    ),
    "inference": Job(
        "Backbone inference: ResNet-{depth}, c2 to c5, {height} x {width}",
        (OWN, FUSED, "torchvision", "timm", "detectron2", *runtimes.RUNTIMES),
        partial(networks.backbone, False),
        BACKBONE_MODES,
    ),
    "pyramid-inference": Job(
        "Backbone and pyramid inference: ResNet-{depth} FPN, p2 to p6, {height} x {width}",
        (OWN, FUSED, "torchvision", "detectron2", *runtimes.RUNTIMES),
        partial(networks.backbone, False, fpn=True),
        BACKBONE_MODES,
    ),
    "detector-inference": Job(
        "Faster R-CNN ResNet-{depth} FPN inference, {height} x {width}",
        (OWN, FUSED, "torchvision", "detectron2", *runtimes.RUNTIMES),
        partial(detectors.contender, False),
        DETECTOR_MODES,
        tolerance=1e-5,
        difference=detectors.difference,
    ),
    "scoring": Job(
        "COCO scoring, 100 detections an image",
        (OWN, "pycocotools"),
        scoring.contender,
        ("fp64",),
        batch_size=1000,
    ),
}


@dataclass(frozen=True)
class Options:
    """This package beside torchvision, timm, detectron2, ONNX Runtime, OpenVINO and pycocotools: time and memory of the
    same jobs."""

    jobs: Several[str] = ()
    """inference, pyramid-inference, training, detector-inference, detector-training, imagenet or scoring. Default: on a
    GPU all but scoring, on a CPU all but imagenet."""
    modes: Several[str] = ()
    """fp32, fp32-channels-last or bf16-channels-last, on a GPU also tf32-channels-last or bf16-compiled; fp64 for
    scoring. Default: all that suit the job."""
    depth: int = 50
    """Depth of every network: 18, 34, 50, 101 or 152."""
    height: int = 800
    """Height of the images in pixels."""
    width: int = 1216
    """Width of the images in pixels."""
    batch_sizes: Several[int] = ()
    """Images in a run; each size is measured by itself. Default: 1 (imagenet: 256; scoring: 1000)."""
    rounds: int = 5
    """Number of rounds; in each, every package takes one turn."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    output: Path = Path("runs/benchmark")
    """Folder for benchmark.json (every round) and benchmark.md, both written after each comparison."""
    budget: float = math.inf
    """Seconds after which no new measurement starts."""
    quiet: bool = False
    """Print only warnings, errors and the tables."""


def main(argv: list[str] | None = None) -> dict:
    """Jobs -> contests -> tables; the content of benchmark.json. Raises UserError at the end if anything failed."""
    options = parse(Options, argv)
    contests = contests_of(options)
    deadline = time.monotonic() + options.budget
    if options.device.startswith("cuda"):
        torch.cuda.set_device(torch.device(options.device).index or 0)  # timers synchronize the current device
    installed = {OWN, *filter(importlib.util.find_spec, PEERS)}
    content: dict = {
        "command": shlex.join(["python", "tools/benchmark.py", *(sys.argv[1:] if argv is None else argv)]),
        **describe(options.device, torch.get_num_threads()),
        "skipped": [f"{name}, which is not installed" for name in PEERS if name not in installed],
        "jobs": {name: JOBS[name].heading.format_map(vars(options)) for name, _ in contests},
        "contests": [],
    }
    options.output.mkdir(parents=True, exist_ok=True)
    for name, work in contests:
        suited = [one for one in JOBS[name].names if runtimes.suits(one, work)]
        names = [one for one in suited if contest.package_of(one) in installed]
        result = contest.empty_result(name, work, names)
        try:
            if time.monotonic() > deadline:
                content["skipped"].append(f"{label_of(result)}: the budget is spent")
            else:
                content["contests"].append(result)
                contest.measure(JOBS[name], work, result, rounds=options.rounds, deadline=deadline)
                progress_console.print("\n".join([f"{label_of(result)}: done", *failures_of(result)]))
        finally:  # an interrupted contest keeps its rounds
            write_json(options.output / "benchmark.json", content, indent=1)
            write_atomically(options.output / "benchmark.md", markdown(content))
        torch.compiler.reset()  # otherwise torch.compile gives up on a class of which it compiled eight networks
    console.print(markdown(content))
    failures = [line for result in content["contests"] for line in failures_of(result)]
    if failures:
        raise UserError(f"{len(failures)} failed: {'; '.join(failures)}")
    return content


def contests_of(options: Options) -> list[tuple[str, Workload]]:
    """What is to be measured, each with its job's name. Raises UserError if an option is out of range."""
    one_of("depth", options.depth, DEPTHS)
    if min(options.batch_sizes, default=1) < 1:
        raise UserError(f"--batch-sizes {min(options.batch_sizes)}: must be at least 1")
    with from_option("--device"):
        device = one_of("device", torch.device(choose_device(options.device)).type, ("cpu", "cuda"))
    contests = []
    for name in options.jobs or [name for name in JOBS if name != ("scoring" if device == "cuda" else "imagenet")]:
        job = JOBS[one_of("job", name, JOBS)]
        suited = [mode for mode in job.modes if device == "cuda" or mode not in GPU_MODES]
        for size in options.batch_sizes or (job.batch_size,):
            for mode in options.modes or suited:
                one_of(f"mode of {name} on {options.device}", mode, suited)
                work = Workload(mode, options.device, options.depth, options.height, options.width, size)
                contests.append((name, work))
    return contests


if __name__ == "__main__":
    main_of(main)
