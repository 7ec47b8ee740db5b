from contextlib import nullcontext
from itertools import islice

import pytest
import torch

from resbackbone.engine.transfer import moved

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def streams(monkeypatch):
    """Stands in for CUDA's streams; lists who waited for whom."""
    waits = []

    class Stream:
        def __init__(self, device):
            assert device == GPU

        def wait_stream(self, other):
            waits.append((self, other))

    computing = Stream(GPU)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    return waits


def test_on_a_cpu_batches_are_moved_one_by_one():
    seen = []
    results = moved(iter(range(10)), lambda batch: seen.append(batch) or batch * 2, CPU)
    assert list(islice(results, 3)) == [0, 2, 4] and seen == [0, 1, 2]


def test_on_a_gpu_one_batch_is_moved_ahead_and_the_order_stays(streams):
    seen = []
    results = moved(range(5), lambda batch: seen.append(batch) or batch * 2, GPU)
    assert next(results) == 0 and seen == [0, 1]
    assert next(results) == 2 and seen == [0, 1, 2]
    assert list(results) == [4, 6, 8]
    assert len(streams) == 5  # before each batch is given, its copies are waited for


def test_what_goes_wrong_with_a_batch_is_raised_when_its_turn_comes(streams):
    def move(batch):
        if batch == 2:
            raise ValueError("image 7.jpg: empty file")
        return batch

    results = moved(range(5), move, GPU)
    assert next(results) == 0 and next(results) == 1
    with pytest.raises(ValueError, match=r"image 7\.jpg"):
        next(results)


def test_every_tensor_of_a_batch_is_known_to_the_stream_that_reads_it(streams, monkeypatch):
    a, b, c, d = torch.zeros(4).unbind()
    seen = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: seen.append(tensor.data_ptr()))
    list(moved([([a, b], [{"boxes": c, "image_id": 3, "skipped": ["x"]}, {"labels": (d,)}])], lambda batch: batch, GPU))
    assert seen == [tensor.data_ptr() for tensor in (a, b, c, d)]
