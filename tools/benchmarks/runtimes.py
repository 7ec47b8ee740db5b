"""Exported networks in ONNX Runtime and OpenVINO, on a CPU: what somebody takes who only runs a network there.

Both get one file, the images' size, and as many threads as PyTorch has. OpenVINO computes in bf16 if the mode says so;
ONNX Runtime has no bf16 on a CPU.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from detection.export import onnx_runner
from resbackbone.tools.benchmarks.contest import Workload

Run = Callable[[], dict[str, Tensor]]  # {name of an output: tensor}, which the next call may overwrite


def suits(name: str, work: Workload) -> bool:
    """Whether the package `name` can do this: every package that is not a runtime can."""
    return name not in RUNTIMES or not (work.on_gpu or work.bf16 and name == "onnxruntime")


def exported(export: Callable[[Path], None]) -> bytes:
    """The file that `export` writes, an ONNX one."""
    with tempfile.TemporaryDirectory() as folder:
        export(path := Path(folder, "network.onnx"))
        return path.read_bytes()


def runner(name: str, model: bytes, images: Tensor, work: Workload) -> Run:
    """A function that runs the model, an ONNX file with one input, on `images` in the runtime `name`."""
    return RUNTIMES[name](model, images.contiguous(), work)


def _onnxruntime(model: bytes, images: Tensor, work: Workload) -> Run:
    return partial(onnx_runner(model), images)


def _openvino(model: bytes, images: Tensor, work: Workload) -> Run:
    import openvino

    core = openvino.Core()
    network = core.read_model(model)
    network.reshape(list(images.shape))
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "bf16" if work.bf16 else "f32",
    }
    request = core.compile_model(network, "CPU", settings).create_infer_request()
    request.set_input_tensor(openvino.Tensor(images.numpy()))  # a copy
    outputs = {x.any_name: torch.from_numpy(request.get_tensor(x).data) for x in request.model_outputs}

    def run() -> dict[str, Tensor]:
        request.infer()
        return outputs

    return run


RUNTIMES: dict[str, Callable[[bytes, Tensor, Workload], Run]] = {"onnxruntime": _onnxruntime, "openvino": _openvino}
