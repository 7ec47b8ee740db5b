import pytest
import torch
from made import target

from detection.batch import Targets, check_form, needed, pad_boxes
from resbackbone.checks import UserError


def boxes(*rows, dtype=torch.float32):
    return torch.tensor(rows, dtype=dtype).reshape(-1, 4)


def test_ground_truth_has_room_for_the_image_with_the_most_boxes_and_keeps_what_was_given():
    given = [
        {"boxes": boxes([1, 2, 30, 40]), "labels": torch.tensor([3]), "image_id": 7},
        {"boxes": boxes(), "labels": torch.zeros(0, dtype=torch.int64)},
        {"boxes": torch.rand(17, 4), "labels": torch.arange(1, 18)},
    ]
    targets = Targets.of(given)
    assert targets.boxes.shape == (3, 32, 4) and targets.labels.shape == (3, 32)
    assert targets.real.sum(1).tolist() == [1, 0, 17] and Targets.of(given[:2]).boxes.shape == (2, 16, 4)
    assert torch.equal(targets.boxes[2, :17], given[2]["boxes"]) and (targets.boxes[1] == 0).all()
    assert targets.as_list()[0]["image_id"] == 7 and Targets.of(targets) is targets


@pytest.mark.parametrize("first, wanted", [(torch.float16, torch.float32), (torch.float64, torch.float64)])
def test_boxes_are_in_fp32_or_better_whatever_the_first_image_has(first, wanted):
    labels = torch.tensor([1])
    of_images = boxes([1, 2, 300, 400], dtype=first), boxes([0, 0, 300.01, 7])
    targets = Targets.of([{"boxes": x, "labels": labels} for x in of_images])
    assert targets.boxes.dtype == wanted and targets.boxes[1, 0, 2] == of_images[1][0, 2]


def test_regions_fill_up_to_one_at_least():
    padded = pad_boxes([boxes([1, 2, 3, 4], [5, 6, 7, 8]), boxes()])
    assert padded.shape == (2, 2, 4) and (padded[1] == 0).all() and pad_boxes(padded) is padded
    assert pad_boxes([boxes(), boxes()]).shape == (2, 1, 4)


@pytest.mark.parametrize("counts, places", [([0, 0], 1), ([3, 5], 5), ([9, 2], 8)])
def test_a_cpu_computes_the_places_that_some_image_uses(counts, places):
    assert needed(torch.tensor(counts), 8) == places


@pytest.mark.parametrize(
    "targets, says",
    [
        ([target()], "2 images need a list of 2 targets, not 1"),
        (target(), "2 images need a list of 2 targets, not dict"),
        ([target(), None], r"targets\[1\] is a dict .*, not NoneType"),
        ([target(), {"labels": torch.ones(1)}], r"targets\[1\]: boxes are a float tensor \[n, 4\] .*, not NoneType"),
        ([target(), {**target(), "boxes": [[1, 2, 3, 4]]}], r"boxes are a float tensor \[n, 4\] .*, not list"),
        ([target(), {**target(), "boxes": torch.rand(0)}], r"not torch.float32 \[0\] \(none: torch.zeros\(0, 4\)\)"),
        ([target(), {**target(), "boxes": torch.ones(1, 4).int()}], r"not torch.int32 \[1, 4\]"),
        ([target(), {"boxes": torch.rand(1, 4), "image_id": 5}], "image 5: labels of 1 boxes .*, not NoneType"),
        ([target(), target((1, 2, 9, 9), labels=[1, 2])], r"labels of 1 boxes are an int64 tensor \[1\], not .* \[2\]"),
        ([target(), {**target((1, 2, 9, 9)), "labels": torch.ones(1)}], r"not torch.float32 \[1\]"),
    ],
)
def test_targets_that_do_not_fit_the_images_are_refused_in_words(targets, says):
    with pytest.raises(UserError, match=says):
        check_form(targets, 2)
