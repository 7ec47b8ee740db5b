"""What there is to compare: each job's contests, from the options of the command and a folder for scratch files."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from resbackbone.tools.benchmarks import networks
from resbackbone.tools.benchmarks.contest import COMPILED, FUSED, GRAPH, MODES, OWN, Contest
from resbackbone.tools.benchmarks.networks import Setting

if TYPE_CHECKING:
    from resbackbone.tools.benchmark import Options

PEERS = ("torchvision", "timm", "detectron2")
GPU_MODES = ("tf32-channels-last",)  # on a CPU there is no TF32
BF16 = "bf16-channels-last"
# How much outputs may differ (`relative_difference`): TF32 keeps 11 bits and bf16 8, and packages differ in where they
# round.
TOLERANCE = {"fp64": 1e-5, "fp32": 1e-4, "tf32": 1e-2, "bf16": 3e-2}
DETECTIONS_AN_IMAGE = 100
INPUT_IMAGES = 100
SLOW_ROUNDS = 3  # at most, where a peer takes long and times hardly spread


def with_peers(options: "Options", *own: str, among: tuple[str, ...] = PEERS) -> tuple[str, ...]:
    return (*own, *(name for name in options.peers if name in among))


def size_of(options: "Options") -> str:
    return f"{options.batch_size} x 3 x {options.height} x {options.width}"


def by_mode(contest: Contest, options: "Options", modes: tuple[str, ...], batch_size: int) -> Iterator[Contest]:
    """A contest between networks in each mode that is asked for, by default in each of `modes`."""
    for mode in options.modes or modes:
        setting = Setting(mode, options.device, options.depth, options.height, options.width, batch_size)
        yield replace(
            contest,
            build=partial(contest.build, setting),
            mode=mode,
            batch_size=batch_size,
            tolerance=contest.tolerance or TOLERANCE[mode.split("-")[0]],
            items=(batch_size,) * len(contest.names),
        )


def backbones(job: str, options: "Options", _: Path) -> Iterator[Contest]:
    training = job == "training"
    names = with_peers(options, *((OWN,) if training else (OWN, f"{OWN}, {FUSED}")))
    what = "training step: {}, stem and c2 frozen, {}" if training else "inference: {}, c2 to c5, {}"
    heading = f"Backbone {what.format(f'ResNet-{options.depth}', size_of(options))}"
    contest = Contest(job, heading, names, partial(networks.backbone, training), memory=True)
    modes = tuple(mode for mode in MODES if options.on_gpu or mode not in GPU_MODES)
    return by_mode(contest, options, modes, options.batch_size)


def compiled(job: str, options: "Options", _: Path) -> Iterator[Contest]:
    """Each package under torch.compile, and on a GPU first as a CUDA graph."""
    training = job == "compiled-training"
    ways = (GRAPH, COMPILED) if options.on_gpu else (COMPILED,)
    names = (OWN, *(f"{name}, {way}" for way in ways for name in with_peers(options, OWN)))
    what = "training step" if training else "inference"
    heading = f"Backbone {what}, compiled: ResNet-{options.depth}, {size_of(options)}"
    contest = Contest(job, heading, names, partial(networks.backbone, training))
    return by_mode(contest, options, (BF16,), options.batch_size)


def imagenet(job: str, options: "Options", _: Path) -> Iterator[Contest]:
    """On a GPU under torch.compile too."""
    names = with_peers(options, OWN, among=("torchvision", "timm"))
    if options.on_gpu:
        names += tuple(f"{name}, {COMPILED}" for name in names)
    size = options.imagenet_batch_size
    heading = f"ImageNet training step: ResNet-{options.depth}, batches of {size}, 224 x 224"
    return by_mode(Contest(job, heading, names, networks.classifier), options, (BF16,), size)


def detectors(job: str, options: "Options", _: Path) -> Iterator[Contest]:
    from resbackbone.tools.benchmarks import detectors

    training, sizes = job == "detector-training", options.detector_batch_sizes
    what = f"Faster R-CNN ResNet-{options.depth} FPN {'training step' if training else 'inference'}"
    own = (OWN,) if training else (OWN, f"{OWN}, {FUSED}")
    images = "one image" if sizes == (1,) else f"{' or '.join(map(str, sizes))} images"
    contest = Contest(
        job,
        f"{what}, {images}, {options.height} pixels",
        with_peers(options, *own, among=("torchvision", "detectron2")),
        partial(detectors.contender, training, detectors.scene_of(options.data)),
        tolerance=TOLERANCE["fp64"],  # whatever the mode
        difference=detectors.difference,
        memory=True,
    )
    for size in sizes:
        yield from by_mode(contest, options, ("tf32-channels-last" if options.on_gpu else "fp32", BF16), size)


def scoring(job: str, options: "Options", scratch: Path) -> Iterator[Contest]:
    import numpy as np

    from resbackbone.tools.benchmarks import data

    annotations, detections = scratch / "scoring.json", scratch / "detections.npy"
    truth = data.write_instances(annotations, options.scoring_images)
    np.save(detections, data.detections_for(truth, options.scoring_images, DETECTIONS_AN_IMAGE))
    heading = f"COCO scoring: {options.scoring_images} images, {DETECTIONS_AN_IMAGE} detections an image"
    build = partial(data.scoring, annotations, detections)
    yield Contest(job, heading, (OWN, data.REFEREE), build, tolerance=1e-9, most_rounds=SLOW_ROUNDS)


def annotations(job: str, options: "Options", scratch: Path) -> Iterator[Contest]:
    from resbackbone.tools.benchmarks import data

    path = scratch / "annotations.json"
    data.write_instances(path, options.annotation_images)
    heading = f"Loading an annotation file: {options.annotation_images} images"
    build = partial(data.loading, path)
    yield Contest(job, heading, (OWN, data.REFEREE), build, memory=True, most_rounds=SLOW_ROUNDS)


def index(job: str, options: "Options", _: Path) -> Iterator[Contest]:
    from resbackbone.tools.benchmarks import data

    heading = "Drawing 1,000 batches of 16 images from an index"
    items = (data.BATCHES * data.BATCH_SIZE,) * len(data.INDEXES)
    yield Contest(job, heading, data.INDEXES, data.drawing, reference=data.INDEXES[0], items=items, memory=True)


def input_pipeline(job: str, options: "Options", scratch: Path) -> Iterator[Contest]:
    from resbackbone.tools import benchmark_input

    folder = options.images or benchmark_input.noise_images(scratch / "images", INPUT_IMAGES)
    yield benchmark_input.pipelines(benchmark_input.Options(folder, batch_size=20, images=INPUT_IMAGES), scratch)


def imports(job: str, options: "Options", _: Path) -> Iterator[Contest]:
    from resbackbone.tools.benchmarks import processes

    names = with_peers(options, OWN, processes.WITH_DETECTION)
    yield Contest(job, "Import, beyond that of torch", names, processes.importing, most_rounds=SLOW_ROUNDS)


def scaling(job: str, options: "Options", scratch: Path) -> Iterator[Contest]:
    from resbackbone.tools.benchmarks import processes

    size = options.batch_size
    setting = Setting("fp32", "cpu", options.depth, options.height, options.width, size)
    yield Contest(
        job,
        f"Training step in one and two processes of one thread (gloo): ResNet-{options.depth}, {size_of(options)} each",
        (processes.TWO, processes.ONE),
        measure=partial(processes.scaling, setting, scratch),
        mode="fp32",
        reference=processes.ONE,
        items=(2 * size, size),
        most_rounds=SLOW_ROUNDS,
    )


JOBS: dict[str, Callable[[str, "Options", Path], Iterator[Contest]]] = {
    "inference": backbones,
    "training": backbones,
    "detector-inference": detectors,
    "detector-training": detectors,
    "imagenet": imagenet,
    "compiled-training": compiled,
    "compiled-inference": compiled,
    "scoring": scoring,
    "annotations": annotations,
    "index": index,
    "input": input_pipeline,
    "import": imports,
    "scaling": scaling,
}
# By default. A GPU's time is not for what the processor does alone.
ON_GPU_ONLY = ("imagenet", "compiled-training", "compiled-inference")
ON_CPU_ONLY = ("scoring", "annotations", "index", "input", "import", "scaling")
