"""What is trained: a command fills in a `Task`, and `loop.train` calls it."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn


class Task(ABC):
    """Data, losses, evaluation and files of one kind of training. A batch is whatever `batches` yields."""

    @abstractmethod
    def batches(self, start: int) -> Iterator[Any]:
        """Endless batches of this rank, on its device, from update `start` on."""

    def parts(self, batch: Any) -> Sequence[Any]:
        """Parts of equal size that a batch goes through the network in; their gradients are accumulated."""
        return [batch]

    @abstractmethod
    def losses(self, model: nn.Module, part: Any) -> Mapping[str, Tensor]:
        """The loss terms (scalars) of a part; called under autocast."""

    def after_update(self, batch: Any, step: int) -> Mapping[str, float]:
        """Called after every update. The numbers it returns, under the same names each time, are metrics too."""
        return {}

    @abstractmethod
    def bad_batch(self, batch: Any) -> tuple[Mapping[str, Tensor], str]:
        """For a batch whose loss is not finite: the tensors to save, and what names its images: "images 7, 9"."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the network's files into a checkpoint's folder."""

    @abstractmethod
    def evaluate(self, *, final: bool) -> Mapping[str, Any]:
        """Evaluate on all ranks; the result, the same on each, becomes a line of metrics."""

    @abstractmethod
    def summary(self, result: Mapping[str, Any]) -> str:
        """The result in a few words."""

    @abstractmethod
    def write_report(self, folder: Path) -> None:
        """Write the run's report, with the last evaluation if there was one; called on rank 0."""
