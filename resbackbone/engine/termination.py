"""SIGTERM, with which schedulers end a job: training stops between two updates and saves, and the command exits 0."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

EXIT_STATUS = 128 + signal.SIGTERM  # what a shell reports for it


class Terminated(SystemExit):
    """Raised where SIGTERM stops this process; `together` if all ranks have agreed to stop here.

    Its exit status is 0 once all that is wanted later is saved.
    """

    def __init__(self, status: int, *, together: bool = False):
        super().__init__(status)
        self.together = together


class Termination:
    """What to do about SIGTERM: stop at once, or while `deferred` only note that it is `requested`.

    `saved` says that stopping loses nothing, as in a run that can be resumed.
    """

    def __init__(self):
        self.requested = self.saved = self._deferred = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle the signal in the block, anew."""
        self.requested = self.saved = self._deferred = False
        if threading.current_thread() is not threading.main_thread():  # no other may
            yield
            return
        before = signal.signal(signal.SIGTERM, self._received)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    @contextmanager
    def deferred(self, deferred: bool = True) -> Iterator[None]:
        """In the block the signal is only noted; with False, in a part of such a block, it stops at once again."""
        before, self._deferred = self._deferred, deferred
        try:
            yield
        finally:
            self._deferred = before

    def stop(self, *, together: bool = False) -> NoReturn:
        """Raise Terminated."""
        raise Terminated(0 if self.saved else EXIT_STATUS, together=together)

    def _received(self, *_) -> None:
        self.requested = True
        if not self._deferred:
            self.stop()


@contextmanager
def quick_exit() -> Iterator[None]:
    """End a process that is one of several ranks at the end of the block, without Python's own shutdown.

    During that shutdown a gloo thread that frees a tensor aborts the process (pytorch/pytorch issue 190489): a rank
    that has done its work would count as failed.
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
    for worker in multiprocessing.active_children():  # of data loaders, which would outlive this process
        worker.terminate()
    os._exit(status if isinstance(status, int) else int(status is not None))


def worker_processes(workers: int) -> dict[str, Any]:
    """A DataLoader's options for workers that ignore Ctrl-C, and SIGTERM unless their parent sent it.

    torchrun, SLURM and terminals signal every process of a rank. Without its workers a rank could not finish its update
    and save. On macOS and Windows workers take SIGTERM as usual.
    """
    forked = workers > 0 and sys.platform == "linux"  # elsewhere threads that started earlier would get the signal
    return {
        "num_workers": workers,
        "worker_init_fn": _leave_signals_to_parent,
        "multiprocessing_context": "fork" if forked else None,
    }


def _leave_signals_to_parent(_worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # threads that start later inherit this
        threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    while parent is not None and parent.is_alive():
        received = signal.sigtimedwait({signal.SIGTERM}, 1)
        if received is not None and received.si_pid == parent.pid:
            break
    os._exit(0)


termination = Termination()  # the process's: it has one handler for a signal
