"""How the ranks that torchrun starts find each other, after a restart too."""

import hashlib
import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

AGENT = "TORCHELASTIC_USE_AGENT_STORE"  # set by torchrun, whose store outlives the ranks
PAUSE = 0.1  # seconds between reads of the store


def store_of_this_start(rank: int, ranks: int, timeout: timedelta) -> dist.Store | None:
    """torchrun's store under a prefix that only these ranks use; None if torchrun did not start them.

    After a restart (--max-restarts) torchrun's store still holds the addresses of the previous ranks, and a fast rank
    would connect to those. The restart count cannot serve as a prefix, because every node counts its own.
    """
    if os.environ.get(AGENT) != "True":
        return None
    store, *_ = next(dist.rendezvous("env://", rank=rank, world_size=ranks, timeout=timeout))
    return dist.PrefixStore(agree(store, rank, ranks, timeout), store)


def agree(store: dist.Store, rank: int, ranks: int, timeout: timedelta) -> str:
    """A prefix that the running ranks agree on, whatever previous ranks left in the store.

    Every rank writes a new name. Rank 0 proposes the names it finds, again and again, until each rank has confirmed
    that its own is among them; the prefix is their hash. Raises TimeoutError if they do not agree in time.
    """
    own, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    store.set(f"name/{rank}", own)
    while time.monotonic() < deadline:
        if rank == 0:
            store.set("names", " ".join(store.get(f"name/{r}").decode() for r in range(ranks)))
        names = store.get("names").decode()
        if own in names.split():
            prefix = hashlib.sha256(names.encode()).hexdigest()
            store.set(f"{prefix}/{rank}", "here")
            if rank == 0 and store.check([f"{prefix}/{r}" for r in range(ranks)]):
                store.set("agreed", prefix)
            if store.check(["agreed"]) and store.get("agreed").decode() == prefix:
                return prefix
        time.sleep(PAUSE)
    raise TimeoutError(f"the {ranks} ranks did not find each other within {timeout.total_seconds():.0f} seconds")
