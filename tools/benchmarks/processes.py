"""What needs processes of its own: the time an import takes, and training in two processes beside one."""

import json
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.contest import OWN, Contender
from benchmarks.networks import Setting, backbone_weights, ours, training_step
from resbackbone.training.distributed import Rank, distributed, launch

ROOT = Path(__file__).parents[2]
WITH_DETECTION = f"{OWN}, with detection"
IMPORTED = {  # detectron2's top level is empty
    OWN: "resbackbone",
    WITH_DETECTION: "detection",
    "torchvision": "torchvision",
    "timm": "timm",
    "detectron2": "detectron2.modeling",
}
ONE, TWO = f"{OWN}, 1 process", f"{OWN}, 2 processes"


def importing(name: str) -> Contender:
    """A fresh interpreter's import of the package, after that of torch, which all of them need."""
    code = (
        f"import time, torch; began = time.perf_counter(); import {IMPORTED[name]}; print(time.perf_counter() - began)"
    )

    def clock() -> float:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
        )
        return float(done.stdout.split()[-1])

    def run() -> dict:
        clock()  # reads the files from disk
        return {}

    return Contender(run, clock=clock)


def scaling(setting: Setting, scratch: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of a training step in one process of one thread, and in two that average their gradients (gloo).

    Round by round in the same two processes, of which one rests in between.
    """
    path = scratch / "scaling.json"
    launch(_steps, (setting, rounds, str(path)), device="cpu", processes=2)
    return json.loads(path.read_text())


def _steps(rank: Rank, setting: Setting, rounds: int, path: str) -> None:
    torch.set_num_threads(1)
    networks = [setting.place(ours(setting.depth, backbone_weights(setting.depth))).train() for _ in range(2)]
    alone = training_step(networks[0], networks[0], setting).run
    together = training_step(distributed(networks[1], rank), networks[1], setting).run
    seconds = {TWO: [], ONE: []}
    for _ in range(rounds + 1):
        dist.barrier()
        began = time.perf_counter()
        if rank.is_main:
            alone()
        seconds[ONE].append(time.perf_counter() - began)
        dist.barrier()
        began = time.perf_counter()
        together()
        dist.barrier()
        seconds[TWO].append(time.perf_counter() - began)
    if rank.is_main:
        Path(path).write_text(json.dumps({name: times[1:] for name, times in seconds.items()}))
