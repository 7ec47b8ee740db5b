"""Training augmentation: what is cut out, what is done to it, and that a seed decides all of it."""

import numpy as np
import pytest
import torch
from torchvision.transforms import functional as F

from resbackbone.classification.transforms import PCA_DIRECTIONS, PCA_VARIANCES, TrainAugment, to_model_input
from resbackbone.weights.inputs import MEAN, STD


def ramp(height, width):
    """A picture whose red is its column and whose green is its row."""
    image = np.zeros((height, width, 3), dtype=np.uint8)
    image[:, :, 0], image[:, :, 1] = np.arange(width), np.arange(height)[:, None]
    return image


def cut(crop):
    """(top, left, height, width) of what a ramp's crop was cut from, to a pixel or two."""
    red, green = crop[0].double().mean(0), crop[1].double().mean(1)
    size = len(red)
    w, h = ((x[-1] - x[0]).abs() * size / (size - 1) for x in (red, green))
    return green.min() - h / size / 2, red.min() - w / size / 2, h, w


@pytest.mark.parametrize("options", [{}, {"shorter_side": (32, 64), "pca": True, "auto_augment": "trivial"}])
def test_a_crop_is_a_function_of_the_image_and_the_seed(options):
    augment = TrainAugment(31, erase=0.3, **options)
    image = ramp(83, 120)
    first = [augment(image, seed) for seed in range(6)]
    assert all(crop.shape == (3, 31, 31) and crop.dtype == torch.uint8 for crop in first)
    assert all(torch.equal(crop, augment(image, seed)) for seed, crop in enumerate(first))
    assert not any(torch.equal(first[0], crop) for crop in first[1:])


def test_crops_have_areas_and_aspects_in_the_ranges_and_lie_anywhere_in_the_image():
    augment = TrainAugment(64, scale=(0.2, 0.6), flip=False)
    cuts = torch.tensor([cut(augment(ramp(180, 240), seed)) for seed in range(300)])
    areas, aspects = cuts[:, 2] * cuts[:, 3] / (180 * 240), cuts[:, 3] / cuts[:, 2]
    assert 0.18 < areas.min() < 0.25 and 0.55 < areas.max() < 0.62 and abs(areas.mean() - 0.4) < 0.03
    assert 0.73 < aspects.min() < 0.8 and 1.25 < aspects.max() < 1.36
    assert cuts[:, 0].min() < 3 and (cuts[:, 0] + cuts[:, 2]).max() > 177
    assert cuts[:, 1].min() < 3 and (cuts[:, 1] + cuts[:, 3]).max() > 237


def test_every_other_crop_is_mirrored():
    augment = TrainAugment(16)
    mirrored = [bool((crop := augment(ramp(50, 60), seed))[0, 0, 0] > crop[0, 0, -1]) for seed in range(200)]
    assert 75 < sum(mirrored) < 125
    assert not any((c := TrainAugment(16, flip=False)(ramp(50, 60), s))[0, 0, 0] > c[0, 0, -1] for s in range(20))


@pytest.mark.parametrize("height, width, expected", [(10, 200, (10, 13)), (200, 10, (13, 10)), (1, 1, (1, 1))])
def test_of_an_image_too_long_for_any_crop_the_middle_is_taken(height, width, expected):
    crop = TrainAugment(8, scale=(0.9, 1.0), flip=False)(ramp(height, width), 0)
    top, left, h, w = cut(crop)
    assert (h - expected[0]).abs() <= 1.5 and (w - expected[1]).abs() <= 1.5
    assert abs(left + w / 2 - width / 2) < 2 and abs(top + h / 2 - height / 2) < 2


def test_with_a_range_of_shorter_sides_the_crop_is_the_square_of_the_resized_image():
    augment = TrainAugment(32, shorter_side=(40, 80), flip=False)
    cuts = torch.tensor([cut(augment(ramp(160, 220), seed)) for seed in range(200)])
    sides = 160 * 32 / cuts[:, 2]  # the shorter sides that the crops amount to
    assert (cuts[:, 2] - cuts[:, 3]).abs().max() < 2.5
    assert 38 < sides.min() < 43 and 75 < sides.max() < 84
    assert cuts[:, 1].min() < 4 and (cuts[:, 1] + cuts[:, 3]).max() > 216


def test_the_scaled_crop_is_that_of_resizing_first_to_a_pixel():
    image = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8).repeat(10, 0).repeat(10, 1)
    crop = TrainAugment(60, shorter_side=(60, 60), flip=False)(image, 0)
    resized = F.resize(torch.from_numpy(image).permute(2, 0, 1), 60, antialias=True)
    differences = [(resized[:, :, x : x + 60].float() - crop.float()).abs().mean() for x in range(21)]
    assert min(differences) < 3 < 20 < max(differences)


def test_pca_noise_shifts_the_colour_of_the_whole_crop_along_imagenets_components():
    grey = np.full((20, 30, 3), 128, dtype=np.uint8)
    crops = torch.stack([TrainAugment(9, pca=True)(grey, seed) for seed in range(2000)]).double()
    assert torch.equal(crops.amax((2, 3)), crops.amin((2, 3)))
    shifts = crops[:, :, 0, 0] - 128
    expected = PCA_DIRECTIONS @ np.diag((25.5 * PCA_VARIANCES) ** 2) @ PCA_DIRECTIONS.T + np.eye(3) / 12  # and rounding
    assert torch.allclose(shifts.T.cov(), torch.from_numpy(expected), rtol=0.1, atol=0.1)
    white = TrainAugment(9, pca=True)(np.full((20, 30, 3), 255, dtype=np.uint8), 0)
    assert white.min() > 200  # it saturates and does not wrap around


def test_the_published_components_are_directions():
    assert np.allclose(PCA_DIRECTIONS.T @ PCA_DIRECTIONS, np.eye(3), atol=1e-3)


@pytest.mark.parametrize("name", ["trivial", "rand-m7-mstd0.5-inc1"])
def test_automatic_augmentation_changes_most_crops(name):
    image = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8).repeat(10, 0).repeat(10, 1)
    plain, augment = TrainAugment(30), TrainAugment(30, auto_augment=name)
    changed = [not torch.equal(plain(image, seed), augment(image, seed)) for seed in range(40)]
    assert 20 < sum(changed) < 40


def test_erasing_fills_a_rectangle_with_what_is_normalized_to_about_zero():
    white = np.full((40, 40, 3), 255, dtype=np.uint8)
    crop = TrainAugment(30, erase=1.0)(white, 0)
    erased = (crop != 255).any(0)
    assert 0.02 * 900 - 30 < erased.sum() < 0.34 * 900 + 30
    assert to_model_input(crop[None], torch.device("cpu"))[0][:, erased].abs().max() < 0.01
    assert not (TrainAugment(30)(white, 0) != 255).any()


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_the_input_of_a_network_is_what_torchvision_normalizes_it_to_bit_for_bit(layout):
    pixels = torch.randint(0, 256, (3, 3, 7, 11), dtype=torch.uint8).contiguous(memory_format=layout)
    x = to_model_input(pixels, torch.device("cpu"))
    expected = F.normalize(F.convert_image_dtype(pixels, torch.float), MEAN, STD)
    assert x.dtype == torch.float and torch.equal(x, expected)
    assert x.is_contiguous(memory_format=torch.channels_last)
