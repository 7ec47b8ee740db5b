"""The kernels compiled for NVIDIA GPUs, which needs none."""

import pytest

triton = pytest.importorskip("triton", reason="triton comes with torch for GPUs alone")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from detection import nms_kernel  # noqa: E402
from resbackbone import kernels  # noqa: E402


def ptx_of(kernel, types, constants, *, capability, **options):
    """Its PTX, after ptxas has made machine code of it."""
    names = [parameter.name for parameter in kernel.params]
    signature = {name: types.get(name, "constexpr") for name in names}
    given = {name: constants.get(name) for name in names if name not in types}
    source = ASTSource(fn=kernel, signature=signature, constexprs=given)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert made.asm["cubin"]
    return made.asm["ptx"]


@pytest.fixture(params=[70, 90], ids="sm_{}".format)
def capability(request):
    return request.param


@pytest.mark.parametrize("dtype, divided", [("fp32", "div.rn.f32"), ("fp64", "div.rn.f64")])
@pytest.mark.parametrize("boxes", [2048, nms_kernel.MOST_BOXES])
def test_nms_divides_and_rounds_as_a_cpu(dtype, divided, boxes, capability, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {"boxes": f"*{dtype}", "real": "*u1", "kept": "*u1", "count": "i32", "threshold": "fp64"}
    options = nms_kernel.options_of(boxes)
    ptx = ptx_of(nms_kernel._greedy, types, {"BLOCK": boxes}, capability=capability, **options)
    assert divided in ptx and "fma." not in ptx and "div.full" not in ptx


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "contiguous"])
def test_norm_sum_and_relu_compile_forward_and_backward(dtype, last, capability, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    options = {"LAST": last, "NORM": True, "ADD": True, "RELU": True, "R": 16, "C": 256}
    shapes = dict.fromkeys(("rows", "columns", "channels"), "i32") | {"eps": "fp32"}
    maps = dict.fromkeys(("y", "shortcut", "z", "grad", "grad_y", "grad_shortcut"), f"*{dtype}")
    constants = dict.fromkeys(("weight", "bias", "mean", "var"), "*fp32")
    for kernel in (kernels._forward, kernels._backward):
        names = {parameter.name for parameter in kernel.params}
        types = {name: kind for name, kind in (shapes | maps | constants).items() if name in names}
        assert "st.global" in ptx_of(kernel, types, options, capability=capability)
