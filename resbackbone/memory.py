"""What the C library does with memory that tensors give back."""

import ctypes
from contextlib import suppress

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # parameters of mallopt(3)
_MIB = 2**20


def keep_freed_memory(keep: bool = True) -> None:
    """Have this process keep the memory that its main thread frees, for the next tensors.

    glibc returns blocks above 32 MiB to the system at once, and the system zeroes each page of the next one before it
    is used. Kept memory grows to the most that was in use at once, and by fragments where sizes vary. `keep=False`
    returns it, and sets glibc to what it does without having been told. Other C libraries (musl, macOS, Windows) and
    other threads: no effect.
    """
    with suppress(AttributeError, OSError, TypeError):  # Windows has no library without a name
        libc = ctypes.CDLL(None)
        if keep:
            settings = [(_TRIM_THRESHOLD, 1024 * _MIB), (_MMAP_MAX, 0)]
        else:  # glibc's own adjustment, which any setting ends, stops at these thresholds
            settings = [(_MMAP_MAX, 65536), (_MMAP_THRESHOLD, 32 * _MIB), (_TRIM_THRESHOLD, 64 * _MIB)]
        for setting in settings:
            libc.mallopt(*setting)
        if not keep:
            libc.malloc_trim(0)
