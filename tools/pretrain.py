"""Train a ResNet to classify images, as ImageNet's, and evaluate it. Without --data it trains on the built-in data set.

python tools/pretrain.py                                              the built-in data set, some minutes on a CPU
python tools/pretrain.py --depth 101 --data imagenet --recipe paper --eval 10crop
python tools/pretrain.py --depth 50 --data 'imagenet/train-{000000..000146}.tar' --recipe a3 --accumulate 2
python tools/pretrain.py --depth 50 --output runs/mine --resume       continues where it stopped
python tools/pretrain.py --eval-only runs/r101 runs/r152 --eval multiscale      an ensemble of two
"""

import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from resbackbone.cli.command import be_quiet, console, main_of, parse, progress_console, to_config
from resbackbone.cli.errors import from_option
from resbackbone.cli.options import claim_folder, resume_point, resumed, wants_resume

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from detection.crops import make_shape_crops
from resbackbone.checks import UserError
from resbackbone.classification.data import LAYOUT, SYNTHETIC, open_images, train_batches
from resbackbone.classification.recipes import Recipe
from resbackbone.classification.report import Predictions, write_report
from resbackbone.classification.training import build_average, build_loss
from resbackbone.classification.transforms import TrainAugment, to_model_input
from resbackbone.classifier import ResNetClassifier, build_resnet_classifier
from resbackbone.engine import loop
from resbackbone.engine.device import arithmetic, use_deterministic
from resbackbone.engine.distributed import (
    Rank,
    count_processes,
    distributed,
    from_main,
    gather,
    launch,
    share_buffers,
)
from resbackbone.engine.optimizers import build_optimizer
from resbackbone.engine.run import Run, read_yaml
from resbackbone.engine.state import NonFinite, TrainState, seed_step
from resbackbone.report.summary import summary
from resbackbone.tools.pretraining.evaluation import described, evaluate_only, score_of, write_results, zoo_row
from resbackbone.tools.pretraining.options import (
    EMBEDDED,
    MAY_DIFFER,
    PretrainOptions,
    complete,
    complete_for_evaluation,
    data_name,
    default_folder,
    recipe_of,
)
from resbackbone.weights import read_weights, write_weights
from resbackbone.weights.fit import resolve_architecture
from resbackbone.weights.write import architecture_name


@dataclass(frozen=True)
class Options(PretrainOptions):
    """Train a ResNet to classify images and evaluate it; without --data, on the built-in data set."""


def main(argv: list[str] | None = None) -> None:
    """Options -> a trained classifier and its accuracy, in a run folder; in one process, or in one for each GPU."""
    options = parse(Options, argv)
    if options.eval_only:
        options = complete_for_evaluation(options)
        launch(
            evaluate_only, (options,), device=options.device, processes=count_processes(options.device, options.gpus)
        )
        return
    options = complete(options)
    if wants_resume(options):
        options = complete(resumed(options, argv, default=default_folder(options), may_differ=MAY_DIFFER))
    launch(train, (options,), device=options.device, processes=count_processes(options.device, options.gpus))


def train(rank: Rank, options: Options) -> None:
    """Images -> classifier -> updates -> evaluation, in every process; rank 0 writes."""
    be_quiet(options)
    use_deterministic(options.deterministic)
    say = progress_console.print if rank.is_main else lambda *_: None
    draw_embedded_set(options, rank, say)
    claimed = {"default": default_folder(options), "resume": options.resume}
    folder = from_main(lambda: claim_folder(options.output, **claimed), rank)
    recipe = recipe_of(options)
    say(f"run:   {folder}")
    opened = partial(open_images, options.data, skip_bad_images=options.skip_bad_images)
    with from_option("--data"):
        train_set, val_set = (from_main(partial(opened, split), rank) for split in ("train", "val"))
    if train_set.classes != val_set.classes:
        raise UserError(f"--data {options.data}: the classes of its training and validation images differ")
    say(f"train: {train_set.summary()}\nval:   {val_set.summary()}")
    for message in sorted(train_set.skipped | val_set.skipped) if rank.is_main else ():
        console.print(f"skipped {message}")

    last = from_main(lambda: resume_point(folder), rank) if options.resume else None
    seed_step(options.seed, 0, 0)  # every rank starts from the same weights
    model, metadata = build(options, recipe, train_set.classes, last and last / "model.safetensors")
    metadata |= {"recipe": {"name": options.recipe, **asdict(recipe)}, "accuracy": []}
    model.to(rank.device, memory_format=torch.channels_last).train()
    say(f"{metadata['architecture']}, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")

    schedule = recipe.schedule(len(train_set), options.batch_size, options.epochs)
    average = build_average(model, schedule.steps, schedule.warmup_steps) if recipe.ema else None
    if average is not None and last is not None:
        average.module.load_state_dict(load_file(last / "average.safetensors"))
    if options.compile:
        model.compile()
    optimizer = build_optimizer(
        model,
        recipe.optimizer,
        rate=schedule.rate,
        weight_decay=recipe.weight_decay,
        decay_norms=recipe.decay_norms,
    )
    state = TrainState(distributed(model, rank), optimizer, rank, scaled=options.precision == "fp16")
    if last is not None:
        state.load(last)
    steps = schedule.steps if options.max_steps is None else options.max_steps
    say(
        f"{'resumed at step ' + str(state.step) if last else 'from step 0'} to {steps}: {options.batch_size} images an "
        f"update{f' in {options.accumulate} parts' if options.accumulate > 1 else ''} on {rank.ranks} "
        f"{rank.device.type}, {options.precision}, learning rate {schedule.rate:g}"
    )
    effective = {**asdict(schedule), "milestones": list(schedule.milestones), **arithmetic(rank.device)}
    effective["train_set_sha256"] = train_set.fingerprint
    if last is not None and rank.is_main and fingerprint_of(folder) != train_set.fingerprint:
        raise UserError(f"--data {options.data}: the run in {folder} was trained on other images")
    kept = to_config(replace(options, output=None, resume=False, config=None))  # who starts from it starts a new run
    kept.pop("eval_only")
    run = Run(folder, {**kept, "effective": effective}, resumed_step=state.step, writes=rank.is_main)

    losses_of_mixed = build_loss(state.model, recipe, len(train_set.classes))
    skipped = set(train_set.skipped)

    def losses(part: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        pixels, labels = part
        return losses_of_mixed(to_model_input(pixels, rank.device), labels)

    def parts_of(batch: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
        return list(zip(*(tensor.chunk(options.accumulate) for tensor in batch), strict=True))

    def after_update(batch: tuple[Tensor, Tensor]) -> None:
        if average is not None:
            average.update(model, step=state.step)
        for message in sorted(train_set.skipped - skipped):
            console.print(f"skipped {message}")
            skipped.add(message)

    def save_model(to: Path) -> None:
        write_weights(to / "model.safetensors", model.state_dict(), metadata)
        if average is not None:
            save_file({k: v.contiguous() for k, v in average.module.state_dict().items()}, to / "average.safetensors")

    def checkpoint() -> None:
        run.save(state, save_model)
        if rank.is_main and not options.eval_period:  # else evaluations write it
            write_report(folder, network=metadata["architecture"])

    def score(protocol: str) -> dict:
        began = time.monotonic()
        tested = model if average is None else average.module
        share_buffers(tested, rank)
        predicted: list[Tensor] = []
        results = score_of([tested], val_set, rank, options, recipe, protocol=protocol, seen=predicted.append)
        run.record(state.step, {**results, "seconds": time.monotonic() - began}, kind="eval")
        if rank.is_main:
            best = predicted[0].numpy()
            shown = Predictions(val_set.classes, val_set.labels, best, None, val_set.read, val_set.name)
            write_report(folder, network=metadata["architecture"], results=results, predictions=shown)
        return results

    loop.train(
        state,
        train_batches(
            train_set,
            batch_size=options.batch_size // rank.ranks,
            transform=augmentation(recipe),
            seed=options.seed,
            rank=rank.rank,
            ranks=rank.ranks,
            start=state.step,
            workers=options.workers,
            repeats=recipe.repeats,
            device=rank.device,
        ),
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
        evaluate=lambda: described(score("1crop")),
        bad_batch=lambda batch, error: save_batch(*batch, folder, error, rank),
        parts_of=parts_of,
        after_update=after_update,
    )

    results = None if options.data == SYNTHETIC else score(options.eval)
    unread = gather(train_set.skipped, rank)
    if results is None:
        say("nothing is evaluated: synthetic images show the speed alone")
        if rank.is_main:
            why_not = "Nothing is evaluated: synthetic images show the speed alone."
            write_report(folder, network=metadata["architecture"], why_not=why_not)
            progress_console.print(summary(folder, {}, {"report": "report.html"}))
    elif rank.is_main:
        where = f"{data_name(options)}, {len(val_set)} validation images, {options.eval}"
        metadata["accuracy"] = [
            {"data": where, "metric": metric, "value": round(100 * results[key], 3), "published": "this run"}
            for key, metric in (("top1", "top-1"), ("top5", "top-5"))
        ]
        tested = model if average is None else average.module
        write_weights(folder / "model.safetensors", tested.state_dict(), metadata)
        results["skipped_images"] = sorted(val_set.skipped)
        results["skipped_training_images"] = sorted(set().union(*unread))
        write_results(folder / "results.json", results)
        say(f"row of MODEL_ZOO.md:\n{zoo_row(options, folder, metadata, results, train_set, val_set, rank)}")
        files = {"classifier": "model.safetensors", "results": "results.json", "report": "report.html"}
        accuracy = f"{100 * results['top1']:.2f}%, {100 * results['top5']:.2f}%"
        progress_console.print(summary(folder, {"top-1, top-5": accuracy}, files))
        console.print(described(results))
    run.close()


def fingerprint_of(folder: Path) -> str:
    """The checksum of the classes and labels that the run in `folder` was trained on."""
    return str(read_yaml(folder / "config.yaml").get("effective", {}).get("train_set_sha256"))


def draw_embedded_set(options: Options, rank: Rank, say) -> None:
    """Say what is trained on if it is the built-in data set, and draw it if it is not there."""
    if Path(options.data) != EMBEDDED:
        return
    say(f"data: the built-in data set in {EMBEDDED}; to train on yours, give --data DIR, which should hold {LAYOUT}")
    if not EMBEDDED.exists():
        say("drawing it first (a few thousand images)")
    EMBEDDED.parent.mkdir(exist_ok=True)
    from_main(lambda: make_shape_crops(EMBEDDED), rank)


def augmentation(recipe: Recipe) -> TrainAugment:
    return TrainAugment(
        recipe.size,
        shorter_side=recipe.shorter_side,
        colour=recipe.colour,
        auto_augment=recipe.auto_augment,
        erase=recipe.erase,
    )


def build(
    options: Options, recipe: Recipe, classes: list[str], checkpoint: Path | None
) -> tuple[ResNetClassifier, dict]:
    """The classifier a run starts or goes on from, and what its files say about it."""
    asked = {
        "depth": options.depth,
        "norm": options.norm,
        "shortcut": "none" if options.plain else options.shortcut,
        "stride_in_1x1": options.stride_in_1x1 or None,
    }
    source = checkpoint or options.weights
    weights = None if source is None else read_weights(source)
    if checkpoint and weights.metadata.get("classes") != classes:
        raise UserError(f"{checkpoint}: was trained on other classes than those of {options.data}")
    zero_init = recipe.zero_init_residual and not options.plain
    model = build_resnet_classifier(num_classes=len(classes), weights=weights, zero_init_residual=zero_init, **asked)
    trunk = resolve_architecture(weights, **asked)
    return model, {
        "architecture": architecture_name(trunk),
        "backbone": trunk,
        "num_classes": len(classes),
        "classes": classes,
        "source": f"tools/pretrain.py on {data_name(options)}",
    }


def save_batch(pixels: Tensor, labels: Tensor, folder: Path, error: NonFinite, rank: Rank) -> str:
    """Keep the images and labels of a batch that went wrong; returns a clause that names the file."""
    path = loop.keep_bad_batch({"images": pixels, "labels": labels}, folder, error, rank)
    return f"{error.terms} on rank {rank.rank}, its images are saved in {path}"


def run() -> None:
    main_of(main)


if __name__ == "__main__":
    run()
