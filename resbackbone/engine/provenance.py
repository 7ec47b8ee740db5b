"""The commit that measurements record."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def commit() -> str | None:
    """The checkout's commit, with "+" if tracked files differ from it.

    Where there is no checkout or no git: $RESBACKBONE_COMMIT, or None.
    """
    # Naming the directory excludes a repository around an installed package.
    command = ["git", f"--git-dir={ROOT / '.git'}", f"--work-tree={ROOT}", "describe", "--always", "--exclude=*"]
    try:
        run = subprocess.run([*command, "--abbrev=12", "--dirty=+"], capture_output=True, text=True, check=True)
        return run.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("RESBACKBONE_COMMIT")
