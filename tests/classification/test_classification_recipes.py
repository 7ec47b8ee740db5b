import pytest

from resbackbone.classification.recipes import RECIPES
from resbackbone.classification.transforms import TrainAugment

IMAGENET = 1_281_167


@pytest.mark.parametrize(
    "name, batch_size, steps, rate",
    [
        ("paper", 256, 600_000, 0.1),
        ("torchvision-v1", 256, 450_000, 0.1),
        ("torchvision-v2", 1024, 750_000, 0.5),
        ("a1", 2048, 375_000, 5e-3),
        ("a2", 2048, 187_500, 5e-3),
        ("a3", 2048, 62_500, 8e-3),
    ],
)
def test_a_recipe_is_as_long_on_imagenet_as_published(name, batch_size, steps, rate):
    recipe = RECIPES[name]
    schedule = recipe.schedule(IMAGENET, recipe.batch_size)
    assert recipe.batch_size == batch_size
    assert schedule.steps == pytest.approx(steps, rel=2e-3) and schedule.rate == rate


def test_the_rate_drops_to_a_tenth_at_the_epochs_of_the_step_recipes():
    schedule = RECIPES["torchvision-v1"].schedule(25_600, 256)  # 100 updates an epoch
    rates = [schedule.learning_rate(step) for step in (0, 2999, 3000, 5999, 6000, 8999)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_a_cosine_recipe_warms_up_for_five_epochs_and_ends_at_zero():
    schedule = RECIPES["a3"].schedule(20_480, 2048)  # 10 updates an epoch
    assert schedule.learning_rate(0) == pytest.approx(1e-4)
    assert schedule.learning_rate(49) < schedule.learning_rate(50) > schedule.learning_rate(51)
    assert schedule.learning_rate(999) < 1e-5


@pytest.mark.parametrize("name, rate", [("torchvision-v2", 0.125), ("a2", 5e-3), ("demo", 1e-3)])
def test_only_the_rate_of_sgd_follows_the_batch_size(name, rate):
    recipe = RECIPES[name]
    whole, quarter = (recipe.schedule(10_240, size) for size in (recipe.batch_size, recipe.batch_size // 4))
    assert quarter.rate == rate and quarter.steps == 4 * whole.steps


def test_with_fewer_epochs_drops_and_warm_up_come_earlier_in_proportion():
    short = RECIPES["paper"].schedule(25_600, 256, epochs=12)
    assert (short.steps, short.milestones) == (1200, (300, 600, 900))
    assert RECIPES["torchvision-v2"].schedule(102_400, 1024, epochs=60).warmup_steps == 50


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_names_its_source_and_its_result_and_has_an_augmentation_that_exists(name):
    recipe = RECIPES[name]
    assert recipe.source and recipe.published
    kept = {key: getattr(recipe, key) for key in ("shorter_side", "pca", "auto_augment", "erase")}
    assert TrainAugment(recipe.size, **kept).size == recipe.size
    assert recipe.crop <= recipe.resize
