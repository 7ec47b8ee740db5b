"""Which images make up each batch: a function of the seed and the step, the same for any number of ranks."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from detection.coco import CocoImages, ImageRequest
from resbackbone.checks import UserError


class TrainBatches(Sampler):
    """Endless batches of `ImageRequest`s, each all landscape or all portrait, which keeps the padding small.

    Every image is drawn once an epoch, each epoch in another order. The ranks' batches together hold `batch_size`
    images; rank r of n takes every n-th. The first batch is number `start`, so resumed runs get the batches that would
    have come next. Raises UserError if `batch_size` does not divide by the number of ranks.
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
        counts = np.bincount(self.portrait, minlength=2)  # landscape and portrait images
        epoch = self._epoch_of(self.start, counts)
        skip = self.start - self._batches_before(epoch, counts)
        # An epoch's left-over images go into the next epoch's batches; with few images they wait for several epochs.
        waiting = [self._left_over(epoch, counts, of) for of in (0, 1)]
        while True:
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
            epoch, skip = epoch + 1, 0

    def _draws(self, epoch: int) -> np.ndarray:
        """int64 [images, 2]: the epoch's order of the images, and a seed for the augmentation of each."""
        random = np.random.default_rng((self.seed, epoch))
        order = random.permutation(len(self.portrait))
        return np.stack([order, random.integers(0, 2**62, len(order))], axis=1)

    def _batches_before(self, epoch: int, counts: np.ndarray) -> int:
        return sum(epoch * int(count) // self.batch_size for count in counts)

    def _epoch_of(self, batch: int, counts: np.ndarray) -> int:
        """The epoch in which this batch, counted from 0, is completed."""
        epoch = batch * self.batch_size // len(self.portrait)
        while self._batches_before(epoch + 1, counts) <= batch:
            epoch += 1
        return epoch

    def _left_over(self, epoch: int, counts: np.ndarray, of: int) -> np.ndarray:
        """The draws of one orientation from earlier epochs that are in no batch yet when this epoch starts."""
        missing = epoch * int(counts[of]) % self.batch_size
        parts = [np.empty((0, 2), np.int64)]
        while missing > 0:
            epoch -= 1
            draws = self._draws(epoch)
            parts.append(draws[self.portrait[draws[:, 0]] == of][-missing:])
            missing -= len(parts[-1])
        return np.concatenate(parts[::-1])
