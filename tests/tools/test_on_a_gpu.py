"""What tools/gpu_check.py finds, as tests: they run wherever there is a GPU, and are skipped elsewhere."""

import importlib
import os

import pytest
import torch

from resbackbone.engine.device import use_deterministic

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first product on the GPU, for determinism
equality, records, runs, steps = (
    importlib.import_module(f"resbackbone.tools.gpu_checks.{name}") for name in ("equality", "record", "runs", "steps")
)
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]


@pytest.fixture
def setting(tmp_path):
    return records.Setting("", "cuda:0", tmp_path)


@pytest.mark.parametrize(
    "check", [equality.check, steps.waits, runs.resume, runs.ddp], ids=lambda check: check.__name__
)
def test_a_part_of_gpu_check_finds_nothing_wrong(setting, tmp_path, check):
    record = records.Record(tmp_path / "record.json")
    check(setting, record)
    assert not record.differs, [row for row in record.content["rows"] if row["ok"] is False]


def test_with_deterministic_algorithms_a_step_repeats_bit_for_bit(setting):
    use_deterministic(True)
    try:
        states = []
        for _ in range(2):
            training = steps.Training(setting, 2)
            for step in range(3):
                torch.manual_seed(step)
                training.step()
            states.append(training.detector.state_dict())
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
