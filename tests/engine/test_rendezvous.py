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
def test_restarted_ranks_agree_on_a_new_prefix(order, monkeypatch):
    monkeypatch.setattr(rendezvous, "PAUSE", 0.01)
    store = dist.HashStore()
    prefixes = [agreed(store, 3, order) for _ in range(3)]
    assert all(len(each) == 1 for each in prefixes) and len(set.union(*prefixes)) == 3


def test_a_fast_rank_waits_for_its_peers_and_not_for_their_predecessors(monkeypatch):
    monkeypatch.setattr(rendezvous, "PAUSE", 0.01)
    store = dist.HashStore()
    agreed(store, 2, (0, 1))
    for rank in (0, 1):  # the other one is not there yet, but what its predecessor wrote is
        with pytest.raises(TimeoutError, match="the 2 ranks did not find each other within 0 seconds"):
            agree(store, rank, 2, timedelta(seconds=0.2))
    assert len(agreed(store, 2, (1, 0))) == 1


def test_a_rank_alone_agrees_with_itself_and_without_torchrun_there_is_no_store(monkeypatch):
    assert agree(dist.HashStore(), 0, 1, SOON)
    monkeypatch.delenv(rendezvous.AGENT, raising=False)
    assert store_of_this_start(0, 1, SOON) is None
