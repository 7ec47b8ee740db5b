"""Where a figure comes from: the commit, the hardware and the command that made it."""

import multiprocessing
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import torch

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


def cpu() -> tuple[str, int]:
    """The processor's name, as Linux knows it or else as Python does, and the number of cores that this process has."""
    name = fields_of(Path("/proc/cpuinfo")).get("model name")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return name or platform.processor() or platform.machine(), cores


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Those of the packages that are installed."""
    found = {}
    for name in packages:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def fields_of(path: Path) -> dict[str, str]:
    """A file of /proc with lines such as "VmRSS:  1024 kB"; empty where there is none."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def hardware(device: torch.device) -> str:
    """The models of a GPU and of the CPU, with its cores: "NVIDIA H200; AMD EPYC 9R14, 16 cores"."""
    name, cores = cpu()
    gpu = f"{torch.cuda.get_device_name(device)}; " if device.type == "cuda" else ""
    return f"{gpu}{name}, {cores} core{'s' if cores > 1 else ''}"


def program() -> list[str]:
    """The words that started this process, without its options: python and a script, or an installed command.

    The options of torchrun, which a process does not know, are "..". Of a program that calls a command: no words.
    """
    script = Path(sys.argv[0])
    if script.stem.startswith("resbackbone-"):
        return [script.name]
    if script.absolute().parent.name != "tools":
        return []
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return ["torchrun", "..", sys.argv[0]]
    if multiprocessing.parent_process() is not None:  # spawned for a GPU: its orig_argv is multiprocessing's
        return ["python", sys.argv[0]]
    return sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]


def command(tool: str) -> str | None:
    """The shell command that started this process; None if that was not `tool` ("train_coco") but a program that
    called it.
    """
    if Path(sys.argv[0]).stem.replace("-", "_") not in (tool, f"resbackbone_{tool}"):
        return None
    return in_shell([*program(), *sys.argv[1:]])


def tool_of(command: str) -> str | None:
    """The tool that a `command` starts: "train_coco"."""
    found = re.search(r"(?:^|[/\\\s])(?:tools[/\\](\w+)\.py|resbackbone-([a-z0-9-]+)(?=\s|\.exe|$))", command)
    return (found[1] or found[2].replace("-", "_")) if found else None


def in_shell(words: Sequence[str]) -> str:
    """The words as a line of a shell."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)
