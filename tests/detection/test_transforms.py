import numpy as np
import pytest
import torch
from made import assert_boxes_are_seen, coloured

from detection.transforms import InputTransform, TrainTransform, to_model_input
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


CORNER_TO_CORNER = {1: (0, 0, 20, 15), 2: (30, 20, 51, 40), 3: (60, 3, 67, 9), 4: (50, 60, 71, 63)}  # of 71 x 63


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


@pytest.mark.parametrize("size", [(63, 71), (71, 63)])
def test_boxes_follow_their_pixels_through_scale_jitter_crop_and_padding(size):
    height, width = size
    boxes = {i: (x1, y1, min(x2, width), min(y2, height)) for i, (x1, y1, x2, y2) in CORNER_TO_CORNER.items()}
    transform = TrainTransform((), 0, scale_jitter=(0.3, 2.0), crop_size=57)
    kept, padded, flipped = set(), 0, 0
    for seed in range(60):
        torch.manual_seed(seed)
        image, target = transform(*coloured(height, width, boxes))
        assert image.shape == (3, 57, 57) and image.dtype == torch.uint8
        assert_boxes_are_seen(image, target)
        kept.add(len(target["labels"]))
        padded += image[:, -1, -1].tolist() == [124, 116, 104]  # what the detector turns to 0
        flipped += 1 in target["labels"] and target["boxes"][target["labels"] == 1][0, 0].item() > 15
    assert {1, 2, 3, 4} <= kept
    assert 10 < padded < 50 and flipped > 5


def test_a_crop_that_shows_no_object_is_background():
    image, target = coloured(40, 40, {1: (0, 0, 2, 2)})
    transform = TrainTransform((), 0, flip=0, scale_jitter=(4.0, 4.0), crop_size=16)
    torch.manual_seed(0)
    cropped, empty = transform(image, target)
    assert cropped.unique().tolist() == [90]
    assert empty["boxes"].shape == (0, 4) and empty["labels"].shape == (0,) and empty["labels"].dtype == torch.int64


@pytest.mark.parametrize("height, width, size", [(1, 500, (1, 96)), (2000, 3, (96, 1))])
def test_a_strip_keeps_a_pixel_where_the_longer_side_is_limited(height, width, size):
    image, target = TrainTransform((64,), 96)(*sample(height, width, [(0, 0, width, height)]))
    assert image.shape == (3, *size) and target["boxes"].tolist() == [[0, 0, size[1], size[0]]]


def test_a_strip_keeps_a_pixel_at_the_smallest_scale():
    image, target = TrainTransform((), 0, scale_jitter=(0.1, 0.1), crop_size=32)(*sample(2, 200, [(0, 0, 200, 2)]))
    assert image.shape == (3, 32, 32) and (image[:, 1:] != 255).all()
    assert target["boxes"].tolist() == [[0, 0, 3, 1]]


@pytest.mark.parametrize("size, resized", [((1, 512), (1, 128)), ((512, 3), (128, 1)), ((1, 128), (1, 128))])
@pytest.mark.parametrize("training", [True, False])
def test_a_detector_too_leaves_a_strip_a_pixel_and_its_boxes_fit(size, resized, training):
    transform = InputTransform(64, 128, [0.5] * 3, [0.2] * 3).train(training)
    height, width = size
    target = {"boxes": torch.tensor([[0.0, 0.0, width, height]]), "labels": torch.tensor([1])}
    images, [target] = transform([torch.rand(3, *size)], [{**target, "masks": torch.ones(1, *size, dtype=torch.uint8)}])
    assert images.image_sizes == [resized] and target["masks"].shape == (1, *resized)
    torch.testing.assert_close(target["boxes"], torch.tensor([[0.0, 0.0, resized[1], resized[0]]]))
    ordinary, _ = transform([torch.rand(3, 64, 80)])
    assert ordinary.image_sizes == [(64, 80)]


def test_photometric_distortion_changes_colours_and_nothing_else():
    image, target = coloured(63, 71, CORNER_TO_CORNER)
    transform = TrainTransform((63,), 99, flip=0, photometric=True)
    changed = 0
    for seed in range(10):
        torch.manual_seed(seed)
        distorted, same = transform(image, target)
        assert torch.equal(same["boxes"], target["boxes"]) and distorted.dtype == torch.uint8
        inside = [distorted[:, y1:y2, x1:x2].flatten(1) for x1, y1, x2, y2 in CORNER_TO_CORNER.values()]
        assert all((pixels == pixels[:, :1]).all() for pixels in inside)
        changed += not torch.equal(distorted, image)
    assert changed >= 8


def test_the_same_random_state_gives_the_same_sample():
    transform = TrainTransform((), 0, scale_jitter=(0.1, 2.0), crop_size=48, photometric=True)
    drawn = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        drawn.append(transform(*coloured(63, 71, CORNER_TO_CORNER)))
    (first, boxes), (second, same_boxes), (third, _) = drawn
    assert torch.equal(first, second) and torch.equal(boxes["boxes"], same_boxes["boxes"])
    assert not torch.equal(first, third)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"crop_size": 64}, "crop_size without scale_jitter: give both"),
        ({"scale_jitter": (0.1, 2.0)}, "scale_jitter without crop_size: give both"),
        ({"scale_jitter": (2.0, 0.1), "crop_size": 64}, r"scale_jitter \(2.0, 0.1\): must be the least and the"),
        ({"scale_jitter": (0, 1), "crop_size": 64}, r"scale_jitter \(0, 1\): must be the least"),
        ({"scale_jitter": 1.0, "crop_size": 64}, "scale_jitter 1.0: must be the least"),
        ({"scale_jitter": (0.1, 2.0), "crop_size": 0}, "crop_size 0: must be a whole number of pixels, at least 1"),
        ({"scale_jitter": (0.1, 2.0), "crop_size": 5.5}, "crop_size 5.5: must be a whole number"),
        ({"short_sides": ()}, r"short_sides \(\) and max_size 99: must be such as"),
        ({"short_sides": 64}, "short_sides 64 and max_size 99"),
        ({"max_size": 0}, r"short_sides \(64,\) and max_size 0"),
        ({"flip": 1.5}, "flip 1.5: must be a probability"),
        ({"copy_paste": -1}, "copy_paste -1: must be a probability"),
    ],
)
def test_settings_that_contradict_one_another_or_their_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        TrainTransform(**{"short_sides": (64,), "max_size": 99, **options})
