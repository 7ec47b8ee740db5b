"""metrics.jsonl, read back: one JSON object a line, with its `kind` ("train" or "eval") and its `step`."""

import json
from pathlib import Path

from resbackbone.checks import UserError


def read_metrics(folder: Path, kind: str | None = None) -> list[dict]:
    """The lines of a run's metrics.jsonl, all or one kind of them; a line that a kill cut short is skipped.

    Raises UserError if the file is missing or cannot be read."""
    path = folder / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    whole = [content for line in lines if (content := _parsed(line))]
    return [content for content in whole if kind in (None, content.get("kind"))]


def _parsed(line: str) -> dict | None:
    try:
        content = json.loads(line)
    except ValueError:
        return None
    return content if isinstance(content, dict) and isinstance(content.get("step"), int) else None
