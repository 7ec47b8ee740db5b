"""Surroundings that go wrong: a disk that is too small."""

import subprocess
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def small_disk(place: Path, size: int):
    """A file system of `size` bytes at `place`; False where this user may not mount one."""
    place.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(place)], check=True)
