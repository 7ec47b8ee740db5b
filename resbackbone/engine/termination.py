"""Ctrl-C, and SIGTERM, which schedulers send to end a job: training stops after an update and saves."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

EXIT_STATUS = 128 + signal.SIGTERM  # as shells report it
INTERRUPTED = 128 + signal.SIGINT


class Terminated(SystemExit):
    """A signal stops this process; `together` if all ranks agreed to stop here. Its text is for the user."""

    def __init__(self, status: int, message: str, *, together: bool = False):
        super().__init__(status)
        self.message, self.together = message, together

    def __str__(self) -> str:
        return self.message


class Termination:
    """Handles SIGTERM and the first Ctrl-C: stops at once or, while `deferred`, sets `requested`.

    A second Ctrl-C raises KeyboardInterrupt wherever the process is. In a training, `resume_command` continues the run
    from the update that is `saved`; if one is, the exit status after SIGTERM is 0.
    """

    def __init__(self):
        self._reset()

    def _reset(self) -> None:
        self.requested = self.interrupted = self._deferred = False
        self.saved: int | None = None
        self.resume_command = ""

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle the signals in the block; one that is ignored, as Ctrl-C by a shell's background jobs, stays so."""
        self._reset()
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
        for number in before:
            signal.signal(number, self._received)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self, deferred: bool = True) -> Iterator[None]:
        """In the block the signal only sets `requested`; with False, inside such a block, it stops at once again."""
        before, self._deferred = self._deferred, deferred
        try:
            yield
        finally:
            self._deferred = before

    def stop(self, where: str = "", *, together: bool = False) -> NoReturn:
        """Raise Terminated, whose message says `where`; a training's step is known here."""
        how, status = ("interrupted", INTERRUPTED) if self.interrupted else ("terminated", EXIT_STATUS)
        if self.saved is not None:
            where = f"at step {self.saved}, which is saved; continue with: {self.resume_command}"
            status = status if self.interrupted else 0
        elif self.resume_command:
            where = "before the first update; there was nothing to save"
        raise Terminated(status, f"{how} {where}".rstrip(), together=together)

    def _received(self, number: int, _) -> None:
        self.requested = True
        if number == signal.SIGINT:
            self.interrupted = True
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if not self._deferred:
            self.stop()
        if number == signal.SIGINT and os.environ.get("RANK", "0") == "0":
            with suppress(OSError):  # what reads it may have been interrupted too; print() may be in use here
                os.write(2, b"\nstopping soon; Ctrl-C again stops at once\n")


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
