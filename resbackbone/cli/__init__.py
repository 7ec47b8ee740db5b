"""The terminal: options, help, progress and one-line errors of the commands.

Commands import this package before any other (tools/ruff.toml), so that a package that is missing, or another one with
the name of ours, is one line and not a traceback.
"""

import sys
from types import TracebackType

from resbackbone.checks import MissingPackage, detection_clash, require


def import_error_in_one_line(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """The `sys.excepthook` of commands, for what is raised before they can catch it: while they are imported."""
    clash = detection_clash() if isinstance(error, ImportError) else None
    if isinstance(error, MissingPackage) or clash:
        print(f"error: {clash or error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = import_error_in_one_line
TRAIN = ("huggingface_hub", "jinja2", "matplotlib", "rich", "simplejpeg", "tensorboard", "timm", "tyro", "yaml")
require("train", *TRAIN, user="a command")
