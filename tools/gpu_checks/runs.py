"""Runs the commands as users do: killed and resumed, under torchrun, to an AP, for speed."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from detection.data import EMBEDDED
from detection.shapes import make_shapes
from resbackbone.checks import require
from resbackbone.engine.metrics import read_metrics
from resbackbone.tools.benchmarks.contest import relative_difference
from resbackbone.tools.gpu_checks.record import Record, Setting
from resbackbone.tools.gpu_checks.steps import Training

TOOLS = Path(__file__).parents[1]
NEEDED = ("tyro", "rich", "jinja2", "timm", "tensorboard", "matplotlib")  # by the trainings; detection checks its own
UPDATES, SAVED, KILLED = 40, 20, 23
PATIENCE = 120  # seconds to wait for an event
LEAST_AP50 = 0.6  # of `make demo`; on a CPU its seeds gave 0.68 to 0.76


class Command:
    """One of the tools in a process of its own, in the scratch folder."""

    def __init__(self, argv: Sequence[str | Path], setting: Setting, *, launcher: Sequence[str] = ()):
        require("train", *NEEDED, user="this part")
        self.argv = [*(launcher or [sys.executable]), *map(str, argv)]
        self.log = setting.scratch / f"{time.time_ns()}.log"
        paths = os.pathsep.join(filter(None, (str(TOOLS.parent), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
        if not setting.on_gpu:
            environment["OMP_NUM_THREADS"] = "1"  # two at once would wait for each other's threads
        self.began = time.monotonic()
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                self.argv, cwd=setting.scratch, env=environment, stdout=log, stderr=subprocess.STDOUT
            )

    def finish(self, accepted: int = 0) -> float:
        """Wait for its end; returns the seconds since its start. Raises RuntimeError for another exit status."""
        if (status := self.process.wait()) != accepted:
            raise self.error(f"ended with {status}")
        return time.monotonic() - self.began

    def wait_for(self, text: str) -> float:
        """Wait until it prints `text`; returns the seconds since its start."""
        while text not in self.output():
            if self.process.poll() is not None or time.monotonic() - self.began > PATIENCE:
                raise self.error(f"did not print {text!r}")
            time.sleep(0.05)
        return time.monotonic() - self.began

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def error(self, what: str) -> RuntimeError:
        return RuntimeError(f"{' '.join(self.argv[1:4])} .. {what}: {self.output()[-2000:]}")


def small_data(setting: Setting) -> Path:
    return make_shapes(setting.scratch / "small", train_images=32, val_images=2, size=64)


def training(setting: Setting, output: Path, *options: str) -> list[str | Path]:
    """train_coco.py with the options of a short run."""
    small = ["--recipe", "short", "--batch-size", "4", "--workers", "2", "--pictures", "0", "--log-period", "1"]
    return [*small, "--data", small_data(setting), "--device", setting.device, "--output", output, *options]


# Killed and resumed


def resume(setting: Setting, record: Record) -> None:
    """40 updates, and 40 that are killed after the 23rd and resumed at the 20th: the same images, the same weights."""
    for kind in ("deterministic",) if setting.quick else ("deterministic", "as usual"):
        extra = ["--deterministic"] if kind == "deterministic" else []
        extra += ["--max-steps", str(UPDATES), "--checkpoint-period", str(SAVED)]
        whole, broken = (setting.scratch / f"{kind.replace(' ', '-')}-{name}" for name in ("whole", "broken"))

        def start(run: Path, kill: int, *options: str, extra=extra) -> Command:
            argv = training(setting, run, *extra, *options)
            return Command([TOOLS / "gpu_checks" / "watched.py", run.with_suffix(".ids"), str(kill), *argv], setting)

        uninterrupted = start(whole, 0)
        start(broken, KILLED).finish(-signal.SIGKILL)
        start(broken, 0, "--resume").finish()
        uninterrupted.finish()
        compare(kind, whole, broken, record)


def compare(kind: str, whole: Path, broken: Path, record: Record) -> None:
    """Record how a resumed run differs from an uninterrupted one."""
    ids = [[json.loads(line) for line in run.with_suffix(".ids").read_text().splitlines()] for run in (whole, broken)]
    expected = ids[0][:KILLED] + ids[0][SAVED:]
    same = len(ids[0]) == UPDATES and ids[1] == expected
    record.row(f"{kind}: images of every update", "the same" if same else "different", "the same", same)
    one, other = (load_file(run / "model.safetensors") for run in (whole, broken))
    what, distance = f"{kind}: difference of the weights, relative", relative_difference(other, one)
    if kind == "deterministic":
        record.at_most(what, distance, 0.0)
    else:
        record.row(what, distance)


# Under torchrun, and DDP over one rank


def ranks(setting: Setting, record: Record) -> None:
    """A start under torchrun, SIGTERM, and what DDP over one rank changes."""
    ddp(setting, record)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    launcher += ["--nproc-per-node", "1"]
    output = setting.scratch / "torchrun"
    argv = training(setting, output, "--max-steps", "5000", "--checkpoint-period", "5000")
    command = Command([TOOLS / "train_coco.py", *argv], setting, launcher=launcher)
    started = command.wait_for("train 3/")
    record.row("torchrun: from its start to the third update", f"{started:.1f} s{setting.beside}")
    command.process.send_signal(signal.SIGTERM)
    signalled = time.monotonic()
    status = command.process.wait(PATIENCE)
    record.row("torchrun: from SIGTERM to its end", f"{time.monotonic() - signalled:.1f} s{setting.beside}")
    record.row("torchrun: its exit status", status, "1, whenever it is signalled")
    saved = [path.name for path in (output / "checkpoints").glob("step_*")]
    stopped = "terminated at step" in command.output() and len(saved) == 1
    record.row("torchrun: the rank saved and stopped", ", ".join(saved) or "no", "yes", stopped)
    if not stopped:
        record.detail("torchrun said", command.output()[-4000:])


def ddp(setting: Setting, record: Record) -> None:
    """One process as a group of its own: NCCL on a GPU, gloo on a CPU."""
    backend = "nccl" if setting.on_gpu else "gloo"
    began = time.monotonic()
    dist.init_process_group(backend, init_method=f"file://{setting.scratch / 'store'}", rank=0, world_size=1)
    dist.all_reduce(torch.ones(1, device=setting.device))
    record.row(f"{backend}: time to the first exchange", f"{time.monotonic() - began:.2f} s{setting.beside}")
    alone, together = Training(setting, 2), Training(setting, 2, ranks=2)  # over 1, DDP would be left out
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        for one in (alone, together):
            torch.manual_seed(0)
            one.step()
    strides = sorted({str(line.message)[:200] for line in raised if "stride" in str(line.message)})
    record.row("DDP: warnings about strides", "; ".join(strides) or "none", "none", not strides)
    moved = relative_difference(together.detector.state_dict(), alone.detector.state_dict())
    record.at_most("DDP: weights after an update, beside those without", moved, 1e-3)
    dist.destroy_process_group()


# To its AP, and for speed


def demo(setting: Setting, record: Record) -> None:
    """train_coco.py on the built-in data set."""
    short = ["--max-steps", "200" if setting.on_gpu else "2"] if setting.quick else []
    data = EMBEDDED if setting.on_gpu or not setting.quick else small_data(setting)
    argv = ["--data", data, "--recipe", "short", "--device", setting.device, "--pictures", "2", "--output", "demo"]
    seconds = Command([TOOLS / "train_coco.py", *argv, *short], setting).finish()
    results = json.loads((setting.scratch / "demo" / "results.json").read_text())
    lines = read_metrics(setting.scratch / "demo", "train")
    record.row("updates", lines[-1]["step"])
    update = statistics.median(line["seconds"] for line in lines)
    record.row("in total, including drawing the images", f"{seconds:.0f} s{setting.beside}")
    record.row("an update, median", f"{1000 * update:.1f} ms{setting.beside}")
    ap50 = results["bbox"]["AP50"]
    record.row("AP, AP50", f"{100 * (results['bbox']['AP'] or 0):.1f}, {100 * (ap50 or 0):.1f}")
    if not short:
        record.row("AP50 of the demo", ap50, f"at least {LEAST_AP50}", (ap50 or 0) >= LEAST_AP50)


def pretrain(setting: Setting, record: Record) -> None:
    """pretrain.py on synthetic images, as it is and compiled."""
    # Not tools/pretrain.py: it imports resbackbone.tools, which is not there where this package is not installed.
    start = f"import resbackbone; resbackbone.__path__.append({str(TOOLS.parent)!r}); "
    start += "from resbackbone.tools.pretrain import run; run()"
    small = [] if setting.on_gpu else ["--size", "64", "--depth", "18"]
    steps, size = (60, setting.batches(256)[0]) if setting.on_gpu else (4, 4)
    for flags in ([], ["--compile"]) if setting.on_gpu else ([],):
        name = "compiled" if flags else "eager"
        argv = ["--data", "synthetic", "--device", setting.device, "--output", name, "--batch-size", str(size), *small]
        argv += ["--max-steps", str(steps), "--log-period", str(steps // 4), *flags]
        seconds = Command(["-c", start, *argv], setting).finish()
        rates = [line["images_per_second"] for line in read_metrics(setting.scratch / name, "train")[1:]]
        record.row(f"{name}: images a second, batches of {size}", round(statistics.median(rates)))
        record.row(f"{name}: seconds in total", round(seconds))
