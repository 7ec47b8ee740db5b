"""How ranks find each other, after a restart by torchrun too."""

import hashlib
import logging
import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from resbackbone.checks import some

AGENT = "TORCHELASTIC_USE_AGENT_STORE"  # set by torchrun, whose store outlives the ranks
PAUSE = 0.1  # seconds between reads of the store
PATIENCE = 30.0  # seconds before rank 0 says whom it waits for


def store_of_this_start(rank: int, ranks: int, timeout: timedelta) -> dist.Store | None:
    """The store at MASTER_ADDR, once all ranks are there; under torchrun its own, below a prefix of these ranks alone.
    None if nothing says where it is.

    After a restart (--max-restarts) torchrun's store still holds the addresses of the previous ranks, and a fast rank
    would connect to those. The restart count cannot serve as a prefix, because every node counts its own.
    """
    if os.environ.get(AGENT) != "True":
        if "MASTER_ADDR" not in os.environ:
            return None
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        more = {"multi_tenant": True, "use_libuv": os.environ.get("USE_LIBUV", "01"[os.name != "nt"]) == "1"}
        store = dist.TCPStore(host, port, ranks, rank == 0, timeout, wait_for_workers=False, **more)
        store.set(f"here/{rank}", "")
        start, said = time.monotonic(), False
        while absent := [str(r) for r in range(ranks) if not store.check([f"here/{r}"])]:
            if time.monotonic() > start + timeout.total_seconds():
                raise TimeoutError(f"{_processes(absent, ranks)} did not come within {timeout.total_seconds():.0f} s")
            if rank == 0 and not said and time.monotonic() > start + PATIENCE:
                said = True
                who = _processes(absent, ranks)
                logging.getLogger("resbackbone").warning("waiting for %s at %s:%d", who, host, port)
            time.sleep(PAUSE)
        return store
    store, *_ = next(dist.rendezvous("env://", rank=rank, world_size=ranks, timeout=timeout))
    return dist.PrefixStore(agree(store, rank, ranks, timeout), store)


def _processes(absent: list[str], ranks: int) -> str:
    return f"{len(absent)} of {ranks} processes (RANK {some(absent)})"


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
