import pytest
import torch
from made import keys_of_torchvisions_draws
from torchvision.models.detection import _utils

from detection import sampling
from detection.sampling import sample

LABELS = torch.tensor(
    [[1, 0, -1, 0, 2, 0, 1, -1, 0, 0], [0, 0, 0, -1, 0, 0, 0, 0, 0, 0], [1, 3, 1, 2, -1, 1, 1, 0, 1, 1]]
)


def chosen(index, drawn, labels):
    """Which labels of each image were drawn."""
    masks = torch.zeros_like(labels, dtype=torch.bool)
    for mask, places, valid in zip(masks, index, drawn, strict=True):
        assert len(places[valid].unique()) == valid.sum()  # without replacement
        mask[places[valid]] = True
    return masks


@pytest.mark.parametrize("count, fraction", [(4, 0.5), (6, 0.25), (1, 0.5), (2, 1.0), (30, 0.5), (5, 0.0)])
def test_from_the_same_random_state_it_draws_what_torchvision_does(count, fraction, monkeypatch):
    monkeypatch.setattr(sampling, "random_keys", keys_of_torchvisions_draws)
    torch.manual_seed(3)
    positive, negative = _utils.BalancedPositiveNegativeSampler(count, fraction)(list(LABELS))
    torch.manual_seed(3)
    index, drawn, most = sample(LABELS, count, fraction)
    assert index.shape == drawn.shape == (3, count) and most == int(count * fraction)
    found = chosen(index, drawn, LABELS)
    for of_image, pos, neg in zip(found, positive, negative, strict=True):
        assert torch.equal(of_image, (pos | neg).bool())
    places = torch.arange(count).expand(3, -1)
    is_positive = (LABELS.gather(1, index) > 0) & drawn
    assert (places[is_positive] < most).all() and (is_positive[:, :most].sum(1) == is_positive.sum(1)).all()


def test_every_candidate_of_a_kind_is_drawn_equally_often():
    torch.manual_seed(0)
    rounds, count = 4000, 4
    labels = LABELS[:1].expand(rounds, -1)  # three positives, five negatives
    index, drawn, _ = sample(labels, count, 0.5)
    assert drawn.all()
    times = torch.bincount(index.flatten(), minlength=10)
    assert (times[[2, 7]] == 0).all()
    for places, expected in (([0, 4, 6], 2 / 3), ([1, 3, 5, 8, 9], 2 / 5)):
        spread = (rounds * expected * (1 - expected)) ** 0.5
        assert ((times[places] - rounds * expected).abs() < 4 * spread).all()
    pairs = index[:, :2].sort(1).values  # of positives: each of the three pairs as often
    counts = torch.unique(pairs, dim=0, return_counts=True)[1]
    assert len(counts) == 3 and ((counts - rounds / 3).abs() < 4 * (rounds * 2 / 9) ** 0.5).all()


def test_an_image_with_nothing_to_draw_from_draws_nothing():
    index, drawn, most = sample(torch.full((2, 3), -1), 8, 0.25)
    assert not drawn.any() and (index == 0).all() and most == 2
