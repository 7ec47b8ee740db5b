"""One writer for each folder: a lock that the operating system releases when the process ends."""

import contextlib
import os
import socket
import time
from pathlib import Path

from filelock import FileLock, Timeout

from resbackbone.checks import UserError

LOCK, HOLDER = ".lock", ".lock.txt"  # the second names the process
_locks: dict[Path, tuple[FileLock, list[Path]]] = {}  # with the folders created for it, innermost first


def lock_folder(folder: Path) -> None:
    """Make this process the only writer of `folder`, which is created if missing.

    Raises ValueError if another process writes there, and names that process.
    """
    key = folder.resolve()
    if key in _locks:
        return
    made = [path for path in (key, *key.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(key / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        holder = "another process"
        with contextlib.suppress(OSError):
            holder = (folder / HOLDER).read_text()
        raise UserError(f"{folder} is being written by {holder}; choose another folder") from None
    _locks[key] = lock, made
    holder = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
    (folder / HOLDER).write_text(holder)


def release_folder(folder: Path) -> None:
    """Unlock `folder`, and remove it if `lock_folder` created it and it is empty."""
    lock, made = _locks.pop(folder.resolve(), (None, []))
    if lock is None:
        return
    for name in (LOCK, HOLDER):
        with contextlib.suppress(PermissionError):  # Windows does not delete an open file
            (folder / name).unlink(missing_ok=True)
    for path in made:
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    lock.release()


def release_all_folders() -> None:
    """Unlock every folder that this process has locked."""
    for folder in list(_locks):
        release_folder(folder)
