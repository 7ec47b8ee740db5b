"""Break trainings in every way that is known to happen, go on with them, and compare with runs that were left alone.

python tools/soak.py                                  all faults, 50 kills; about a quarter of an hour on two cores
python tools/soak.py --faults kill full-disk --kills 10 --output runs/soak
The subjects are a small Faster R-CNN (train_coco.py) and a small ResNet-18 (pretrain.py) on drawn images, on a CPU.
"""

import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from safetensors.torch import load_file

from detection.crops import make_shape_crops
from detection.shapes import make_shapes
from resbackbone.atomic import write_atomically
from resbackbone.checks import one_of
from resbackbone.training.checkpoints import checkpoints
from resbackbone.training.command import console, main_of, parse

TOOLS = Path(__file__).parent
STEPS = 40
SHARED = f"--device cpu --precision fp32 --log-period 1 --checkpoint-period 4 --eval-period 8 --max-steps {STEPS}"
COMMANDS = {
    "detector": f"train_coco.py --recipe short --depth 18 --batch-size 2 --pictures 0 {SHARED}",
    "classifier": f"pretrain.py --recipe a2 --depth 18 --size 32 --batch-size 8 --epochs 40 {SHARED}",
}
CLOCK = {"seconds", "data_seconds", "images_per_second", "memory_mib"}  # what no two runs share
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node")
PATIENCE = 300  # seconds for anything that must end


@dataclass(frozen=True)
class Options:
    """Break trainings, go on with them, and compare them with runs that were left alone."""

    faults: tuple[str, ...] = ()
    """Of kill, terminate, damage, full-disk, download, restart, bad-rank and two-nodes. Default: all."""
    kills: int = 50
    """How many kills, half of a detector's training and half of a classifier's; the other faults scale with it."""
    output: Path = Path("runs/soak")
    """Folder for the runs, reliability.json and reliability.md; what is there is replaced."""
    seed: int = 0
    """Of the moments."""


@dataclass
class Row:
    """What was injected, how often, into what, and what came of it."""

    fault: str
    subject: str
    times: int
    outcome: str
    lost: list[str] = field(default_factory=list)  # what differs from the run left alone


class Subject:
    """A training: its command, its data, and the run of it that was left alone."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder
        if name == "detector":
            self.data = make_shapes(folder / "shapes", train_images=16, val_images=6, size=64)
        else:
            self.data = make_shape_crops(folder / "crops", train_scenes=24, val_scenes=12, size=64)
        script, *argv = COMMANDS[name].split()
        self.argv = [str(TOOLS / script), *argv, "--data", str(self.data)]
        self.alone: dict[int, Path] = {}  # by the number of ranks

    def start(self, run: Path, *flags: str, launcher: Sequence[str] = (sys.executable,)) -> subprocess.Popen:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [*launcher, *self.argv, "--output", str(run), *flags]
        with open(self.folder / f"{run.name}.log", "ab") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    def finish(self, run: Path, **options) -> None:
        process = self.start(run, "--resume", **options)
        if process.wait(PATIENCE):
            raise RuntimeError(f"{run} could not be resumed: {self.log(run)[-500:]}")

    def log(self, run: Path) -> str:
        """What the run's processes have said so far."""
        path = self.folder / f"{run.name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def left_alone(self, ranks: int = 1) -> Path:
        if ranks not in self.alone:
            self.alone[ranks] = self.folder / f"{self.name}-{ranks}-alone"
            launcher = (sys.executable,) if ranks == 1 else (*TORCHRUN, str(ranks), "--standalone")
            self.finish(self.alone[ranks], launcher=launcher)
        return self.alone[ranks]

    def trains(self, run: Path) -> Callable[[], bool]:
        """Whether a process that is started next has made an update."""
        before = len(self.log(run))
        return lambda: "\ntrain " in self.log(run)[before:]

    def new_run(self, fault: str) -> Path:
        return self.folder / f"{self.name}-{fault}-{len(list(self.folder.glob(f'{self.name}-{fault}-*.log')))}"


def main(argv: list[str] | None = None) -> None:
    """Subjects -> faults -> a table of what was injected and what was lost; exit status 1 if anything was."""
    options = parse(Options, argv)
    for name in options.faults:
        one_of("fault", name, FAULTS)
    shutil.rmtree(options.output, ignore_errors=True)
    options.output.mkdir(parents=True)
    moments = random.Random(options.seed)
    detector, classifier = (Subject(name, options.output) for name in COMMANDS)
    few = max(1, options.kills // 10)
    rows = []
    for name in options.faults or FAULTS:
        began = time.monotonic()
        for subject in (detector, classifier) if name in ("kill", "terminate", "damage") else (detector,):
            times = max(1, options.kills // 2) if name == "kill" else few
            rows.append(FAULTS[name](subject, times, moments))
            console.print(f"{name}, {subject.name}: {rows[-1].outcome}; lost: {rows[-1].lost or 'nothing'}")
        console.print(f"  {time.monotonic() - began:.0f} s")
    content = {"versions": versions(), "options": {"kills": options.kills, "seed": options.seed}}
    content["rows"] = [vars(row) for row in rows]
    write_atomically(options.output / "reliability.json", json.dumps(content, indent=2) + "\n")
    write_atomically(options.output / "reliability.md", table(rows))
    console.print(table(rows))
    if any(row.lost for row in rows):
        sys.exit(1)


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
    moments_hit = ", ".join(f"{count} in a {what}" for what, count in hit.items() if count)
    return Row("SIGKILL", subject.name, times, f"{moments_hit}; {runs} runs ended as if left alone", lost)


def terminate(subject: Subject, times: int, moments: random.Random) -> Row:
    """SIGTERM, as a scheduler sends it before it takes the machine away."""
    run, lost, seconds = subject.new_run("terminate"), [], []
    for _ in range(times):
        trains = subject.trains(run)
        process = subject.start(run, "--resume")
        wait_for(trains, process)
        time.sleep(moments.uniform(0, 1.5))
        if process.poll() is not None:
            break  # it was done
        step = len(metrics(run))
        process.terminate()
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


def download(subject: Subject, times: int, moments: random.Random) -> Row:
    """SIGKILL in the middle of a download from a slow server."""
    source, to = subject.folder / "served" / "weights.bin", subject.folder / "downloaded.bin"
    source.parent.mkdir()
    source.write_bytes(moments.randbytes(8 << 20))
    program = "import sys; from resbackbone.weights.download import download; download(*sys.argv[1:])"
    with slow_server(source.parent) as address:
        for _ in range(times):
            process = subprocess.Popen([sys.executable, "-c", program, f"{address}/weights.bin", str(to)], stderr=-3)
            part, had = to.with_name(f"{to.name}.part"), size_of(to.with_name(f"{to.name}.part"))
            wait_for(lambda part=part, had=had: size_of(part) > had, process)
            time.sleep(moments.uniform(0, 0.3))
            process.kill()
            process.wait()
        subprocess.run([sys.executable, "-c", program, f"{address}/weights.bin", str(to)], check=True, stderr=-3)
    lost = [] if to.read_bytes() == source.read_bytes() else ["the file differs"]
    return Row("SIGKILL in a download", "weights", times, "went on where it stopped; the file is the server's", lost)


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


FAULTS: dict[str, Callable[[Subject, int, random.Random], Row]] = {
    "kill": kill,
    "terminate": terminate,
    "damage": damage,
    "full-disk": full_disk,
    "download": download,
    "restart": restart,
    "bad-rank": bad_rank,
    "two-nodes": two_nodes,
}


def differences(run: Path, alone: Path) -> list[str]:
    """What a run left otherwise than the one left alone: weights and optimizer bit for bit, results, metrics."""
    found = []
    last = f"checkpoints/step_{STEPS:07d}"
    for file in ["model.safetensors", *(f"{last}/{path.name}" for path in (alone / last).glob("*.safetensors"))]:
        one, other = (load_file(folder / file) for folder in (run, alone))
        if one.keys() != other.keys() or not all(torch.equal(one[key], other[key]) for key in one):
            found.append(f"{run.name}/{file}")
    for file in ("results.json", "detections.json"):
        if (alone / file).exists() and (run / file).read_bytes() != (alone / file).read_bytes():
            found.append(f"{run.name}/{file}")
    one, other = (sorted(json.dumps(comparable(line)) for line in metrics(folder, None)) for folder in (run, alone))
    return [*found, *([f"{run.name}/metrics.jsonl"] * (one != other))]


def comparable(line: dict) -> dict:
    return {name: value for name, value in line.items() if name not in CLOCK}


def metrics(run: Path, kind: str | None = "train") -> list[dict]:
    """The lines of metrics that are whole, of one kind or of all."""
    found = []
    with suppress(OSError):
        for line in (run / "metrics.jsonl").read_text().splitlines():
            with suppress(ValueError):
                found.append(json.loads(line))
    return [line for line in found if kind in (None, line["kind"])]


def last_step(run: Path) -> int:
    return max((line["step"] for line in metrics(run)), default=0)


def saving(run: Path) -> bool:
    return any((run / "checkpoints").glob(".step_*.tmp"))


def evaluating(run: Path) -> bool:
    step = last_step(run)
    return step > 0 and step % 8 == 0 and step not in {line["step"] for line in metrics(run, "eval")}


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    """Until the condition holds or the process has ended."""
    deadline = time.monotonic() + PATIENCE
    while not condition() and process.poll() is None:
        if time.monotonic() > deadline:
            raise RuntimeError(f"nothing happened for {PATIENCE} s")
        time.sleep(0.002)


def workers(parent: int) -> list[int]:
    """The processes that torchrun has started, now."""
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


@contextmanager
def small_disk(place: Path, size: int):
    """A file system of `size` bytes at `place`; False where this user may not mount one."""
    place.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(place)], check=True)


@contextmanager
def slow_server(folder: Path):
    """A file server on this machine that sends 4 MB a second; its address."""

    class Handler(SimpleHTTPRequestHandler):
        def copyfile(self, source, outputfile):
            while block := source.read(1 << 16):
                with suppress(OSError):
                    outputfile.write(block)
                time.sleep(1 / 64)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


def versions() -> dict:
    return {"python": platform.python_version(), "torch": str(torch.__version__), "date": time.strftime("%Y-%m-%d")}


def table(rows: Sequence[Row]) -> str:
    """A Markdown table, a row for each fault and subject."""
    lines = ["| injected | into | times | what happened | lost |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        lost = "; ".join(row.lost) or "nothing"
        lines.append(f"| {row.fault} | {row.subject} | {row.times} | {row.outcome} | {lost} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main_of(main)
