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
            raise UserError(f"batch size {batch_size} does not divide evenly over {ranks} processes")
        sizes = np.asarray(dataset.widths_heights)
        self.portrait = sizes[:, 0] < sizes[:, 1]
        self.batch_size, self.seed, self.rank, self.ranks, self.start = batch_size, seed, rank, ranks, start

    def __iter__(self) -> Iterator[list[ImageRequest]]:
        # Images left over from an epoch go into the next epoch's batches; with few images they wait several epochs.
        waiting = [np.empty((0, 2), np.int64)] * 2  # landscape and portrait
        skip = self.start
        for epoch in count():
            draws = self._draws(epoch)
            ends, batches = [], []
            for of in (0, 1):
                places = np.flatnonzero(self.portrait[draws[:, 0]] == of)
                before = len(waiting[of])
                group = np.concatenate([waiting[of], draws[places]])
                whole = len(group) // self.batch_size * self.batch_size
                waiting[of] = group[whole:]
                batches.append(group[:whole].reshape(-1, self.batch_size, 2))
                ends.append(places[np.arange(self.batch_size, whole + 1, self.batch_size) - before - 1])
            order = np.argsort(np.concatenate(ends))  # a batch is complete when its last image is drawn
            of_epoch = np.concatenate(batches)
            for which in order[skip:]:
                yield [ImageRequest(*draw) for draw in of_epoch[which, self.rank :: self.ranks].tolist()]
            skip = max(0, skip - len(order))

    def _draws(self, epoch: int) -> np.ndarray:
        """int64 [images, 2]: the epoch's order of the images, and a seed for the augmentation of each."""
        random = np.random.default_rng((self.seed, epoch))
        order = random.permutation(len(self.portrait))
        return np.stack([order, random.integers(0, 2**62, len(order))], axis=1)
