"""How the ranks of one start find each other under torchrun."""

import hashlib
import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

AGENT = "TORCHELASTIC_USE_AGENT_STORE"  # set by torchrun: the store is its own, and outlives the ranks
PAUSE = 0.1  # seconds between two looks at the store


def store_of_this_start(rank: int, ranks: int, timeout: timedelta) -> dist.Store | None:
    """torchrun's store, under a prefix that these ranks alone have; None where it was not torchrun that started them.

    After a restart (--max-restarts) torchrun's store still holds the addresses of the ranks before, and a rank that is
    quicker than its peer would connect to where that one's predecessor was. A count of the restarts is no help: the
    nodes count their own.
    """
    if os.environ.get(AGENT) != "True":
        return None
    store, *_ = next(dist.rendezvous("env://", rank=rank, world_size=ranks, timeout=timeout))
    return dist.PrefixStore(agree(store, rank, ranks, timeout), store)


def agree(store: dist.Store, rank: int, ranks: int, timeout: timedelta) -> str:
    """A word that the ranks which run now agree on, whatever ranks before them left in the store.

    Every rank writes a name that nobody had; rank 0 proposes the names it finds, and takes them when each one has
    answered under its name. If one was a predecessor's, its successor's comes into a later proposal.

    Raises TimeoutError if that does not come about in time.
    """
    own, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    store.set(f"name/{rank}", own)
    while time.monotonic() < deadline:
        if rank == 0:
            names = [store.get(f"name/{r}").decode() for r in range(ranks)]
            store.set("names", " ".join(names))
            word = _word(names)
            if all(store.check([f"{word}/{r}"]) for r in range(1, ranks)):
                store.set("agreed", word)
                return word
        else:
            names = store.get("names").decode().split()
            word = _word(names)
            if names[rank : rank + 1] == [own]:
                store.set(f"{word}/{rank}", "here")
                if store.check(["agreed"]) and store.get("agreed").decode() == word:
                    return word
        time.sleep(PAUSE)
    raise TimeoutError(f"the {ranks} ranks did not find each other within {timeout.total_seconds():.0f} seconds")


def _word(names: list[str]) -> str:
    return hashlib.sha256(" ".join(names).encode()).hexdigest()
