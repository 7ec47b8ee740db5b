import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchvision.ops import nms

from detection.nms import nms_sorted

CHAIN = 300
HERE = Path(__file__).parent


def random_boxes(count, side=100.0):
    corners = torch.rand(count, 2) * side
    return torch.cat((corners, corners + 1 + torch.rand(count, 2) * side / 2), 1)


def chain(count, step):
    """Each box overlaps the next ones: kept, suppressed, kept, .. the longest dependence that there is."""
    left = step * torch.arange(count).float()
    return torch.stack((left, torch.zeros(count), left + 10, torch.full((count,), 10.0)), 1)


CASES = {
    "random": lambda: random_boxes(200),
    "crowded": lambda: random_boxes(200, side=12),
    "a chain": lambda: chain(CHAIN, 3),
    "a chain that reaches further": lambda: chain(CHAIN, 1.7),
    "a chain backwards": lambda: chain(CHAIN, 3).flip(0),
    "chains beside each other": lambda: torch.cat([chain(80, 3), chain(80, 3) + torch.tensor([0.0, 4, 0, 4])]),
    "all equal": lambda: chain(1, 0).expand(50, 4).contiguous(),
    "nested": lambda: torch.stack([torch.tensor([-i, -i, i, i]) for i in torch.arange(1.0, 90)]),
    "without a size": lambda: torch.zeros(30, 4),
    "at the threshold": lambda: torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5], [0, 5, 10, 10], [5, 0, 10, 10]]),
    "at a threshold that fp32 rounds": lambda: torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 7], [0, 0, 10, 3]]),
    "far out": lambda: random_boxes(60) * 1e30,
    "infinite": lambda: torch.tensor([[0.0, 0, 9, 9], [0, 0, torch.inf, 9], [0, 0, 9, 8], [1, 0, 10, 9]]),
    "one": lambda: random_boxes(1),
}


def one_by_one(boxes, real, threshold):
    kept = torch.zeros_like(real)
    for i in range(len(boxes)):
        places = real[i].nonzero().squeeze(1)
        falling = torch.arange(len(places), 0, -1).to(boxes.dtype)
        kept[i, places[nms(boxes[i, places], falling, threshold)]] = True
    return kept


def lists_of(dtype):
    """All cases in one tensor, some boxes of each of them missing."""
    torch.manual_seed(0)
    lists = [make().to(dtype) for make in CASES.values()]
    boxes = torch.nn.utils.rnn.pad_sequence(lists, batch_first=True)
    real = torch.arange(boxes.shape[1]) < torch.tensor([len(x) for x in lists])[:, None]
    return torch.cat((boxes, boxes)), torch.cat((real, real & (torch.rand(real.shape) < 0.7)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.7, 1.0])
def test_every_list_is_as_with_torchvision(dtype, threshold):
    boxes, real = lists_of(dtype)
    assert torch.equal(nms_sorted(boxes, real, threshold), one_by_one(boxes, real, threshold))


def check_the_kernel():
    from detection import nms_kernel

    torch.cuda.current_device = lambda: None  # the index of a CPU
    for dtype, threshold in itertools.product((torch.float32, torch.float64), (0.3, 0.7)):  # fp32 rounds up and down
        boxes, real = (x[:, :60].contiguous() for x in lists_of(dtype))  # the interpreter takes long
        assert torch.equal(nms_kernel.greedy(boxes, real, threshold), one_by_one(boxes, real, threshold))
    print("the same")


def test_the_gpus_kernel_decides_the_same():
    """Run by Triton's interpreter on a CPU, for which Triton looks when it is imported."""
    pytest.importorskip("triton", reason="triton comes with torch for GPUs alone")
    done = subprocess.run(
        [sys.executable, "-c", "import test_nms; test_nms.check_the_kernel()"],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])])},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "the same\n", done.stderr


@pytest.mark.parametrize("lists, count", [(0, 5), (3, 0), (2, 1)])
def test_there_may_be_no_list_and_no_box(lists, count):
    boxes, real = torch.rand(lists, count, 4), torch.ones(lists, count, dtype=torch.bool)
    assert nms_sorted(boxes, real, 0.5).shape == (lists, count)
    assert not nms_sorted(boxes, ~real, 0.5).any()
