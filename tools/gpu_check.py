"""Check a GPU: whether this package computes correctly on it, resumes, and how fast it is beside its peers.

python tools/gpu_check.py                                  every part, in 7.5 minutes on an H100; nothing is downloaded
python tools/gpu_check.py --quick                          2 minutes
python tools/gpu_check.py --parts equality waits           these parts alone
python tools/gpu_check.py cifar --data cifar10 --minutes 12    the paper's CIFAR-10 networks, as many as fit
python tools/gpu_check.py --device cpu --quick             the parts that need no GPU, at toy sizes: a smoke test

Each part runs in its own process with a time limit. If one fails, its traceback is recorded and the next one starts.
The output folder gets gpu_check.json, written after every part, and gpu_check.md with all rows.
"""

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from operator import attrgetter
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import resbackbone  # noqa: E402

resbackbone.__path__.append(str(ROOT))  # resbackbone.tools, where this package is not installed

from resbackbone.atomic import write_atomically  # noqa: E402
from resbackbone.checks import UserError  # noqa: E402
from resbackbone.engine.device import choose_device  # noqa: E402
from resbackbone.tools import gpu_checks  # noqa: E402
from resbackbone.tools.benchmarks.machine import describe, usable_cores  # noqa: E402
from resbackbone.tools.gpu_checks.record import Record, Setting  # noqa: E402

ROOMY = {"cores": 8, "bytes": 70e9}  # what a machine must have to run parts side by side
BAD = ("differs", "failed", "out of memory", "timed out", "interrupted")  # "skipped" and "out of time" are not
SHORTEST = 20  # seconds; with less than this left, no part starts


@dataclass(frozen=True)
class Part:
    """A part: MODULE.FUNCTION in gpu_checks, and its time limit in seconds (on a CPU four times that)."""

    function: str
    seconds: int
    gpu_only: bool = False
    alone: bool = True  # timed: nothing else may run meanwhile
    quick: bool = True  # part of --quick


TOGETHER = 170  # seconds: the longest of the parts that run together sets how long they take
PARTS = {
    "machine": Part("machine.check", 45),
    "equality": Part("equality.check", TOGETHER, alone=False),
    "waits": Part("steps.waits", TOGETHER, gpu_only=True, alone=False),
    "resume": Part("runs.resume", TOGETHER, alone=False),
    "ranks": Part("runs.ranks", TOGETHER, alone=False),
    "demo": Part("runs.demo", TOGETHER, alone=False),
    "compile": Part("peers.compiled", TOGETHER, gpu_only=True, alone=False, quick=False),
    "profile": Part("steps.profiled", 60),
    "detector-training": Part("peers.detector_training", 80),
    "detector-inference": Part("peers.detector_inference", 60),
    "backbones": Part("peers.backbones", 50),
    "imagenet": Part("peers.imagenet", 110),
    "pretrain": Part("runs.pretrain", 100),
}
CIFAR = {"cifar": Part("cifar.experiment", 0)}  # its limit is --minutes


@dataclass
class Running:
    """A part whose process has been started."""

    name: str
    process: subprocess.Popen
    file: Path
    log: Path
    limit: float
    by_deadline: bool  # whether the overall deadline set the limit
    began: float = field(default_factory=time.monotonic)

    @property
    def is_over(self) -> bool:
        return self.process.poll() is not None or time.monotonic() - self.began > self.limit

    def stop(self) -> None:
        """Kill its process and everything that it has started."""
        kill_descendants(self.process.pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process that hangs in the driver cannot be killed
            self.process.wait(10)

    def result(self, *, interrupted: bool) -> dict:
        """Stop it; returns its results, which are partial if it had not ended."""
        seconds, status = time.monotonic() - self.began, self.process.poll()
        self.stop()
        try:
            found = json.loads(self.file.read_text())
        except (OSError, ValueError):
            found = not_run("unfinished", "")
        if found["status"] == "unfinished":
            if status is not None:
                found |= {"status": "failed", "reason": f"its process ended with {status}"}
            elif interrupted:
                found |= {"status": "interrupted", "reason": "by a signal"}
            else:
                found["status"] = "out of time" if self.by_deadline else "timed out"
                found["reason"] = f"stopped after {self.limit:.0f} s"
            found["traceback"] = self.log.read_text(errors="replace")[-4000:]
        for file in (self.file, self.log):
            file.unlink(missing_ok=True)
        return {**found, "seconds": round(seconds, 1)}


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


def main(argv: list[str] | None = None) -> int:
    """Parts -> gpu_check.json, gpu_check.md and a table. Returns 1 if a part found something wrong, otherwise 0."""
    options = parse(argv)
    if options.part:
        return run_part(options.part, options.setting)
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    parts = CIFAR if options.what == "cifar" else {name: PARTS[name] for name in options.parts or PARTS}
    command = shlex.join(["python", "tools/gpu_check.py", *(sys.argv[1:] if argv is None else argv)])
    content: dict = {"command": command, "machine": {}, "seconds": 0.0, "parts": {}}
    began = time.monotonic()
    signals: list[int] = []  # received so far; parts are stopped between two polls so that none is lost
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, lambda received, _: signals.append(received))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        device = "cuda:0" if options.device == "cuda" else options.device  # commands would use all GPUs
        setting = Setting(device, options.quick, output, Path(scratch), data=options.data, minutes=options.minutes)
        grace = 60 if options.what == "cifar" else 0  # to start, and to stop the net in training
        for name, found in run(parts, setting, began + 60 * options.minutes + grace, signals):
            content["machine"] = found.pop("machine", {}) or content["machine"]
            content["parts"] |= {name: found}
            content["parts"] = {name: content["parts"][name] for name in parts if name in content["parts"]}
            content["seconds"] = round(time.monotonic() - began, 1)
            write_atomically(output / "gpu_check.json", json.dumps(content, indent=1) + "\n")
            print(f"{name}: {found['status']}, {found['seconds']:.0f} s", flush=True)
    write_atomically(output / "gpu_check.md", markdown(content))
    print(table(content))
    print(f"all rows: {output / 'gpu_check.md'}; all measurements: {output / 'gpu_check.json'}")
    return int(any(found["status"] in BAD for found in content["parts"].values()))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options. argparse, not tyro: the machine may have torch and little else."""
    lines = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(
        prog="gpu_check.py",
        description=lines[0],
        epilog="\n".join(lines[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", nargs="?", default="all", choices=("all", "cifar"), help="default: all")
    parser.add_argument("--quick", action="store_true", help="2 minutes instead of 7.5")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--device", default="cuda", metavar="NAME", help="cuda, cuda:N or cpu (default: cuda)")
    parser.add_argument("--minutes", type=float, metavar="N", help="time limit; with cifar, that of the nets")
    parser.add_argument("--data", metavar="DIR", help="CIFAR-10, for cifar; or synthetic")
    parser.add_argument("--output", default="runs/gpu-check", metavar="DIR", help="folder (default: runs/gpu-check)")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # these two start a part's own process
    parser.add_argument("--setting", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if sys.platform == "win32":
        sys.exit("error: gpu_check.py needs Linux or macOS")
    try:
        choose_device(options.device)
    except UserError as error:
        flag = "" if str(error).startswith("unknown ") else "--device "
        sys.exit(f"error: {flag}{error}; --device cpu --quick runs the parts that need no GPU")
    if options.what == "cifar" and options.data is None:
        sys.exit("error: cifar needs --data DIR with cifar-10-batches-py/, or with train/<class>/ and test/<class>/")
    if options.minutes is None:
        on_gpu = options.device.startswith("cuda")
        options.minutes = (5 if options.what == "cifar" else 2 if options.quick else 7.5) if on_gpu else 30
    if not options.minutes > 0:
        parser.error(f"--minutes {options.minutes}: must be more than 0")
    return options


def run(
    parts: dict[str, Part], setting: Setting, deadline: float, signals: Sequence[int] = ()
) -> Iterator[tuple[str, dict]]:
    """Run every part; yields (name, result) as each ends. Parts that are not timed run together if they fit.

    deadline: when to stop, in time.monotonic(). signals: those received so far; the first one stops everything.
    """
    for group in grouped(parts, side_by_side=setting.on_gpu and is_roomy(setting.device)):
        running: list[Running] = []
        try:
            for name in group:
                left = deadline - time.monotonic()
                if signals:
                    yield name, not_run("interrupted", "by a signal")
                elif parts[name].gpu_only and not setting.on_gpu:
                    yield name, not_run("skipped", "needs a GPU")
                elif setting.quick and not parts[name].quick:
                    yield name, not_run("skipped", "not in --quick")
                elif left < SHORTEST:
                    yield name, not_run("out of time", "not started")
                else:
                    running.append(start(name, parts[name], replace(setting, together=len(group) > 1), left))
            while running:
                time.sleep(0.1)
                for one in [one for one in running if signals or one.is_over]:
                    found = one.result(interrupted=bool(signals))
                    if found["status"] == "out of memory":
                        setting = replace(setting, share=setting.share / 2)
                    yield one.name, found
                    running.remove(one)
        finally:
            for one in running:
                one.stop()


def grouped(parts: dict[str, Part], *, side_by_side: bool) -> list[list[str]]:
    groups: list[list[str]] = []
    for name, part in parts.items():
        together = side_by_side and groups and not part.alone and not parts[groups[-1][-1]].alone
        groups[-1].append(name) if together else groups.append([name])
    return groups


def is_roomy(device: str) -> bool:
    memory = torch.cuda.get_device_properties(device).total_memory
    return usable_cores() >= ROOMY["cores"] and memory >= ROOMY["bytes"]


def start(name: str, part: Part, setting: Setting, left: float) -> Running:
    """Start a part's process, with its own time limit or what is left until the deadline, whichever is less."""
    seconds = part.seconds if setting.on_gpu else 4 * part.seconds  # a CPU may be slow, or busy
    limit = min(seconds or left, left)
    setting = replace(setting, scratch=setting.scratch / name, until=time.time() + limit)
    setting.scratch.mkdir()
    file, log = (setting.output / f".{name}.{kind}" for kind in ("json", "log"))
    file.unlink(missing_ok=True)
    words = json.dumps(asdict(setting), default=str)
    argv = [sys.executable, __file__, "--device", setting.device, "--part", name, "--setting", words]
    with open(log, "wb") as said:
        process = subprocess.Popen(argv, stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
    return Running(name, process, file, log, limit, by_deadline=limit == left)


def not_run(status: str, reason: str) -> dict:
    return {"status": status, "seconds": 0.0, "reason": reason, "rows": [], "details": {}}


def run_part(name: str, words: str) -> int:
    """Run a part in its own process, and record the outcome."""
    values = json.loads(words)
    setting = Setting(**values | {name: Path(values[name]) for name in ("output", "scratch")})
    record = Record(setting.output / f".{name}.json")
    try:
        if setting.on_gpu:
            torch.cuda.set_device(torch.device(setting.device).index or 0)
        record.content["machine"] = describe(setting.device, torch.get_num_threads())
        record.write()
        function_of(name)(setting, record)
        status, reason = "differs" if record.differs else "ok", ""
    except ModuleNotFoundError as error:
        status, reason = "skipped", str(error)
    except Exception as error:  # noqa: BLE001 - any failure is recorded, and the next part starts
        full = isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)
        status = "out of memory" if full else "failed"
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        record.content["traceback"] = traceback.format_exc()
    record.content |= {"status": status, "reason": reason[:300]}
    record.write()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch raises an error when DataLoader workers are killed
    kill_descendants(os.getpid())
    return int(status in BAD)


def function_of(part: str) -> Callable[[Setting, Record], None]:
    """The function of a part. Only what it may need is imported: the machine may lack packages of other parts."""
    name = {**PARTS, **CIFAR}[part].function
    if name.startswith(("machine.", "peers.")):
        from resbackbone.tools.gpu_checks import machine, peers  # noqa: F401
    elif name.startswith("cifar."):
        from resbackbone.tools.gpu_checks import cifar  # noqa: F401
    else:
        from resbackbone.tools.gpu_checks import equality, runs, steps  # noqa: F401
    return attrgetter(name)(gpu_checks)


def table(content: dict) -> str:
    """One line per part: its status, then the failed checks or the number that passed."""
    lines = [f"{'part':18} {'status':14} {'seconds':>7}  "]
    for name, found in content["parts"].items():
        wrong = [
            f"{row['what']}: {shown(row['value'])}, {row['wanted']}" for row in found["rows"] if row["ok"] is False
        ]
        right = sum(row["ok"] is True for row in found["rows"])
        note = found.get("reason") or "; ".join(wrong) or (f"{right} checks passed" if right else "")
        lines.append(f"{name:18} {found['status']:14} {found['seconds']:7.0f}  {note[:150]}")

    def named(*statuses: str) -> str:
        return ", ".join(name for name, found in content["parts"].items() if found["status"] in statuses)

    bad, skipped, late = named(*BAD), named("skipped"), named("out of time")
    last = f"look at: {bad}" if bad else "nothing wrong was found"
    last += f"; skipped: {skipped}" if skipped else ""
    lines.append(last + (f"; there was no time for {late} (--minutes, --parts)" if late else ""))
    return "\n".join(lines)


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
    sys.exit(main())
