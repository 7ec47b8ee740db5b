"""Train the paper's CIFAR-10 networks, residual or plain, and test them (He et al. 2015, Sec. 4.2).

python tools/train_cifar10.py --depth 20 --data cifar10
python tools/train_cifar10.py --depth 56 --plain --data cifar10 --steps 4000        a sixteenth of the paper's schedule
python tools/train_cifar10.py --depth 20 --data cifar10 --output runs/mine --resume     resumes where it stopped
python tools/train_cifar10.py --data synthetic --steps 100                          no data at hand, seconds
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from resbackbone.cli.command import Auto, console, main_of, parse
from resbackbone.cli.errors import from_option
from resbackbone.cli.options import (
    MachineOptions,
    RunOptions,
    check_shortcut,
    choose_machine,
    launch_command,
    training_options,
)
from resbackbone.cli.training import prepare_run

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from resbackbone.analysis import count_parameters
from resbackbone.atomic import write_json
from resbackbone.checks import UserError, one_of, usual_folder
from resbackbone.cifar import CIFAR_DEPTHS, CifarResNet, build_cifar_resnet, save_cifar_resnet
from resbackbone.classification.cifar10 import (
    LAYOUT,
    SYNTHETIC,
    Cifar10,
    Split,
    mean_image_of,
    open_cifar10,
    to_model_input,
    train_batches,
)
from resbackbone.classification.report import Predictions, write_report
from resbackbone.engine import loop
from resbackbone.engine.distributed import Rank, broadcast, distributed, from_main, gather, share_buffers
from resbackbone.engine.optimizers import build_optimizer
from resbackbone.engine.schedule import Schedule
from resbackbone.engine.state import TrainState, seed_step
from resbackbone.engine.task import Task

PAPER = "He et al. 2015, Sec. 4.2: SGD 0.1, momentum 0.9, weight decay 1e-4, a tenth of the rate at 1/2 and at 3/4"
CIFAR10_FOLDERS = ({"CIFAR10_DIR": ""}, "datasets/cifar10")
RATE, BATCH_SIZE, STEPS = 0.1, 128, 64_000
WEIGHT_DECAY = 1e-4
WARMUP_DEPTH, WARMUP_STEPS = 110, 400
TEST_BATCH = 500


@dataclass(frozen=True)
class DataOptions:
    data: Auto[Path] = None
    """Folder with cifar-10-batches-py/, or with train/<class>/ and test/<class>/; or synthetic: patterns drawn on the
    spot. Default: $CIFAR10_DIR or ./datasets/cifar10."""
    validation: bool = False
    """Hold out a tenth of the training images (the paper's 45k/5k) and test on them instead of the test images."""


@dataclass(frozen=True)
class NetworkOptions:
    depth: int = 20
    """20, 32, 44, 56, 110 or 1202."""
    plain: bool = False
    """Without shortcuts: the paper's plain nets."""
    shortcut: Auto[str] = None
    """A, B or C (the paper's Sec. 4.1). Default: A, which the paper uses here."""


@dataclass(frozen=True)
class TrainingOptions:
    steps: Auto[int] = None
    """Length of the schedule in updates; the rate drops at 1/2 and at 3/4 of it. Default: 64000, with 128 images per
    update."""
    batch_size: int = BATCH_SIZE
    """Images per update, over all GPUs; the rate and the default of --steps are scaled with it."""
    checkpoint_period: int = 500
    """Updates between checkpoints."""
    eval_period: Auto[int] = None
    """Updates between tests; 0 tests at the end only. Default: 1000, or a tenth of --steps if that is less."""


@dataclass(frozen=True)
class Options(DataOptions, NetworkOptions, TrainingOptions, RunOptions, MachineOptions):
    """Train one of the paper's CIFAR-10 networks and test it."""


@dataclass(frozen=True)
class PaperSchedule(Schedule):
    """The learning rate of very deep nets, which start with a tenth of it."""

    warmup_factor: float = 0.1

    def learning_rate(self, step: int) -> float:
        return self.rate * self.warmup_factor if step < self.warmup_steps else super().learning_rate(step)


def main(argv: list[str] | None = None) -> None:
    """Options -> a trained network and its test error, in a run folder; in one process, or in one for each GPU."""
    options = training_options(parse(Options, argv), argv, complete=complete, default_folder=default_folder)
    launch_command(train, options)


def train(rank: Rank, options: Options) -> None:
    """Data -> network -> updates -> test error, in every process; rank 0 writes."""
    session = prepare_run(rank, options, default=default_folder(options))
    with from_option("--data"):
        data = from_main(lambda: open_cifar10(options.data), rank)
    if options.validation:
        data = data.held_out()
    session.info(f"data:  {data.summary()} in {options.data}{', a tenth held out to test on' * options.validation}")

    seed_step(options.seed, 0, 0)  # every rank starts from the same weights
    shortcut = shortcut_of(options)
    network: dict[str, Any] = {"depth": options.depth, "shortcut": shortcut, "num_classes": len(data.classes)}
    checkpoint = session.checkpoint and session.checkpoint / "model.safetensors"
    model = build_cifar_resnet(**network, weights=checkpoint)
    model.to(rank.device).to(memory_format=torch.channels_last).train()
    parameters = count_parameters(model)
    session.info(f"{name_of(options)}, shortcut {shortcut}, {parameters / 1e6:.2f} M parameters")

    schedule = schedule_of(options)
    optimizer = build_optimizer(model, "sgd", rate=schedule.rate, weight_decay=WEIGHT_DECAY, decay_norms=True)
    state = TrainState(distributed(model, rank), optimizer, rank, scaled=options.precision == "fp16")
    task = Cifar10Task(options, data, rank)
    counts = {
        "training_images": len(data.train[1]),
        "validation_images": len(data.test[1]),
        "classes": len(data.classes),
    }
    run = session.train(task, state, schedule, **counts, train_set_sha256=data.fingerprint())

    results = loop.evaluate(task, state, run, final=True)
    if rank.is_main:
        task.save(state.evaluated, session.folder)
        content = {**results, **network, "parameters": parameters, "steps": state.step}
        write_json(session.folder / "results.json", content)
        session.finish({f"{split_name(options)} error": f"{100 * results['error']:.2f}%"})
        console.print(task.summary(results))
    run.close()


def split_name(options: Options) -> str:
    return "validation" if options.validation else "test"


class Cifar10Task(Task):
    """A CIFAR network on its images less their mean image; a batch is (images, labels)."""

    def __init__(self, options: Options, data: Cifar10, rank: Rank):
        self.options, self.data, self.rank = options, data, rank
        self.mean_image = mean_image_of(data.train)
        self.wrong = torch.zeros((), device=rank.device)
        self.predictions: Predictions | None = None

    def batches(self, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        return train_batches(
            self.data.train,
            self.mean_image,
            batch_size=self.options.batch_size // self.rank.ranks,
            seed=self.options.seed,
            rank=self.rank.rank,
            ranks=self.rank.ranks,
            start=start,
            device=self.rank.device,
        )

    def losses(self, model: nn.Module, part: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        images, labels = part
        logits = model(images).float()
        self.wrong.copy_((logits.detach().argmax(1) != labels).float().mean())
        return {"loss_class": F.cross_entropy(logits, labels)}

    def after_update(self, batch: tuple[Tensor, Tensor], step: int) -> dict[str, float]:
        return {"train_error": self.wrong.item()}

    def save(self, model: Any, folder: Path) -> None:
        recipe = f"{PAPER} of {self.options.steps} updates of {self.options.batch_size} images"
        file, mean, classes = folder / "model.safetensors", self.mean_image, self.data.classes
        save_cifar_resnet(model, file, mean_image=mean, classes=classes, recipe=recipe)

    def evaluate(self, model: Any, *, final: bool) -> dict:
        share_buffers(model, self.rank)
        bf16 = self.options.precision == "bf16"
        results, best, losses = test(model, self.data.test, self.mean_image, self.rank, bf16=bf16)
        images, labels = self.data.test

        def picture(index: int) -> Image.Image:
            return Image.fromarray(images[index].permute(1, 2, 0).contiguous().numpy())

        if best is not None:
            self.predictions = Predictions(self.data.classes, labels.numpy(), best, picture, "image {}".format, losses)
        return results

    def score(self, result: Mapping) -> float | None:
        return 1 - result["error"] if self.options.validation else None  # nothing is chosen by the test images

    def summary(self, result: Mapping) -> str:
        return f"{split_name(self.options)} error {100 * result['error']:.2f}%"

    def write_report(self, folder: Path) -> None:
        write_report(folder, network=name_of(self.options), predictions=self.predictions)


def complete(options: Options) -> Options:
    """Fill in every option except the folder. Raises ValueError for an option that is not accepted."""
    one_of("depth", options.depth, CIFAR_DEPTHS)
    check_shortcut(options)
    data = options.data or usual_folder(*CIFAR10_FOLDERS)
    if data is None:
        raise UserError(
            "no CIFAR-10 in $CIFAR10_DIR or ./datasets/cifar10; unpack https://www.cs.toronto.edu/~kriz/"
            f"cifar-10-python.tar.gz and give --data DIR, which should hold {LAYOUT}; or try --data {SYNTHETIC}"
        )
    device, _, precision = choose_machine(options)
    steps = options.steps or max(1, round(STEPS * BATCH_SIZE / options.batch_size))
    period = min(1000, max(1, steps // 10)) if options.eval_period is None else options.eval_period
    shortcut = None if options.plain else options.shortcut or "A"
    options = replace(options, data=data, shortcut=shortcut, steps=steps, eval_period=period)
    return replace(options, device=device, precision=precision)


def schedule_of(options: Options) -> PaperSchedule:
    """The paper's schedule over --steps updates: a rate of 0.1, divided by 10 at 1/2 and at 3/4.

    The rate is for 128 images and scales linearly with the batch size (Goyal et al. 2017). Nets of 110 or more layers
    start with a tenth of it. The paper does so until the training error is below 80%, after about 400 updates; we do so
    for 400 updates (at most a tenth of --steps), because only a rate that depends on the step can be resumed.
    """
    return PaperSchedule(
        rate=RATE * options.batch_size / BATCH_SIZE,
        steps=options.steps,
        milestones=(options.steps // 2, options.steps * 3 // 4),
        warmup_steps=min(WARMUP_STEPS, options.steps // 10) if options.depth >= WARMUP_DEPTH else 0,
    )


def shortcut_of(options: Options) -> str:
    return "none" if options.plain else options.shortcut or "A"


def name_of(options: Options) -> str:
    return network_name(options.depth, shortcut_of(options))


def network_name(depth: int, shortcut: str) -> str:
    """plain-20, resnet-20 (with the paper's shortcut A), resnet-20-B."""
    return {"none": f"plain-{depth}", "A": f"resnet-{depth}"}.get(shortcut, f"resnet-{depth}-{shortcut}")


def default_folder(options: Options) -> Path:
    return Path("runs") / f"{options.data.resolve().name}-{name_of(options)}"


@torch.inference_mode()
def test(
    model: CifarResNet, split: Split, mean_image: Tensor, rank: Rank, *, bf16: bool
) -> tuple[dict, np.ndarray | None, np.ndarray | None]:
    """Test on every image once: {"error": fraction, "loss": mean, "images": count}, the same on every rank.

    Rank 0 also gets the predicted class, [N, 1], and the loss, [N], of each image; the other ranks get None.
    """
    model.eval()
    mean_image = mean_image.to(rank.device)
    own = []
    for begin in range(rank.rank * TEST_BATCH, len(split.labels), rank.ranks * TEST_BATCH):
        images, labels = (tensor[begin : begin + TEST_BATCH].to(rank.device) for tensor in split)
        images = to_model_input(images, mean_image).contiguous(memory_format=torch.channels_last)
        with torch.autocast(rank.device.type, torch.bfloat16, enabled=bf16):
            logits = model(images).float()
        losses = F.cross_entropy(logits, labels, reduction="none")
        own.append((begin, logits.argmax(1).cpu().numpy(), losses.cpu().double().numpy()))
    model.train()
    parts = gather(own, rank)
    if parts is None:
        return broadcast(None, rank), None, None
    ordered = sorted((batch for part in parts for batch in part), key=lambda batch: batch[0])
    best, every_loss = (np.concatenate(column) for column in list(zip(*ordered, strict=True))[1:])
    wrong = best != split.labels.numpy()
    results = {"error": float(wrong.mean()), "loss": float(every_loss.mean()), "images": len(wrong)}
    return broadcast(results, rank), best[:, None], every_loss


if __name__ == "__main__":
    main_of(main)
