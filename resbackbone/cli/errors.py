"""How a command ends when its user made a mistake: one line and exit status 1."""

import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import SafetensorError

from resbackbone.checks import UserError
from resbackbone.image_io import BadImage

HEAD_START = 2.0  # seconds; mistakes are mostly found by all ranks at once, and the first one said is enough
SAID = "RESBACKBONE_ERROR_SAID"  # names a file that is there once rank 0 has said its error


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a UserError, an OSError, a full GPU or Ctrl-C in the block into one line on stderr and an exit.

    The rank in $RANK, if it is not 0, is named, and waits a moment, in which it is stopped if rank 0 failed too; if
    rank 0 was heard by then, it says nothing.
    So does every rank with a RuntimeError, longer: it is what a rank meets whose peer has gone, and the peer says why.
    RESBACKBONE_DEBUG=1 lets the traceback through.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except (UserError, OSError, SafetensorError, torch.OutOfMemoryError) as error:  # the third: a disk that is full
        if os.environ.get("RESBACKBONE_DEBUG"):
            raise
        _exit(" ".join(_in_words(error).split()) or type(error).__name__)
    except RuntimeError:
        if "RANK" in os.environ:
            time.sleep(2 * HEAD_START)
        raise


@contextmanager
def quick_exit() -> Iterator[None]:
    """In the block, and at its end, a process that is one of several ranks exits without Python's own way out.

    On that way a thread of gloo which lets go of a tensor then aborts the process (pytorch/pytorch issue 190489): a
    rank that had done its work would be one that failed, and one that says its error would say more than that.
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
    for worker in multiprocessing.active_children():  # of data loaders, which outlive this otherwise
        worker.terminate()
    os._exit(status if isinstance(status, int) else int(status is not None))


@contextmanager
def from_option(name: str) -> Iterator[None]:
    """Name the option whose value a UserError in the block is about: `nowhere: no such folder` gets `--data ` in front.

    The library does not know options, so its message starts with the value.
    """
    try:
        yield
    except BadImage:
        raise  # it is about one of many files
    except UserError as error:
        raise UserError(f"{name} {error}") from None


def _in_words(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        said = ". ".join(str(error).split(". ")[:2])
        return f"{said}; fewer images at a time take less: --batch-size, and for classifiers --accumulate"
    return f"{error}; --skip-bad-images skips it" if isinstance(error, BadImage) else str(error)


def _exit(line: str) -> NoReturn:
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(HEAD_START)
        if SAID in os.environ and Path(os.environ[SAID]).exists():
            sys.exit(1)
    elif SAID in os.environ:
        Path(os.environ[SAID]).touch()
    sys.exit(f"error: {line}" if rank == "0" else f"error on rank {rank}: {line}")
