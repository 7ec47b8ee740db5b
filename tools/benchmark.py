"""This package beside torchvision, timm and detectron2 (those installed): time and memory of the same jobs.

python tools/benchmark.py                                             on the CPU; about a quarter of an hour
python tools/benchmark.py --jobs training --modes fp32 --rounds 9 --output runs/benchmark
python tools/benchmark.py --device cuda                               within 9 minutes
python tools/benchmark.py --device cuda --jobs detector-training --batch-sizes 1 2 16
python tools/benchmark.py --height 64 --width 96 --depth 18 --rounds 1      to see that it works; figures of no use

All packages get the same weights, inputs and settings, and their outputs are compared before anything is timed. They
take turns in an order that is shuffled each round. A ratio is the median over the rounds of time / time of the fastest
other package: below 1 is faster. Packages that fail are named at the end; the rest is measured. A job that cannot be
set up ends the run. docs/benchmarks.md describes the jobs.
"""

import importlib.util
import json
import math
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from resbackbone.cli.command import console, main_of, parse, progress_console
from resbackbone.cli.errors import from_option
from resbackbone.cli.options import check_counts

import torch

from resbackbone.atomic import write_atomically
from resbackbone.checks import UserError, one_of
from resbackbone.engine.device import choose_device
from resbackbone.resnet import DEPTHS
from resbackbone.tools.benchmarks import contest, data, detectors, networks
from resbackbone.tools.benchmarks.contest import BF16, COMPILED, FUSED, MODES, OWN, TF32, Contest, Limits
from resbackbone.tools.benchmarks.machine import describe
from resbackbone.tools.benchmarks.networks import Workload
from resbackbone.tools.benchmarks.report import label_of, markdown, not_measured

PEERS = ("torchvision", "timm", "detectron2")
# How far outputs may differ (`relative_difference`). TF32 keeps 11 bits and bf16 8; packages round in different places.
TOLERANCE = {"fp64": 1e-5, "fp32": 1e-4, "tf32": 1e-2, "bf16": 3e-2}
ANNOTATION_IMAGES = 118_287  # as in COCO train2017
SLOW_ROUNDS = 3  # at most, for jobs whose peers take long and whose times hardly spread


@dataclass(frozen=True)
class Options:
    """This package beside torchvision, timm and detectron2: time and memory of the same jobs."""

    jobs: tuple[str, ...] | None = None
    """Of inference, training, detector-inference, detector-training, imagenet, scoring, annotations, input, scaling.
    Default: on a GPU the first five, on a CPU all but imagenet."""
    modes: tuple[str, ...] | None = None
    """Of fp32, fp32-channels-last, tf32-channels-last (GPU), bf16-channels-last, bf16-compiled (not for detectors).
    Default: those that suit the job."""
    depth: int = 50
    """Of every network: 18, 34, 50, 101 or 152."""
    height: int = 800
    """Pixels; for detectors those of the shorter side."""
    width: int = 1216
    """Pixels."""
    batch_sizes: tuple[int, ...] | None = None
    """Images in a network's run; each size is measured by itself. Default: 1, for imagenet 256."""
    rounds: int | None = None
    """Default: 5, on a GPU 8."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    output: Path | None = None
    """Folder for benchmark.json (every round) and benchmark.md."""
    budget: float | None = None
    """Seconds after which nothing more is started. Default: none, on a GPU 500."""
    data: Path | None = None
    """COCO, for the detectors' image. Default: a drawn image."""
    images: Path | None = None
    """A folder of class folders with JPEGs, for the input pipelines. Default: drawn images."""
    scoring_images: int = 1000
    """Images to score, with 100 detections each."""
    quiet: bool = False
    """Print only warnings, errors and the tables."""

    @property
    def on_gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"


def main(argv: list[str] | None = None) -> dict:
    """Jobs -> contests -> tables; the content of benchmark.json. Raises UserError at the end if anything failed."""
    options = parse(Options, argv)
    check(options)
    if options.on_gpu:
        torch.cuda.set_device(torch.device(options.device).index or 0)  # timers synchronize the current device
    budget = options.budget or (500.0 if options.on_gpu else math.inf)
    limits = Limits(options.device, options.rounds or (8 if options.on_gpu else 5), time.monotonic() + budget)
    content = {
        "command": shlex.join(["python", "tools/benchmark.py", *(sys.argv[1:] if argv is None else argv)]),
        **describe(options.device, torch.get_num_threads()),
        "options": {name: str(v) if isinstance(v, Path) else v for name, v in asdict(options).items()},
        "finished": False,
        "failed": [],
        "skipped": [f"{name}, which is not installed" for name in PEERS if not importlib.util.find_spec(name)],
        "jobs": {},
        "contests": [],
    }
    for line in content["skipped"]:
        progress_console.print(f"without {line}")
    suited = [job for job in JOBS if (job in NETWORK_JOBS if options.on_gpu else job != "imagenet")]
    try:
        with tempfile.TemporaryDirectory() as scratch:
            for job in options.jobs or suited:
                measure_job(job, options, Path(scratch), content, limits)
        content["finished"] = True
    finally:  # an interrupted run reports what it has measured
        console.print(markdown(content))
        write(content, options.output)
    if content["failed"]:
        raise UserError(f"{len(content['failed'])} failed: {'; '.join(content['failed'])}")
    return content


def check(options: Options) -> None:
    """Make the output folder. Raises UserError if an option is out of range."""
    for kind, asked, known in (("job", options.jobs, JOBS), ("mode", options.modes, MODES)):
        for name in asked or ():
            one_of(kind, name, known)
    one_of("depth", options.depth, DEPTHS)
    check_counts(options)
    if options.batch_sizes and min(options.batch_sizes) < 1:
        raise UserError(f"--batch-sizes {min(options.batch_sizes)}: must be at least 1")
    with from_option("--device"):
        one_of("device", torch.device(choose_device(options.device)).type, ("cpu", "cuda"))
    if TF32 in (options.modes or ()) and not options.on_gpu:
        raise UserError(f"--modes {TF32} with --device {options.device}: TF32 needs --device cuda")
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)


def measure_job(job: str, options: Options, scratch: Path, content: dict, limits: Limits) -> None:
    """Measure all contests of a job, and write the results after each."""
    for one in JOBS[job](job, options, scratch):
        began, result = time.monotonic(), one.empty_result()
        content["jobs"][job] = one.heading
        try:
            contest.measure(one, result, limits)
        finally:  # an interrupted contest keeps its rounds
            content["contests"].append(result)
            content["failed"] += not_measured(result, ["failed"])
            write(content, options.output)
        for line in [*not_measured(result), f"{label_of(result)} took {time.monotonic() - began:.0f} s"]:
            progress_console.print(line)
        contest.release_memory()
        torch.compiler.reset()  # otherwise torch.compile gives up on a class of which it has compiled eight networks


def write(content: dict, folder: Path | None) -> None:
    if folder is not None:
        write_atomically(folder / "benchmark.json", json.dumps(content, indent=1) + "\n")
        write_atomically(folder / "benchmark.md", markdown(content))


# The jobs: each makes its contests from the options and a folder for scratch files.


def with_peers(*own: str, among: tuple[str, ...] = PEERS) -> tuple[str, ...]:
    return (*own, *(name for name in among if importlib.util.find_spec(name)))


def by_mode(made: Contest, options: Options, modes: tuple[str, ...], default_size: int = 1) -> Iterator[Contest]:
    """A contest between networks for each batch size and mode, by default each of `modes`."""
    for size in options.batch_sizes or (default_size,):
        for mode in options.modes or modes:
            work = Workload(mode, options.device, options.depth, options.height, options.width, size)
            yield replace(
                made,
                build=partial(made.build, work),
                mode=mode,
                batch_size=size,
                tolerance=made.tolerance or TOLERANCE[mode.split("-")[0]],
                items=(size,) * len(made.names),
            )


def sizes_of(options: Options, default: int = 1) -> str:
    return " or ".join(map(str, options.batch_sizes or (default,)))


def backbones(job: str, options: Options, _: Path) -> Iterator[Contest]:
    training = job == "training"
    what = f"ResNet-{options.depth}, {'stem and c2 frozen' if training else 'c2 to c5'}"
    size = f"{sizes_of(options)} x 3 x {options.height} x {options.width}"
    heading = f"Backbone {'training step' if training else 'inference'}: {what}, {size}"
    names = with_peers(OWN) if training else with_peers(OWN, f"{OWN}, {FUSED}")
    modes = ("fp32", "fp32-channels-last", *((TF32, BF16, COMPILED) if options.on_gpu else (BF16,)))
    return by_mode(Contest(job, heading, names, partial(networks.backbone, training), memory=True), options, modes)


def faster_rcnn(job: str, options: Options, _: Path) -> Iterator[Contest]:
    training = job == "detector-training"
    what = f"Faster R-CNN ResNet-{options.depth} FPN {'training step' if training else 'inference'}"
    images = "one image" if (options.batch_sizes or (1,)) == (1,) else f"{sizes_of(options)} images"
    with from_option("--data"):
        scene = detectors.read_scene(options.data) if options.data else detectors.drawn_scene()
    own = (OWN,) if training else (OWN, f"{OWN}, {FUSED}")
    made = Contest(
        job,
        f"{what}, {images}, {options.height} pixels",
        with_peers(*own, among=("torchvision", "detectron2")),
        partial(detectors.contender, training, scene),
        tolerance=TOLERANCE["fp64"],  # whatever the mode
        difference=detectors.difference,
        memory=True,
    )
    return by_mode(made, options, (TF32 if options.on_gpu else "fp32", BF16))


def imagenet(job: str, options: Options, _: Path) -> Iterator[Contest]:
    heading = f"ImageNet training step: ResNet-{options.depth}, batches of {sizes_of(options, 256)}, 224 x 224"
    names = with_peers(OWN, among=("torchvision", "timm"))
    modes = (BF16, COMPILED) if options.on_gpu else (BF16,)
    return by_mode(Contest(job, heading, names, networks.classifier), options, modes, 256)


def scoring(job: str, options: Options, scratch: Path) -> Iterator[Contest]:
    truth = data.write_instances(scratch / "scoring.json", options.scoring_images)
    detections = data.detections_for(truth, options.scoring_images)
    heading = f"COCO scoring: {options.scoring_images} images, {data.DETECTIONS_AN_IMAGE} detections an image"
    build = partial(data.scoring, scratch / "scoring.json", detections)
    yield Contest(job, heading, (OWN, data.REFEREE), build, tolerance=1e-9, most_rounds=SLOW_ROUNDS)


def annotations(job: str, options: Options, scratch: Path) -> Iterator[Contest]:
    data.write_instances(scratch / "annotations.json", ANNOTATION_IMAGES)
    heading = f"Loading an annotation file: {ANNOTATION_IMAGES} images"
    build = partial(data.loading, scratch / "annotations.json")
    yield Contest(job, heading, (OWN, data.REFEREE), build, memory=True, most_rounds=SLOW_ROUNDS)


def input_pipelines(job: str, options: Options, scratch: Path) -> Iterator[Contest]:
    folder = options.images or data.drawn_images(scratch)
    heading = f"ImageNet input pipeline, one core, {data.INPUT_IMAGES} images"
    items = (data.INPUT_IMAGES,) * len(data.PIPELINES)
    build = partial(data.reading, folder, scratch)
    yield Contest(job, heading, data.PIPELINES, build, reference=data.PLAIN, items=items)


def scaling(job: str, options: Options, scratch: Path) -> Iterator[Contest]:
    work = Workload("fp32", "cpu", options.depth, options.height, options.width, (options.batch_sizes or (1,))[0])
    size = f"{work.batch_size} x 3 x {work.height} x {work.width}"
    heading = f"Training step in one and two processes of one thread (gloo): ResNet-{options.depth}, {size} each"
    yield Contest(
        job,
        heading,
        (networks.TWO, networks.ONE),
        partial(networks.in_processes, work, scratch),
        mode="fp32",
        reference=networks.ONE,
        items=(2 * work.batch_size, work.batch_size),
        most_rounds=SLOW_ROUNDS,
    )


NETWORK_JOBS: dict[str, Callable[[str, Options, Path], Iterator[Contest]]] = {
    "inference": backbones,
    "training": backbones,
    "detector-inference": faster_rcnn,
    "detector-training": faster_rcnn,
    "imagenet": imagenet,
}
JOBS = NETWORK_JOBS | {
    "scoring": scoring,
    "annotations": annotations,
    "input": input_pipelines,
    "scaling": scaling,
}


if __name__ == "__main__":
    main_of(main)
