"""Check a GPU once: whether this package computes on it what it should, resumes, and how fast it is beside its peers.

python tools/gpu_check.py                                  every part, in 7.5 minutes on an H100; nothing is downloaded
python tools/gpu_check.py --quick                          2 minutes
python tools/gpu_check.py --parts equality waits           these parts alone
python tools/gpu_check.py cifar --data cifar10 --minutes 12    the paper's CIFAR-10 networks, as many as fit
python tools/gpu_check.py --device cpu --quick             what a CPU can do of it, at sizes that only show that it runs

Every part runs in a process of its own, with a time limit; what fails is recorded with its traceback, and the next part
starts. The output folder has gpu_check.json, written after every part, and gpu_check.md with all rows.
"""

import argparse
import contextlib
import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]  # it runs where this package is not installed, too

from gpu_checks.record import Record, Setting  # noqa: E402

from resbackbone.atomic import write_atomically  # noqa: E402
from resbackbone.training.device import choose_device  # noqa: E402

ROOMY = {"cores": 8, "bytes": 40e9}  # of a machine that runs parts side by side
BAD = ("differs", "failed", "out of memory", "timed out", "interrupted")
SHORTEST = 5  # seconds; with less than this left, a part is not started


@dataclass(frozen=True)
class Part:
    """A part, MODULE.FUNCTION of gpu_checks, and the seconds after which it is stopped."""

    function: str
    seconds: int
    gpu_only: bool = False
    alone: bool = True  # its times count, so that nothing else may run meanwhile
    quick: bool = True  # part of --quick


PARTS = {
    "machine": Part("machine.check", 45),
    "equality": Part("equality.check", 100, alone=False),
    "waits": Part("steps.waits", 60, gpu_only=True, alone=False),
    "resume": Part("runs.resume", 120, alone=False),
    "ranks": Part("runs.ranks", 90, alone=False),
    "demo": Part("runs.demo", 120, alone=False),
    "compile": Part("peers.compiled", 140, gpu_only=True, alone=False, quick=False),
    "profile": Part("steps.profiled", 60),
    "detector-training": Part("peers.detector_training", 90),
    "detector-inference": Part("peers.detector_inference", 70),
    "backbones": Part("peers.backbones", 60),
    "imagenet": Part("peers.imagenet", 80),
    "pretrain": Part("runs.pretrain", 80),
}
CIFAR = {"cifar": Part("cifar.experiment", 0)}  # its limit is --minutes


@dataclass
class Running:
    """A part that runs."""

    name: str
    part: Part
    process: subprocess.Popen
    file: Path
    log: Path
    limit: float
    began: float = field(default_factory=time.monotonic)

    def stop(self) -> None:
        """End its process and all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def main(argv: list[str] | None = None) -> int:
    """Parts -> gpu_check.json, gpu_check.md and a table; 1 if a part found something wrong, 0 if none did."""
    options = parse(argv)
    if options.part:
        return run_part(options.part, options.setting)
    if sys.platform == "win32":
        return refuse("it stops processes as Linux and macOS do")
    try:
        choose_device(options.device)
    except ValueError as error:
        return refuse(f"{error} (--device cpu --quick tries what a CPU can do)")
    if options.what == "cifar" and options.data is None:
        return refuse(
            "cifar needs --data DIR, which should hold cifar-10-batches-py/, or train/<class>/ and test/<class>/"
        )
    output = Path(options.output).absolute()
    output.mkdir(parents=True, exist_ok=True)
    parts = CIFAR if options.what == "cifar" else {name: PARTS[name] for name in options.parts or PARTS}
    content = {
        "command": shlex.join(["python", "tools/gpu_check.py", *(sys.argv[1:] if argv is None else argv)]),
        "machine": {},
        "seconds": 0.0,
        "parts": {},
    }
    began = time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        data = options.data and str(Path(options.data).absolute() if Path(options.data).exists() else options.data)
        setting = Setting(options.device, options.quick, output, Path(scratch), data=data, minutes=options.minutes)
        grace = 60 if options.what == "cifar" else 0  # for its start, and for the net that is under way
        try:
            for name, found in results_of(parts, setting, began + 60 * options.minutes + grace):
                content["machine"] = content["machine"] or found.pop("machine", {})
                content["parts"][name] = found
                content["seconds"] = round(time.monotonic() - began, 1)
                write_atomically(output / "gpu_check.json", json.dumps(content, indent=1) + "\n")
                print(f"{name}: {found['status']}, {found['seconds']:.0f} s", flush=True)
        except KeyboardInterrupt:
            for name in [name for name in parts if name not in content["parts"]]:
                content["parts"][name] = not_run("interrupted", "by Ctrl-C")
    write_atomically(output / "gpu_check.json", json.dumps(content, indent=1) + "\n")
    write_atomically(output / "gpu_check.md", markdown(content))
    print(table(content))
    print(f"{output / 'gpu_check.md'} has every row, gpu_check.json beside it all that was measured")
    return int(any(found["status"] in BAD for found in content["parts"].values()))


def parse(argv: list[str] | None) -> argparse.Namespace:
    # argparse, not tyro: the machine may have torch and little else.
    lines = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(
        prog="gpu_check.py",
        description=lines[0],
        epilog="\n".join(lines[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", nargs="?", default="all", choices=("all", "cifar"), help="what to do (default: all)")
    parser.add_argument("--quick", action="store_true", help="2 minutes instead of 7.5")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--device", default="cuda", metavar="NAME", help="cuda, cuda:N or cpu (default: cuda)")
    parser.add_argument("--minutes", type=float, metavar="N", help="the time there is; with cifar, for the nets")
    parser.add_argument("--data", metavar="DIR", help="CIFAR-10, for cifar; or synthetic")
    parser.add_argument("--output", default="runs/gpu-check", metavar="DIR", help="folder (default: runs/gpu-check)")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # what a part's own process is started with
    parser.add_argument("--setting", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.minutes is None:
        on_gpu = options.device.startswith("cuda")
        options.minutes = (5 if options.what == "cifar" else 2 if options.quick else 7.5) if on_gpu else 30
    if not options.minutes > 0:
        parser.error(f"--minutes {options.minutes}: must be more than 0")
    return options


def refuse(reason: str) -> int:
    print(f"error: {reason}", file=sys.stderr)
    return 1


def results_of(parts: dict[str, Part], setting: Setting, deadline: float) -> Iterator[tuple[str, dict]]:
    """(name, result) of every part as they end; where there is room, those whose times do not count run together."""
    for group in grouped(parts, side_by_side=setting.on_gpu and is_roomy(setting.device)):
        running = []
        try:
            for name in group:
                left = deadline - time.monotonic()
                if parts[name].gpu_only and not setting.on_gpu:
                    yield name, not_run("skipped", "needs a GPU")
                elif setting.quick and not parts[name].quick:
                    yield name, not_run("skipped", "not in --quick")
                elif left < SHORTEST:
                    yield name, not_run("skipped", "no time left")
                else:
                    running.append(start(name, parts[name], setting, min(parts[name].seconds or left, left)))
            while running:
                time.sleep(0.1)
                for one in [one for one in running if is_over(one)]:
                    running.remove(one)
                    found = result_of(one)
                    if found["status"] == "out of memory":
                        setting = replace(setting, share=setting.share / 2)
                    yield one.name, found
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
    return (os.cpu_count() or 1) >= ROOMY["cores"] and memory >= ROOMY["bytes"]


def start(name: str, part: Part, setting: Setting, limit: float) -> Running:
    """Start a part's process."""
    setting = replace(setting, scratch=setting.scratch / name)
    setting.scratch.mkdir()
    file, log = (setting.output / f".{name}.{kind}" for kind in ("json", "log"))
    file.unlink(missing_ok=True)
    words = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(setting).items()}
    argv = [sys.executable, str(Path(__file__)), "--part", name, "--setting", json.dumps(words)]
    with open(log, "wb") as said:
        process = subprocess.Popen(argv, stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
    return Running(name, part, process, file, log, limit)


def is_over(one: Running) -> bool:
    return one.process.poll() is not None or time.monotonic() - one.began > one.limit


def result_of(one: Running) -> dict:
    """What a part has recorded; of one that has not ended by itself, until it was stopped."""
    seconds, status = time.monotonic() - one.began, one.process.poll()
    one.stop()
    try:
        found = json.loads(one.file.read_text())
    except (OSError, ValueError):
        found = {"status": "unfinished", "rows": [], "details": {}}
    if found["status"] == "unfinished":
        found["status"] = "timed out" if status is None else "failed"
        said = one.log.read_text(errors="replace")[-4000:]
        found["reason"] = f"stopped after {one.limit:.0f} s" if status is None else f"its process ended with {status}"
        found["traceback"] = found.get("traceback", said)
    for file in (one.file, one.log):
        file.unlink(missing_ok=True)
    return {"seconds": round(seconds, 1), **found}


def not_run(status: str, reason: str) -> dict:
    return {"status": status, "seconds": 0.0, "reason": reason, "rows": [], "details": {}}


def run_part(name: str, words: str) -> int:
    """In a part's own process: run it, and record how that went."""
    values = json.loads(words)
    setting = Setting(**{**values, "output": Path(values["output"]), "scratch": Path(values["scratch"])})
    record = Record(setting.output / f".{name}.json")
    module, function = {**PARTS, **CIFAR}[name].function.split(".")
    try:
        from benchmarks.machine import describe

        record.content["machine"] = describe(setting.device, torch.get_num_threads())
        getattr(importlib.import_module(f"gpu_checks.{module}"), function)(setting, record)
        status, reason = "differs" if record.differs else "ok", ""
    except ModuleNotFoundError as error:
        status, reason = "skipped", f"needs {error.name}, which is not installed"
    except Exception as error:  # noqa: BLE001 - whatever it is, it is recorded and the next part starts
        full = isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)
        status, reason = (
            "out of memory" if full else "failed",
            f"{type(error).__name__}: {' '.join(str(error).split())}",
        )
        record.content["traceback"] = traceback.format_exc()
    record.content |= {"status": status, "reason": reason[:300]}
    record.write()
    return int(status in BAD)


def table(content: dict) -> str:
    """A line a part: how it went, and what is wrong, or how many rows are as they should be."""
    lines = [f"{'part':18} {'status':14} {'seconds':>7}  "]
    for name, found in content["parts"].items():
        wrong = [
            f"{row['what']}: {shown(row['value'])}, {row['wanted']}" for row in found["rows"] if row["ok"] is False
        ]
        right = sum(row["ok"] is True for row in found["rows"])
        note = found.get("reason") or "; ".join(wrong) or (f"{right} checks passed" if right else "")
        lines.append(f"{name:18} {found['status']:14} {found['seconds']:7.0f}  {note[:150]}")
    bad = [name for name, found in content["parts"].items() if found["status"] in BAD]
    lines.append(f"look at: {', '.join(bad)}" if bad else "nothing wrong was found")
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
