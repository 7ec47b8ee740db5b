"""Evaluates classifiers, a run's own or given ones, and writes their accuracy."""

import json
from collections.abc import Mapping
from pathlib import Path

from resbackbone.cli.command import be_quiet, console
from resbackbone.cli.errors import from_option
from resbackbone.cli.training import Session

import torch
from torch import nn

from resbackbone.atomic import write_atomically
from resbackbone.checks import UserError
from resbackbone.classification.data import open_images
from resbackbone.classification.evaluate import evaluate
from resbackbone.classification.images import Images
from resbackbone.classification.recipes import Recipe
from resbackbone.classifier import build_resnet_classifier
from resbackbone.engine.distributed import Rank, from_main
from resbackbone.tools.pretraining.options import Options, recipe_of
from resbackbone.weights import read_weights
from resbackbone.weights.sources import is_named


def evaluate_only(rank: Rank, options: Options) -> None:
    """Classifiers and images -> accuracy, in every process; rank 0 writes."""
    be_quiet(options)
    session = Session(options, rank)
    files = [str(Path(run) / "model.safetensors") if Path(run).is_dir() else run for run in options.eval_only]
    with from_option("--data"):
        val_set = from_main(lambda: open_images(options.data, "val", skip_bad_images=options.skip_bad_images), rank)
    models: list[nn.Module] = []
    for file in files:
        weights = read_weights(file)
        model = build_resnet_classifier(num_classes=len(val_set.classes), weights=weights)
        ours = "recipe" in weights.metadata  # only our files name the classes by their folders
        if ours and weights.metadata["classes"] != val_set.classes:
            raise UserError(f"{file}: was trained on other classes than those of {options.data}")
        models.append(model.to(rank.device).to(memory_format=torch.channels_last))
    session.info(f"{' and '.join(files)} on {val_set.summary()}, {options.precision}")
    for message in sorted(val_set.skipped) if rank.is_main else ():
        session.warn(f"skipped {message}")
    results = score_of(models, val_set, session, recipe_of(options), protocol=options.eval)
    if not rank.is_main:
        return
    console.print(described(results))
    target = options.output
    if target is None and len(files) == 1 and not is_named(options.eval_only[0]):
        target = Path(files[0]).parent
    if target is not None:
        target.mkdir(parents=True, exist_ok=True)
        file, recorded = target / f"results-{options.eval}.json", {"models": list(options.eval_only)}
        write_results(file, {**results, **recorded, "skipped_images": sorted(val_set.skipped)})
        session.info(f"results: {file}")


def score_of(models: list[nn.Module], val_set: Images, session: Session, recipe: Recipe, **protocol) -> dict:
    """The accuracy of one network, or of the averaged scores of several; prints which images it skips."""
    skipped = set(val_set.skipped)
    results = evaluate(
        models,
        val_set,
        session.rank,
        crop=recipe.crop,
        resize=recipe.resize,
        batch_size=250 if session.rank.device.type == "cuda" else 50,
        workers=session.options.workers,
        bf16=session.options.precision == "bf16",
        progress=session.track,
        **protocol,
    )
    for message in sorted(val_set.skipped - skipped):
        session.warn(f"skipped {message}")
    return results


def described(results: Mapping) -> str:
    return (
        f"top-1 {100 * results['top1']:.2f}%, top-5 {100 * results['top5']:.2f}% on {results['images']} images, "
        f"{results['protocol']}"
    )


def write_results(path: Path, results: dict) -> None:
    write_atomically(path, json.dumps(results, indent=2) + "\n")
