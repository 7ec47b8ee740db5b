import pytest
import torch

from resbackbone.engine.device import (
    arithmetic,
    autocast,
    choose_device,
    choose_precision,
    native_precision,
)
from resbackbone.engine.provenance import commit, hardware


@pytest.fixture
def gpus(monkeypatch):
    """Give this machine a number of GPUs."""

    def have(count, *, bf16=True):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0) if bf16 else (7, 5))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200" if bf16 else "Tesla T4")

    return have


def test_gpus_are_chosen_where_there_are_any(gpus, monkeypatch):
    gpus(0)
    assert choose_device(None) == choose_device("cpu") == "cpu"
    gpus(2)
    assert choose_device(None) == "cuda" and choose_device("cuda:1") == "cuda:1"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("mps") == "mps" and choose_precision(None, "mps") == "fp32"
    with pytest.raises(ValueError, match="bf16: mps computes in fp32 only"):
        choose_precision("bf16", "mps")


@pytest.mark.parametrize(
    "device, message",
    [
        ("cuda", "cuda: this torch finds no GPU; python tools/doctor.py says why"),
        ("mps", "mps: this torch finds no Apple GPU; leave the device out to compute on the CPU"),
        ("tpu", "unknown device 'tpu'; choose from cuda, cpu, mps"),
    ],
)
def test_a_device_that_is_not_here_is_refused(device, message, gpus):
    gpus(0)
    with pytest.raises(ValueError, match=message):
        choose_device(device)


@pytest.mark.parametrize(
    "processor, precision",
    [
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True}, "bf16"),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, "bf16"),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, "fp32"),  # AMX hidden by the hypervisor
        ({"cpu_name": "Intel Core", "avx2": True}, "fp32"),
        ({"avx512_bf16": True}, "bf16"),
        ({}, "fp32"),
    ],
)
def test_a_processor_computes_in_bf16_where_that_is_faster(processor, precision, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor, raising=False)
    assert native_precision("cpu") == precision


def test_the_precision_is_one_that_the_device_computes_in(gpus):
    gpus(1)
    assert choose_precision(None, "cuda") == "bf16"
    gpus(1, bf16=False)  # V100, T4
    assert choose_precision(None, "cuda") == "fp32" and choose_precision("fp16", "cuda:0") == "fp16"
    with pytest.raises(ValueError, match="unknown precision 'fp8'; choose from fp32, bf16, fp16"):
        choose_precision("fp8", "cuda")
    with pytest.raises(
        ValueError, match="fp16: needs a GPU, as a CPU is dozens of times slower with it; give fp32 or bf16"
    ):
        choose_precision("fp16", "cpu")


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.half)])
def test_under_autocast_products_are_in_the_precision(precision, dtype):
    with autocast(torch.device("cpu"), precision):
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == dtype


def test_what_a_result_depends_on_is_said(gpus, monkeypatch):
    on_cpu = arithmetic(torch.device("cpu"))
    usual = {"torch": torch.__version__, "tf32": "not used", "threads": torch.get_num_threads()}
    assert on_cpu == {"commit": commit(), "hardware": hardware(torch.device("cpu")), **usual} and on_cpu["hardware"]
    gpus(1)
    assert arithmetic(torch.device("cuda"))["hardware"].startswith("NVIDIA H200; ")
    assert arithmetic(torch.device("cuda"))["tf32"].startswith("convolutions")  # torch's default
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    assert arithmetic(torch.device("cuda"))["tf32"] == "not used"
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE")
    gpus(1, bf16=False)  # V100, T4: no TF32 either
    assert arithmetic(torch.device("cuda"))["tf32"] == "not used"
