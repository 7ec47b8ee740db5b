"""The interface between a training command and the loop: a command implements `Task`, `loop.train` calls it."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn


class Task(ABC):
    """Data, losses, evaluation and files of one kind of training. `batches` decides what a batch is.

    `final_differs`: the final evaluation is made in another way than those on the way, and is not compared with them.
    """

    final_differs = False

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
    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the files of a network, the trained one or its average, into a folder."""

    @abstractmethod
    def evaluate(self, model: nn.Module, *, final: bool) -> Mapping[str, Any]:
        """Evaluate a network on all ranks; the result, the same on each, becomes a line of metrics."""

    def score(self, result: Mapping[str, Any]) -> float | None:
        """The score by which evaluations are compared: higher is better. None: this one is not compared."""
        return None

    @abstractmethod
    def summary(self, result: Mapping[str, Any]) -> str:
        """An evaluation's result in a few words."""

    @abstractmethod
    def write_report(self, folder: Path) -> None:
        """Write the run's report, with the last evaluation if there was one; called on rank 0."""
