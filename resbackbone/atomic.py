"""Write files and folders atomically: under a temporary name, then fsync, then rename."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

PIECE = 1 << 20  # bytes


def write_atomically(path: str | os.PathLike, data: str | bytes) -> None:
    """Write `data` to `path`. Readers see the old file or the new one, even after a crash."""
    with open_atomically(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def write_json(path: str | os.PathLike, content: object, *, indent: int = 2) -> None:
    write_atomically(path, json.dumps(content, indent=indent) + "\n")


@contextmanager
def open_atomically(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Yield a temporary file to write to, then sync it and move it to `path`; after an error `path` is unchanged."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def folder_atomically(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary folder to write to, then sync it and move it to `path`, replacing an older one."""
    path = Path(path)
    temporary, replaced = (path.with_name(f".{path.name}.{os.getpid()}.{kind}") for kind in ("tmp", "old.tmp"))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in [*temporary.rglob("*"), temporary]:
            _sync(file)
        if path.exists():
            os.rename(path, replaced)
        os.rename(temporary, path)
        _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def file_digest(path: str | os.PathLike, algorithm: str = "sha256") -> str:
    """The hash of a file in hexadecimal digits."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


def remove_unfinished(folder: str | os.PathLike) -> None:
    """Remove the temporary files of killed processes in `folder`. Only its sole writer may call this."""
    for left in Path(folder).glob(".*.tmp"):
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


def _sync(path: Path) -> None:
    if os.name == "nt":  # Windows syncs only files that are open for writing
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
