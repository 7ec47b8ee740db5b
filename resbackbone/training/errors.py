"""How a command ends when its user made a mistake: one line and exit status 1."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import SafetensorError

HEAD_START = 2.0  # seconds; mistakes are mostly found by all ranks at once, and the first one said is enough
SAID = "RESBACKBONE_ERROR_SAID"  # names a file that is there once rank 0 has said its error


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a ValueError, an OSError, a full GPU or Ctrl-C in the block into one line on stderr and an exit.

    The rank in $RANK, if it is not 0, is named, and waits a moment, in which it is stopped if rank 0 failed too; if
    rank 0 was heard by then, it says nothing.
    So does every rank with a RuntimeError, longer: it is what a rank meets whose peer has gone, and the peer says why.
    RESBACKBONE_DEBUG=1 lets the traceback through.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except torch.OutOfMemoryError as error:
        if os.environ.get("RESBACKBONE_DEBUG"):
            raise
        said = ". ".join(str(error).split(". ")[:2])
        _exit(f"{said}; fewer images at a time take less: --batch-size, and for classifiers --accumulate")
    except RuntimeError:
        if "RANK" in os.environ:
            time.sleep(2 * HEAD_START)
        raise
    except (ValueError, OSError, SafetensorError) as error:  # the last: a disk that is full
        if os.environ.get("RESBACKBONE_DEBUG"):
            raise
        _exit(str(error) or type(error).__name__)


def _exit(said: str) -> NoReturn:
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(HEAD_START)
        if SAID in os.environ and Path(os.environ[SAID]).exists():
            sys.exit(1)
    elif SAID in os.environ:
        Path(os.environ[SAID]).touch()
    line = " ".join(said.split())
    sys.exit(f"error: {line}" if rank == "0" else f"error on rank {rank}: {line}")
