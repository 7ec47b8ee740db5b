"""Check a GPU: whether this package computes correctly on it, resumes, and how fast it is beside its peers.

python tools/gpu_check.py                             every part, in 15 minutes at most; nothing is downloaded
python tools/gpu_check.py --quick                     machine, equality, waits and resume, in 4 minutes at most
python tools/gpu_check.py --parts equality waits      these parts alone
python tools/gpu_check.py --device cpu                the parts that need no GPU, at toy sizes: a smoke test

Each part runs in its own process with a time limit. If one fails, its traceback is recorded and the next one starts.
The output folder gets gpu_check.json, written after every part, and gpu_check.md with all rows.
"""

import argparse
import contextlib
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from operator import attrgetter
from pathlib import Path
from typing import NoReturn

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import resbackbone  # noqa: E402

resbackbone.__path__.append(str(ROOT))  # resbackbone.tools, where this package is not installed

from resbackbone.atomic import write_atomically, write_json  # noqa: E402
from resbackbone.checks import UserError, nearest, one_of  # noqa: E402
from resbackbone.engine.device import choose_device  # noqa: E402
from resbackbone.tools import gpu_checks  # noqa: E402
from resbackbone.tools.benchmarks.machine import describe  # noqa: E402
from resbackbone.tools.gpu_checks.record import Record, Setting  # noqa: E402

PARTS = {  # by its name: MODULE.FUNCTION in gpu_checks
    "machine": "speed.machine",
    "equality": "equality.check",
    "waits": "steps.waits",
    "resume": "runs.resume",
    "ranks": "runs.ranks",
    "demo": "runs.demo",
    "profile": "steps.profiled",
    "detector-training": "speed.beside_peers",
    "detector-inference": "speed.beside_peers",
    "training": "speed.beside_peers",
    "inference": "speed.beside_peers",
    "imagenet": "speed.beside_peers",
    "pretrain": "runs.pretrain",
    "compiled": "steps.compiled",
}
QUICK = ("machine", "equality", "waits", "resume")
LIMIT = 150  # seconds of a part on a GPU; a CPU may be slow, or busy, and has four times that
SHORTEST = 20  # seconds; with less than this left, no part starts
BAD = ("differs", "failed", "timed out", "interrupted")  # "skipped" and "out of time" are not


def main(argv: list[str] | None = None) -> int:
    """Parts -> gpu_check.json, gpu_check.md and a line each. Returns 1 if a part found something wrong, otherwise 0."""
    options = parse(argv)
    if options.part:
        return run_part(Setting(options.part, options.device, options.output, time.time() + 60 * options.minutes))
    options.output.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "tools/gpu_check.py", *(sys.argv[1:] if argv is None else argv)])
    content: dict = {"command": command, "machine": {}, "seconds": 0.0, "parts": {}}
    began = time.monotonic()
    signals: list[int] = []  # received so far; a part is stopped between two polls so that none is lost
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, lambda received, _: signals.append(received))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        asked = options.parts or (QUICK if options.quick else PARTS)
        for name in (name for name in PARTS if name in asked):
            left = began + 60 * options.minutes - time.monotonic()
            found = isolated(name, options.device, Path(scratch) / name, left, signals)
            content["machine"] = found.pop("machine", {}) or content["machine"]
            content["parts"][name] = found
            content["seconds"] = round(time.monotonic() - began, 1)
            write_json(options.output / "gpu_check.json", content, indent=1)
            print(line_of(name, found), flush=True)
    write_atomically(options.output / "gpu_check.md", markdown(content))
    print(summary(content))
    print(f"all rows and measurements: {options.output / 'gpu_check.md'} and .json")
    return int(any(found["status"] in BAD for found in content["parts"].values()))


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Exit with one line, as other commands do."""
        message = re.sub("expected (one|at least one) argument", "needs a value", message.removeprefix("argument "))
        sys.exit("error: " + message.replace("ignored explicit argument", "takes no value, not"))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options. argparse, not tyro: the machine may have torch and little else."""
    lines = (__doc__ or "").splitlines()
    parser = Parser(
        prog="gpu_check.py",
        allow_abbrev=False,
        description=lines[0],
        epilog="\n".join(lines[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK)}, in 4 minutes")
    parser.add_argument("--parts", nargs="+", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--device", default="cuda:0", metavar="NAME", help="cuda, cuda:N or cpu (default: cuda:0)")
    parser.add_argument("--minutes", metavar="N", help="time limit (default: 15; 4 with --quick)")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu-check"), metavar="DIR", help="folder for results")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # starts a part's own process
    options, others = parser.parse_known_args(argv)
    if others:
        near = nearest(others[0], ("--quick", "--parts", "--device", "--minutes", "--output"))
        wrong = f"no option {others[0]}" if others[0].startswith("-") else f"{others[0]}: belongs to no option"
        parser.error(f"{wrong}; {f'did you mean {near}?' if near else '--help lists the options'}")
    if sys.platform == "win32":
        sys.exit("error: gpu_check.py needs Linux or macOS")
    try:
        for name in options.parts or ():
            one_of("part", name, PARTS)
    except UserError as error:
        parser.error(str(error))
    try:
        choose_device(options.device)
    except UserError as error:
        flag = "" if str(error).startswith("unknown ") else "--device "
        sys.exit(f"error: {flag}{error}; --device cpu runs the parts that need no GPU")
    if options.device == "cuda":
        options.device = "cuda:0"  # commands would use all GPUs
    minutes = options.minutes or (4 if options.quick else 15)
    try:
        options.minutes = float(minutes)
    except ValueError:
        options.minutes = 0
    if not 0 < options.minutes < math.inf:
        parser.error(f"--minutes {minutes}: must be a number above 0")
    if options.output.is_file():
        parser.error(f"--output {options.output}: is a file; give a folder")
    return options


def isolated(name: str, device: str, folder: Path, left: float, signals: Sequence[int]) -> dict:
    """Run a part in its own process, for `left` seconds at most; its results, which are partial if it was stopped.

    `folder` is made for its files. The first of the `signals` received stops it.
    """
    on_gpu = device.startswith("cuda")
    found: dict = {"status": "unfinished", "seconds": 0.0, "reason": "", "rows": [], "details": {}}
    if signals:
        return found | {"status": "interrupted", "reason": "by a signal"}
    if name == "waits" and not on_gpu:
        return found | {"status": "skipped", "reason": "needs a GPU"}
    if left < SHORTEST:
        return found | {"status": "out of time", "reason": "not started"}
    folder.mkdir()
    times = (1 if on_gpu else 4) * (3 if name == "compiled" else 1)  # a compiler takes long
    limit = min(LIMIT * times, left)
    began = time.monotonic()
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            command_of(name, device, folder, limit), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    while process.poll() is None and not signals and time.monotonic() - began < limit:
        time.sleep(0.1)
    status = process.poll()
    kill_descendants(process.pid)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # a process that hangs in the driver cannot be killed
        process.wait(10)
    with contextlib.suppress(OSError, ValueError):
        found |= json.loads((folder / "record.json").read_text())
    if found["status"] == "unfinished":
        if status is not None:
            found |= {"status": "failed", "reason": f"its process ended with {status}"}
        elif signals:
            found |= {"status": "interrupted", "reason": "by a signal"}
        else:
            found["status"] = "out of time" if limit == left else "timed out"
            found["reason"] = f"stopped after {limit:.0f} s"
        found["traceback"] = (folder / "log").read_text(errors="replace")[-4000:]
    return found | {"seconds": round(time.monotonic() - began, 1)}


def command_of(part: str, device: str, folder: Path, seconds: float) -> list[str]:
    limit = ["--minutes", str(seconds / 60)]
    return [sys.executable, __file__, "--part", part, "--device", device, "--output", str(folder), *limit]


def kill_descendants(pid: int) -> None:
    """Kill a process's descendants, including those in other sessions (torchrun's workers). Needs /proc."""
    parents = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(file.parent.name)] = int(file.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for one in found:  # which grows meanwhile
        found += [child for child, parent in parents.items() if parent == one]
    for one in found[1:]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)


def run_part(setting: Setting) -> int:
    """Run a part in this process, and record the outcome."""
    record = Record(setting.scratch / "record.json")
    try:
        if setting.on_gpu:
            torch.cuda.set_device(setting.device)
        record.content["machine"] = describe(setting.device, torch.get_num_threads())
        record.write()
        function_of(setting.part)(setting, record)
        status, reason = "differs" if record.differs else "ok", ""
    except ModuleNotFoundError as error:
        status, reason = "skipped", str(error)
    except Exception as error:  # noqa: BLE001 - any failure is recorded, and the next part starts
        status, reason = "failed", f"{type(error).__name__}: {' '.join(str(error).split())}"
        record.content["traceback"] = traceback.format_exc()
    record.content |= {"status": status, "reason": reason[:300]}
    record.write()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch raises an error when DataLoader workers are killed
    kill_descendants(os.getpid())
    return int(status in BAD)


def function_of(part: str) -> Callable[[Setting, Record], None]:
    """The function of a part. What `speed` does not need is not imported for it: the machine may lack packages."""
    if PARTS[part].startswith("speed."):
        from resbackbone.tools.gpu_checks import speed  # noqa: F401
    else:
        from resbackbone.tools.gpu_checks import equality, runs, steps  # noqa: F401
    return attrgetter(PARTS[part])(gpu_checks)


def line_of(name: str, found: dict) -> str:
    """A part's status, and its failed checks or the number that passed."""
    wrong = [f"{row['what']}: {shown(row['value'])}, {row['wanted']}" for row in found["rows"] if row["ok"] is False]
    passed = f"{sum(row['ok'] is True for row in found['rows'])} checks passed"
    note = found["reason"] or "; ".join(wrong) or passed
    return f"{name}: {found['status']}, {found['seconds']:.0f} s, {note[:150]}"


def summary(content: dict) -> str:
    """The parts to look at, and those that did not run."""
    named: dict[str, list[str]] = {}
    for name, found in content["parts"].items():
        named.setdefault("look at" if found["status"] in BAD else found["status"], []).append(name)
    lines = [f"{kind}: {', '.join(names)}" for kind, names in named.items() if kind != "ok"]
    return "; ".join(lines if "look at" in named else ["nothing wrong was found", *lines])


def markdown(content: dict) -> str:
    """All rows, and what they were measured on."""
    machine = content["machine"]
    hardware, versions = machine.get("hardware", {}), machine.get("versions", {})
    card = f"{hardware['gpu']}, CUDA {hardware['cuda']}, cuDNN {hardware['cudnn']}; " if "gpu" in hardware else ""
    when = f"{machine.get('date', '?')}, commit {machine.get('commit') or 'unknown'}"
    lines = [
        f"Measured {when}, in {content['seconds']:.0f} s,",
        f"with `{content['command']}`.",
        f"{card}{hardware.get('cpu', '?')}, {hardware.get('cores', '?')} cores, {hardware.get('memory_gib', '?')} GiB.",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
    ]
    for name, found in content["parts"].items():
        reason = f" ({found['reason']})" if found.get("reason") else ""
        lines += ["", f"### {name}: {found['status']}{reason}, {found['seconds']:.0f} s", ""]
        lines += ["| what | found | wanted | |", "| --- | --- | --- | --- |"] if found["rows"] else []
        for row in found["rows"]:
            mark = {True: "ok", False: "**differs**", None: ""}[row["ok"]]
            cells = (row["what"], shown(row["value"]), row["wanted"], mark)
            lines.append(f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |")
        if "traceback" in found:
            lines += ["", "```", found["traceback"].strip(), "```"]
    return "\n".join(lines) + "\n"


def shown(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head -1` ends it quietly
    try:
        sys.exit(main())
    except OSError as error:  # of the files that are written here
        sys.exit(f"error: {error.filename or 'output'}: {error.strerror}")
