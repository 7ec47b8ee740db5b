"""Which images make up each batch, as a function of seed and step alone, for any number of ranks."""

from collections.abc import Iterator
from itertools import count

import numpy as np
from torch.utils.data import Sampler

from detection.coco import CocoImages, ImageRequest
from resbackbone.checks import UserError


class TrainBatches(Sampler):
    """Endless batches of `ImageRequest`s, each all landscape or all portrait, which keeps the padding small.

    Every epoch draws every image once, in its own order; with a `repeat_threshold`, images of rare classes more often
    (`repeat_factors`), the fraction rounded up at its own probability in each epoch. `repeated` is the number of those
    images. The ranks' batches together hold `batch_size` images, of which rank r of n takes every n-th. The first batch
    is number `start`, so a resumed run gets the batches that would have come next.

    Raises UserError if `batch_size` is not divisible by the number of ranks or `repeat_threshold` is not in 0..1.
    """

    def __init__(
        self,
        dataset: CocoImages,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        start: int = 0,
        repeat_threshold: float = 0.0,
    ):
        if batch_size < ranks or batch_size % ranks:
            raise UserError(f"batch size {batch_size}: must be a multiple of {ranks}, the number of processes")
        if not 0 <= repeat_threshold <= 1:
            raise UserError(
                f"repeat threshold {repeat_threshold:g}: must be a share of the images, from 0 to 1, below which a "
                "class is rare (LVIS: 0.001)"
            )
        sizes = np.asarray(dataset.widths_heights)
        self.portrait: list[bool] = (sizes[:, 0] < sizes[:, 1]).tolist()
        self.factors = repeat_factors(dataset, repeat_threshold) if repeat_threshold else np.ones(len(sizes))
        self.repeated = int((self.factors > 1).sum())
        self.batch_size, self.seed, self.rank, self.ranks, self.start = batch_size, seed, rank, ranks, start

    def __iter__(self) -> Iterator[list[ImageRequest]]:
        waiting: dict[bool, list[ImageRequest]] = {False: [], True: []}  # what an epoch leaves over, the next one uses
        number = 0
        for epoch in count():
            random = np.random.default_rng((self.seed, epoch))
            times = self.factors.astype(int)
            if self.repeated:
                times += random.random(len(times)) < self.factors - times
            order = np.repeat(np.arange(len(times)), times)[random.permutation(times.sum())].tolist()
            for draw in zip(order, random.integers(0, 2**62, len(order)).tolist(), strict=True):
                group = waiting[self.portrait[draw[0]]]
                group.append(ImageRequest(*draw))
                if len(group) == self.batch_size:
                    if number >= self.start:
                        yield group[self.rank :: self.ranks]
                    group.clear()
                    number += 1


def repeat_factors(dataset: CocoImages, threshold: float) -> np.ndarray:
    """How often an epoch draws each image, float [n], 1 or more (LVIS; Gupta et al. 2019, Appendix B.2).

    max(1, sqrt(threshold / f)) for a class in a share f of the images; for an image, the largest of its classes'.
    """
    images = np.repeat(np.arange(len(dataset)), np.diff(dataset.offsets.numpy()))  # of each box
    labels, outputs = dataset.labels.numpy(), len(dataset.categories) + 1
    pairs = np.unique(images * outputs + labels)  # a class once an image
    shares = np.bincount(pairs % outputs, minlength=outputs) / len(dataset)
    factors = np.ones(len(dataset))
    np.maximum.at(factors, images, np.sqrt(threshold / shares[labels]))
    return factors
