"""What an update pays for the size of its data: drawing batches from an index of a thousand to a million images."""

from itertools import islice

import numpy as np

from benchmarks.contest import OWN, Contender
from detection.sampler import TrainBatches

SIZES = (1_000, 10_000, 100_000, 1_000_000)  # images
NAMES = tuple(f"{OWN}, {size:,} images" for size in SIZES)
BATCHES, BATCH_SIZE = 1000, 16
PORTRAIT = 0.27  # of the images; the rest are landscape


class Index:
    """All that the sampler asks of a data set: int32 [images, 2], widths and heights in pixels."""

    def __init__(self, images: int):
        portrait = np.random.default_rng(0).random(images) < PORTRAIT
        self.widths_heights = np.where(portrait[:, None], [480, 640], [640, 480]).astype(np.int32)


def drawing(name: str) -> Contender:
    """The first BATCHES batches, from the first update on: with what is done once an epoch."""
    index = Index(dict(zip(NAMES, SIZES, strict=True))[name])

    def run() -> dict:
        batches = iter(TrainBatches(index, batch_size=BATCH_SIZE, seed=0))
        for _ in islice(batches, BATCHES):
            pass
        return {"batches": batches}  # so that what it holds counts

    return Contender(run, check=dict)  # the batches differ, as the data do
