"""What changes while training, in one place: the network, the optimizer, the step; one update, and its checkpoint."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from resbackbone.checks import UserError
from resbackbone.engine.distributed import Rank, any_rank
from resbackbone.engine.stopwatch import Stopwatch


class NonFinite(ValueError):
    """A loss term or a gradient is not finite, on this rank (`terms` names it) or on another; no weight has changed."""

    def __init__(self, step: int, terms: str):
        super().__init__(f"step {step} is not finite: {terms or 'on another rank'}")
        self.step, self.terms = step, terms


class TrainState:
    """`model` as it trains (wrapped or not), its `optimizer`, and the number of updates done.

    `scaled` is for fp16, which holds no small gradients: the loss is multiplied by a factor that is halved whenever a
    gradient overflows, and the weights are left alone in that update (Micikevicius et al. 2018; torch.amp.GradScaler).

    After an update, `gradient_norm` is the length of its gradient before clipping (the last that was finite), and
    `stopping` whether any rank wished to stop. `stopwatch` has the seconds of the updates' forward, backward and
    optimizer, which is all that follows on a backward: checks, clipping and the step.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        rank: Rank,
        *,
        clip_grad: float | None = None,
        scaled: bool = False,
    ):
        self.model, self.optimizer, self.rank, self.clip_grad = model, optimizer, rank, clip_grad
        self.step, self.gradient_norm, self.stopping = 0, 0.0, False
        self.scaler = torch.amp.GradScaler(rank.device.type, enabled=scaled)
        self.stopwatch = Stopwatch(rank.device)

    def update(
        self,
        losses_of: Callable[[Any], Mapping[str, Tensor]],
        parts: Sequence[Any],
        *,
        learning_rate: float,
        stop: bool = False,
    ) -> dict[str, float]:
        """One update from the mean over `parts` of the sum of their losses (scalars); returns the means as floats.

        Gradients of several parts are accumulated, and exchanged between the ranks with the last. `stop` is this
        rank's wish to stop after the update. Raises NonFinite on every rank, before any weight has changed, if a
        loss term is not finite on any, or the gradient (`scaled`: even where the loss's factor is 1).
        """
        self.stopwatch.start()
        self.optimizer.zero_grad(set_to_none=True)
        terms: list[dict[str, Tensor]] = []
        for i, part in enumerate(parts):
            with self._exchanging(i == len(parts) - 1):
                losses = losses_of(part)
                terms.append({name: loss.detach().float() for name, loss in losses.items()})
                total = cast(Tensor, sum(losses.values()) / len(parts))
                self.stopwatch.lap("forward")
                self.scaler.scale(total).backward()
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
        self.stopwatch.lap("optimizer")
        self.step += 1
        return mean_of(values)

    def _exchanging(self, exchanges: bool):
        if isinstance(self.model, nn.parallel.DistributedDataParallel) and not exchanges:
            return self.model.no_sync()
        return nullcontext()

    def _checked(self, terms: Sequence[Mapping[str, Tensor]], norm: Tensor, stop: bool) -> list[dict[str, float]]:
        """The terms as floats, if all ranks have finite ones and a finite gradient; the only wait for a GPU."""
        losses = torch.stack([value for part in terms for value in part.values()])
        flags = [~losses.isfinite().all(), ~norm.isfinite(), torch.full_like(norm, stop, dtype=torch.bool)]
        numbers = torch.cat([losses, norm.float()[None], any_rank(torch.stack(flags), self.rank).float()])
        *values, length, bad_loss, bad_gradient, stopping = numbers.tolist()
        self.stopping, following = bool(stopping), iter(values)
        floats = [{name: next(following) for name in part} for part in terms]
        if bad_loss:  # on some rank; the gradient of all of them is not finite then
            wrong = [f"{name} is {v}" for part in floats for name, v in part.items() if not math.isfinite(v)]
            raise NonFinite(self.step, ", ".join(wrong))
        if not bad_gradient:
            self.gradient_norm = length
        elif not self.scaler.is_enabled() or self.scaler.get_scale() <= 1:
            names = ", ".join(self._wrong_gradients()) or "all weights together"
            raise NonFinite(self.step, f"the gradient of {names}")
        return floats

    def _wrong_gradients(self) -> list[str]:
        model = self.model.module if isinstance(self.model, nn.parallel.DistributedDataParallel) else self.model
        named = [(n, p.grad) for n, p in model.named_parameters() if p.grad is not None]
        wrong = [name for name, gradient in named if not gradient.isfinite().all()]
        return [*wrong[:3], *([f"{len(wrong) - 3} more"] if len(wrong) > 3 else [])]

    @property
    def nbytes(self) -> int:
        """Of a checkpoint: the model's tensors and the optimizer's."""
        held = [value for state in self.optimizer.state.values() for value in state.values()]
        tensors = [*self.model.parameters(), *self.model.buffers(), *(v for v in held if isinstance(v, Tensor))]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

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
        described["scaler"] = self.scaler.state_dict()  # {} if it scales nothing
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
                        raise UserError(f"{key} is {list(value.shape)}, the parameter {list(parameter.shape)}")
                    # in the parameter's memory layout, in which it was: sums over it (LAMB's norms) depend on that
                    value = torch.empty_like(parameter, dtype=value.dtype, device="cpu").copy_(value)
                state.setdefault(int(index), {})[name] = value
            self.optimizer.load_state_dict({"state": state, "param_groups": described["param_groups"]})
            if self.scaler.is_enabled():
                self.scaler.load_state_dict(described["scaler"])
            self.step = described["step"]
        except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
            raise UserError(f"checkpoint {folder}: cannot be read ({error})") from None


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
