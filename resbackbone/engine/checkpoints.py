"""A run's checkpoints: written atomically, with checksums that show damage."""

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


def checkpoints(run: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    found = Path(run).glob("checkpoints/step_*")
    finished = [path for path in found if re.fullmatch(r"step_\d{7,}", path.name) and path.is_dir()]
    return sorted(finished, key=step_of)  # by number: 9999999 before 10000000


def step_of(checkpoint: Path) -> int:
    """The number of updates after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("step_"))


def save_checkpoint(run: Path, step: int, write: Callable[[Path], None], *, nbytes: int) -> None:
    """Let `write` fill the folder of a checkpoint of about `nbytes`, then delete all but the last three checkpoints.

    If that fails, as on a full disk, raises ValueError with the space needed and keeps the earlier checkpoints.
    """
    try:
        with folder_atomically(run / "checkpoints" / f"step_{step:07d}") as folder:
            write(folder)
            sums = {path.name: file_digest(path) for path in sorted(folder.iterdir())}
            (folder / CHECKSUMS).write_text(json.dumps(sums, indent=2))
    except (OSError, SafetensorError) as error:
        before = checkpoints(run)
        kept = f"the run can be resumed from {before[-1].name}" if before else "there is no earlier one"
        raise UserError(
            f"checkpoint of step {step}: cannot be written to {run} ({error}); {nbytes / 1e6:.0f} MB are needed, "
            f"{shutil.disk_usage(run).free / 1e6:.0f} MB are free; {kept}"
        ) from None
    for old in checkpoints(run)[:-KEPT]:
        shutil.rmtree(old)


def last_whole_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint that matches its checksums, if any."""
    return next(filter(_is_whole, reversed(checkpoints(run))), None)


def resume_point(run: Path, warn: Callable[[str], None] = print) -> Path | None:
    """The newest undamaged checkpoint, or None if the run has no checkpoint.

    Newer, damaged ones are renamed to step_N.damaged with a warning. Raises ValueError if all are damaged.
    """
    found, last = checkpoints(run), last_whole_checkpoint(run)
    if last is None and found:
        raise UserError(f"{run}: all of its {len(found)} checkpoints are damaged; choose another folder")
    for path in found[found.index(last) + 1 :] if last else ():
        aside = path.with_name(f"{path.name}.damaged")
        warn(f"damaged: {path} does not match its checksums; set aside as {aside.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    return last


def _is_whole(path: Path) -> bool:
    try:
        sums = json.loads((path / CHECKSUMS).read_text())
        return all(file_digest(path / name) == expected for name, expected in sums.items())
    except (OSError, ValueError, AttributeError):
        return False
