import pytest

from resbackbone.engine.schedule import Schedule

STEPS = Schedule(rate=0.02, steps=90_000, milestones=(60_000, 80_000), warmup_steps=1000, warmup_factor=0.001)
COSINE = Schedule(rate=0.1, steps=100, cosine=True)


@pytest.mark.parametrize(
    "step, rate",
    [
        (0, 0.02 * 0.001),
        (500, 0.02 * (0.001 + 0.999 / 2)),
        (1000, 0.02),
        (59_999, 0.02),
        (60_000, 0.002),
        (79_999, 0.002),
        (80_000, 0.0002),
        (89_999, 0.0002),
    ],
)
def test_the_rate_warms_up_and_falls_to_a_tenth_at_every_milestone(step, rate):
    assert STEPS.learning_rate(step) == pytest.approx(rate, rel=1e-9)


@pytest.mark.parametrize("step, rate", [(0, 0.1), (25, 0.0853553), (50, 0.05), (75, 0.0146447), (100, 0), (120, 0)])
def test_a_cosine_falls_from_the_rate_to_zero_and_stays_there(step, rate):
    assert COSINE.learning_rate(step) == pytest.approx(rate, abs=1e-7)


@pytest.mark.parametrize("batch_size", [4, 8, 16, 64])
def test_another_batch_size_sees_as_many_images_at_a_rate_in_proportion(batch_size):
    scaled = STEPS.for_batch(batch_size, 16)
    assert scaled.rate == pytest.approx(0.02 * batch_size / 16)
    assert scaled.steps * batch_size == STEPS.steps * 16
    assert [milestone * batch_size for milestone in scaled.milestones] == [60_000 * 16, 80_000 * 16]
    assert scaled.warmup_steps == pytest.approx(1000 * 16 / batch_size, abs=0.5)
    assert (scaled.warmup_factor, scaled.cosine) == (STEPS.warmup_factor, STEPS.cosine)


def test_lengths_scale_without_the_rate_too_and_stay_at_least_one_step():
    scaled = COSINE.for_batch(4, 16, scale_rate=False)
    assert (scaled.rate, scaled.steps, scaled.cosine) == (0.1, 400, True)
    assert STEPS.for_batch(16, 16) == STEPS
    assert COSINE.for_batch(100_000, 16).steps == 1
