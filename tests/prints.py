"""What a process prints, by Python or not."""

import os
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout


@contextmanager
def prints_into(file):
    """Whatever the process prints, by Python or not, goes into the file."""
    sys.stdout.flush(), sys.stderr.flush()
    kept = [os.dup(number) for number in (1, 2)]
    try:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        with redirect_stdout(file), redirect_stderr(file):
            yield
        file.flush()
    finally:
        for number, own in zip((1, 2), kept, strict=True):
            os.dup2(own, number)
            os.close(own)
