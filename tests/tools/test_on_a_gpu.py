"""What tools/gpu_check.py finds, as tests: they run wherever there is a GPU, and are skipped elsewhere."""

import importlib
import os
from collections import Counter

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
    return records.Setting("cuda", True, tmp_path, tmp_path)


@pytest.mark.parametrize("dtype", equality.LIMITS, ids=str)
@pytest.mark.parametrize("subject", equality.SUBJECTS)
def test_a_gpu_computes_what_a_cpu_does(subject, dtype):
    assert equality.apart(subject, "cuda", dtype) <= equality.LIMITS[dtype]


def test_bf16_errors_are_no_larger_than_those_of_torchvision_in_bf16():
    errors = equality.bf16_errors("cuda", 50)
    assert all(own <= errors["torchvision"][name] for name, own in errors["resbackbone"].items())


def test_a_compiled_backbone_gives_what_eager_gives():
    assert equality.compiled_apart("cuda") < 1e-4


def test_a_cuda_graph_gives_what_eager_gives_whatever_happens_in_between():
    assert all(difference < 1e-4 for difference in equality.graph_apart("cuda").values())


def test_a_step_of_two_images_waits_for_the_gpu_thirty_times_at_most(setting):
    training, found = steps.Training(setting, 2), Counter()
    for _ in range(3):
        training.step()
    with steps.waits_noted(found):
        training.step()
    assert found.total() <= steps.MOST_WAITS, found.most_common()


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


def test_a_killed_run_resumes_to_the_same_weights(setting, tmp_path):
    record = records.Record(tmp_path / "record.json")
    runs.resume(setting, record)
    assert not record.differs, record.content["rows"]


def test_ddp_over_nccl_changes_nothing(setting, tmp_path):
    record = records.Record(tmp_path / "record.json")
    runs.ddp(setting, record)
    assert not record.differs, record.content["rows"]
