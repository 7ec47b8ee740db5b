import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist
from torch.distributed.elastic.utils.distributed import get_free_port

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
    for name in (rendezvous.AGENT, "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    assert store_of_this_start(0, 1, SOON) is None


def test_rank_0_says_whom_it_waits_for(monkeypatch, caplog):
    monkeypatch.setattr(rendezvous, "PATIENCE", 0.2)
    monkeypatch.delenv(rendezvous.AGENT, raising=False)
    port = get_free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(store_of_this_start, 0, 2, SOON)
        while not caplog.messages and not first.done():
            time.sleep(0.05)
        second = pool.submit(store_of_this_start, 1, 2, SOON)
        first.result().set("from 0", "hello")
        assert second.result().get("from 0") == b"hello"
    assert caplog.messages == [f"waiting for 1 of 2 processes (RANK 1) at 127.0.0.1:{port}"]
