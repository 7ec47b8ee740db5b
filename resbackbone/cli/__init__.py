"""The terminal: options, help, progress and one-line errors of the commands.

Commands import this package before any other (tools/ruff.toml), so that a package that is missing, or another one with
the name of ours, is one line and not a traceback.
"""

import sys
from types import TracebackType

from resbackbone.checks import UserError, detection_clash, require
from resbackbone.cli import load as load  # measures from now on

TRAIN = ("huggingface_hub", "jinja2", "matplotlib", "rich", "simplejpeg", "tensorboard", "timm", "tyro", "yaml")


def import_error_in_one_line(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """The `sys.excepthook` of commands: most imports are done before a command can catch their errors or Ctrl-C."""
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)  # Python exits as shells expect
        return
    line = None
    if isinstance(error, ImportError):
        name = (error.name or "").partition(".")[0]
        needed = f"a command needs {name}: pip install 'resbackbone[train]'" if name in TRAIN else None
        line = detection_clash() or (str(error) if isinstance(error, UserError) else needed)
    if line:
        print(f"error: {line}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = import_error_in_one_line
require("train", "rich", "tyro", "yaml", user="a command")
