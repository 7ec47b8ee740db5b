"""A training in processes of its own: how it is started, watched, stopped and compared with an undisturbed run."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import load_file

from detection.crops import make_shape_crops
from detection.shapes import make_shapes
from resbackbone.engine.metrics import read_metrics
from resbackbone.engine.run import CLOCK

TOOLS = Path(__file__).parents[1]
STEPS = 40
SHARED = f"--log-period 1 --checkpoint-period 4 --eval-period 8 --max-steps {STEPS}"
COMMANDS = {
    "detector": f"train_coco.py --recipe short --depth 18 --batch-size 2 --pictures 0 {SHARED}",
    "classifier": f"pretrain.py --recipe a2 --depth 18 --size 32 --batch-size 8 --epochs 40 {SHARED}",
}
ON_CPU = ("--device", "cpu", "--precision", "fp32")
PYTHON = (sys.executable,)
TORCHRUN = (*PYTHON, "-m", "torch.distributed.run", "--nproc-per-node")
PATIENCE = 300  # seconds for anything that must end


class Subject:
    """A training: its command with more `options`, its data, and its undisturbed runs."""

    def __init__(self, name: str, folder: Path, options: Sequence[str] = ON_CPU):
        self.name, self.folder = name, folder
        if name == "detector":
            self.data = make_shapes(folder / "shapes", train_images=16, val_images=6, size=64)
        else:
            self.data = make_shape_crops(folder / "crops", train_scenes=24, val_scenes=12, size=64)
        self.argv = [*COMMANDS[name].split(), *options, "--data", str(self.data)]

    def start(self, run: Path, *flags: str, launcher: Sequence[str] = PYTHON) -> subprocess.Popen:
        """The training in a process of its own, with the run folder `run`."""
        return start_tool([*self.argv, "--output", str(run), *flags], log=self.log_file(run), launcher=launcher)

    def resume(self, run: Path, *, launcher: Sequence[str] = PYTHON) -> subprocess.Popen:
        """The same, resumed; a run that has not begun yet starts."""
        flags = ["--resume"] if (run / "config.yaml").is_file() else []
        return self.start(run, *flags, launcher=launcher)

    def finish(self, run: Path, *, launcher: Sequence[str] = PYTHON) -> None:
        """Start or resume a run, and wait for its end. Raises RuntimeError if it fails."""
        if self.resume(run, launcher=launcher).wait(PATIENCE):
            raise RuntimeError(f"{run} could not be resumed: {self.log(run)[-500:]}")

    def log_file(self, run: Path) -> Path:
        return self.folder / f"{run.name}.log"

    def log(self, run: Path) -> str:
        """The output of the run's processes so far."""
        path = self.log_file(run)
        return path.read_text(errors="replace") if path.exists() else ""

    def undisturbed(self, ranks: int = 1) -> Path:
        """The run that no fault was injected into, made when it is first asked for."""
        run = self.folder / f"{self.name}-{ranks}-undisturbed"
        if not (run / "results.json").exists():
            self.finish(run, launcher=PYTHON if ranks == 1 else (*TORCHRUN, str(ranks), "--standalone"))
        return run

    def trains(self, run: Path) -> Callable[[], bool]:
        """Returns a function that says whether the next process in `run` has made an update."""
        before = len(self.log(run))
        return lambda: "\ntrain " in self.log(run)[before:]

    def new_run(self, fault: str) -> Path:
        return self.folder / f"{self.name}-{fault}-{len(list(self.folder.glob(f'{self.name}-{fault}-*.log')))}"


def start_tool(argv: Sequence[str], *, log: Path, launcher: Sequence[str] = PYTHON) -> subprocess.Popen:
    """Start one of the tools; its output is appended to `log`."""
    # PYTHONPATH: where this package is not installed.
    path = os.pathsep.join(filter(None, [str(TOOLS.parent), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [*launcher, str(TOOLS / argv[0]), *argv[1:]]
    with open(log, "ab") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)


def stop(process: subprocess.Popen, number: signal.Signals) -> int:
    """Send a signal to all processes of a training; returns its exit status."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
    return process.wait(PATIENCE)


def differences(run: Path, undisturbed: Path) -> list[str]:
    """The files in which two runs differ: weights and optimizer bit for bit, results, metrics without times."""
    found = []
    files = [file.relative_to(undisturbed) for file in undisturbed.glob(f"checkpoints/step_{STEPS:07d}/*.safetensors")]
    for file in [Path("model.safetensors"), *files]:
        one, other = (load_file(folder / file) for folder in (run, undisturbed))  # metadata has no order
        if one.keys() != other.keys() or not all(torch.equal(one[key], other[key]) for key in one):
            found.append(f"{run.name}/{file}")
    for name in ("results.json", "detections.json"):
        if (undisturbed / name).exists() and (run / name).read_bytes() != (undisturbed / name).read_bytes():
            found.append(f"{run.name}/{name}")
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
