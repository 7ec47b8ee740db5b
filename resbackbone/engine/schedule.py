"""The learning rate as a function of the step, and its scaling with the batch size."""

import math
from dataclasses import dataclass, replace

from resbackbone.checks import UserError


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up to `rate`, then a division by 10 at every milestone, or a half cosine down to zero.

    Lengths are in steps (updates). The rate at step 0 is `warmup_factor` times that without warm-up.
    """

    rate: float
    steps: int
    milestones: tuple[int, ...] = ()
    cosine: bool = False
    warmup_steps: int = 0
    warmup_factor: float = 0.001

    def __post_init__(self):
        if not (self.steps >= 1 and 0 <= self.rate < math.inf and 0 <= self.warmup_factor <= 1):
            raise UserError(
                f"a schedule needs at least 1 step, a finite rate of at least 0 and a warm-up factor from 0 to 1, not "
                f"{self.steps}, {self.rate:g} and {self.warmup_factor:g}"
            )
        if not 0 <= self.warmup_steps <= self.steps:
            raise UserError(f"a warm-up of {self.warmup_steps} steps: must be at most the schedule's {self.steps}")
        if list(self.milestones) != sorted(self.milestones) or not all(0 <= m <= self.steps for m in self.milestones):
            some = ", ".join(map(str, self.milestones))
            raise UserError(f"milestones {some}: must rise, and be at most the schedule's {self.steps} steps")

    def learning_rate(self, step: int) -> float:
        """The rate of update `step`, counted from 0."""
        rate = self.rate
        if step < self.warmup_steps:
            progress = step / self.warmup_steps
            rate *= self.warmup_factor + (1 - self.warmup_factor) * progress
        if self.cosine:
            return rate * 0.5 * (1 + math.cos(math.pi * min(step / self.steps, 1.0)))
        return rate * 0.1 ** sum(step >= milestone for milestone in self.milestones)

    def of_length(self, steps: int) -> "Schedule":
        """The schedule over `steps`, milestones in proportion. The warm-up stays, but ends within a quarter of them."""
        milestones = tuple(round(milestone * steps / self.steps) for milestone in self.milestones)
        return replace(self, steps=steps, milestones=milestones, warmup_steps=min(self.warmup_steps, steps // 4))

    def for_batch(self, batch_size: int, stated_for: int, *, scale_rate: bool = True) -> "Schedule":
        """The schedule for another batch size: with k = batch_size / stated_for, the rate times k, the steps over k.

        This linear scaling rule (Goyal et al. 2017, Sec. 2.1) holds for SGD; `scale_rate=False` keeps the rate.
        """
        k = batch_size / stated_for
        return replace(
            self,
            rate=self.rate * k if scale_rate else self.rate,
            steps=max(1, round(self.steps / k)),
            milestones=tuple(round(milestone / k) for milestone in self.milestones),
            warmup_steps=round(self.warmup_steps / k),
        )
