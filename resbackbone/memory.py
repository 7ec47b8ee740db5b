"""What the C library does with memory that tensors give back."""

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # parameters of mallopt(3)
_MIB = 2**20


def keep_freed_memory(keep: bool = True) -> bool:
    """Have this process keep up to 1 GiB that it frees, for its next tensors; True if the C library can do that.

    glibc gives blocks above 32 MiB back at once, and the system zeroes every page again for the next one: a tenth of
    the time of a detection on a CPU. With keep=False it does so again. Other C libraries (musl, macOS, Windows): no
    effect.
    """
    try:
        set_to = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # Windows has no library without a name
        return False
    if keep:
        return bool(set_to(_TRIM_THRESHOLD, 1024 * _MIB) and set_to(_MMAP_MAX, 0))
    # glibc's own adjustment, which the first setting has ended, stops at these thresholds.
    settings = (_MMAP_MAX, 65536), (_MMAP_THRESHOLD, 32 * _MIB), (_TRIM_THRESHOLD, 64 * _MIB)
    return all(set_to(*setting) for setting in settings)
