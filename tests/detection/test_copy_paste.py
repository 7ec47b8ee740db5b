import pytest
import torch
from made import assert_boxes_are_seen, coloured

from detection.copy_paste import paste_objects

HEIGHT, WIDTH = 63, 71


def pasted(base, partner, seed=0):
    torch.manual_seed(seed)
    return paste_objects(*base, *partner)


def labels_over_seeds(base, partner, seeds=20):
    return {tuple(pasted(base, partner, seed)[1]["labels"].tolist()) for seed in range(seeds)}


def test_any_part_of_the_partners_objects_is_pasted_with_its_boxes():
    base = coloured(HEIGHT, WIDTH, {1: (0, 0, 20, 15)})
    partner = coloured(HEIGHT, WIDTH, {2: (30, 20, 51, 40), 3: (60, 3, 71, 9), 4: (50, 60, 70, 63)})
    before = base[0].clone(), partner[0].clone()
    for seed in range(10):
        assert_boxes_are_seen(*pasted(base, partner, seed))
    assert torch.equal(base[0], before[0]) and torch.equal(partner[0], before[1])
    assert labels_over_seeds(base, partner, 60) == {
        *((1,), (1, 2), (1, 3), (1, 4), (1, 2, 3), (1, 2, 4), (1, 3, 4), (1, 2, 3, 4))
    }


@pytest.mark.parametrize("covered_to, labels", [(30, {(1,), (2,)}), (27, {(1,), (1, 2)})])
def test_an_object_covered_by_over_70_percent_loses_its_box_and_others_keep_it(covered_to, labels):
    base = coloured(HEIGHT, WIDTH, {1: (0, 0, 40, 20)})
    partner = coloured(HEIGHT, WIDTH, {2: (0, 0, covered_to, 20)})
    assert labels_over_seeds(base, partner) == labels
    for _, target in (pasted(base, partner, seed) for seed in range(20)):
        assert 1 not in target["labels"] or target["boxes"][0].tolist() == [0, 0, 40, 20]


def test_two_rectangles_cover_an_object_together():
    base = coloured(HEIGHT, WIDTH, {1: (0, 0, 40, 20)})
    partner = coloured(HEIGHT, WIDTH, {2: (0, 0, 18, 20), 3: (18, 0, 36, 20)})
    assert labels_over_seeds(base, partner) == {(1,), (1, 2), (1, 3), (2, 3)}


def test_an_object_that_shows_in_a_pasted_rectangle_comes_along_whole():
    base = coloured(HEIGHT, WIDTH, {})
    partner = coloured(HEIGHT, WIDTH, {1: (0, 0, 20, 20), 2: (14, 5, 28, 15), 3: (24, 0, 34, 30), 4: (40, 40, 50, 50)})
    drawn = labels_over_seeds(base, partner, 40)
    assert (1, 2, 3) in drawn and (3, 4) in drawn  # 1 shows 3/7 of 2, which shows no 3/10 of 3, as little as 3 of 2
    assert all(2 in labels for labels in drawn if 1 in labels)


def test_an_object_that_shows_in_two_pasted_rectangles_together_comes_along():
    partner = coloured(HEIGHT, WIDTH, {1: (0, 0, 15, 20), 2: (25, 0, 40, 20), 3: (11, 2, 29, 18)})  # 2/9 of 3 in each
    assert labels_over_seeds(coloured(HEIGHT, WIDTH, {}), partner, 40) == {
        *((), (1,), (2,), (3,), (1, 3), (2, 3), (1, 2, 3))
    }


@pytest.mark.parametrize("height, width", [(31, 90), (90, 35)])
def test_what_lies_outside_the_base_is_cut_off(height, width):
    base = coloured(height, width, {1: (0, 0, 20, 15)})
    partner = coloured(HEIGHT, WIDTH, {2: (22, 20, 51, 40), 3: (60, 3, 71, 9), 4: (34, 45, 70, 63)})
    for seed in range(10):
        image, target = pasted(base, partner, seed)
        assert image.shape == (3, height, width)
        assert_boxes_are_seen(image, target)


def test_images_without_objects_are_pasted_on_and_from():
    empty, full = coloured(HEIGHT, WIDTH, {}), coloured(HEIGHT, WIDTH, {1: (0, 0, 20, 15)})
    assert labels_over_seeds(empty, full) == {(), (1,)}
    assert labels_over_seeds(full, empty) == {(1,)}
    image, target = pasted(empty, empty)
    assert torch.equal(image, empty[0]) and target["boxes"].shape == (0, 4)
