"""The learning rate as a function of the step, and how a schedule follows the batch size."""

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up to `rate`, then a tenth of it at every milestone, or one half cosine down to zero.

    Lengths are in steps (updates). `warmup_factor` is the share of the rate at step 0.
    """

    rate: float
    steps: int
    milestones: tuple[int, ...] = ()
    cosine: bool = False
    warmup_steps: int = 0
    warmup_factor: float = 0.001

    def learning_rate(self, step: int) -> float:
        """The rate of update number `step`, which counts from 0."""
        rate = self.rate
        if step < self.warmup_steps:
            progress = step / self.warmup_steps
            rate *= self.warmup_factor + (1 - self.warmup_factor) * progress
        if self.cosine:
            return rate * 0.5 * (1 + math.cos(math.pi * min(step / self.steps, 1.0)))
        return rate * 0.1 ** sum(step >= milestone for milestone in self.milestones)

    def stretched(self, factor: float) -> "Schedule":
        """The schedule `factor` times as long, if that is more than once, behind the same warm-up."""
        factor = max(factor, 1)
        milestones = tuple(round(milestone * factor) for milestone in self.milestones)
        return replace(self, steps=round(self.steps * factor), milestones=milestones)

    def for_batch(self, batch_size: int, stated_for: int, *, scale_rate: bool = True) -> "Schedule":
        """The schedule for another batch size: rate times k, steps by k, k = batch_size / stated_for.

        The linear scaling rule of Goyal et al. 2017 (Sec. 2.1): the same number of images is seen. It holds for
        SGD; for others `scale_rate=False` leaves the rate.
        """
        k = batch_size / stated_for
        return replace(
            self,
            rate=self.rate * k if scale_rate else self.rate,
            steps=max(1, round(self.steps / k)),
            milestones=tuple(round(milestone / k) for milestone in self.milestones),
            warmup_steps=round(self.warmup_steps / k),
        )
