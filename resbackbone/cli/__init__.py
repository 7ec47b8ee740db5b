"""The terminal: options, help, progress and one-line errors of the commands.

Commands import this package before any other (tools/ruff.toml), so that a package that is missing, or another one with
the name of ours, is one line and not a traceback.
"""

import sys
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType

from resbackbone.checks import MissingPackage, require


def detection_clash() -> str | None:
    """Say which other package is imported as `detection` instead of ours; None if it is ours."""
    spec = find_spec("detection")
    if spec is not None and spec.origin and "resbackbone" in Path(spec.origin).read_text(encoding="utf-8"):
        return None
    found = "is not installed" if spec is None else f"in {spec.origin} is another package than ours"
    return f"detection {found}: pip uninstall detection, then install resbackbone again"


def import_error_in_one_line(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """The `sys.excepthook` of commands, for what is raised before they can catch it: while they are imported."""
    clash = detection_clash() if isinstance(error, ImportError) else None
    if isinstance(error, MissingPackage) or clash:
        print(f"error: {clash or error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = import_error_in_one_line
require("train", "rich", "tyro", "yaml", user="a command")
