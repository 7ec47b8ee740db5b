"""The interface between a training command and the loop: a command implements `Task`, `loop.train` calls it."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn


class Task(ABC):
    """Data, losses, evaluation and files of one kind of training. `batches` decides what a batch is."""

    @abstractmethod
    def batches(self, start: int) -> Iterator[Any]:
        """Endless batches for this rank, on its device, from update `start` on."""

    def parts(self, batch: Any) -> Sequence[Any]:
        """The batch split into parts of equal size, whose gradients are accumulated."""
        return [batch]

    @abstractmethod
    def losses(self, model: nn.Module, part: Any) -> Mapping[str, Tensor]:
        """The loss terms (scalars) of a part; called under autocast."""

    def after_update(self, batch: Any, step: int) -> Mapping[str, float]:
        """Called after every update. The numbers returned, with the same names every time, join the metrics."""
        return {}

    def bad_batch(self, batch: Any) -> tuple[Mapping[str, Tensor], str]:
        """For a batch whose loss is not finite: the tensors to save, and a name for its images: "images 7, 9"."""
        return dict(zip(("images", "labels"), batch, strict=True)), "its images"

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the network's files into a checkpoint's folder."""

    @abstractmethod
    def evaluate(self, *, final: bool) -> Mapping[str, Any]:
        """Evaluate on all ranks; the result, the same on each, becomes a line of metrics."""

    @abstractmethod
    def summary(self, result: Mapping[str, Any]) -> str:
        """An evaluation's result in a few words."""

    @abstractmethod
    def write_report(self, folder: Path) -> None:
        """Write the run's report, with the last evaluation if there was one; called on rank 0."""
