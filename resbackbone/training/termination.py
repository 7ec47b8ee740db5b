"""SIGTERM, with which schedulers end a job: training stops between two updates and saves, and the command exits 0."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

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


def leave_signals_to_parent(_worker: int = 0) -> None:
    """In a data loader's process (its `worker_init_fn`): Ctrl-C, and SIGTERM of others than the parent, do nothing.

    torchrun, SLURM and a terminal signal all processes of a rank. Without its loaders it could not end its update and
    save. Where there is no sigwaitinfo (macOS, Windows) SIGTERM is left as it is.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # threads that start later inherit this
        threading.Thread(target=_exit_if_the_parent_says_so, args=(os.getppid(),), daemon=True).start()


def _exit_if_the_parent_says_so(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


termination = Termination()  # the process's: it has one handler for a signal
