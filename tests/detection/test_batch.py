import pytest
import torch

from detection.batch import Targets, needed, pad_boxes


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
