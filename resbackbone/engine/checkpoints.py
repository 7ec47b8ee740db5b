"""A run's checkpoints: written atomically, with checksums that show damage."""

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
    return sorted(finished, key=lambda path: int(path.name.removeprefix("step_")))  # by number: 9999999 before 10000000


def save_checkpoint(run: Path, step: int, write: Callable[[Path], None], *, nbytes: int) -> None:
    """Let `write` fill the folder of a checkpoint of about `nbytes`, then delete all but the last three checkpoints.

    If the disk is full, raises ValueError with the space needed and keeps the earlier checkpoints.
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
        kept = f"the run can be resumed from {before[-1].name}" if before else "there is no earlier one"
        raise UserError(
            f"checkpoint of step {step}: no space left in {run}: {nbytes / 1e6:.0f} MB are needed, "
            f"{shutil.disk_usage(run).free / 1e6:.0f} MB are free; {kept}"
        ) from None
    for old in checkpoints(run)[:-KEPT]:
        shutil.rmtree(old)


def last_whole_checkpoint(run: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint that matches its checksums, if any, and what is wrong with each newer one."""
    damaged: dict[Path, str] = {}
    for path in reversed(checkpoints(run)):
        damage = _damage(path)
        if damage is None:
            return path, damaged
        damaged[path] = damage
    return None, damaged


def resume_point(run: Path, warn: Callable[[str], None] = print) -> Path | None:
    """The newest undamaged checkpoint, or None if the run has no checkpoint.

    Newer, damaged ones are renamed to step_N.damaged with a warning. Raises ValueError if all are damaged.
    """
    last, damaged = last_whole_checkpoint(run)
    if last is None and damaged:
        raise UserError(f"{run}: all of its {len(damaged)} checkpoints are damaged; choose another folder")
    for path, damage in damaged.items():
        aside = path.with_name(f"{path.name}.damaged")
        warn(f"damaged: {path}: {damage}; set aside as {aside.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    return last


def _damage(path: Path) -> str | None:
    try:
        sums = json.loads((path / CHECKSUMS).read_text())
        if not isinstance(sums, dict):
            return f"{CHECKSUMS} is not what was written"
        changed = [name for name, expected in sums.items() if file_digest(path / name) != expected]
    except (OSError, ValueError) as error:
        return f"cannot be read ({error})"
    return f"{', '.join(changed)} changed since it was written" if changed else None


def _no_space(error: Exception) -> bool:
    return getattr(error, "errno", None) in NO_SPACE or any(f"os error {code}" in str(error) for code in NO_SPACE)
