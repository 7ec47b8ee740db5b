"""A user's mistake ends a command with one line and exit status 1."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch

from resbackbone.checks import UserError
from resbackbone.engine.distributed import REPORTED
from resbackbone.image_io import BadImage

HEAD_START = 2.0  # seconds for rank 0, because all ranks find most mistakes at once, and one line is enough


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a UserError, an OSError, a full GPU or Ctrl-C in the block into one line on stderr and exit status 1.

    Ranks other than 0 wait a moment and print nothing if rank 0 has reported an error by then. A rank raises a
    RuntimeError when its peer has exited; it waits longer, so that the peer reports the cause first.
    RESBACKBONE_DEBUG=1 shows tracebacks instead.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        if os.environ.get("RESBACKBONE_DEBUG"):
            raise
        _exit(" ".join(_message(error).split()) or type(error).__name__)
    except RuntimeError:
        if "RANK" in os.environ:
            time.sleep(2 * HEAD_START)
        raise


@contextmanager
def from_option(name: str) -> Iterator[None]:
    """Put an option in front of a UserError: `nowhere: no such folder` becomes `--data nowhere: no such folder`.

    The library does not know options, so its messages start with the value, or with the parameter: `scales 1, 1: ..`.
    Those of `one_of` stay as they are.
    """
    try:
        yield
    except BadImage:
        raise  # its message names the file
    except UserError as error:
        message = str(error).removeprefix(f"{name.removeprefix('--')} ")
        raise UserError(message if message.startswith("unknown ") else f"{name} {message}") from None


def _message(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        first = ". ".join(str(error).split(". ")[:2])
        return f"{first}; lower --batch-size, or for classifiers raise --accumulate"
    return f"{error}; --skip-bad-images skips it" if isinstance(error, BadImage) else str(error)


def _exit(line: str) -> NoReturn:
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(HEAD_START)
        if REPORTED in os.environ and Path(os.environ[REPORTED]).exists():
            sys.exit(1)
    elif REPORTED in os.environ:
        Path(os.environ[REPORTED]).touch()
    sys.exit(f"error: {line}" if rank == "0" else f"error on rank {rank}: {line}")
