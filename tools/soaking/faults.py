"""The faults: each is injected some times, the training gone on with, and compared with one that was left alone."""

import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from resbackbone.engine.checkpoints import checkpoints
from resbackbone.tools.soaking.places import small_disk
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


@dataclass
class Row:
    """What was injected, how often, into what, and what came of it."""

    fault: str
    subject: str
    times: int
    outcome: str
    lost: list[str] = field(default_factory=list)  # what differs from the run left alone


def kill(subject: Subject, times: int, moments: random.Random) -> Row:
    """SIGKILL at random moments: any, in the middle of a save, in the middle of an evaluation."""
    hit = {"start": 0, "step": 0, "save": 0, "evaluation": 0}
    run, lost, done, runs = subject.new_run("kill"), [], 0, 1
    while done < times:
        trains = subject.trains(run)
        process = subject.start(run, "--resume")
        wanted = moments.choice(["start", "step", "step", "save", "evaluation"])
        if wanted == "start":
            time.sleep(moments.uniform(0, 5))
        else:
            wait_for(trains, process)
            inside = {"save": partial(saving, run), "evaluation": partial(evaluating, run)}.get(wanted)
            if inside is None:
                time.sleep(moments.uniform(0, 3))
            else:
                wait_for(inside, process)
                time.sleep(moments.uniform(0, 0.1))
        if process.poll() is None:
            was = "save" if saving(run) else "evaluation" if evaluating(run) else "step" if metrics(run) else "start"
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            hit["start" if wanted == "start" and was == "step" else was] += 1
            done += 1
        else:  # it was done before: another one
            lost += differences(run, subject.left_alone())
            run, runs = subject.new_run("kill"), runs + 1
    subject.finish(run)
    lost += differences(run, subject.left_alone())
    moments_hit = ", ".join(
        f"{count} in {'an' if what == 'evaluation' else 'a'} {what}" for what, count in hit.items() if count
    )
    return Row("SIGKILL", subject.name, times, f"{moments_hit}; {runs} runs ended as if left alone", lost)


def terminate(subject: Subject, times: int, moments: random.Random) -> Row:
    """SIGTERM to all its processes, as a scheduler sends it before it takes the machine away."""
    run, lost, seconds = subject.new_run("terminate"), [], []
    for _ in range(times):
        trains = subject.trains(run)
        process = subject.start(run, "--resume")
        wait_for(trains, process)
        time.sleep(moments.uniform(0, 1.5))
        if process.poll() is not None:
            break  # it was done
        step = len(metrics(run))
        os.killpg(process.pid, signal.SIGTERM)
        began = time.monotonic()
        status = process.wait(PATIENCE)
        seconds.append(time.monotonic() - began)
        saved = int(checkpoints(run)[-1].name[5:])
        if status != 0 or saved < step:
            lost.append(f"exit status {status}, step {step} done, step {saved} saved")
    subject.finish(run)
    lost += differences(run, subject.left_alone())
    return Row("SIGTERM", subject.name, len(seconds), f"exit status 0 within {max(seconds):.1f} s, saved", lost)


def damage(subject: Subject, times: int, moments: random.Random) -> Row:
    """The newest checkpoint truncated, with a bit flipped, or with a file gone."""
    run, lost = subject.new_run("damage"), []
    for i in range(times):
        process = subject.start(run, "--resume")
        wait_for(lambda run=run: len(checkpoints(run)) >= 2, process)
        time.sleep(moments.uniform(0, 1))
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        newest = checkpoints(run)[-1]
        file = moments.choice([newest / "model.safetensors", newest / "optimizer.safetensors", newest / "state.json"])
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
            lost.append(f"nothing was said of {file}")
        lost += differences(run, subject.left_alone())
        run = subject.new_run("damage")
    return Row("damaged newest checkpoint", subject.name, times, "said, set aside, went on from the one before", lost)


def full_disk(subject: Subject, times: int, moments: random.Random) -> Row:
    """A disk with room for a part of a checkpoint only, then with room again."""
    place, lost = subject.folder / "small-disk", []
    size = sum(path.stat().st_size for path in checkpoints(subject.left_alone())[-1].iterdir())
    for i in range(times):
        with small_disk(place, int(size * moments.uniform(2.2, 2.9))) as mounted:
            if not mounted:
                return Row("full disk", subject.name, 0, "not tried: mounting a small file system needs root", lost)
            moved = subject.new_run("full-disk")
            run = place / moved.name
            status = subject.start(run).wait(PATIENCE)
            said = re.search(r"error: checkpoint of step \d+: no space left .* MB are needed", subject.log(run))
            if status != 1 or not said:
                lost.append(f"exit status {status}: {subject.log(run)[-300:]}")
            shutil.copytree(run, moved)
        subject.finish(moved)
        lost += [f"{i}: {what}" for what in differences(moved, subject.left_alone())]
    outcome = "one line with the bytes needed; the last checkpoint stays"
    return Row("full disk while saving", subject.name, times, outcome, lost)


def restart(subject: Subject, times: int, moments: random.Random) -> Row:
    """One of two workers killed, under torchrun --max-restarts, which starts both again."""
    run = subject.new_run("restart")
    launcher = (*TORCHRUN, "2", "--standalone", "--max-restarts", str(times))
    process = subject.start(run, launcher=launcher)
    for _ in range(times):
        step = last_step(run)
        wait_for(lambda step=step: last_step(run) > step + 4, process)
        time.sleep(moments.uniform(0, 1))
        os.kill(moments.choice(workers(process.pid)), signal.SIGKILL)
        time.sleep(2)
    status = process.wait(PATIENCE)
    lost = [f"exit status {status}: {subject.log(run)[-300:]}"] * (status != 0)
    lost += differences(run, subject.left_alone(2))
    return Row("worker killed under torchrun", subject.name, times, "restarted, ended as two ranks left alone", lost)


def bad_rank(subject: Subject, times: int, moments: random.Random) -> Row:
    """One rank meets an image that has become unreadable since the start."""
    lost, seconds, kept = [], [], subject.data / "kept"
    images = sorted((subject.data / "train2017").iterdir())
    for _ in range(times):
        run, image = subject.new_run("bad-rank"), moments.choice(images)
        process = subject.start(run, launcher=(*TORCHRUN, "2", "--standalone"))
        wait_for(lambda run=run: last_step(run) > 1, process)
        shutil.copy(image, kept)
        image.write_bytes(b"")
        began = time.monotonic()
        try:
            status = process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            status = None
        seconds.append(time.monotonic() - began)
        shutil.move(kept, image)
        if status != 1 or f"{image.name}: empty file" not in subject.log(run) or "error" not in subject.log(run):
            lost.append(f"exit status {status}: {subject.log(run)[-300:]}")
    text = f"the job ended within {max(seconds):.0f} s, its part of the epoch included, and named the image"
    return Row("one rank raises", subject.name, times, text, lost)


def two_nodes(subject: Subject, times: int, moments: random.Random) -> Row:
    """Two nodes, simulated on this machine, that meet through torchrun's c10d rendezvous."""
    lost = []
    for _ in range(times):
        run, port = subject.new_run("two-nodes"), moments.randrange(20_000, 60_000)
        meet = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "1"]
        nodes = [subject.start(run, launcher=(*TORCHRUN, "1", *meet)) for _ in range(2)]
        statuses = [node.wait(PATIENCE) for node in nodes]
        lost += [f"exit statuses {statuses}: {subject.log(run)[-300:]}"] * (statuses != [0, 0])
        lost += differences(run, subject.left_alone(2))
    return Row("two nodes, c10d rendezvous", subject.name, times, "ended as two ranks of one node", lost)


def evaluation(subject: Subject, times: int, moments: random.Random) -> Row:
    """Evaluations with shares of unequal length, and with more ranks than images."""
    alone, images, lost, found = subject.left_alone(), 6, [], []
    for ranks in (1, 4, images + 1):
        folder = subject.folder / f"evaluated-by-{ranks}"
        argv = ["evaluate_coco.py", str(alone), "--output", str(folder), "--device", "cpu"]
        process = subject.run(argv, log=folder, launcher=(*TORCHRUN, str(ranks), "--standalone"))
        if status := process.wait(PATIENCE):
            lost.append(f"{ranks} ranks: exit status {status}: {subject.log(folder)[-300:]}")
            continue
        found.append([(folder / file).read_bytes() for file in ("results.json", "detections.json")])
        if found[-1] != found[0]:
            lost.append(f"{ranks} ranks: other results than 1")
    text = f"by 4 and by {images + 1} ranks, for {images} images: every byte as by one"
    return Row("unequal shares, ranks without an image", "evaluation", 2, text, lost)


FAULTS: dict[str, Callable[[Subject, int, random.Random], Row]] = {
    "kill": kill,
    "terminate": terminate,
    "damage": damage,
    "full-disk": full_disk,
    "restart": restart,
    "bad-rank": bad_rank,
    "two-nodes": two_nodes,
    "evaluation": evaluation,
}
