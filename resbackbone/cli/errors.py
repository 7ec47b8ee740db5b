"""A user's mistake ends a command with one line and exit status 1."""

import io
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

import torch

from resbackbone.checks import UserError
from resbackbone.engine.termination import INTERRUPTED, Terminated, termination
from resbackbone.image_io import BadImage

HEAD_START = 5.0  # seconds for rank 0, because all ranks find most mistakes at once, and one line is enough


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a UserError, an OSError or a full GPU in the block into one line on stderr and exit status 1.

    Ctrl-C and SIGTERM get a line too, and the statuses of `Terminated`.

    Ranks other than 0 wait a moment, in which they are stopped if rank 0 has failed too. A rank raises a RuntimeError
    when its peer has exited; it waits longer, so that the peer reports the cause first. RESBACKBONE_DEBUG=1 shows
    tracebacks instead.
    """
    try:
        yield
    except Terminated as stop:
        _print(stop.message)
        raise
    except KeyboardInterrupt:
        saved = f"; step {termination.saved} is saved; continue with: {termination.resume_command}"
        _print(f"interrupted{'' if termination.saved is None else saved}")
        sys.exit(INTERRUPTED)
    except (UserError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        if os.environ.get("RESBACKBONE_DEBUG"):
            raise
        _exit(error)
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


def _print(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):  # what reads it may have been interrupted too
            print(line, file=sys.stderr, flush=True)


def _exit(error: Exception) -> NoReturn:
    message, rank = str(error), os.environ.get("RANK", "0")
    if isinstance(error, OSError) and error.filename and error.strerror:
        message = f"{error.filename}: {error.strerror}"
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        message = (". ".join(message.split(". ")[:2]) or "out of memory") + "; lower --batch-size or raise --accumulate"
    elif isinstance(error, BadImage):
        message += "; --skip-bad-images skips it"
    line = " ".join(message.split()) or type(error).__name__
    if rank == "0":
        sys.exit(f"error: {line}")
    time.sleep(HEAD_START)
    sys.exit(f"error on rank {rank}: {line}")


@contextmanager
def readers_may_leave() -> Iterator[None]:
    """End quietly, with status 1, when what reads the block's output has left, such as `| head -1`.

    A signal's own status remains. Characters that the output cannot encode are printed as escapes.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        ending = sys.exc_info()[1]
        broken = isinstance(ending, BrokenPipeError)  # of the output, if it breaks once more
        try:
            print(end="\n" if broken else "", flush=True)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes again at its end
            if not isinstance(error, BrokenPipeError):
                raise
            if not isinstance(ending, Terminated):
                sys.exit(1)
