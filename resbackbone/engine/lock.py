"""One writer for each folder: a lock that the operating system releases when the process ends."""

import contextlib
from pathlib import Path

from filelock import FileLock, Timeout

from resbackbone.checks import UserError

LOCK = ".lock"
_locks: dict[Path, tuple[FileLock, list[Path]]] = {}  # with the folders created for it, innermost first


def lock_folder(folder: Path) -> None:
    """Make this process the only writer of `folder`, which is created if missing.

    Raises ValueError if another process writes there.
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
        raise UserError(f"{folder} is being written by another process; choose another folder") from None
    _locks[key] = lock, made


def release_folder(folder: Path) -> None:
    """Unlock `folder`, and remove it if `lock_folder` created it and it is empty."""
    lock, made = _locks.pop(folder.resolve(), (None, []))
    if lock is None:
        return
    with contextlib.suppress(PermissionError):  # Windows does not delete an open file
        (folder / LOCK).unlink(missing_ok=True)
    for path in made:
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    lock.release()


def release_all_folders() -> None:
    """Unlock every folder that this process has locked."""
    for folder in list(_locks):
        release_folder(folder)
