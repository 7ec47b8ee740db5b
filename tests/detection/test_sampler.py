import math
from collections import Counter
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from detection.sampler import TrainBatches, repeat_factors


def images(landscape=7, portrait=0, square=0):
    sizes = [(40, 30)] * landscape + [(30, 40)] * portrait + [(30, 30)] * square
    return SimpleNamespace(widths_heights=np.array(sizes, dtype=np.int32))


def batches(dataset, count, **options):
    return list(islice(TrainBatches(dataset, **{"batch_size": 4, "seed": 0, **options}), count))


def test_a_batch_holds_images_of_one_orientation():
    dataset = images(landscape=9, portrait=5, square=3)
    portrait_batches = 0
    for batch in batches(dataset, 60):
        portrait = {9 <= draw.index < 14 for draw in batch}
        assert len(batch) == 4 and len(portrait) == 1
        portrait_batches += portrait == {True}
    assert 0 < portrait_batches < 60


@pytest.mark.parametrize("landscape, portrait", [(12, 0), (8, 4), (0, 8), (1, 3)])
def test_every_image_comes_once_an_epoch(landscape, portrait):
    dataset = images(landscape, portrait)
    total = landscape + portrait
    drawn = [draw.index for batch in batches(dataset, total, batch_size=1) for draw in batch]
    assert len(drawn) == total and set(drawn) == set(range(total))
    following = [draw.index for batch in batches(dataset, total, batch_size=1, start=total) for draw in batch]
    assert set(following) == set(range(total)) and (following != drawn or total < 5)


def test_no_image_falls_away_where_the_batch_size_does_not_divide_their_number():
    dataset = images(landscape=7, portrait=3)
    counts = Counter(draw.index for batch in batches(dataset, 100) for draw in batch)
    assert len(counts) == 10
    assert max(counts.values()) - min(counts.values()) <= 2  # up to a batch of each orientation is still waiting


def test_a_data_set_smaller_than_a_batch_fills_it_over_several_epochs():
    for batch in batches(images(landscape=1, portrait=1), 5, batch_size=6):
        assert len(batch) == 6 and len({draw.index for draw in batch}) == 1


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_batches_of_all_ranks_together_are_those_of_one(ranks):
    dataset = images(landscape=9, portrait=5)
    whole = batches(dataset, 20)
    shares = [batches(dataset, 20, rank=rank, ranks=ranks) for rank in range(ranks)]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert all(len(part) == 4 // ranks for part in parts)
        assert sorted(draw for part in parts for draw in part) == sorted(batch)


@pytest.mark.parametrize("landscape, portrait", [(9, 5), (1, 0), (2, 3), (0, 7), (40, 31)])
@pytest.mark.parametrize("batch_size, start", [(4, 30), (8, 3), (8, 33), (13, 7)])
def test_a_later_start_goes_on_with_the_batches_that_would_have_come(landscape, portrait, batch_size, start):
    dataset = images(landscape, portrait)
    whole = batches(dataset, start + 25, batch_size=batch_size, seed=3)
    assert batches(dataset, 25, batch_size=batch_size, seed=3, start=start) == whole[start:]


def test_the_batches_of_a_seed_stay_what_they_are():
    """Resumed runs and published results depend on it."""
    drawn = [[draw.index for draw in batch] for batch in batches(images(landscape=5, portrait=4), 4, batch_size=3)]
    assert drawn == [[4, 2, 3], [5, 6, 8], [0, 1, 1], [7, 6, 7]]


def test_the_order_and_the_augmentation_are_functions_of_the_seed():
    dataset = images(landscape=30)
    assert batches(dataset, 9, seed=1) == batches(dataset, 9, seed=1)
    one, other = batches(dataset, 7, seed=1), batches(dataset, 7, seed=2)
    assert [draw.index for batch in one for draw in batch] != [draw.index for batch in other for draw in batch]
    seeds = [draw.seed for batch in batches(dataset, 30) for draw in batch]
    assert len(set(seeds)) == len(seeds)  # an image is augmented otherwise in each epoch


@pytest.mark.parametrize("batch_size, ranks", [(4, 3), (2, 4), (1, 2)])
def test_a_batch_size_that_does_not_divide_over_the_processes_is_refused(batch_size, ranks):
    with pytest.raises(
        ValueError, match=f"batch size {batch_size}: must be a multiple of {ranks}, the number of processes"
    ):
        TrainBatches(images(), batch_size=batch_size, seed=0, ranks=ranks)


# Repeat-factor sampling


class Labelled(SimpleNamespace):
    """Landscape images with these labels, as a data set of four classes holds them."""

    def __init__(self, *of_each_image):
        ends = np.cumsum([0, *(len(labels) for labels in of_each_image)])
        labels = torch.tensor([label for labels in of_each_image for label in labels], dtype=torch.int32)
        super().__init__(offsets=torch.from_numpy(ends), labels=labels, categories=dict.fromkeys(range(4)))
        self.widths_heights = [(40, 30)] * len(of_each_image)

    def __len__(self):
        return len(self.widths_heights)


# Of 20 images, one shows class 1, five show class 2 (one of them twice), all but one, which is empty, class 3; 4 none.
RARE = Labelled([3, 1, 3], [2, 3, 2], *[[2, 3]] * 4, *[[3]] * 13, [])


def test_images_of_rare_classes_repeat_as_often_as_lvis_has_it():
    factors = repeat_factors(RARE, 0.5)
    assert factors.tolist() == pytest.approx([math.sqrt(0.5 / 0.05)] + [math.sqrt(0.5 / 0.25)] * 5 + [1] * 14)
    assert TrainBatches(RARE, batch_size=2, seed=0, repeat_threshold=0.5).repeated == 6
    epoch = math.ceil(factors.sum())
    drawn = Counter(d.index for [d] in batches(RARE, 300 * epoch, batch_size=1, repeat_threshold=0.5))
    epochs = drawn[19]  # the empty image comes once in each
    assert all(drawn[i] / epochs == pytest.approx(factors[i], abs=0.1) for i in range(20))
    of_each = [drawn[i] / epochs for i in range(6, 19)]
    assert max(of_each) - min(of_each) < 0.01  # factors of 1 are not rounded up


def test_the_fraction_of_a_repeat_is_rounded_up_in_some_epochs():
    counts = set()
    for seed in range(30):
        drawn = Counter(d.index for [d] in batches(RARE, 20, batch_size=1, seed=seed, repeat_threshold=0.06))
        counts.add(drawn[0])  # sqrt(0.06 / 0.05) = 1.1
    assert counts <= {0, 1, 2} and {1, 2} <= counts


def test_without_a_rare_class_the_batches_are_those_without_repeats():
    assert TrainBatches(RARE, batch_size=2, seed=0, repeat_threshold=0.05).repeated == 0
    assert batches(RARE, 50, repeat_threshold=0.05) == batches(RARE, 50)


@pytest.mark.parametrize("ranks, start", [(1, 17), (2, 0), (2, 40)])
def test_repeats_are_the_same_on_every_rank_and_after_a_resume(ranks, start):
    options = {"seed": 3, "repeat_threshold": 0.5}
    whole = batches(RARE, start + 20, **options)[start:]
    assert any(len({draw.index for draw in batch}) < 4 for batch in whole)
    for rank in range(ranks):
        share = batches(RARE, 20, rank=rank, ranks=ranks, start=start, **options)
        assert share == [batch[rank::ranks] for batch in whole]
    seeds = [draw.seed for batch in whole for draw in batch]
    assert len(set(seeds)) == len(seeds)  # repeats of an image are augmented differently


@pytest.mark.parametrize("threshold", [-0.1, 1.5, math.nan])
def test_a_repeat_threshold_that_is_no_share_is_refused(threshold):
    with pytest.raises(ValueError, match=f"repeat threshold {threshold:g}: must be a share of the images"):
        TrainBatches(RARE, batch_size=1, seed=0, repeat_threshold=threshold)
