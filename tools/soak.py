"""Break trainings in every way that is known to happen, resume them, and compare them with undisturbed runs.

python tools/soak.py                                  all faults, 50 kills; about a quarter of an hour on two cores
python tools/soak.py --faults kill full-disk --kills 10 --output runs/soak

The subjects are a small Faster R-CNN (train_coco.py) and a small ResNet-18 (pretrain.py) on drawn images, on a CPU.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from resbackbone.cli.command import Several, main_of, parse

import torch

from resbackbone.atomic import write_atomically, write_json
from resbackbone.checks import one_of
from resbackbone.engine.checkpoints import checkpoints, step_of
from resbackbone.report.numbers import markdown_table
from resbackbone.tools.benchmarks.machine import describe
from resbackbone.tools.soaking.subject import (
    COMMANDS,
    PATIENCE,
    TORCHRUN,
    Subject,
    differences,
    last_step,
    metrics,
    stop,
    wait_for,
    workers,
)

Found = tuple[str, list[str]]
STANDALONE = (*TORCHRUN, "2", "--standalone")


@dataclass(frozen=True)
class Options:
    """Break trainings, resume them, and compare them with undisturbed runs."""

    faults: Several[str] = ()
    """kill, terminate, damage, full-disk, restart or two-nodes. Default: all."""
    kills: int = 50
    """Number of kills, half of them in a detector's training and half in a classifier's; other faults scale with it."""
    output: Path = Path("runs/soak")
    """Folder for the runs, reliability.json and reliability.md. Its content is replaced."""


def main(argv: list[str] | None = None) -> None:
    """Subjects -> faults -> a table of what was injected and what was lost; exit status 1 if anything was."""
    options = parse(Options, argv)
    for name in options.faults:
        one_of("fault", name, FAULTS)
    shutil.rmtree(options.output, ignore_errors=True)
    options.output.mkdir(parents=True)
    moments = random.Random(0)
    detector, classifier = (Subject(name, options.output) for name in COMMANDS)
    rows: list[dict] = []
    for name in options.faults or FAULTS:
        times = max(1, options.kills // (2 if name == "kill" else 10))
        for subject in (detector, classifier) if name in ("kill", "terminate", "damage") else (detector,):
            try:
                outcome, lost = FAULTS[name](subject, times, moments)
            except RuntimeError as error:
                outcome, lost = "not finished", [str(error)]
            rows.append({"fault": name, "subject": subject.name, "times": times, "outcome": outcome, "lost": lost})
            print(f"{name}, {subject.name}: {outcome}; lost: {lost or 'nothing'}", flush=True)
            machine = describe("cpu", torch.get_num_threads())
            content = {**machine, "kills": options.kills, "rows": rows}
            write_json(options.output / "reliability.json", content)
            write_atomically(options.output / "reliability.md", table(rows))
    print(table(rows))
    if any(row["lost"] for row in rows):
        sys.exit(1)


def table(rows: Sequence[dict]) -> str:
    """A Markdown table, a row for each fault and subject."""
    names = ("fault", "subject", "times", "outcome")
    cells = ([*(row[name] for name in names), "; ".join(row["lost"]) or "nothing"] for row in rows)
    return markdown_table(["injected", "into", "times", "what happened", "lost"], cells)


# The faults. Each is injected several times; the training is resumed and compared with an undisturbed run. A fault
# returns its outcome in words, and what was lost. It raises RuntimeError if a training hangs or cannot be resumed.


def kill(subject: Subject, times: int, moments: random.Random) -> Found:
    """SIGKILL at random moments: any, in the middle of a save, in the middle of an evaluation."""
    hit: Counter[str] = Counter()
    run, lost, runs = subject.new_run("kill"), [], 1

    def moment() -> str:
        if any((run / "checkpoints").glob(".step_*.tmp")):
            return "save"
        step = last_step(run)
        due = step > 0 and step % 8 == 0 and step not in {line["step"] for line in metrics(run, "eval")}
        return "evaluation" if due else "step"

    while hit.total() < times:
        trains = subject.trains(run)
        process = subject.resume(run)
        wanted = moments.choice(["startup", "step", "step", "save", "evaluation"])
        if wanted != "startup":
            wait_for(trains, process)
            wait_for(lambda wanted=wanted: moment() == wanted, process)
        time.sleep(moments.uniform(0, {"startup": 5, "step": 3}.get(wanted, 0.1)))
        if process.poll() is None:
            hit["startup" if wanted == "startup" else moment()] += 1
            stop(process, signal.SIGKILL)
        else:  # it has ended by itself: use another run
            lost += differences(run, subject.undisturbed())
            run, runs = subject.new_run("kill"), runs + 1
    lost += lost_by(subject, run)
    moments_hit = ", ".join(f"{count} during {what}" for what, count in sorted(hit.items()))
    return f"{moments_hit}; {runs} runs ended like the undisturbed one", lost


def lost_by(subject: Subject, run: Path) -> list[str]:
    """Resume a run to its end; the files in which it differs from the undisturbed one."""
    subject.finish(run)
    return differences(run, subject.undisturbed())


def terminate(subject: Subject, times: int, moments: random.Random) -> Found:
    """SIGTERM to all its processes, as a scheduler sends it before it takes the machine away."""
    run, lost, seconds = subject.new_run("terminate"), [], []
    for _ in range(times):
        trains = subject.trains(run)
        process = subject.resume(run)
        wait_for(trains, process)
        time.sleep(moments.uniform(0, 1.5))
        if process.poll() is not None:
            break  # it has ended by itself
        step, began = last_step(run), time.monotonic()
        status = stop(process, signal.SIGTERM)
        seconds.append(time.monotonic() - began)
        saved = step_of(checkpoints(run)[-1])
        if status != 0 or saved < step:
            lost.append(f"exit status {status}, step {step} done, step {saved} saved")
    return f"{len(seconds)} times exit status 0 within {max(seconds):.1f} s, saved", lost + lost_by(subject, run)


def damage(subject: Subject, times: int, moments: random.Random) -> Found:
    """A file of the newest checkpoint truncated, or with a bit flipped."""
    lost = []
    for i in range(times):
        run = subject.new_run("damage")
        process = subject.start(run)
        wait_for(lambda run=run: len(checkpoints(run)) >= 2, process)
        time.sleep(moments.uniform(0, 1))
        stop(process, signal.SIGKILL)
        newest = checkpoints(run)[-1]
        file = newest / moments.choice(["model.safetensors", "optimizer.safetensors", "state.json"])
        content = bytearray(file.read_bytes())
        place = moments.randrange(len(content))
        content[place] ^= 1 << moments.randrange(8)
        file.write_bytes(content[:place] if i % 2 else content)
        lost += lost_by(subject, run)
        if f"set aside as {newest.name}.damaged" not in subject.log(run):
            lost.append(f"the damage of {file} was not reported")
    return "reported, set aside, resumed from the previous one", lost


def full_disk(subject: Subject, times: int, moments: random.Random) -> Found:
    """A disk with room for only a part of a checkpoint, then with room again."""
    lost: list[str] = []
    disk = subject.folder / "small-disk"
    disk.mkdir()
    size = sum(path.stat().st_size for path in checkpoints(subject.undisturbed())[-1].iterdir())
    for _ in range(times):
        options = f"size={int(size * moments.uniform(2.2, 2.9))}"
        if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(disk)], capture_output=True).returncode:
            return "not tried: mounting a small file system needs root", lost
        try:
            moved = subject.new_run("full-disk")
            run = disk / moved.name
            status = subject.start(run).wait(PATIENCE)
            said = re.search(r"error: checkpoint of step \d+: cannot be written .* MB are needed", subject.log(run))
            if status != 1 or not said:
                lost.append(failure(subject, run, status))
            shutil.copytree(run, moved)
        finally:
            subprocess.run(["umount", "-l", str(disk)], check=True)
        lost += lost_by(subject, moved)
    return "one line with the bytes needed; the last checkpoint is kept", lost


def restart(subject: Subject, times: int, moments: random.Random) -> Found:
    """One of two workers killed, under torchrun --max-restarts, which starts both again."""
    run = subject.new_run("restart")
    process = subject.start(run, launcher=(*STANDALONE, "--max-restarts", str(times)))
    for _ in range(times):
        step = last_step(run)
        wait_for(lambda step=step: last_step(run) > step + 4, process)
        time.sleep(moments.uniform(0, 1))
        os.kill(moments.choice(workers(process.pid)), signal.SIGKILL)
        time.sleep(2)
    status = process.wait(PATIENCE)
    lost = [failure(subject, run, status)] * (status != 0)
    return "restarted, ended like two undisturbed ranks", lost + differences(run, subject.undisturbed(2))


def two_nodes(subject: Subject, times: int, moments: random.Random) -> Found:
    """Two nodes, simulated on this machine, that meet through torchrun's c10d rendezvous."""
    lost = []
    for _ in range(times):
        run, port = subject.new_run("two-nodes"), moments.randrange(20_000, 60_000)
        meet = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "1"]
        nodes = [subject.start(run, launcher=(*TORCHRUN, "1", *meet)) for _ in range(2)]
        statuses = [node.wait(PATIENCE) for node in nodes]
        lost += [failure(subject, run, statuses)] * (statuses != [0, 0])
        lost += differences(run, subject.undisturbed(2))
    return "ended like two ranks on one node", lost


def failure(subject: Subject, run: Path, status) -> str:
    return f"exit status {status}: {subject.log(run)[-300:]}"


FAULTS: dict[str, Callable[[Subject, int, random.Random], Found]] = {
    "kill": kill,
    "terminate": terminate,
    "damage": damage,
    "full-disk": full_disk,
    "restart": restart,
    "two-nodes": two_nodes,
}


if __name__ == "__main__":
    main_of(main)
