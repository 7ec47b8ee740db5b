from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from resbackbone.engine import rendezvous
from resbackbone.engine.rendezvous import agree, store_of_this_start

SOON = timedelta(seconds=20)


def agreed(store, ranks, order):
    with ThreadPoolExecutor(ranks) as pool:
        waiting = {rank: pool.submit(agree, store, rank, ranks, SOON) for rank in order}
        return {waiting[rank].result() for rank in range(ranks)}


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_ranks_that_are_started_again_agree_on_a_word_that_those_before_had_not(order, monkeypatch):
    monkeypatch.setattr(rendezvous, "PAUSE", 0.01)
    store = dist.HashStore()
    words = [agreed(store, 3, order) for _ in range(3)]
    assert all(len(word) == 1 for word in words) and len(set.union(*words)) == 3


def test_a_rank_that_is_quicker_than_its_peers_waits_for_them_and_not_for_their_predecessors(monkeypatch):
    monkeypatch.setattr(rendezvous, "PAUSE", 0.01)
    store = dist.HashStore()
    agreed(store, 2, (0, 1))
    for rank in (0, 1):  # the other one is not there yet, but what its predecessor wrote is
        with pytest.raises(TimeoutError, match="the 2 ranks did not find each other within 0 seconds"):
            agree(store, rank, 2, timedelta(seconds=0.2))
    assert len(agreed(store, 2, (1, 0))) == 1


def test_a_rank_alone_agrees_with_itself():
    assert agree(dist.HashStore(), 0, 1, SOON)


def test_without_torchrun_there_is_no_such_store(monkeypatch):
    monkeypatch.delenv(rendezvous.AGENT, raising=False)
    assert store_of_this_start(0, 1, SOON) is None
