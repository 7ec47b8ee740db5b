"""The GPU's kernels, run by Triton's interpreter on a CPU."""

import itertools

import pytest
import torch
import torch.nn.functional as F

triton = pytest.importorskip("triton", reason="triton comes with torch for GPUs alone")
interpreter = pytest.importorskip("triton.runtime.interpreter")
from resbackbone import kernels  # noqa: E402
from resbackbone.folding import FrozenBatchNorm2d, _NormAddReLU  # noqa: E402


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    for name in ("_block", "_forward", "_backward"):
        monkeypatch.setattr(kernels, name, interpreter.InterpretedFunction(getattr(kernels, name).fn))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # the index of a CPU


def relative_error(x, expected):
    return ((x.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("add, relu, normed", [*itertools.product((False, True), repeat=3)])
def test_norm_sum_and_relu_with_their_gradients(add, relu, normed, layout, dtype, tolerance, randomised):
    norm = randomised(FrozenBatchNorm2d(12))
    y, shortcut = (torch.randn(2, 12, 5, 7).to(dtype).requires_grad_() for _ in range(2))
    constants = (norm.weight, norm.bias, norm.running_mean, norm.running_var) if normed else (norm.bias,)
    given = (y * 1).contiguous(memory_format=layout)
    found = _NormAddReLU.apply(given, shortcut if add else None, constants, norm.eps, relu, kernels)
    assert found.data_ptr() == given.data_ptr()
    expected = norm(y.float()) if normed else y.float() + norm.bias.view(-1, 1, 1)
    expected = expected + shortcut.float() if add else expected
    expected = F.relu(expected) if relu else expected
    assert relative_error(found, expected) < tolerance
    leaves, weights = (y, shortcut) if add else (y,), torch.randn(found.shape)
    gradients = (torch.autograd.grad((x * weights).sum(), leaves) for x in (found, expected))
    assert all(relative_error(mine, theirs) < tolerance for mine, theirs in zip(*gradients, strict=True))


def test_maps_without_elements_and_values_that_are_not_numbers():
    bias = torch.zeros(3)
    assert kernels.norm_add_relu(torch.empty(0, 3, 4, 5), None, (bias,), 0.0, True).shape == (0, 3, 4, 5)
    y = torch.tensor([float("nan"), -1.0, float("inf")]).view(1, 3, 1, 1)
    z = kernels.norm_add_relu(y.clone(), None, (bias,), 0.0, True)
    assert z.flatten().tolist()[1:] == [0.0, float("inf")] and z.isnan().sum() == 1


def test_a_second_derivative(randomised):
    norm = randomised(FrozenBatchNorm2d(4))
    y = torch.randn(1, 4, 3, 2, requires_grad=True)
    constants = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    z = _NormAddReLU.apply(y * 1, None, constants, norm.eps, True, kernels)
    (first,) = torch.autograd.grad((z**2).sum(), y, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), y)
    scale = norm.scale_and_shift()[0].view(-1, 1, 1)
    assert relative_error(second, 2 * scale**2 * (z > 0)) < 1e-6
