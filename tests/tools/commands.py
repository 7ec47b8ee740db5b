"""What tests of commands share: runs that are killed or start several processes, and comparisons of their folders."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from resbackbone.cli.command import main_of
from resbackbone.engine.run import CLOCK
from resbackbone.engine.state import TrainState

TOOLS = Path(__file__).parents[2] / "tools"
CIFAR = ["--data", "synthetic", "--device", "cpu", "--precision", "fp32", "--batch-size", "8", "--log-period", "1"]
SIX_STEPS = [*CIFAR, "--steps", "6", "--checkpoint-period", "2", "--eval-period", "3"]  # of train_cifar10.py


def error_line(main, argv, capsys=None):
    """The one line that `main` ends with, with exit status 1, when it is called with these words."""
    with pytest.raises(SystemExit) as exit:
        main_of(lambda: main([str(word) for word in argv]))
    assert isinstance(exit.value.code, str)  # to the interpreter: this line on stderr, and status 1
    assert exit.value.code.startswith("error: ") and len(exit.value.code.splitlines()) == 1
    assert capsys is None or capsys.readouterr().err == ""
    return exit.value.code


def torchrun(tool, argv, *, processes=2):
    """What a tool prints in several processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    words = [str(word) for word in (*launcher, tool, *argv)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TOOLS.parent)}
    process = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


def as_srun_starts(tool, argv, *, processes=2):
    """What the first rank of a tool prints, started as srun starts it: each rank a process told its place."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    places = [{"RANK": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(processes)]
    command = [sys.executable, tool, *map(str, argv)]
    ranks = [
        subprocess.Popen(command, env={**os.environ, **shared, **place}, stdout=subprocess.PIPE, text=True)
        for place in places
    ]
    said = [rank.communicate(timeout=100)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * processes
    return said[0]


def kill_after_three_steps(tool, argv, run):
    """Start a training of the folder `run`, kill it, and remove checkpoints after step 4, as on a slow machine."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, TOOLS / tool, *argv, "--max-steps", "500", "--output", run]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not ((run / "metrics.jsonl").is_file() and len(metrics(run)) >= 3):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    for path in (run / "checkpoints").glob("step_*"):
        if int(path.name[5:]) > 4:
            shutil.rmtree(path)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')


def die_in_second_checkpoint(main, argv, run):
    """Start a training of the folder `run` that dies while it writes the checkpoint of step 4."""
    save = TrainState.save

    def dies(self, folder):
        save(self, folder)
        if self.step == 4:
            raise MemoryError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(TrainState, "save", dies)
        main([*argv, "--output", str(run)])
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_0000002"]


def metrics(folder, kind="train"):
    """The lines of one kind in a run's metrics.jsonl."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def timeless(folder, kind="train"):
    """The same without what depends on the clock and the machine."""
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in metrics(folder, kind)]


def differing(one, other):
    """Names of the tensors that are not the same in two safetensors files, bit for bit."""
    one, other = load_file(one), load_file(other)
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def assert_ended_alike(run, alone):
    """Two runs of six steps have the same tensors, results and metrics, apart from the clock."""
    for file in [alone / "model.safetensors", *(alone / "checkpoints/step_0000006").glob("*.safetensors")]:
        assert differing(run / file.relative_to(alone), file) == []
    for file in alone.glob("*.json"):
        assert (run / file.name).read_bytes() == file.read_bytes()
    assert timeless(run) == timeless(alone)  # every step once, with the same losses and rates
