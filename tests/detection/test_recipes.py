from dataclasses import replace

import pytest
from torchvision.models.detection import fasterrcnn_resnet50_fpn_v2

from detection.faster_rcnn import build_faster_rcnn
from detection.recipes import RECIPES, SMALL_DATA, default_recipe
from resbackbone import build_resnet_backbone


def test_the_short_recipe_ends_at_no_rate_and_keeps_it_for_any_batch_size():
    recipe = RECIPES["short"]
    schedule = recipe.schedule
    assert recipe.optimizer == "adamw" and schedule.cosine
    assert 0 < schedule.learning_rate(schedule.steps - 1) < schedule.rate / 1000
    other = schedule.for_batch(2 * recipe.batch_size, recipe.batch_size, scale_rate=False)
    assert (other.rate, other.steps) == (schedule.rate, schedule.steps // 2)


@pytest.mark.parametrize("images, batch_size, steps", [(200, 8, 2000), (200, 2, 8000), (4000, 16, 3000)])
def test_small_data_are_seen_twelve_times_and_in_sixteen_thousand_images_at_least(images, batch_size, steps):
    recipe = RECIPES["small"]
    schedule = recipe.schedule_for(batch_size, images=images)
    assert schedule.steps == steps and steps * batch_size == max(12 * images, 16_000)
    assert schedule.rate == pytest.approx(RECIPES["1x"].schedule.rate * batch_size / 16)
    assert schedule.warmup_steps == 200 * 8 / batch_size
    assert 0 < schedule.learning_rate(steps - 1) < schedule.rate / 1000


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if not recipe.least_epochs])
def test_the_schedule_of_every_other_recipe_does_not_follow_the_data(name):
    recipe = RECIPES[name]
    for images in (1, 10**6):
        assert recipe.schedule_for(recipe.batch_size, images=images) == recipe.schedule


@pytest.mark.parametrize("images, steps", [(205, 1100), (4000, 6000)])
def test_scratch_has_twelve_epochs_and_1100_updates_at_least(images, steps):
    assert RECIPES["scratch"].schedule_for(8, images=images).steps == steps
    half = RECIPES["scratch"].schedule_for(4, images=images)
    assert (half.steps, half.rate) == (2 * steps, 0.002)  # AdamW's rate does not follow the batch size


def test_small_data_have_recipes_of_their_own_and_coco_1x():
    assert [default_recipe(images) for images in (1, SMALL_DATA - 1)] == ["small"] * 2
    assert [default_recipe(images) for images in (SMALL_DATA, 118_287)] == ["1x"] * 2
    seen = RECIPES["1x"].schedule.steps * RECIPES["1x"].batch_size
    assert seen / SMALL_DATA == 36 == RECIPES["small"].least_epochs * 3


def test_what_is_given_of_a_schedule_is_used_as_it_is_and_the_rest_in_proportion():
    recipe = RECIPES["1x"]
    schedule = recipe.schedule_for(4, images=1000, lr=0.003, epochs=40)
    assert (schedule.rate, schedule.steps, schedule.milestones) == (0.003, 10_000, (6667, 8889))
    assert schedule.warmup_steps == 10_000 // 4  # of 4,000 for this batch size
    schedule = recipe.schedule_for(16, images=1000, steps=50_000, warmup_steps=7)
    assert (schedule.rate, schedule.steps, schedule.warmup_steps) == (0.02, 50_000, 7)
    assert recipe.schedule_for(16, images=1, epochs=0.1).steps == 1
    assert RECIPES["small"].schedule_for(8, images=100_000, epochs=3).steps == 37_500  # fewer than its own least


@pytest.mark.parametrize("name, side", [("1x", 512), ("v2", 400), ("short", 64)])
def test_all_sizes_follow_that_of_test_images(name, side):
    recipe, resized = RECIPES[name], RECIPES[name].at_size(side)
    scale = side / recipe.detector.min_size
    pairs = [(recipe.detector.max_size, resized.detector.max_size)]
    pairs += [(recipe.augmentation.max_size, resized.augmentation.max_size)]
    pairs += zip(recipe.augmentation.short_sides, resized.augmentation.short_sides, strict=True)
    pairs += [(recipe.augmentation.crop_size or 0, resized.augmentation.crop_size or 0)]
    assert resized.detector.min_size == side
    for before, after in pairs:
        assert abs(after - scale * before) <= 0.5


def test_the_recipe_of_version_two_builds_torchvisions_detector():
    theirs = fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=4, trainable_backbone_layers=5)
    recipe = RECIPES["v2"]
    backbone = build_resnet_backbone(50, fpn=True, norm="BN", fpn_norm="BN")
    assert (recipe.backbone.norm, recipe.backbone.fpn_norm) == ("SyncBN", "SyncBN")
    settings = vars(replace(recipe.detector, box_norm="BN"))
    ours = build_faster_rcnn(backbone, 3, **settings)
    shapes, expected = ({k: v.shape for k, v in d.state_dict().items()} for d in (ours, theirs))
    assert {k.replace("body.", "").replace("backbone.", ""): v for k, v in expected.items()} == {
        k.replace("body.", "").replace("backbone.", ""): v for k, v in shapes.items()
    }
