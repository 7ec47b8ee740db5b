"""What changes while training, in one place: the network, the optimizer, the step; one update, and its checkpoint."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from resbackbone.training.distributed import Rank, all_agree


class NonFiniteLoss(ValueError):
    """A loss term is not finite, on this rank (`terms` names it) or on another; nothing was updated."""

    def __init__(self, step: int, terms: str):
        super().__init__(f"loss is not finite at step {step}: {terms or 'on another rank'}")
        self.step, self.terms = step, terms


class TrainState:
    """`model` as it trains (wrapped or not), its `optimizer`, and the number of updates done."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, rank: Rank, *, clip_grad: float | None = None
    ):
        self.model, self.optimizer, self.rank, self.clip_grad = model, optimizer, rank, clip_grad
        self.step = 0

    def update(
        self, losses_of: Callable[[Any], Mapping[str, Tensor]], parts: Sequence[Any], *, learning_rate: float
    ) -> dict[str, float]:
        """One update from the mean over `parts` of the sum of their losses (scalars); returns the means as floats.

        Gradients of several parts are accumulated, and exchanged between the ranks with the last. Raises
        NonFiniteLoss on every rank, before anything has changed, if a term is not finite on any.
        """
        self.optimizer.zero_grad(set_to_none=True)
        values = []
        for i, part in enumerate(parts):
            with self._exchanging(i == len(parts) - 1):
                losses = losses_of(part)
                values.append(self._finite(losses))
                (sum(losses.values()) / len(parts)).backward()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad)
        self.optimizer.step()
        self.step += 1
        return mean_of(values)

    def _exchanging(self, exchanges: bool):
        several = isinstance(self.model, nn.parallel.DistributedDataParallel)
        return self.model.no_sync() if several and not exchanges else nullcontext()

    def _finite(self, losses: Mapping[str, Tensor]) -> dict[str, float]:
        numbers = torch.stack([loss.detach().float() for loss in losses.values()]).tolist()  # one wait for the GPU
        values = dict(zip(losses, numbers, strict=True))
        wrong = {name: value for name, value in values.items() if not math.isfinite(value)}
        if not all_agree(not wrong, self.rank):
            raise NonFiniteLoss(self.step, ", ".join(f"{name} is {value}" for name, value in wrong.items()))
        return values

    def save(self, folder: Path) -> None:
        """Write the optimizer's state and the step into `folder`: tensors as safetensors, the rest as JSON."""
        content = self.optimizer.state_dict()
        tensors, plain = {}, {}
        for index, entries in content["state"].items():
            for name, value in entries.items():
                if isinstance(value, Tensor):
                    tensors[f"{index}.{name}"] = value.detach().cpu().contiguous()
                else:
                    plain[f"{index}.{name}"] = value
        save_file(tensors, folder / "optimizer.safetensors")
        described = {"step": self.step, "param_groups": content["param_groups"], "state": plain}
        (folder / "state.json").write_text(json.dumps(described, default=Tensor.item))  # LAMB counts in a tensor

    def load(self, folder: Path) -> None:
        """Take up what `save` wrote. ValueError if it is not whole, or of another network's optimizer."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        try:
            described = json.loads((folder / "state.json").read_text())
            tensors = load_file(folder / "optimizer.safetensors")
            state: dict[int, dict] = {}
            for key, value in {**tensors, **described["state"]}.items():
                index, name = key.split(".", 1)
                parameter = parameters[int(index)]
                if isinstance(value, Tensor) and value.ndim:
                    if value.shape != parameter.shape:
                        raise ValueError(f"{key} is {list(value.shape)}, the parameter {list(parameter.shape)}")
                    # in the parameter's memory layout, in which it was: sums over it (LAMB's norms) depend on that
                    value = torch.empty_like(parameter, dtype=value.dtype, device="cpu").copy_(value)
                state.setdefault(int(index), {})[name] = value
            self.optimizer.load_state_dict({"state": state, "param_groups": described["param_groups"]})
            self.step = described["step"]
        except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
            raise ValueError(f"checkpoint {folder}: cannot be read ({error})") from None


def parameter_groups(model: nn.Module, weight_decay: float, *, decay_norms: bool = True) -> list[dict]:
    """What trains in `model`, for an optimizer; without `decay_norms`, norms and biases are not decayed."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if decay_norms:
        return [{"params": trainable, "weight_decay": weight_decay}]
    return [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make whatever is random in a step a function of these three, so that a resumed run draws alike."""
    torch.manual_seed(((seed * 1_000_003 + step) * 4_099 + rank) % 2**63)  # primes, so that two are hardly alike


def mean_of(records: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each entry over the records, which all have the same ones."""
    records = list(records)
    return {name: sum(record[name] for record in records) / len(records) for name in records[0]}
