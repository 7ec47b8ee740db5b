"""Train a ResNet to classify images such as ImageNet's, and evaluate it; without --data, on the built-in data set.

python tools/pretrain.py                                              the built-in data set, some minutes on a CPU
python tools/pretrain.py --depth 101 --data imagenet --recipe paper --eval 10crop
python tools/pretrain.py --depth 50 --data 'imagenet/train-{000000..000146}.tar' --recipe a3 --accumulate 2
python tools/pretrain.py --depth 50 --output runs/mine --resume       resumes where it stopped
python tools/pretrain.py --eval-only runs/r101 runs/r152 --eval multiscale      an ensemble of two
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

from resbackbone.cli.command import console, main_of, parse
from resbackbone.cli.errors import from_option
from resbackbone.cli.options import launch_command, training_options
from resbackbone.cli.training import Session, about_built_in_data, prepare_run

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from detection.crops import make_shape_crops
from resbackbone.checks import UserError
from resbackbone.classification.data import LAYOUT, SYNTHETIC, open_images, train_batches
from resbackbone.classification.images import Images
from resbackbone.classification.recipes import Recipe
from resbackbone.classification.report import Predictions, write_report
from resbackbone.classification.training import build_average, build_loss
from resbackbone.classification.transforms import TrainAugment, to_model_input
from resbackbone.classifier import ResNetClassifier, build_resnet_classifier
from resbackbone.engine import loop
from resbackbone.engine.distributed import Rank, distributed, from_main, gather, share_buffers
from resbackbone.engine.optimizers import build_optimizer
from resbackbone.engine.state import TrainState, seed_step
from resbackbone.engine.task import Task
from resbackbone.tools.pretraining.evaluation import described, evaluate_only, score_of, write_results
from resbackbone.tools.pretraining.options import (
    EMBEDDED,
    MAY_DIFFER,
    Options,
    complete,
    complete_for_evaluation,
    data_name,
    default_folder,
    recipe_of,
)
from resbackbone.weights import read_weights, write_weights
from resbackbone.weights.fit import resolve_architecture
from resbackbone.weights.write import architecture_name

NOT_EVALUATED = "nothing is evaluated: synthetic images show only the speed"
Batch = tuple[Tensor, Tensor]  # uint8 images [B, 3, H, W], labels [B]


def main(argv: list[str] | None = None) -> None:
    """Options -> a trained classifier and its accuracy, in a run folder; in one process, or in one for each GPU."""
    options = parse(Options, argv)
    if options.eval_only:
        launch_command(evaluate_only, complete_for_evaluation(options))
        return
    launch_command(train, training_options(options, argv, complete, default_folder, MAY_DIFFER))


def train(rank: Rank, options: Options) -> None:
    """Images -> classifier -> updates -> evaluation, in every process; rank 0 writes."""
    embedded = Path(options.data) == EMBEDDED
    about_data = about_built_in_data(EMBEDDED, LAYOUT) if embedded else None
    session = prepare_run(rank, options, default=default_folder(options), first_line=about_data)
    if embedded:
        from_main(partial(make_shape_crops, EMBEDDED), rank)
    train_set, val_set = open_data(session)
    recipe = recipe_of(options)

    seed_step(options.seed, 0, 0)  # every rank starts from the same weights
    checkpoint = session.checkpoint
    model, metadata = build(options, recipe, train_set.classes, checkpoint and checkpoint / "model.safetensors")
    model.to(rank.device).to(memory_format=torch.channels_last).train()
    session.info(f"{metadata['architecture']}, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")

    schedule = recipe.schedule(len(train_set), options.batch_size, options.epochs)
    average = build_average(model, schedule.steps, schedule.warmup_steps) if recipe.ema else None
    if average is not None and checkpoint is not None:
        average.module.load_state_dict(load_file(checkpoint / "average.safetensors"))
    if options.compile:
        model.compile()
    rate, decay, norms = schedule.rate, recipe.weight_decay, recipe.decay_norms
    optimizer = build_optimizer(model, recipe.optimizer, rate=rate, weight_decay=decay, decay_norms=norms)
    state = TrainState(distributed(model, rank), optimizer, rank, scaled=options.precision == "fp16")
    task = Classification(session, model, average, metadata, train_set, val_set)
    run = session.train(task, state, schedule, parts=options.accumulate, train_set_sha256=train_set.fingerprint)

    if options.data == SYNTHETIC:
        session.info(NOT_EVALUATED)
        if rank.is_main:
            task.write_report(session.folder)
            session.finish({}, {"report": "report.html"})
    else:
        results = loop.evaluate(task, state, run, final=True)
        skipped = gather(train_set.skipped, rank)
        if rank.is_main:
            bad = {"skipped_images": sorted(val_set.skipped), "skipped_training_images": sorted(set().union(*skipped))}
            finish(session, task, {**results, **bad})
    run.close()


def open_data(session: Session) -> tuple[Images, Images]:
    """The images to train on and to validate on."""
    options, rank = session.options, session.rank
    opened = partial(open_images, options.data, skip_bad_images=options.skip_bad_images)
    with from_option("--data"):
        train_set, val_set = (from_main(partial(opened, split), rank) for split in ("train", "val"))
    if train_set.classes != val_set.classes:
        raise UserError(f"--data {options.data}: the classes of its training and validation images differ")
    session.info(f"train: {train_set.summary()}\nval:   {val_set.summary()}")
    for message in sorted(train_set.skipped | val_set.skipped) if rank.is_main else ():
        session.warn(f"skipped {message}")
    return train_set, val_set


class Classification(Task):
    """A classifier, perhaps with a moving average of its weights, on labelled images."""

    def __init__(
        self, session: Session, model: ResNetClassifier, average, metadata: dict, train_set: Images, val_set: Images
    ):
        self.session, self.options, self.rank = session, session.options, session.rank
        self.recipe = recipe = recipe_of(session.options)
        self.model, self.average, self.metadata = model, average, metadata
        self.train_set, self.val_set = train_set, val_set
        self.losses_of = build_loss(recipe, len(train_set.classes))
        self.skipped = set(train_set.skipped)
        self.evaluated: tuple[dict, Predictions] | None = None

    @property
    def tested(self) -> nn.Module:
        """The network that is evaluated and written: the average of the weights if there is one."""
        return self.model if self.average is None else self.average.module

    def batches(self, start: int) -> Iterator[Batch]:
        recipe = self.recipe
        return train_batches(
            self.train_set,
            batch_size=self.options.batch_size // self.rank.ranks,
            transform=TrainAugment(
                recipe.size,
                shorter_side=recipe.shorter_side,
                colour=recipe.colour,
                auto_augment=recipe.auto_augment,
                erase=recipe.erase,
            ),
            seed=self.options.seed,
            rank=self.rank.rank,
            ranks=self.rank.ranks,
            start=start,
            workers=self.options.workers,
            repeats=recipe.repeats,
            device=self.rank.device,
        )

    def parts(self, batch: Batch) -> list[Batch]:
        return list(zip(*(tensor.chunk(self.options.accumulate) for tensor in batch), strict=True))

    def losses(self, model: nn.Module, part: Batch) -> Mapping[str, Tensor]:
        pixels, labels = part
        return self.losses_of(model, to_model_input(pixels, self.rank.device), labels)

    def after_update(self, batch: Batch, step: int) -> Mapping[str, float]:
        if self.average is not None:
            self.average.update(self.model, step=step)
        for message in sorted(self.train_set.skipped - self.skipped):
            self.session.warn(f"skipped {message}")
            self.skipped.add(message)
        return {}

    def bad_batch(self, batch: Batch) -> tuple[dict[str, Tensor], str]:
        return dict(zip(("images", "labels"), batch, strict=True)), "its images"

    def save(self, folder: Path) -> None:
        write_weights(folder / "model.safetensors", self.model.state_dict(), self.metadata)
        if self.average is not None:
            tensors = {name: tensor.contiguous() for name, tensor in self.average.module.state_dict().items()}
            save_file(tensors, folder / "average.safetensors")

    def evaluate(self, *, final: bool) -> dict:
        share_buffers(self.tested, self.rank)
        predicted: list[Tensor] = []
        protocol, val_set = self.options.eval if final else "1crop", self.val_set
        results = score_of([self.tested], val_set, self.session, self.recipe, protocol=protocol, seen=predicted.append)
        if self.rank.is_main:
            best = predicted[0].numpy()
            shown = Predictions(val_set.classes, val_set.labels, best, None, val_set.read, val_set.name)
            self.evaluated = results, shown
        return results

    def summary(self, result: Mapping) -> str:
        return described(result)

    def write_report(self, folder: Path) -> None:
        results, predictions = self.evaluated or (None, None)
        named: dict = {"network": self.metadata["architecture"], "results": results, "predictions": predictions}
        if self.options.data == SYNTHETIC:
            named["why_not"] = NOT_EVALUATED
        write_report(folder, **named)


def finish(session: Session, task: Classification, results: dict) -> None:
    """Write the classifier with its accuracy, and results.json; print the results."""
    options, folder, metadata = session.options, session.folder, task.metadata
    where = f"{data_name(options)}, {len(task.val_set)} validation images, {options.eval}"
    metadata["accuracy"] = [
        {"data": where, "metric": metric, "value": round(100 * results[key], 3), "published": "this run"}
        for key, metric in (("top1", "top-1"), ("top5", "top-5"))
    ]
    write_weights(folder / "model.safetensors", task.tested.state_dict(), metadata)
    write_results(folder / "results.json", results)
    files = {"classifier": "model.safetensors", "results": "results.json", "report": "report.html"}
    session.finish({"top-1, top-5": f"{100 * results['top1']:.2f}%, {100 * results['top5']:.2f}%"}, files)
    console.print(described(results))


def build(
    options: Options, recipe: Recipe, classes: list[str], checkpoint: Path | None
) -> tuple[ResNetClassifier, dict]:
    """Build the classifier that a run starts or resumes from; returns it with the metadata of its files."""
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
        "recipe": {"name": options.recipe, **asdict(recipe)},
        "accuracy": [],
    }


def run() -> None:
    main_of(main)


if __name__ == "__main__":
    run()
