"""What changes during training: network, optimizer and step; one update; saving and loading them."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from resbackbone.checks import UserError
from resbackbone.engine.distributed import Rank, any_rank
from resbackbone.engine.stopwatch import Stopwatch

AVERAGE = "average.safetensors"


class NonFinite(UserError):
    """A loss term or a gradient is not finite on this rank (`terms` names it) or another. No weight has changed."""

    def __init__(self, step: int, terms: str):
        super().__init__(f"step {step} is not finite: {terms or 'on another rank'}")
        self.step, self.terms = step, terms


class TrainState:
    """`model` (in DDP or not), its `optimizer`, and `step`, the number of updates done.

    `scaled` scales the loss for fp16 by torch.amp.GradScaler: an update whose gradient overflows leaves the weights
    alone and halves the scale. `average` (`average.build_average` of the model without DDP) follows every update.

    After an update, `gradient_norm` is the norm of the last finite gradient before clipping, and `stopping` whether any
    rank asked to stop. `stopwatch` measures forward, backward and optimizer (checks, clipping and step).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        rank: Rank,
        *,
        clip_grad: float | None = None,
        scaled: bool = False,
        average: Any = None,
    ):
        self.model, self.optimizer, self.rank, self.clip_grad = model, optimizer, rank, clip_grad
        self.average = average
        self.step, self.gradient_norm, self.stopping = 0, 0.0, False
        self.scaler = torch.amp.GradScaler(rank.device.type, enabled=scaled)
        self.stopwatch = Stopwatch(rank.device)

    @property
    def network(self) -> nn.Module:
        """The model without DDP."""
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model

    @property
    def evaluated(self) -> nn.Module:
        """The network to evaluate and to keep: the average if there is one."""
        return self.network if self.average is None else self.average.module

    def update(
        self,
        losses_of: Callable[[Any], Mapping[str, Tensor]],
        parts: Sequence[Any],
        *,
        learning_rate: float,
        stop: bool = False,
    ) -> dict[str, float]:
        """Minimize the sum of the losses (scalars), averaged over `parts`; returns each loss's mean as a float.

        Gradients of the parts are accumulated; ranks exchange them with the last part. With `stop`, this rank asks to
        stop after the update. Raises NonFinite on every rank, before any weight changes, if a loss term or the gradient
        is not finite on any of them. When `scaled`, a gradient may overflow until the scale is 1.
        """
        self.stopwatch.start()
        self.optimizer.zero_grad(set_to_none=True)
        terms: list[dict[str, Tensor]] = []
        for i, part in enumerate(parts):
            exchanges = i == len(parts) - 1 or not isinstance(self.model, DistributedDataParallel)
            with nullcontext() if exchanges else self.model.no_sync():  # type: ignore[operator]
                losses = losses_of(part)
                terms.append({name: loss.detach().float() for name, loss in losses.items()})
                total = cast(Tensor, sum(losses.values()) / len(parts))
                self.stopwatch.lap("forward")
                self.scaler.scale(total).backward()
                if i == 0 and len(parts) > 1:
                    own_gradients(self.model)
                self.stopwatch.lap("backward")
        self.scaler.unscale_(self.optimizer)
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        values = self._checked(terms, norm, stop)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.clip_grad is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.clip_grad, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        if self.average is not None:
            self.average.update(self.network, step=self.step)
        self.stopwatch.lap("optimizer")
        return mean_of(values)

    def _checked(self, terms: Sequence[Mapping[str, Tensor]], norm: Tensor, stop: bool) -> list[dict[str, float]]:
        """The loss terms as floats. Raises NonFinite. An update waits for the GPU only here."""
        losses = torch.stack([value for part in terms for value in part.values()])
        flags = [~losses.isfinite().all(), ~norm.isfinite(), torch.full_like(norm, stop, dtype=torch.bool)]
        numbers = torch.cat([losses, norm.float()[None], any_rank(torch.stack(flags), self.rank).float()])
        *values, length, bad_loss, bad_gradient, stopping = numbers.tolist()
        self.stopping, following = bool(stopping), iter(values)
        floats = [{name: next(following) for name in part} for part in terms]
        if bad_loss:
            wrong = [f"{name} is {v}" for part in floats for name, v in part.items() if not math.isfinite(v)]
            raise NonFinite(self.step, ", ".join(wrong))
        if not bad_gradient:
            self.gradient_norm = length
        elif not self.scaler.is_enabled() or self.scaler.get_scale() <= 1:
            names = ", ".join(self._wrong_gradients()) or "all weights together"
            raise NonFinite(self.step, f"the gradient of {names}")
        return floats

    def _wrong_gradients(self) -> list[str]:
        named = [(n.removeprefix("module."), p.grad) for n, p in self.model.named_parameters() if p.grad is not None]
        wrong = [name for name, gradient in named if not gradient.isfinite().all()]
        return [*wrong[:3], *([f"{len(wrong) - 3} more"] if len(wrong) > 3 else [])]

    @property
    def nbytes(self) -> int:
        """Size of a checkpoint: the tensors of model, average and optimizer."""
        state = [value for entries in self.optimizer.state.values() for value in entries.values()]
        tensors = [*self.model.parameters(), *self.model.buffers(), *(v for v in state if isinstance(v, Tensor))]
        if self.average is not None:
            tensors += self.average.module.state_dict().values()
        return sum(tensor.nbytes for tensor in tensors)

    def save(self, folder: Path) -> None:
        """Write optimizer, average and step into `folder`: tensors as safetensors, the rest as JSON."""
        content = self.optimizer.state_dict()
        state = {f"{i}.{name}": value for i, entries in content["state"].items() for name, value in entries.items()}
        tensors = {k: value.detach().cpu().contiguous() for k, value in state.items() if isinstance(value, Tensor)}
        save_file(tensors, folder / "optimizer.safetensors")
        if self.average is not None:
            weights = self.average.module.state_dict()
            save_file({name: tensor.cpu().contiguous() for name, tensor in weights.items()}, folder / AVERAGE)
        described = {
            "step": self.step,
            "param_groups": content["param_groups"],
            "state": {k: value for k, value in state.items() if k not in tensors},
            "scaler": self.scaler.state_dict(),  # {} unless `scaled`
        }
        (folder / "state.json").write_text(json.dumps(described, default=Tensor.item))  # LAMB counts in a tensor

    def load(self, folder: Path) -> None:
        """Load what `save` wrote. Raises ValueError if a file is damaged or is of another network's optimizer."""
        if (folder / AVERAGE).exists() != (self.average is not None):
            was, now = ("without", "with") if self.average is not None else ("with", "without")
            raise UserError(
                f"checkpoint {folder}: is of a run {was} an average of the weights; it cannot be resumed {now} one"
            )
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        try:
            if self.average is not None:
                self.average.module.load_state_dict(load_file(folder / AVERAGE))
            described = json.loads((folder / "state.json").read_text())
            step, scaler = described["step"], described["scaler"]
            state: dict[int, dict] = {}
            for key, value in {**load_file(folder / "optimizer.safetensors"), **described["state"]}.items():
                index, name = key.split(".", 1)
                parameter = parameters[int(index)]
                if isinstance(value, Tensor) and value.ndim:
                    if value.shape != parameter.shape:
                        raise UserError(f"{key} is {list(value.shape)}, the parameter {list(parameter.shape)}")
                    # In the parameter's memory layout: the order of sums over it (LAMB's norms) depends on that.
                    value = torch.empty_like(parameter, dtype=value.dtype, device="cpu").copy_(value)
                state.setdefault(int(index), {})[name] = value
            self.optimizer.load_state_dict({"state": state, "param_groups": described["param_groups"]})
        except (OSError, ValueError, LookupError, TypeError, RuntimeError, SafetensorError) as error:
            reason = error if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            raise UserError(f"checkpoint {folder}: cannot be read ({reason})") from None
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(scaler)
        self.step = step


def own_gradients(network: nn.Module) -> None:
    """Copy the gradients to memory of their own, so that the next backward adds to them.

    Those of a CUDA graph (`mode="reduce-overhead"`) lie in the graph's memory, which the next replay overwrites.
    """
    for parameter in network.parameters():
        if parameter.grad is not None:
            parameter.grad = parameter.grad.clone()


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch as a function of these three, so that a resumed run draws the same numbers."""
    torch.manual_seed(((seed * 1_000_003 + step) * 4_099 + rank) % 2**63)  # primes keep different keys apart


def mean_of(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each entry over records with the same names."""
    return {name: sum(record[name] for record in records) / len(records) for name in records[0]}
