"""Which images make up each batch, as a function of seed and step alone, for any number of ranks."""

from collections.abc import Iterator
from itertools import count

import numpy as np
from torch.utils.data import Sampler

from detection.coco import CocoImages, ImageRequest
from resbackbone.checks import UserError


class TrainBatches(Sampler):
    """Endless batches of `ImageRequest`s, each all landscape or all portrait, which keeps the padding small.

    Every epoch draws every image once, in its own order. The ranks' batches together hold `batch_size` images, of which
    rank r of n takes every n-th. The first batch is number `start`, so a resumed run gets the batches that would have
    come next. Raises UserError if `batch_size` is not divisible by the number of ranks.
    """

    def __init__(
        self, dataset: CocoImages, *, batch_size: int, seed: int, rank: int = 0, ranks: int = 1, start: int = 0
    ):
        if batch_size < ranks or batch_size % ranks:
            raise UserError(f"batch size {batch_size}: must be a multiple of {ranks}, the number of processes")
        sizes = np.asarray(dataset.widths_heights)
        self.portrait: list[bool] = (sizes[:, 0] < sizes[:, 1]).tolist()
        self.batch_size, self.seed, self.rank, self.ranks, self.start = batch_size, seed, rank, ranks, start

    def __iter__(self) -> Iterator[list[ImageRequest]]:
        waiting: dict[bool, list[ImageRequest]] = {False: [], True: []}  # what an epoch leaves over, the next one uses
        number = 0
        for epoch in count():
            random = np.random.default_rng((self.seed, epoch))
            order = random.permutation(len(self.portrait)).tolist()
            for draw in zip(order, random.integers(0, 2**62, len(order)).tolist(), strict=True):
                group = waiting[self.portrait[draw[0]]]
                group.append(ImageRequest(*draw))
                if len(group) == self.batch_size:
                    if number >= self.start:
                        yield group[self.rank :: self.ranks]
                    group.clear()
                    number += 1
