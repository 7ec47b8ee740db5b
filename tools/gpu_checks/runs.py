"""Runs the commands as users do: killed and resumed, under torchrun, to an AP, for speed."""

import json
import signal
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist

from detection.data import EMBEDDED_SET
from detection.shapes import make_shapes
from resbackbone.checks import require
from resbackbone.engine.checkpoints import checkpoints
from resbackbone.engine.metrics import read_metrics
from resbackbone.tools.benchmarks.contest import relative_difference
from resbackbone.tools.gpu_checks.record import Record, Setting
from resbackbone.tools.gpu_checks.steps import Training
from resbackbone.tools.soaking.subject import (
    PATIENCE,
    TORCHRUN,
    Subject,
    differences,
    last_step,
    start_tool,
    stop,
    wait_for,
)

NEEDED = ("tyro", "rich", "jinja2", "timm", "tensorboard", "matplotlib")  # by the trainings; detection checks its own
KILLED = 23  # the update after which a training is killed
LEAST_AP50 = 0.6  # of `make demo`; on a CPU its seeds gave 0.68 to 0.76


def subject_of(setting: Setting, *options: str) -> Subject:
    require("train", *NEEDED, user="this part")
    return Subject("detector", setting.scratch, ["--device", setting.device, *options])


def resume(setting: Setting, record: Record) -> None:
    """A training with --deterministic that is killed and resumed ends bit-identically to one that is not."""
    subject = subject_of(setting, "--deterministic")
    run = subject.new_run("kill")
    process = subject.start(run)
    wait_for(lambda: last_step(run) >= KILLED, process)
    stop(process, signal.SIGKILL)
    record.row("killed after update", last_step(run))
    subject.finish(run)
    differing = differences(run, subject.undisturbed())
    record.row("resumed", "; ".join(differing) or "no difference", "no difference to an undisturbed run", not differing)


def ranks(setting: Setting, record: Record) -> None:
    """A start under torchrun, SIGTERM, and what DDP over one rank changes."""
    subject = subject_of(setting)
    ddp(setting, record)
    run, began = subject.new_run("torchrun"), time.monotonic()
    process = subject.start(run, launcher=(*TORCHRUN, "1", "--standalone", "--local-addr", "127.0.0.1"))
    wait_for(lambda: last_step(run) >= 3, process)
    record.row("torchrun: from its start to the third update", f"{time.monotonic() - began:.1f} s")
    process.terminate()
    signalled = time.monotonic()
    status = process.wait(PATIENCE)
    record.row("torchrun: from SIGTERM to its end", f"{time.monotonic() - signalled:.1f} s")
    record.row("torchrun: its exit status", status, "1, whenever it is signalled")
    saved = ", ".join(path.name for path in checkpoints(run))
    stopped = "terminated at step" in subject.log(run)
    record.row("torchrun: the rank saved and stopped", saved or "no", "yes", stopped and bool(saved))
    if not stopped:
        record.detail("torchrun said", subject.log(run)[-4000:])


def ddp(setting: Setting, record: Record) -> None:
    """One process as a group of its own: NCCL on a GPU, gloo on a CPU."""
    backend = "nccl" if setting.on_gpu else "gloo"
    began = time.monotonic()
    dist.init_process_group(backend, init_method=f"file://{setting.scratch / 'store'}", rank=0, world_size=1)
    dist.all_reduce(torch.ones(1, device=setting.device))
    record.row(f"{backend}: time to the first exchange", f"{time.monotonic() - began:.2f} s")
    alone, together = Training(setting, 2), Training(setting, 2, ranks=2)  # over 1, DDP would be left out
    for one in (alone, together):
        torch.manual_seed(0)
        one.step()
    moved = relative_difference(together.detector.state_dict(), alone.detector.state_dict())
    record.at_most("DDP: weights after an update, beside those without", moved, 1e-3)
    dist.destroy_process_group()


def run_tool(setting: Setting, name: str, *words: str | Path) -> tuple[Path, float]:
    """Run one of the tools to its end; returns its run folder, `name`, and its seconds."""
    require("train", *NEEDED, user="this part")
    run, log, began = setting.scratch / name, setting.scratch / f"{name}.log", time.monotonic()
    process = start_tool([*map(str, words), "--device", setting.device, "--output", str(run)], log=log)
    if status := process.wait():
        raise RuntimeError(f"{words[0]} ended with {status}: {log.read_text(errors='replace')[-2000:]}")
    return run, time.monotonic() - began


def demo(setting: Setting, record: Record) -> None:
    """train_coco.py on the built-in data set; on a CPU two updates on a smaller one."""
    size = EMBEDDED_SET if setting.on_gpu else {"train_images": 32, "val_images": 2, "size": 64}
    steps = [] if setting.on_gpu else ["--max-steps", "2"]
    data = make_shapes(setting.scratch / "shapes", **size)
    run, seconds = run_tool(setting, "demo", "train_coco.py", "--data", data, "--recipe", "short", *steps)
    box = json.loads((run / "results.json").read_text())["bbox"]
    ap, ap50 = (box[name] or 0.0 for name in ("AP", "AP50"))
    record.row("in total", f"{seconds:.0f} s")
    update = statistics.median(line["seconds"] for line in read_metrics(run, "train"))
    record.row("an update, median", f"{1000 * update:.1f} ms")
    record.row("AP", ap)
    record.row("AP50", ap50, f"at least {LEAST_AP50}", ap50 >= LEAST_AP50 if setting.on_gpu else None)


def pretrain(setting: Setting, record: Record) -> None:
    """pretrain.py on synthetic images, as it is and compiled."""
    small = [] if setting.on_gpu else ["--size", "64", "--depth", "18"]
    steps, size = (60, setting.batches(256)[0]) if setting.on_gpu else (4, 4)
    small += ["--batch-size", str(size), "--max-steps", str(steps), "--log-period", str(steps // 4)]
    for name, flags in (("eager", []), ("compiled", ["--compile"]))[: 2 if setting.on_gpu else 1]:
        run, seconds = run_tool(setting, name, "pretrain.py", "--data", "synthetic", *small, *flags)
        rates = [line["images_per_second"] for line in read_metrics(run, "train")[1:]]
        record.row(f"{name}: images a second, batches of {size}", round(statistics.median(rates)))
        record.row(f"{name}: seconds in total", round(seconds))
