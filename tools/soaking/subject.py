"""A training that faults are injected into: how it is started, watched and compared with an undisturbed run."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from detection.crops import make_shape_crops
from detection.shapes import make_shapes
from resbackbone.engine.metrics import read_metrics
from resbackbone.engine.run import CLOCK

TOOLS = Path(__file__).parents[1]
STEPS = 40
SHARED = f"--device cpu --precision fp32 --log-period 1 --checkpoint-period 4 --eval-period 8 --max-steps {STEPS}"
COMMANDS = {
    "detector": f"train_coco.py --recipe short --depth 18 --batch-size 2 --pictures 0 {SHARED}",
    "classifier": f"pretrain.py --recipe a2 --depth 18 --size 32 --batch-size 8 --epochs 40 {SHARED}",
}
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node")
PATIENCE = 300  # seconds for anything that must end


class Subject:
    """A training: its command, its data, and its undisturbed runs."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder
        if name == "detector":
            self.data = make_shapes(folder / "shapes", train_images=16, val_images=6, size=64)
        else:
            self.data = make_shape_crops(folder / "crops", train_scenes=24, val_scenes=12, size=64)
        script, *argv = COMMANDS[name].split()
        self.argv = [script, *argv, "--data", str(self.data)]
        self.undisturbed_runs: dict[int, Path] = {}  # by the number of ranks

    def start(self, run: Path, *flags: str, launcher: Sequence[str] = (sys.executable,)) -> subprocess.Popen:
        """The training in a process of its own, with the run folder `run`."""
        return self.run([*self.argv, "--output", str(run), *flags], log=run, launcher=launcher)

    def run(self, argv: Sequence[str], *, log: Path, launcher: Sequence[str]) -> subprocess.Popen:
        """One of the tools in a process of its own, whose output is the log of `log`."""
        command = [*launcher, str(TOOLS / argv[0]), *argv[1:]]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with open(self.folder / f"{log.name}.log", "ab") as file:
            return subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)

    def finish(self, run: Path, **options) -> None:
        process = self.start(run, "--resume", **options)
        if process.wait(PATIENCE):
            raise RuntimeError(f"{run} could not be resumed: {self.log(run)[-500:]}")

    def log(self, run: Path) -> str:
        """The output of the run's processes so far."""
        path = self.folder / f"{run.name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def undisturbed(self, ranks: int = 1) -> Path:
        """The run that no fault was injected into."""
        if ranks not in self.undisturbed_runs:
            run = self.undisturbed_runs[ranks] = self.folder / f"{self.name}-{ranks}-undisturbed"
            self.finish(run, launcher=(sys.executable,) if ranks == 1 else (*TORCHRUN, str(ranks), "--standalone"))
        return self.undisturbed_runs[ranks]

    def trains(self, run: Path) -> Callable[[], bool]:
        """Returns a function that says whether the next process in `run` has made an update."""
        before = len(self.log(run))
        return lambda: "\ntrain " in self.log(run)[before:]

    def new_run(self, fault: str) -> Path:
        return self.folder / f"{self.name}-{fault}-{len(list(self.folder.glob(f'{self.name}-{fault}-*.log')))}"


def differences(run: Path, undisturbed: Path) -> list[str]:
    """The files in which two runs differ: weights and optimizer bit for bit, results, metrics without times."""
    found = []
    last = f"checkpoints/step_{STEPS:07d}"
    for file in ["model.safetensors", *(f"{last}/{path.name}" for path in (undisturbed / last).glob("*.safetensors"))]:
        one, other = (load_file(folder / file) for folder in (run, undisturbed))
        if one.keys() != other.keys() or not all(torch.equal(one[key], other[key]) for key in one):
            found.append(f"{run.name}/{file}")
    for file in ("results.json", "detections.json"):
        if (undisturbed / file).exists() and (run / file).read_bytes() != (undisturbed / file).read_bytes():
            found.append(f"{run.name}/{file}")
    mine, theirs = (
        sorted(json.dumps({k: v for k, v in line.items() if k not in CLOCK}) for line in metrics(folder, None))
        for folder in (run, undisturbed)
    )
    return [*found, *([f"{run.name}/metrics.jsonl"] * (mine != theirs))]


def metrics(run: Path, kind: str | None = "train") -> list[dict]:
    """The run's metrics so far, of one kind or all."""
    return read_metrics(run, kind) if (run / "metrics.jsonl").exists() else []


def last_step(run: Path) -> int:
    return max((line["step"] for line in metrics(run)), default=0)


def saving(run: Path) -> bool:
    return any((run / "checkpoints").glob(".step_*.tmp"))


def evaluating(run: Path) -> bool:
    step = last_step(run)
    return step > 0 and step % 8 == 0 and step not in {line["step"] for line in metrics(run, "eval")}


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    """Wait until the condition holds or the process has ended."""
    deadline = time.monotonic() + PATIENCE
    while not condition() and process.poll() is None:
        if time.monotonic() > deadline:
            raise RuntimeError(f"nothing happened for {PATIENCE} s")
        time.sleep(0.002)


def workers(parent: int) -> list[int]:
    """The processes that torchrun has started."""
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
