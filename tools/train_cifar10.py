"""Train the paper's CIFAR-10 networks, residual or plain, and test them (He et al. 2015, Sec. 4.2).

python tools/train_cifar10.py --depth 20 --data cifar10
python tools/train_cifar10.py --depth 56 --plain --data cifar10 --steps 4000        a sixteenth of the paper's schedule
python tools/train_cifar10.py --depth 20 --data cifar10 --output runs/mine --resume     continues where it stopped
python tools/train_cifar10.py --data synthetic --steps 100                          no data at hand, seconds
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from resbackbone.cli.command import be_quiet, console, main_of, parse, progress_console, to_config
from resbackbone.cli.errors import from_option
from resbackbone.cli.options import RunOptions, check_counts, claim_folder, resume_point, resumed, wants_resume

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from resbackbone.analysis import count_parameters
from resbackbone.atomic import write_atomically
from resbackbone.checks import UserError, one_of
from resbackbone.cifar import CIFAR_DEPTHS, CifarResNet, build_cifar_resnet, save_cifar_resnet
from resbackbone.classification.cifar10 import (
    LAYOUT,
    SYNTHETIC,
    Split,
    mean_image_of,
    open_cifar10,
    to_model_input,
    train_batches,
)
from resbackbone.classification.report import Predictions, write_report
from resbackbone.engine import loop
from resbackbone.engine.device import arithmetic, choose_device, choose_precision, use_deterministic
from resbackbone.engine.distributed import (
    Rank,
    broadcast,
    count_processes,
    distributed,
    from_main,
    gather,
    launch,
    share_buffers,
)
from resbackbone.engine.optimizers import build_optimizer
from resbackbone.engine.run import Run, read_yaml
from resbackbone.engine.schedule import Schedule
from resbackbone.engine.state import NonFinite, TrainState, seed_step
from resbackbone.report.summary import summary

PAPER = "He et al. 2015, Sec. 4.2: SGD 0.1, momentum 0.9, weight decay 1e-4, a tenth of the rate at 1/2 and at 3/4"
RATE, BATCH_SIZE, STEPS = 0.1, 128, 64_000
WEIGHT_DECAY = 1e-4
WARMUP_DEPTH, WARMUP_STEPS = 110, 400
TEST_BATCH = 500
MAY_DIFFER = {  # from the run that is resumed: where it runs and how long
    *("data", "output", "max_steps", "device", "gpus", "resume", "config"),
    *("checkpoint_period", "eval_period", "log_period"),
}


@dataclass(frozen=True)
class Training:
    """What is trained on what, and how long."""

    data: Path | None = None
    """Folder with cifar-10-batches-py/, or with train/<class>/ and test/<class>/; or synthetic: patterns drawn on the
    spot. Default: $CIFAR10_DIR or ./datasets/cifar10."""
    depth: int = 20
    """20, 32, 44, 56, 110 or 1202."""
    plain: bool = False
    """Without shortcuts: the paper's plain nets."""
    shortcut: str | None = None
    """A, B or C (the paper's Sec. 4.1). Default: A, as the paper here."""
    steps: int | None = None
    """Length of the schedule in updates; the drops come at its half and three quarters. Default: 64000, at 128 images
    an update."""
    batch_size: int = BATCH_SIZE
    """Images an update, over all GPUs; the rate and the default --steps follow it."""
    validation: bool = False
    """Keep a tenth of the training images to test on, as the paper's 45k/5k, instead of the test images."""
    checkpoint_period: int = 500
    """Updates between checkpoints."""
    eval_period: int | None = None
    """Updates between tests; 0 tests at the end only. Default: 1000, or a tenth of --steps if that is less."""


@dataclass(frozen=True)
class Options(RunOptions, Training):
    """Train one of the paper's CIFAR-10 networks and test it."""


@dataclass(frozen=True)
class PaperSchedule(Schedule):
    """A very deep net starts with a tenth of the rate, unchanging, and goes on with the whole of it."""

    warmup_factor: float = 0.1

    def learning_rate(self, step: int) -> float:
        return self.rate * self.warmup_factor if step < self.warmup_steps else super().learning_rate(step)


def main(argv: list[str] | None = None) -> None:
    """Options -> a trained network and its test error, in a run folder; in one process, or in one for each GPU."""
    options = parse(Options, argv)
    if wants_resume(options):
        default = options.output or default_folder(complete(options))
        options = resumed(options, argv, default=default, may_differ=MAY_DIFFER)
    options = complete(options)
    launch(train, (options,), device=options.device, processes=count_processes(options.device, options.gpus))


def train(rank: Rank, options: Options) -> None:
    """Data -> network -> updates -> test error, in every process; rank 0 writes."""
    be_quiet(options)
    use_deterministic(options.deterministic)
    say = progress_console.print if rank.is_main else lambda *_: None
    claimed = {"default": default_folder(options), "resume": options.resume}
    folder = from_main(lambda: claim_folder(options.output, **claimed), rank)
    with from_option("--data"):
        data = from_main(lambda: open_cifar10(options.data), rank)
    if options.validation:
        data = data.held_out()
    mean_image = mean_image_of(data.train)
    say(f"run:   {folder}\ndata:  {data.summary()} in {options.data}{' (validation)' if options.validation else ''}")

    last = from_main(lambda: resume_point(folder), rank) if options.resume else None
    seed_step(options.seed, 0, 0)  # every rank starts from the same weights
    network = {"depth": options.depth, "shortcut": shortcut_of(options), "num_classes": len(data.classes)}
    model = build_cifar_resnet(**network, weights=last and last / "model.safetensors")
    model.to(rank.device, memory_format=torch.channels_last).train()
    say(f"{name_of(options)}, shortcut {shortcut_of(options)}, {count_parameters(model) / 1e6:.2f} M parameters")

    schedule = schedule_of(options)
    optimizer = build_optimizer(model, "sgd", rate=schedule.rate, weight_decay=WEIGHT_DECAY, decay_norms=True)
    state = TrainState(distributed(model, rank), optimizer, rank, scaled=options.precision == "fp16")
    if last is not None:
        state.load(last)
    steps = schedule.steps if options.max_steps is None else options.max_steps
    say(
        f"{'resumed at step ' + str(state.step) if last else 'from step 0'} to {steps}: {options.batch_size} images an "
        f"update on {rank.ranks} {rank.device.type}, {options.precision}, learning rate {schedule.rate:g}"
    )
    batches = train_batches(
        data.train,
        mean_image,
        batch_size=options.batch_size,
        seed=options.seed,
        rank=rank.rank,
        ranks=rank.ranks,
        start=state.step,
        device=rank.device,
    )
    fingerprint = data.fingerprint()
    if last is not None and rank.is_main and fingerprint_of(folder) != fingerprint:
        raise UserError(f"--data {options.data}: the run in {folder} was trained on other images")
    effective = {**asdict(schedule), "milestones": list(schedule.milestones), **arithmetic(rank.device)}
    effective["train_set_sha256"] = fingerprint
    kept = replace(options, output=None, resume=False, config=None)  # a run that starts from this file is a new one
    config = {**to_config(kept), "effective": effective}
    run = Run(folder, config, resumed_step=state.step, writes=rank.is_main)
    wrong = torch.zeros((), device=rank.device)

    def save_model(to: Path) -> None:
        recipe = f"{PAPER} of {schedule.steps} updates of {options.batch_size} images"
        save_cifar_resnet(model, to / "model.safetensors", mean_image=mean_image, classes=data.classes, recipe=recipe)

    def losses(batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        images, labels = batch
        logits = state.model(images).float()
        wrong.copy_((logits.detach().argmax(1) != labels).float().mean())
        return {"loss_class": F.cross_entropy(logits, labels)}

    def checkpoint() -> None:
        run.save(state, save_model)
        if rank.is_main and not options.eval_period:  # else evaluations write it
            write_report(folder, network=name_of(options))

    def score() -> dict:
        began = time.monotonic()
        share_buffers(model, rank)
        results, best, image_losses = test(model, data.test, mean_image, rank, bf16=options.precision == "bf16")
        run.record(state.step, {**results, "seconds": time.monotonic() - began}, kind="eval")
        if rank.is_main:
            images, labels = data.test
            shown = Predictions(data.classes, labels.numpy(), best, image_losses, picture_of(images), "image {}".format)
            write_report(folder, network=name_of(options), results=results, predictions=shown)
        return results

    loop.train(
        state,
        batches,
        losses,
        schedule=schedule,
        steps=steps,
        images_per_update=options.batch_size,
        seed=options.seed,
        precision=options.precision,
        rank=rank,
        run=run,
        periods=loop.Periods(options.log_period, options.checkpoint_period, options.eval_period),
        checkpoint=checkpoint,
        evaluate=lambda: f"test error {100 * score()['error']:.2f}%",
        bad_batch=lambda batch, error: save_batch(*batch, folder, error, rank),
        after_update=lambda batch: {"train_error": wrong.item()},
    )

    results = score()
    if rank.is_main:
        save_model(folder)
        content = {**results, **network, "parameters": count_parameters(model), "steps": state.step}
        write_atomically(folder / "results.json", json.dumps(content, indent=2) + "\n")
        error = f"{'validation' if options.validation else 'test'} error"
        files = {"network": "model.safetensors", "results": "results.json", "report": "report.html"}
        progress_console.print(summary(folder, {error: f"{100 * results['error']:.2f}%"}, files))
        console.print(f"{error} {100 * results['error']:.2f}%")
    run.close()


def complete(options: Options) -> Options:
    """Every option that was left out gets its value, but for the folder; ValueError for one that is not there."""
    one_of("depth", options.depth, CIFAR_DEPTHS)
    if options.shortcut is not None:
        one_of("shortcut", options.shortcut, ("A", "B", "C"), " (or --plain)")
        if options.plain:
            raise UserError(f"--plain has no shortcuts, --shortcut {options.shortcut} asks for them; leave one out")
    check_counts(options, least=1, names=("steps", "max_steps", "batch_size", "checkpoint_period", "log_period"))
    check_counts(options, least=0, names=("eval_period", "seed"))
    data = options.data or find_cifar10()
    if data is None:
        raise UserError(
            "no CIFAR-10 in $CIFAR10_DIR or ./datasets/cifar10; unpack https://www.cs.toronto.edu/~kriz/"
            f"cifar-10-python.tar.gz and give --data DIR, which should hold {LAYOUT}; or try --data {SYNTHETIC}"
        )
    device = choose_device(options.device)
    processes = count_processes(device, options.gpus)
    if options.batch_size % processes:
        raise UserError(f"--batch-size {options.batch_size} does not divide evenly over {processes} processes")
    steps = options.steps or max(1, round(STEPS * BATCH_SIZE / options.batch_size))
    return replace(
        options,
        data=data,
        steps=steps,
        eval_period=min(1000, max(1, steps // 10)) if options.eval_period is None else options.eval_period,
        device=device,
        precision=choose_precision(options.precision, device),
    )


def schedule_of(options: Options) -> PaperSchedule:
    """The paper's, as long as --steps: 0.1, a tenth of it from the half and again from three quarters.

    The rate is for 128 images and follows the batch size linearly (Goyal et al. 2017). At 110 layers and more it
    starts with a tenth. The paper goes on when the training error is below 80%, after about 400 updates; here it is
    after 400 (a tenth of --steps, if that is less), for a rate that depends on the step alone can be resumed exactly.
    """
    return PaperSchedule(
        rate=RATE * options.batch_size / BATCH_SIZE,
        steps=options.steps,
        milestones=(options.steps // 2, options.steps * 3 // 4),
        warmup_steps=min(WARMUP_STEPS, options.steps // 10) if options.depth >= WARMUP_DEPTH else 0,
    )


def find_cifar10() -> Path | None:
    """CIFAR-10 where its users keep it: $CIFAR10_DIR, ./datasets/cifar10; None if in neither."""
    places = [os.environ.get("CIFAR10_DIR"), "datasets/cifar10"]
    return next((Path(place) for place in places if place and Path(place).is_dir()), None)


def shortcut_of(options: Options) -> str:
    return "none" if options.plain else options.shortcut or "A"


def name_of(options: Options) -> str:
    """What a network is called: plain-20, resnet-20 (with the paper's shortcut A), resnet-20-B."""
    suffix = "" if shortcut_of(options) in ("none", "A") else f"-{shortcut_of(options)}"
    return f"{'plain' if options.plain else 'resnet'}-{options.depth}{suffix}"


def default_folder(options: Options) -> Path:
    return Path("runs") / f"{options.data.resolve().name}-{name_of(options)}"


def fingerprint_of(folder: Path) -> str:
    """The checksum of the images that the run in `folder` was trained on."""
    return str(read_yaml(folder / "config.yaml").get("effective", {}).get("train_set_sha256"))


@torch.inference_mode()
def test(
    model: CifarResNet, split: Split, mean_image: Tensor, rank: Rank, *, bf16: bool
) -> tuple[dict, np.ndarray | None, np.ndarray | None]:
    """{"error": fraction of the images, "loss": mean, "images"}, every image once; the same on every rank.

    On rank 0 also the class that each image is given, [N, 1], and its loss, [N]; elsewhere None.
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
    results = best = losses = None
    if parts is not None:
        ordered = sorted((batch for part in parts for batch in part), key=lambda batch: batch[0])
        best, losses = (np.concatenate(column) for column in list(zip(*ordered, strict=True))[1:])
        wrong = best != split.labels.numpy()
        results = {"error": float(wrong.mean()), "loss": float(losses.mean()), "images": len(wrong)}
    return broadcast(results, rank), best if best is None else best[:, None], losses


def picture_of(images: Tensor) -> Callable[[int], Image.Image]:
    """The images of a split, uint8 [N, 3, 32, 32], as pictures."""
    return lambda index: Image.fromarray(images[index].permute(1, 2, 0).contiguous().numpy())


def save_batch(images: Tensor, labels: Tensor, folder: Path, error: NonFinite, rank: Rank) -> str:
    """Keep the images and labels of a batch that went wrong; returns a clause that names the file."""
    path = loop.keep_bad_batch({"images": images, "labels": labels}, folder, error, rank)
    return f"{error.terms} on rank {rank.rank}, its images are saved in {path}"


def run() -> None:
    main_of(main)


if __name__ == "__main__":
    run()
