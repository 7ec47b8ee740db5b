"""A run's checkpoints: each written whole or not at all, with checksums that tell later whether it still is."""

import errno
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from resbackbone.atomic import file_digest, folder_atomically
from resbackbone.checks import UserError

KEPT = 3
CHECKSUMS = "checksums.json"  # {file: SHA-256}
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def checkpoints(run: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    found = Path(run).glob("checkpoints/step_*")
    finished = [path for path in found if re.fullmatch(r"step_\d{7,}", path.name) and path.is_dir()]
    return sorted(finished, key=lambda path: int(path.name.removeprefix("step_")))  # as text 10000000 is before 9999999


def save_checkpoint(run: Path, step: int, write: Callable[[Path], None], *, nbytes: int) -> None:
    """Let `write` fill the checkpoint of `step`, about `nbytes` long; afterwards the oldest ones go.

    ValueError that says how much is needed if the disk is full; the checkpoints before stay.
    """
    try:
        with folder_atomically(run / "checkpoints" / f"step_{step:07d}") as folder:
            write(folder)
            sums = {path.name: file_digest(path) for path in sorted(folder.iterdir())}
            (folder / CHECKSUMS).write_text(json.dumps(sums, indent=2))
    except (OSError, SafetensorError) as error:
        if not _no_space(error):
            raise
        before = checkpoints(run)
        stays = f"{before[-1].name} stays, and --resume goes on from it" if before else "there is none before it"
        raise UserError(
            f"checkpoint of step {step}: no space left in {run}: {nbytes / 1e6:.0f} MB are needed, "
            f"{shutil.disk_usage(run).free / 1e6:.0f} MB are free; {stays}"
        ) from None
    for old in checkpoints(run)[:-KEPT]:
        shutil.rmtree(old)


def last_whole_checkpoint(run: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint whose files are as they were written, if any; and what is wrong with those after it."""
    damaged: dict[Path, str] = {}
    for path in reversed(checkpoints(run)):
        wrong = _damage(path)
        if wrong is None:
            return path, damaged
        damaged[path] = wrong
    return None, damaged


def _damage(path: Path) -> str | None:
    try:
        sums = json.loads((path / CHECKSUMS).read_text())
        wrong = [name for name, expected in sums.items() if file_digest(path / name) != expected]
    except (OSError, ValueError, AttributeError) as error:
        return f"cannot be read ({error})"
    return f"{', '.join(wrong)} changed since it was written" if wrong else None


def _no_space(error: Exception) -> bool:
    return getattr(error, "errno", None) in NO_SPACE or any(f"os error {code}" in str(error) for code in NO_SPACE)
