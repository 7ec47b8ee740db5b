"""docs/recipes.md against the recipes it describes."""

from pathlib import Path

import pytest

from detection import recipes as detection
from resbackbone.classification import recipes as classification

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"


def detector_row(name, recipe):
    schedule = recipe.schedule
    drops = ", ".join(f"{step:,}" for step in schedule.milestones)
    ends = "cosine to 0" if schedule.cosine else f"/10 at {drops}"
    least = f", at least {recipe.least_epochs:g} epochs" if recipe.least_epochs else ""
    changes, tested = recipe.augmentation, recipe.detector
    sides = changes.short_sides
    train = f"{sides[0]}" if len(sides) == 1 else f"{min(sides)} .. {max(sides)}"
    if changes.scale_jitter:
        train = f"{changes.scale_jitter[0]:g} .. {changes.scale_jitter[1]:g} x {changes.crop_size}, cropped"
    return [
        f"`{name}`",
        f"{'VGG' if tested.variant == 'vgg16' else 'R'}-{recipe.backbone.depth}, {tested.variant}",
        f"{recipe.batch_size}",
        f"{recipe.optimizer} {schedule.rate:g}",
        f"{schedule.steps:,}{least}",
        f"{schedule.warmup_steps:,}, then {ends}",
        f"{train} / {tested.min_size}, longer side at most {tested.max_size}",
    ]


def classifier_row(name, recipe):
    ends = "cosine" if recipe.cosine else f"/10 at {', '.join(map(str, recipe.drops))}"
    return [
        f"`{name}`",
        f"{recipe.epochs}",
        f"{recipe.batch_size}",
        f"{recipe.optimizer} {recipe.rate:g}",
        f"{recipe.warmup_epochs}, then {ends}",
        f"{recipe.size} / {recipe.crop} of {recipe.resize}",
        recipe.published,
    ]


@pytest.mark.parametrize(
    "heading, expected",
    [
        ("## Detectors", [detector_row(*item) for item in detection.RECIPES.items()]),
        ("## Classifiers", [classifier_row(*item) for item in classification.RECIPES.items()]),
    ],
    ids=["detectors", "classifiers"],
)
def test_the_tables_match_the_recipes(heading, expected):
    section = PAGE.read_text(encoding="utf-8").partition(heading)[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    assert [[cell.strip() for cell in row] for row in rows] == expected


def test_the_page_gives_the_source_of_every_recipe():
    sources = PAGE.read_text(encoding="utf-8").partition("## Sources")[2]
    for name in (*detection.RECIPES, *classification.RECIPES):
        assert f"`{name}`" in sources, name
    for recipe in classification.RECIPES.values():
        assert " ".join(recipe.source.split()) in " ".join(sources.split())
