"""What tests of commands share: the line that a user's mistake ends with, and what a run's folder holds."""

import json

import pytest
import torch
from safetensors.torch import load_file

from resbackbone.cli.command import main_of
from resbackbone.engine.run import CLOCK

CIFAR = ["--data", "synthetic", "--device", "cpu", "--precision", "fp32", "--batch-size", "8", "--log-period", "1"]
SIX_STEPS = [*CIFAR, "--steps", "6", "--checkpoint-period", "2", "--eval-period", "3"]  # of train_cifar10.py


def error_line(main, argv, capsys=None):
    """The one line that `main` ends with, its exit status being 1, when it is called with these words."""
    with pytest.raises(SystemExit) as exit:
        main_of(lambda: main([str(word) for word in argv]))
    assert isinstance(exit.value.code, str)  # to the interpreter: this line on stderr, and status 1
    assert exit.value.code.startswith("error: ") and len(exit.value.code.splitlines()) == 1
    assert capsys is None or capsys.readouterr().err == ""
    return exit.value.code


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
