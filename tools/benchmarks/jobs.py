"""What there is to compare: each job's contests, from the options of the command."""

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks import networks
from benchmarks.contest import MODES, OWN, Contest
from benchmarks.networks import COMPILED, FUSED, GRAPH, Setting

PEERS = ("torchvision", "timm", "detectron2")
DETECTOR_MODES = ("fp32", "bf16-channels-last")
# How much outputs may differ (`relative_difference`): TF32 keeps 11 bits and bf16 8, and packages differ in where they
# round.
TOLERANCE = {"fp64": 1e-5, "fp32": 1e-4, "tf32": 1e-2, "bf16": 3e-2}
DETECTIONS_AN_IMAGE = 100
INPUT_IMAGES = 100
SLOW_ROUNDS = 3  # at most, where a peer takes long and times hardly spread
SECONDS_TO_COMPILE = 60.0


@dataclass(frozen=True)
class Plan:
    """What the options come to."""

    device: str
    modes: tuple[str, ...] | None
    peers: tuple[str, ...]  # that are installed
    depth: int
    height: int
    width: int
    batch_size: int
    imagenet_batch_size: int
    scoring_images: int
    annotation_images: int
    data: Path | None
    images: Path | None
    scratch: Path

    def settings(self, modes: tuple[str, ...], batch_size: int | None = None) -> Iterator[Setting]:
        """One for each of the asked modes, or of `modes` where none are asked."""
        for mode in self.modes or modes:
            yield Setting(mode, self.device, self.depth, self.height, self.width, batch_size or self.batch_size)

    def with_peers(self, *own: str, among: tuple[str, ...] = PEERS) -> tuple[str, ...]:
        return (*own, *(name for name in self.peers if name in among))

    def tolerance(self, mode: str) -> float:
        tf32 = torch.device(self.device).type == "cuda" and mode.startswith("fp32")
        return TOLERANCE["tf32" if tf32 else mode.split("-")[0]]


def backbones(plan: Plan, *, training: bool) -> Iterator[Contest]:
    names = plan.with_peers(*((OWN,) if training else (OWN, f"{OWN}, {FUSED}")))
    for setting in plan.settings(tuple(MODES)):
        yield Contest(
            "training" if training else "inference",
            names,
            partial(networks.backbone, setting, training),
            mode=setting.mode,
            tolerance=plan.tolerance(setting.mode),
            network=True,
            memory=True,
        )


def compiled(plan: Plan, *, training: bool) -> Iterator[Contest]:
    """Each package under torch.compile, and on a GPU as a CUDA graph too."""
    ways = (COMPILED, GRAPH) if torch.device(plan.device).type == "cuda" else (COMPILED,)
    names = (OWN, *(f"{name}, {way}" for way in reversed(ways) for name in plan.with_peers(OWN)))
    for setting in plan.settings(("bf16-channels-last",)):
        yield Contest(
            "compiled-training" if training else "compiled-inference",
            names,
            partial(networks.backbone, setting, training),
            mode=setting.mode,
            tolerance=plan.tolerance(setting.mode),
            network=True,
            seconds_to_build=SECONDS_TO_COMPILE,
        )


def detectors(plan: Plan, *, training: bool) -> Iterator[Contest]:
    from benchmarks import detectors  # torchvision's classes

    scene = scene_of(plan)
    for setting in plan.settings(DETECTOR_MODES):
        yield Contest(
            f"detector-{'training' if training else 'inference'}",
            plan.with_peers(OWN, among=tuple(detectors.DETECTORS)),
            partial(detectors.contender, setting, training, scene),
            mode=setting.mode,
            tolerance=TOLERANCE["fp64"],  # whatever the mode
            difference=detectors.difference,
            network=True,
            memory=True,
        )


def imagenet(plan: Plan) -> Iterator[Contest]:
    for setting in plan.settings(("bf16-channels-last",), plan.imagenet_batch_size):
        names = plan.with_peers(OWN, among=("torchvision", "timm"))
        yield Contest(
            "imagenet",
            names,
            partial(networks.classifier, networks.imagenet(setting)),
            mode=setting.mode,
            tolerance=plan.tolerance(setting.mode),
            items=(setting.batch_size,) * len(names),
            network=True,
        )


def scoring(plan: Plan) -> Iterator[Contest]:
    from benchmarks import coco_files

    annotations, detections = plan.scratch / "scoring.json", plan.scratch / "detections.npy"
    truth = coco_files.write_instances(annotations, plan.scoring_images)
    np.save(detections, coco_files.detections_for(truth, plan.scoring_images, DETECTIONS_AN_IMAGE))
    yield Contest(
        "scoring",
        (OWN, coco_files.REFEREE),
        partial(coco_files.scoring, annotations, detections),
        tolerance=1e-9,
        most_rounds=SLOW_ROUNDS,
    )


def annotations(plan: Plan) -> Iterator[Contest]:
    from benchmarks import coco_files

    path = plan.scratch / "annotations.json"
    coco_files.write_instances(path, plan.annotation_images)
    yield Contest(
        "annotations",
        (OWN, coco_files.REFEREE),
        partial(coco_files.loading, path),
        memory=True,
        most_rounds=SLOW_ROUNDS,
    )


def input_pipeline(plan: Plan) -> Iterator[Contest]:
    import benchmark_input

    folder = plan.images or noise_images(plan.scratch / "images")
    options = benchmark_input.Options(folder, batch_size=20, images=INPUT_IMAGES)
    rows = benchmark_input.pipelines(options, str(plan.scratch))
    names = (*(name for name in rows if name != benchmark_input.PLAIN), benchmark_input.PLAIN)

    def measure(rounds: int) -> dict[str, list[float]]:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return benchmark_input.measure(rows, rounds)
        finally:
            torch.set_num_threads(threads)

    yield Contest("input", names, measure=measure, items=(INPUT_IMAGES,) * len(names))


def index(plan: Plan) -> Iterator[Contest]:
    from benchmarks import index

    yield Contest(
        "index",
        index.NAMES,
        index.drawing,
        reference=index.NAMES[0],
        items=(index.BATCHES * index.BATCH_SIZE,) * len(index.NAMES),
        memory=True,
    )


def imports(plan: Plan) -> Iterator[Contest]:
    from benchmarks import processes

    names = plan.with_peers(OWN, *((processes.WITH_DETECTION,) if importlib.util.find_spec("torchvision") else ()))
    yield Contest("import", names, processes.importing, most_rounds=SLOW_ROUNDS)


def scaling(plan: Plan) -> Iterator[Contest]:
    from benchmarks import processes

    setting = Setting("fp32", "cpu", plan.depth, plan.height, plan.width, plan.batch_size)
    yield Contest(
        "scaling",
        (processes.TWO, processes.ONE),
        measure=partial(processes.scaling, setting, plan.scratch),
        mode="fp32",
        reference=processes.ONE,
        items=(2 * plan.batch_size, plan.batch_size),
        most_rounds=SLOW_ROUNDS,
    )


JOBS = {
    "inference": partial(backbones, training=False),
    "training": partial(backbones, training=True),
    "detector-inference": partial(detectors, training=False),
    "detector-training": partial(detectors, training=True),
    "imagenet": imagenet,
    "compiled-inference": partial(compiled, training=False),
    "compiled-training": partial(compiled, training=True),
    "scoring": scoring,
    "annotations": annotations,
    "index": index,
    "input": input_pipeline,
    "import": imports,
    "scaling": scaling,
}
ON_GPU_ONLY = ("imagenet", "compiled-inference", "compiled-training")  # by default
ON_CPU_ONLY = ("index", "input", "scaling")  # by default


def titles(plan: Plan) -> dict[str, str]:
    """The heading of each job's table."""
    size = f"{plan.batch_size} x 3 x {plan.height} x {plan.width}"
    network = f"ResNet-{plan.depth}"
    return {
        "inference": f"Backbone inference: {network}, c2 to c5, {size}",
        "training": f"Backbone training step: {network}, stem and c2 frozen, {size}",
        "detector-inference": f"Faster R-CNN {network} FPN inference, one image, {plan.height} pixels",
        "detector-training": f"Faster R-CNN {network} FPN training step, one image, {plan.height} pixels",
        "imagenet": f"ImageNet training step: {network}, batches of {plan.imagenet_batch_size}, 224 x 224",
        "compiled-inference": f"Backbone inference, compiled: {network}, {size}",
        "compiled-training": f"Backbone training step, compiled: {network}, {size}",
        "scoring": f"COCO scoring: {plan.scoring_images} images, {DETECTIONS_AN_IMAGE} detections an image",
        "annotations": f"Loading an annotation file: {plan.annotation_images} images",
        "index": "Drawing 1,000 batches of 16 images from an index",
        "input": f"ImageNet input pipeline, one core, {INPUT_IMAGES} images",
        "import": "Import, beyond that of torch",
        "scaling": f"Training step in one and two processes of one thread (gloo): {network}, {size} each",
    }


def scene_of(plan: Plan):
    """The first image of COCO's val2017 with three objects or more; without such data, a drawn one."""
    from benchmarks.detectors import Scene
    from detection.data import find_coco, open_split
    from detection.shapes import make_shapes

    folder = plan.data or find_coco() or make_shapes(plan.scratch / "shapes", train_images=1, val_images=5, size=640)
    dataset = open_split(folder, "val", keep_empty=False)
    image, target = next(
        (sample for sample in map(dataset.__getitem__, range(len(dataset))) if len(sample[1]["boxes"]) > 2), dataset[0]
    )
    return Scene(image / 255, target["boxes"], target["labels"].clamp(max=80))


def noise_images(folder: Path) -> Path:
    """JPEGs about as large as ImageNet's (456 x 394 pixels, 100 KB), in two class folders."""
    rng = np.random.default_rng(0)
    for i in range(INPUT_IMAGES):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 14, 3), dtype=np.uint8)).resize(
            (456, 394), Image.Resampling.BICUBIC
        )
        pixels = np.asarray(coarse) + rng.normal(0, 12, (394, 456, 3))
        path = folder / f"class{i % 2}" / f"{i:04d}.jpg"
        os.makedirs(path.parent, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=92)
    return folder
