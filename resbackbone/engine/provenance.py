"""The commit that measurements record."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def commit() -> str | None:
    """The checkout's commit, with "+" if tracked files differ from it.

    Where there is no checkout or no git: $RESBACKBONE_COMMIT, or None.
    """

    def git(*words: str) -> str:
        # Naming the directory excludes a repository around an installed package.
        command = ["git", f"--git-dir={ROOT / '.git'}", f"--work-tree={ROOT}", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("RESBACKBONE_COMMIT")
