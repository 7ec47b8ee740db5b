import numpy as np
import pytest
import torch

from detection.transforms import TrainTransform, to_model_input
from resbackbone.checks import UserError


def sample(height, width, boxes, **extra):
    """An image that is white where a box is, so that it can be seen whether boxes go with their pixels."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for x1, y1, x2, y2 in boxes:
        image[:, y1:y2, x1:x2] = 255
    target = {"boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)}
    return image, {**target, "labels": torch.arange(1, len(boxes) + 1), "image_id": 5, **extra}


def extent_of_white(image):
    rows, columns = np.nonzero(image[0].numpy() > 127)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_a_flip_flips_the_boxes():
    image, target = TrainTransform((48,), 999, flip=1)(*sample(48, 65, [(3, 5, 20, 30)]))
    assert target["boxes"].tolist() == [[45, 5, 62, 30]]
    assert extent_of_white(image) == [45, 5, 62, 30]


def test_without_a_flip_and_at_the_same_size_nothing_changes():
    image, target = sample(48, 65, [(3, 5, 20, 30), (40, 0, 65, 48)])
    same, unchanged = TrainTransform((48,), 999, flip=0)(image, target)
    assert torch.equal(same, image) and torch.equal(unchanged["boxes"], target["boxes"])


@pytest.mark.parametrize("height, width", [(97, 131), (131, 97), (64, 64), (33, 40)])
def test_half_of_the_images_are_flipped_and_every_short_side_occurs(height, width):
    seen, flipped = set(), 0
    for seed in range(40):
        torch.manual_seed(seed)
        image, target = TrainTransform((64, 72, 80), 999)(*sample(height, width, [(5, 5, 20, 20)]))
        seen.add(min(image.shape[-2:]))
        flipped += int(target["boxes"][0, 0] > image.shape[2] / 4)
        assert abs(image.shape[1] / image.shape[2] - height / width) < 0.03
        assert np.abs(np.subtract(extent_of_white(image), target["boxes"][0].tolist())).max() <= 1.5
    assert seen == {64, 72, 80} and 8 < flipped < 32  # one half


@pytest.mark.parametrize("height, width", [(50, 400), (401, 50)])
def test_the_longer_side_is_at_most_the_maximum(height, width):
    image, target = TrainTransform((80,), 133)(*sample(height, width, [(0, 0, width, height)]))
    assert max(image.shape[-2:]) == 133
    assert target["boxes"].tolist() == [[0, 0, image.shape[2], image.shape[1]]]


def test_an_image_without_boxes_works_and_keeps_what_else_the_target_holds():
    image, target = TrainTransform((40,), 99)(*sample(31, 47, [], skipped=["a"]))
    assert image.shape == (3, 40, 60) and type(image) is torch.Tensor and image.dtype == torch.uint8
    assert target["boxes"].shape == (0, 4) and target["labels"].shape == (0,)
    assert (target["image_id"], target["skipped"]) == (5, ["a"])


def test_a_box_that_vanishes_takes_its_label_with_it():
    image, target = sample(40, 40, [(0, 0, 20, 20), (0, 0, 0, 0), (10, 10, 40, 40)])
    _, small = TrainTransform((8,), 99, flip=0)(image, target)
    assert small["labels"].tolist() == [1, 3]
    assert small["boxes"].tolist() == [[0, 0, 4, 4], [2, 2, 8, 8]]


def test_the_model_is_fed_floats_from_0_to_1_and_the_image_is_left_as_it_was():
    image = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1)
    fed = to_model_input(image, torch.device("cpu"))
    assert fed.dtype == torch.float32 and torch.allclose(fed.flatten(), torch.tensor([0, 0.2, 1]))
    assert image.flatten().tolist() == [0, 51, 255]


def test_masks_and_keypoints_that_would_not_be_flipped_are_refused():
    image, target = sample(40, 40, [(0, 0, 20, 20)], masks=torch.ones(1, 40, 40))
    with pytest.raises(UserError, match="a target with masks: TrainTransform flips and resizes boxes only"):
        TrainTransform((40,), 99, flip=1)(image, target)
