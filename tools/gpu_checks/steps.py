"""Where the host waits for the GPU in a detector's training step, and what the GPU spends its time on."""

import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import torch._inductor.config
from torch.autograd import DeviceType
from torch.profiler import profile
from torch.utils.benchmark import timer

from detection import build_faster_rcnn
from detection.data import open_split, train_batches
from detection.faster_rcnn import BUCKET
from detection.sampler import TrainBatches
from detection.shapes import CLASSES, make_shapes
from detection.transforms import TrainTransform
from resbackbone import build_resnet_backbone
from resbackbone.engine.device import autocast, choose_precision, use
from resbackbone.engine.distributed import Rank, distributed
from resbackbone.engine.optimizers import build_optimizer
from resbackbone.engine.state import TrainState, own_gradients
from resbackbone.tools.benchmarks.contest import relative_difference
from resbackbone.tools.benchmarks.networks import backbone_weights
from resbackbone.tools.gpu_checks.record import Record, Setting

MOST_WAITS = 4  # of a step, however many images; torchvision's detector has 37 with two
WARM_UP, STEPS = 3, 5


class Training:
    """A Faster R-CNN with FPN that trains as in tools/train_coco.py, on synthetic images."""

    def __init__(self, setting: Setting, batch_size: int, *, ranks: int = 1, side: int = 800):
        device = torch.device(setting.device)
        use(device)
        depth, sides = (50, (side,)) if setting.on_gpu else (18, (64,))
        weights = dict(backbone_weights(depth))
        torch.manual_seed(0)
        detector = build_faster_rcnn(
            build_resnet_backbone(depth, fpn=True, weights=weights), len(CLASSES), resize_in_training=False
        )
        self.detector = detector.to(device, memory_format=torch.channels_last).train()
        self.rank, self.precision = Rank(0, ranks, device), choose_precision(None, str(device))
        optimizer = build_optimizer(detector, "sgd", rate=1e-3, weight_decay=1e-4, decay_norms=True)
        self.state = TrainState(distributed(detector, self.rank), optimizer, self.rank)
        data = make_shapes(setting.scratch / "scenes", train_images=8, val_images=1, size=640 if setting.on_gpu else 64)
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


def waits(setting: Setting, record: Record) -> None:
    """Count the host-device synchronizations in a step of 2 and of 16 images, by line."""
    for size in setting.batches(2, 16):
        training = Training(setting, size)
        for _ in range(WARM_UP):
            training.step()
        found = waits_of(training.step)
        what = f"host waits in a step of {size} images"
        record.detail(what, dict(found.most_common()))
        record.at_most(what, found.total(), MOST_WAITS)


def waits_of(run: Callable[[], object]) -> Counter[str]:
    """How often each line of Python, by its path's last parts, makes the host wait for the GPU during `run`."""
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        run()
        torch.cuda.set_sync_debug_mode("default")
    waited = [line for line in raised if "called a synchronizing" in str(line.message)]
    return Counter(f"{'/'.join(Path(line.filename).parts[-3:])}:{line.lineno}" for line in waited)


def compiled(setting: Setting, record: Record) -> None:
    """Compare steps of 2 images by one graph, on a GPU replayed as CUDA graphs, with eager ones, in fp64; time them."""
    training = Training(setting, 2, side=13 * BUCKET)  # images of other sides are padded, and have other samples
    detector, device = training.detector, training.rank.device
    images, targets = next(training.batches)

    def step(seed: int, dtype: torch.dtype, parts: int = 1) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        detector.zero_grad()
        for _ in range(parts):  # gradients are accumulated, as in `TrainState.update`
            with autocast(device, "fp32" if dtype == torch.float64 else training.precision):
                losses = detector([image.to(dtype) for image in images], targets)
            sum(losses.values()).backward()
            if parts > 1:
                own_gradients(detector)
        return losses

    def compared(parts: int) -> dict[str, torch.Tensor]:
        losses = step(0, torch.float64, parts)
        return losses | {name: p.grad.clone() for name, p in detector.named_parameters() if p.grad is not None}

    def milliseconds() -> float:
        began = timer()
        for seed in range(STEPS):
            step(seed, torch.float32)
        return 1000 * (timer() - began) / STEPS

    for seed in range(WARM_UP):
        step(seed, torch.float32)
    record.row("eager: a step", f"{milliseconds():.1f} ms")
    detector.double()
    # A graph is compiled in the first call, recorded in the second, replayed in the third; then by both parts.
    calls = {"first call": 1, "second call": 1, "third call": 1, "two parts": 2}
    wanted = [compared(parts) for parts in calls.values()]
    detector.compile(**({"mode": "reduce-overhead"} if setting.on_gpu else {"backend": "aot_eager"}))
    as_built = detector._is_as_built()  # otherwise the graph would not be used
    record.row("the parts are those that are compiled", str(as_built), "True", as_built)
    whole = {"triton.cudagraph_or_error": True, "graph_partition": False}  # an error where no CUDA graph is recorded
    with torch._inductor.config.patch({"fallback_random": True, **whole}):  # and the same samples as in eager mode
        found = [compared(parts) for parts in calls.values()]
    for what, ours, eager in zip(calls, found, wanted, strict=True):
        record.at_most(f"compiled, {what}", relative_difference(ours, eager), 1e-6)
    detector.float()
    with torch._inductor.config.patch(whole):
        for seed in range(WARM_UP):
            step(seed, torch.float32)
        record.row("compiled: a step", f"{milliseconds():.1f} ms")


def profiled(setting: Setting, record: Record) -> None:
    """Profile steps of 2 and of 16 images: launches and idle share; the longest kernels in the details."""
    for size in setting.batches(2, 16):
        training = Training(setting, size)
        for _ in range(WARM_UP):
            training.step()
        began = timer()  # synchronizes a GPU
        waited = sum(training.step() for _ in range(STEPS))
        seconds = timer() - began  # measured first: the profiler makes a step longer
        with profile(acc_events=True) as profiler:  # of the CPU, and of a GPU if there is one
            for _ in range(STEPS):
                training.step()
            timer()
        averages = profiler.key_averages()
        record.row(f"{size} images: a step", f"{1000 * seconds / STEPS:.1f} ms")
        record.row(f"{size} images: waiting for data", f"{1000 * waited / STEPS:.2f} ms")
        sort_by = f"self_{'device' if setting.on_gpu else 'cpu'}_time_total"
        record.detail(f"{size} images: profile", averages.table(sort_by=sort_by, row_limit=25).splitlines())
        if setting.on_gpu:
            kernels = [e for e in averages if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
            if not kernels:
                raise RuntimeError(
                    "the profiler recorded no kernel; a container may not let it read the GPU's counters"
                )
            idle = 1 - sum(kernel.self_device_time_total for kernel in kernels) / 1e6 / seconds
            record.row(f"{size} images: kernels and copies in a step", round(sum(k.count for k in kernels) / STEPS))
            record.row(f"{size} images: device idle", f"{100 * max(0.0, idle):.0f} %")
            record.row(f"{size} images: peak memory", f"{torch.cuda.max_memory_allocated() / 2**20:,.0f} MiB")
