import pytest

from detection.recipes import RECIPES, SMALL_DATA, default_recipe


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


@pytest.mark.parametrize("name", sorted(set(RECIPES) - {"small"}))
def test_the_schedule_of_every_other_recipe_does_not_follow_the_data(name):
    recipe = RECIPES[name]
    for images in (1, 10**6):
        assert recipe.schedule_for(recipe.batch_size, images=images) == recipe.schedule


def test_the_recipe_of_small_data_is_small_and_that_of_coco_1x():
    assert (default_recipe(1), default_recipe(SMALL_DATA - 1)) == ("small", "small")
    assert (default_recipe(SMALL_DATA), default_recipe(118_287)) == ("1x", "1x")
    seen = RECIPES["1x"].schedule.steps * RECIPES["1x"].batch_size
    assert seen / SMALL_DATA == 36 == RECIPES["small"].epochs * 3
