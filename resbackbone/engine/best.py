"""best/ in a run's folder: the weights of its best evaluation so far, and what that evaluation gave."""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from resbackbone.atomic import folder_atomically
from resbackbone.checks import UserError

FOLDER, FILE = "best", "best.json"


def read_best(run: Path) -> dict | None:
    """{"step", "score", "summary", "result"} of the best evaluation whose weights the run has kept; None without one.

    After a kill it may be of a later step than the checkpoint: the resumed run evaluates that step again, to the same
    score.
    """
    try:
        content = json.loads((Path(run) / FOLDER / FILE).read_text(encoding="utf-8"))
        return content if content.keys() >= {"step", "score", "summary"} else None
    except (OSError, ValueError, AttributeError):
        return None


def is_best(folder: Path) -> bool:
    """Whether a folder is a run's best/: the run replaces it as a whole, so commands write beside it, not in it."""
    return folder.resolve().name == FOLDER and (folder / FILE).is_file()


def keep_if_best(
    run: Path,
    step: int,
    score: float | None,
    summary: str,
    result: Mapping[str, Any],
    write_model: Callable[[Path], None],
) -> None:
    """Let `write_model` fill `run`/best if `score` is higher than the best so far; also writes best.json there.

    The folder gets the run's config.yaml too, so that commands take it like a run. Raises ValueError if that fails.
    """
    best = read_best(run)
    if score is None or not math.isfinite(score) or (best is not None and score <= best["score"]):
        return
    content = {"step": step, "score": score, "summary": summary, "result": dict(result)}
    try:
        with folder_atomically(run / FOLDER) as folder:
            write_model(folder)
            (folder / FILE).write_text(json.dumps(content, indent=2) + "\n")
            shutil.copyfile(run / "config.yaml", folder / "config.yaml")
    except (OSError, SafetensorError) as error:
        raise UserError(f"the best weights, of step {step}, cannot be written to {run / FOLDER} ({error})") from None
