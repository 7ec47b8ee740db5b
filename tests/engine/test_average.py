import pytest
import torch
from torch import nn

from resbackbone.engine.average import build_average


@pytest.mark.parametrize("after", [None, 3])
def test_the_average_copies_or_follows_fast_at_first_and_then_slowly_statistics_included(after):
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    average = build_average(model, 0.7, after=after)
    expected = 0.0
    for step in range(1, 12):
        with torch.no_grad():
            model[0].weight.fill_(step)
            model[1].running_mean.fill_(step)
        average.update(model, step=step)
        kept = min(0.7, 1 - step ** (-2 / 3)) if after is None else 0.7 * (step > 4)
        expected = kept * expected + (1 - kept) * step
        assert average.module[0].weight.item() == pytest.approx(expected)
        assert average.module[1].running_mean.item() == pytest.approx(expected)
