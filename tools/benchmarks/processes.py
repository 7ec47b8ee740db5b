"""Jobs that start processes of their own: the time of an import, and training in two processes beside one."""

import json
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils.benchmark import timer

from resbackbone.engine.distributed import Rank, distributed
from resbackbone.tools.benchmarks.contest import OWN, Contender
from resbackbone.tools.benchmarks.networks import Workload, backbone_weights, build_own, images, training_step

ROOT = Path(__file__).parents[2]
WITH_DETECTION = f"{OWN}, with detection"
IMPORTED = {
    OWN: "resbackbone",
    WITH_DETECTION: "detection",
    "torchvision": "torchvision",
    "timm": "timm",
    "detectron2": "detectron2.modeling",  # its top level is empty
}
ONE, TWO = f"{OWN}, 1 process", f"{OWN}, 2 processes"


def importing(name: str) -> Contender:
    """The import of a package in a fresh interpreter that has imported torch, which all of them need."""
    code = (
        f"import time, torch; began = time.perf_counter(); import {IMPORTED[name]}; print(time.perf_counter() - began)"
    )

    def clock() -> float:
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            kind, _, reason = done.stderr.strip().splitlines()[-1].partition(": ")
            raise (ModuleNotFoundError if kind == "ModuleNotFoundError" else RuntimeError)(reason or kind)
        return float(done.stdout.split()[-1])

    return Contender(lambda: clock() and {}, clock=clock)  # the first run reads the files from disk


def scaling(work: Workload, scratch: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of a training step in one process of one thread, and in two that average their gradients (gloo).

    The same two processes take part in all rounds. One waits while the other trains alone.
    """
    mp.spawn(_steps, (work, rounds, scratch), nprocs=2)
    return json.loads((scratch / "scaling.json").read_text())


def _steps(index: int, work: Workload, rounds: int, scratch: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{scratch / 'store'}", rank=index, world_size=2)
    rank = Rank(index, 2, torch.device("cpu"))
    one, two = (work.place(build_own(work.depth, backbone_weights(work.depth))).train() for _ in range(2))
    pixels = images(work)
    alone, together = training_step(one, one, pixels), training_step(distributed(two, rank), two, pixels)
    seconds: dict[str, list[float]] = {TWO: [], ONE: []}
    for _ in range(rounds + 1):
        for name, step in ((ONE, alone if rank.is_main else lambda: None), (TWO, together)):
            dist.barrier()
            began = timer()
            step()
            if name == TWO:
                dist.barrier()
            seconds[name].append(timer() - began)
    if rank.is_main:
        (scratch / "scaling.json").write_text(json.dumps({name: times[1:] for name, times in seconds.items()}))
    dist.destroy_process_group()
