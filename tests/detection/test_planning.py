import pytest
from test_statistics import drawn

from detection.planning import ANCHOR_SCALES, ENOUGH, by_class, choose_anchor_scale, cost_through, make_plan, sides_for
from resbackbone.checks import UserError

LEVELS = ("p2", "p3", "p4", "p5")


@pytest.fixture
def two_sizes(tmp_path):
    """Images of 640 x 480 pixels with nine cells of 90 pixels, and on one a speck of 31."""
    cells = [(0, 10 + 200 * (i % 3), 10 + 150 * (i // 3), 90, 90) for i in range(9)]
    return drawn(tmp_path, [(640, 480, cells), (640, 480, [*cells, (1, 300, 130, 31, 31)])])


def planned(dataset, *, seconds, update=lambda side: (side / 128) ** 2, **options):
    given = {"batch_size": 8, "sides": [128, 160, 192, 224, 256, 480], "aspect": 2.0, "scales": ANCHOR_SCALES}
    given |= {"levels": LEVELS, "least_updates": 100, "images_to_test": 10}
    timed = {"update_seconds": update, "detect_seconds": lambda side: 0.1}
    return make_plan(dataset, seconds_left=lambda: seconds, **(given | timed | options))


def test_images_are_as_large_as_the_smallest_class_needs_if_there_is_time(two_sizes):
    plan = planned(two_sizes, seconds=10_000)
    assert plan.image_size == 256 and 31 * 256 / 480 >= ENOUGH > 31 * 224 / 480
    assert f"{plan.steps} updates" in plan.reasons[0] and "under 17 pixels" in plan.reasons[1]


@pytest.mark.parametrize("seconds, side", [(60, 128), (120, 128), (170, 160), (240, 192)])
def test_with_less_time_images_are_as_large_as_leaves_enough_updates(two_sizes, seconds, side):
    plan = planned(two_sizes, seconds=seconds)
    assert plan.image_size == side
    cost = plan.steps * (side / 128) ** 2 + 10 * 0.1
    assert seconds * 0.9 < cost <= seconds


def test_evaluations_on_the_way_take_time_from_the_updates(two_sizes):
    often = planned(two_sizes, seconds=60, eval_period=10, update=lambda side: 1.0)
    once = planned(two_sizes, seconds=60, update=lambda side: 1.0)
    assert once.steps * 1.05 + 1 == pytest.approx(60, abs=1.1)
    assert often.steps * 1.05 + 1 + often.steps / 10 == pytest.approx(60, abs=1.2) and often.steps < once.steps


def test_the_cost_of_a_side_follows_from_two_and_never_falls():
    cost = cost_through({100: 2.0, 200: 5.0})
    assert [cost(side) for side in (100, 200, 300)] == [2, 5, 10]
    noisy = cost_through({100: 2.0, 200: 1.9})
    assert noisy(400) == noisy(100) == 2.0
    assert cost_through({64: 3.0})(640) == 3.0


def test_a_time_too_short_for_one_update_is_refused(two_sizes):
    with pytest.raises(UserError, match=r"--minutes: too short; .* evaluating 10 images 1 s; give more minutes"):
        planned(two_sizes, seconds=1.5)


def test_anchors_suit_every_class_alike_however_rare(two_sizes):
    scale, share = choose_anchor_scale(two_sizes, ANCHOR_SCALES, LEVELS, 128, 256)
    assert scale == 2.0 and share < 0.5  # the speck, one of 19 boxes, is 8 pixels large: half of the classes
    assert choose_anchor_scale(two_sizes, (16.0, 4.0), LEVELS, 128, 256) == (4.0, 0.5)


def test_a_single_map_keeps_its_anchors_and_boxes_are_needed_for_others(two_sizes, tmp_path):
    plan = planned(two_sizes, seconds=60, levels=[], scales=[8.0])
    assert plan.anchor_scale == 8.0 and not any("anchors" in reason for reason in plan.reasons)
    with pytest.raises(UserError, match="have no boxes to plan by; give --steps"):
        planned(drawn(tmp_path / "empty", [(30, 20, [])]), seconds=60, sides=[128])


def test_values_are_split_by_class_and_classes_without_boxes_left_out(tmp_path):
    dataset = drawn(tmp_path, [(64, 64, [(2, 1, 1, 5, 5), (0, 1, 1, 9, 9), (2, 3, 3, 7, 7)])], names="abc")
    widths = dataset.boxes[:, 2] - dataset.boxes[:, 0]
    assert [sorted(values.tolist()) for values in by_class(dataset, widths)] == [[9], [5, 7]]


def test_images_are_not_enlarged_beyond_their_own_size(two_sizes, tmp_path):
    assert sides_for(two_sizes, 128)[:2] == [128, 160] and sides_for(two_sizes, 128)[-1] == 480
    assert sides_for(drawn(tmp_path / "tiny", [(30, 20, [(0, 1, 1, 9, 9)])]), 128) == [128]
