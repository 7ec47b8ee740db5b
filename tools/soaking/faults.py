"""The faults. Each is injected several times; the training is resumed and compared with an undisturbed run.

A fault returns its outcome in words, and what was lost. It raises RuntimeError if a training hangs or cannot be
resumed.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from resbackbone.engine.checkpoints import checkpoints
from resbackbone.tools.soaking.subject import (
    PATIENCE,
    TORCHRUN,
    Subject,
    differences,
    evaluating,
    last_step,
    metrics,
    saving,
    wait_for,
    workers,
)

Found = tuple[str, list[str]]
STANDALONE = (*TORCHRUN, "2", "--standalone")


def kill(subject: Subject, times: int, moments: random.Random) -> Found:
    """SIGKILL at random moments: any, in the middle of a save, in the middle of an evaluation."""
    hit: Counter[str] = Counter()
    run, lost, runs = subject.new_run("kill"), [], 1
    while hit.total() < times:
        trains = subject.trains(run)
        process = subject.start(run, "--resume")
        wanted = moments.choice(["startup", "step", "step", "save", "evaluation"])
        if wanted != "startup":
            wait_for(trains, process)
        if wanted in ("save", "evaluation"):
            wait_for(partial(saving if wanted == "save" else evaluating, run), process)
        time.sleep(moments.uniform(0, {"startup": 5, "step": 3}.get(wanted, 0.1)))
        if process.poll() is None:
            now = "save" if saving(run) else "evaluation" if evaluating(run) else "step" if metrics(run) else "startup"
            stop(process, signal.SIGKILL)
            hit["startup" if wanted == "startup" and now == "step" else now] += 1
        else:  # it has ended by itself: use another run
            lost += differences(run, subject.undisturbed())
            run, runs = subject.new_run("kill"), runs + 1
    subject.finish(run)
    lost += differences(run, subject.undisturbed())
    moments_hit = ", ".join(f"{count} during {what}" for what, count in sorted(hit.items()))
    return f"{moments_hit}; {runs} runs ended like the undisturbed one", lost


def terminate(subject: Subject, times: int, moments: random.Random) -> Found:
    """SIGTERM to all its processes, as a scheduler sends it before it takes the machine away."""
    run, lost, seconds = subject.new_run("terminate"), [], []
    for _ in range(times):
        trains = subject.trains(run)
        process = subject.start(run, "--resume")
        wait_for(trains, process)
        time.sleep(moments.uniform(0, 1.5))
        if process.poll() is not None:
            break  # it has ended by itself
        step, began = len(metrics(run)), time.monotonic()
        status = stop(process, signal.SIGTERM)
        seconds.append(time.monotonic() - began)
        saved = int(checkpoints(run)[-1].name[5:])
        if status != 0 or saved < step:
            lost.append(f"exit status {status}, step {step} done, step {saved} saved")
    subject.finish(run)
    lost += differences(run, subject.undisturbed())
    return f"{len(seconds)} times exit status 0 within {max(seconds):.1f} s, saved", lost


def damage(subject: Subject, times: int, moments: random.Random) -> Found:
    """The newest checkpoint truncated, with a bit flipped, or with a file removed."""
    lost = []
    for i in range(times):
        run = subject.new_run("damage")
        process = subject.start(run, "--resume")
        wait_for(lambda run=run: len(checkpoints(run)) >= 2, process)
        time.sleep(moments.uniform(0, 1))
        stop(process, signal.SIGKILL)
        newest = checkpoints(run)[-1]
        file = newest / moments.choice(["model.safetensors", "optimizer.safetensors", "state.json"])
        content = bytearray(file.read_bytes())
        if i % 3 == 0:
            file.write_bytes(content[: moments.randrange(len(content))])
        elif i % 3 == 1:
            content[moments.randrange(len(content))] ^= 1 << moments.randrange(8)
            file.write_bytes(content)
        else:
            file.unlink()
        subject.finish(run)
        if f"set aside as {newest.name}.damaged" not in subject.log(run):
            lost.append(f"the damage of {file} was not reported")
        lost += differences(run, subject.undisturbed())
    return "reported, set aside, resumed from the previous one", lost


def full_disk(subject: Subject, times: int, moments: random.Random) -> Found:
    """A disk with room for only a part of a checkpoint, then with room again."""
    lost: list[str] = []
    disk = subject.folder / "small-disk"
    disk.mkdir()
    size = sum(path.stat().st_size for path in checkpoints(subject.undisturbed())[-1].iterdir())
    for i in range(times):
        options = f"size={int(size * moments.uniform(2.2, 2.9))}"
        if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(disk)], capture_output=True).returncode:
            return "not tried: mounting a small file system needs root", lost
        try:
            moved = subject.new_run("full-disk")
            run = disk / moved.name
            status = subject.start(run).wait(PATIENCE)
            said = re.search(r"error: checkpoint of step \d+: no space left .* MB are needed", subject.log(run))
            if status != 1 or not said:
                lost.append(failure(subject, run, status))
            shutil.copytree(run, moved)
        finally:
            subprocess.run(["umount", "-l", str(disk)], check=True)
        subject.finish(moved)
        lost += [f"{i}: {what}" for what in differences(moved, subject.undisturbed())]
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


def bad_rank(subject: Subject, times: int, moments: random.Random) -> Found:
    """One rank reads an image that has become unreadable since the start."""
    lost, seconds, kept = [], [], subject.data / "kept"
    images = sorted((subject.data / "train2017").iterdir())
    for _ in range(times):
        run, image = subject.new_run("bad-rank"), moments.choice(images)
        process = subject.start(run, launcher=STANDALONE)
        wait_for(lambda run=run: last_step(run) > 1, process)
        shutil.copy(image, kept)
        image.write_bytes(b"")
        began, status = time.monotonic(), None
        with suppress(subprocess.TimeoutExpired):
            status = process.wait(60)
        seconds.append(time.monotonic() - began)
        stop(process, signal.SIGKILL)
        shutil.move(kept, image)
        if status != 1 or f"{image.name}: empty file" not in subject.log(run) or "error" not in subject.log(run):
            lost.append(failure(subject, run, status))
    return f"the job ended within {max(seconds):.0f} s, including the rest of its epoch, and named the image", lost


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


def evaluation(subject: Subject, times: int, moments: random.Random) -> Found:
    """Evaluations with shares of unequal length, and with more ranks than images."""
    run, images, lost, found = subject.undisturbed(), 6, [], []
    for ranks in (1, 4, images + 1):
        folder = subject.folder / f"evaluated-by-{ranks}"
        argv = ["evaluate_coco.py", str(run), "--output", str(folder), "--device", "cpu"]
        process = subject.run(argv, log=folder, launcher=(*TORCHRUN, str(ranks), "--standalone"))
        if status := process.wait(PATIENCE):
            lost.append(f"{ranks} ranks: {failure(subject, folder, status)}")
            continue
        found.append([(folder / file).read_bytes() for file in ("results.json", "detections.json")])
        if found[-1] != found[0]:
            lost.append(f"{ranks} ranks: other results than 1")
    return f"by 4 and by {images + 1} ranks, for {images} images: identical bytes to one rank", lost


def stop(process: subprocess.Popen, number: signal.Signals) -> int:
    """Send a signal to all processes of a training; returns its exit status."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
    return process.wait(PATIENCE)


def failure(subject: Subject, run, status) -> str:
    return f"exit status {status}: {subject.log(run)[-300:]}"


# By its name: what the table calls a fault, and the function.
FAULTS: dict[str, tuple[str, Callable[[Subject, int, random.Random], Found]]] = {
    "kill": ("SIGKILL", kill),
    "terminate": ("SIGTERM", terminate),
    "damage": ("damaged newest checkpoint", damage),
    "full-disk": ("full disk while saving", full_disk),
    "restart": ("worker killed under torchrun", restart),
    "bad-rank": ("one rank raises", bad_rank),
    "two-nodes": ("two nodes, c10d rendezvous", two_nodes),
    "evaluation": ("unequal shares, ranks without an image", evaluation),
}
