"""Where the host waits for the GPU in a detector's training step, and what the GPU spends its time on."""

import re
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import timer

from detection import build_faster_rcnn
from detection.data import open_split, train_batches
from detection.sampler import TrainBatches
from detection.shapes import CLASSES, make_shapes
from detection.transforms import TrainTransform
from resbackbone import build_resnet_backbone
from resbackbone.engine.device import autocast, choose_precision, use
from resbackbone.engine.distributed import Rank, distributed
from resbackbone.engine.optimizers import build_optimizer
from resbackbone.engine.state import TrainState
from resbackbone.tools.benchmarks.networks import backbone_weights
from resbackbone.tools.gpu_checks.record import Record, Setting

ROOT = Path(__file__).resolve().parents[2]
OWN = tuple(str(ROOT / package) for package in ("detection", "resbackbone"))
MOST_WAITS = 30  # of a step of two images; torchvision's detector has 37
WARM_UP, STEPS = 3, 5
GROUPS = {  # of kernels, or of a CPU's operators, by name
    "NMS": r"nms",
    "RoIAlign and RPN gathers": r"embedding_?bag|sumcells",
    "sorting": r"sort|topk|radix",
    "copies from the host": r"memcpy htod",
    "convolutions and matrix products": r"conv|gemm|xmma|cutlass|nvjet|wgrad|dgrad|::mm|addmm|linear",
}


class Training:
    """A Faster R-CNN with FPN that trains as in tools/train_coco.py, on synthetic images."""

    def __init__(self, setting: Setting, batch_size: int, *, ranks: int = 1):
        device = torch.device(setting.device)
        use(device)
        depth, sides = (50, (800,)) if setting.on_gpu else (18, (64,))
        weights = dict(backbone_weights(depth))
        torch.manual_seed(0)
        detector = build_faster_rcnn(
            build_resnet_backbone(depth, fpn=True, weights=weights), len(CLASSES), resize_in_training=False
        )
        self.detector = detector.to(device, memory_format=torch.channels_last).train()
        self.rank, self.precision = Rank(0, ranks, device), choose_precision(None, str(device))
        optimizer = build_optimizer(detector, "sgd", rate=1e-3, weight_decay=1e-4, decay_norms=True)
        self.state = TrainState(distributed(detector, self.rank), optimizer, self.rank)
        data = make_shapes(setting.scratch / "shapes", train_images=8, val_images=1, size=640 if setting.on_gpu else 64)
        images = open_split(data, "train", transform=TrainTransform(sides, 1333), keep_empty=True)
        order = TrainBatches(images, batch_size=batch_size, seed=0)
        self.batches = train_batches(images, order, workers=4 if setting.on_gpu else 0, device=device)

    def step(self) -> float:
        """Make one update; returns the seconds spent waiting for its batch."""
        began = time.perf_counter()
        batch = next(self.batches)
        waited = time.perf_counter() - began

        def losses(part: tuple) -> dict[str, torch.Tensor]:
            with autocast(self.rank.device, self.precision):
                return self.state.model(*part)

        self.state.update(losses, [batch], learning_rate=1e-3)
        return waited


@contextmanager
def count_waits(found: Counter) -> Iterator[None]:
    """Count host-device synchronizations by the innermost line of this project and the line that synchronizes."""

    def note(message, category, filename, lineno, *_) -> None:
        if "called a synchronizing" not in str(message):
            return
        own = [frame for frame in traceback.extract_stack() if frame.filename.startswith(OWN)]
        line = f"{Path(own[-1].filename).relative_to(ROOT)}:{own[-1].lineno}" if own else "elsewhere"
        found[f"{line}, in {'/'.join(Path(filename).parts[-3:])}:{lineno}"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note  # type: ignore[assignment]
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def waits(setting: Setting, record: Record) -> None:
    """Count the host's waits in a step of 2 and of 16 images, by line."""
    for size in setting.batches(2, 16):
        training = Training(setting, size)
        found: Counter[str] = Counter()
        for _ in range(WARM_UP):
            training.step()
        with count_waits(found):
            training.step()
        what = f"host waits in a step of {size} images"
        record.detail(what, dict(found.most_common()))
        if size == 2:
            record.at_most(what, found.total(), MOST_WAITS)
        else:
            record.row(what, found.total())


def profiled(setting: Setting, record: Record) -> None:
    """Profile steps of 2 and of 16 images: launches, idle share and time by kind of kernel."""
    for size in setting.batches(2, 16):
        training = Training(setting, size)
        for _ in range(WARM_UP):
            training.step()
        began = timer()  # synchronizes a GPU
        waited = sum(training.step() for _ in range(STEPS))
        seconds = timer() - began  # measured first: the profiler makes a step longer
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if setting.on_gpu else [])]
        with profile(activities=kinds, acc_events=True) as profiler:
            for _ in range(STEPS):
                training.step()
            timer()
        spans = device_spans(profiler, setting)
        if not spans:
            raise RuntimeError("the profiler recorded no kernel; a container may not let it read the GPU's counters")
        busy = covered(spans)
        record.row(f"{size} images: a step", f"{1000 * seconds / STEPS:.1f} ms")
        record.row(f"{size} images: kernels and copies in a step", round(len(spans) / STEPS))
        record.row(f"{size} images: device idle", f"{100 * max(0.0, 1 - busy / seconds):.0f} %")
        record.row(f"{size} images: waiting for data", f"{1000 * waited / STEPS:.2f} ms")
        for group, pattern in GROUPS.items():
            took = sum(end - start for name, start, end in spans if re.search(pattern, name, re.IGNORECASE))
            record.row(f"{size} images: {group}", f"{1000 * took / STEPS:.2f} ms")
        longest: Any = Counter()
        for name, start, end in spans:
            longest[name[:120]] += 1000 * (end - start) / STEPS
        record.detail(f"{size} images: ms a step by kernel", dict(longest.most_common(25)))
        if setting.on_gpu:
            record.row(f"{size} images: peak memory", f"{torch.cuda.max_memory_allocated() / 2**20:,.0f} MiB")


def device_spans(profiler: profile, setting: Setting) -> list[tuple[str, float, float]]:
    """(name, start, end) in seconds of every kernel and copy on the device; on a CPU, of every outermost operator."""
    kind = DeviceType.CUDA if setting.on_gpu else DeviceType.CPU
    events = [event for event in profiler.events() or () if event.device_type == kind]
    # On a GPU, annotations span kernels; on a CPU, operators contain others.
    events = [e for e in events if not (e.is_user_annotation if setting.on_gpu else e.cpu_parent)]
    return [(event.name, event.time_range.start / 1e6, event.time_range.end / 1e6) for event in events]


def covered(spans: list[tuple[str, float, float]]) -> float:
    """Seconds in which at least one of the spans runs."""
    total, reached = 0.0, float("-inf")
    for _, start, end in sorted(spans, key=lambda span: span[1]):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
