"""SIGTERM, which schedulers send to end a job: training stops after an update and saves, and the command exits 0."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

EXIT_STATUS = 128 + signal.SIGTERM  # as shells report it


class Terminated(SystemExit):
    """SIGTERM stops this process; `together` if all ranks agreed to stop here."""

    def __init__(self, status: int, *, together: bool = False):
        super().__init__(status)
        self.together = together


class Termination:
    """Handles SIGTERM: stops at once or, while `deferred`, sets `requested`.

    Once `saved` is set, because the run can be resumed, the exit status is 0.
    """

    def __init__(self):
        self.requested = self.saved = self._deferred = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle the signal in the block."""
        self.requested = self.saved = self._deferred = False
        before = signal.signal(signal.SIGTERM, self._received)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    @contextmanager
    def deferred(self, deferred: bool = True) -> Iterator[None]:
        """In the block the signal only sets `requested`; with False, inside such a block, it stops at once again."""
        before, self._deferred = self._deferred, deferred
        try:
            yield
        finally:
            self._deferred = before

    def stop(self, *, together: bool = False) -> NoReturn:
        raise Terminated(0 if self.saved else EXIT_STATUS, together=together)

    def _received(self, *_) -> None:
        self.requested = True
        if not self._deferred:
            self.stop()


@contextmanager
def quick_exit() -> Iterator[None]:
    """End a rank at the end of the block without Python's finalization.

    During finalization a gloo thread that frees a tensor aborts the process (pytorch/pytorch issue 190489), and a
    finished rank would count as failed.
    """
    if "RANK" not in os.environ:
        yield
        return
    status: object = None
    try:
        yield
    except SystemExit as exit:
        status = exit.code
    if not isinstance(status, int | None):
        print(status, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    for worker in multiprocessing.active_children():  # data loaders' workers would outlive this process
        worker.terminate()
    os._exit(status if isinstance(status, int) else int(status is not None))


def worker_processes(workers: int) -> dict[str, Any]:
    """DataLoader options for workers that ignore Ctrl-C, and on Linux every SIGTERM but their parent's.

    torchrun, SLURM and terminals signal every process of a rank, but a rank needs its workers to finish an update.
    """
    forked = workers > 0 and sys.platform == "linux"
    return {
        "num_workers": workers,
        "worker_init_fn": _leave_signals_to_parent,
        "multiprocessing_context": "fork" if forked else None,
    }


def _leave_signals_to_parent(_worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # inherited by later threads
        threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    while parent is not None and parent.is_alive():
        received = signal.sigtimedwait({signal.SIGTERM}, 1)
        if received is not None and received.si_pid == parent.pid:
            break
    os._exit(0)


termination = Termination()  # a process has one handler for a signal
