"""Which images make up which batch: a function of the seed and the step alone, the same for any number of ranks."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from detection.coco import CocoImages, Draw


class TrainBatches(Sampler):
    """Endless batches of `Draw`s, each of landscape or of portrait images only, so that little padding is computed.

    Every image is drawn once an epoch, in an order of its own. A batch of all ranks together holds `batch_size`
    images; rank r of n takes every n-th of it. It starts at batch `start`, so a resumed run goes on with the batch
    that would have come next.
    """

    def __init__(
        self, dataset: CocoImages, *, batch_size: int, seed: int, rank: int = 0, ranks: int = 1, start: int = 0
    ):
        if batch_size < ranks or batch_size % ranks:
            raise ValueError(f"batch size {batch_size} does not divide evenly over {ranks} processes")
        self.portrait = dataset.widths_heights[:, 0] < dataset.widths_heights[:, 1]
        self.batch_size, self.seed, self.rank, self.ranks, self.start = batch_size, seed, rank, ranks, start

    def __iter__(self) -> Iterator[list[Draw]]:
        waiting: dict[bool, list[Draw]] = {False: [], True: []}
        done, epoch = 0, 0
        while True:
            random = np.random.default_rng((self.seed, epoch))
            order = random.permutation(len(self.portrait))
            seeds = random.integers(0, 2**62, len(order))
            for index, seed in zip(order.tolist(), seeds.tolist(), strict=True):
                group = waiting[bool(self.portrait[index])]
                group.append(Draw(index, seed))
                if len(group) == self.batch_size:
                    done += 1
                    if done > self.start:
                        yield group[self.rank :: self.ranks]
                    group.clear()
            epoch += 1
