"""The paper's CIFAR-10 networks on a GPU, an update being one CUDA graph (He et al. 2015, Sec. 4.2).

Batches, augmentation, schedule and run folders are those of tools/train_cifar10.py, without checkpoints: a net takes
minutes. tools/degradation.py --plot-only draws the metrics.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from resbackbone.cli.command import to_config

import torch
import torch.nn.functional as F
from torch import Tensor

from resbackbone.analysis import count_parameters
from resbackbone.atomic import write_atomically
from resbackbone.checks import UserError, require
from resbackbone.cifar import CifarResNet, build_cifar_resnet
from resbackbone.classification import cifar10
from resbackbone.engine.device import arithmetic, use
from resbackbone.engine.distributed import Rank
from resbackbone.engine.optimizers import build_optimizer
from resbackbone.engine.run import Run
from resbackbone.engine.state import seed_step
from resbackbone.tools import train_cifar10
from resbackbone.tools.benchmarks.networks import as_graph
from resbackbone.tools.gpu_checks.record import Record, Setting
from resbackbone.tools.gpu_checks.runs import NEEDED

NETS = ("resnet-20", "plain-20", "resnet-56", "plain-56", "resnet-110", "resnet-32", "resnet-44")
STRETCH = 500  # updates between two transfers of batches and metrics
TESTS = 16  # per run, evenly spaced


class Updates:
    """A network's updates on batches that lie on the device; on a GPU each is the replay of a graph.

    An update reads its images and crops from row `place` of tables and increments `place`, so a replay needs nothing
    from the host. A graph holds one learning rate: another rate needs another graph.
    """

    def __init__(self, model: CifarResNet, optimizer: torch.optim.Optimizer, data: cifar10.Split, mean_image: Tensor):
        self.model, self.optimizer, self.mean_image, self.device = model, optimizer, mean_image, mean_image.device
        self.images, self.labels = (tensor.to(self.device) for tensor in data)
        self.place = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.losses, self.wrong = torch.zeros(2, STRETCH, device=self.device)
        self.tables: list[Tensor] = []
        self.replay: Callable[[], None] | None = None

    def fill(self, *values: Tensor) -> None:
        """Set the next n updates: image indices, int64 [n, batch], and `cifar10.crop` arguments, [n, batch, 1]."""
        if not self.tables:
            self.tables = [v.new_zeros((STRETCH, *v.shape[1:]), device=self.device) for v in values]
        for table, new in zip(self.tables, values, strict=True):
            table[: len(new)].copy_(new)
        self.place.zero_()

    def run(self, count: int, rate: float) -> None:
        """Make `count` updates at this learning rate."""
        if self.optimizer.param_groups[0]["lr"] != rate:
            self.optimizer.param_groups[0]["lr"], self.replay = rate, None
        if self.device.type == "cuda" and self.replay is None:
            first = 0 if self.optimizer.state else min(3, count)
            self.replay = as_graph(self._update, self.model, warm_up=first)
            count -= first
        for _ in range(count):
            (self.replay or self._update)()

    def _update(self) -> None:
        indices, *crops = (table.index_select(0, self.place)[0] for table in self.tables)
        images = cifar10.crop(cifar10.to_model_input(self.images[indices], self.mean_image), *crops)
        labels = self.labels[indices]
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.model(images)
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        self.optimizer.step()
        wrong = (logits.detach().argmax(1) != labels).float().mean()
        self.losses.index_copy_(0, self.place, loss.detach()[None])
        self.wrong.index_copy_(0, self.place, wrong[None])
        self.place += 1


def drawn(draw: tuple[list[int], torch.Generator]) -> tuple[Tensor, ...]:
    """A batch's image indices, int64 [batch], and their crops."""
    indices, random = draw
    return torch.tensor(indices), *cifar10.draw_crops(len(indices), random)


def train(options: train_cifar10.Options, folder: Path, data: cifar10.Cifar10, *, until: float) -> dict:
    """Train one net in `folder`; returns {"error", "seconds", "updates"}.

    Training stops early, with an error of None, if it would not end by `until`, in time.monotonic(). Raises ValueError
    if the loss is not finite.
    """
    device = torch.device(options.device)
    use(device)
    seed_step(options.seed, 0, 0)
    network = {"depth": options.depth, "shortcut": train_cifar10.shortcut_of(options), "num_classes": len(data.classes)}
    model = build_cifar_resnet(**network).to(device).to(memory_format=torch.channels_last).train()
    schedule, rank = train_cifar10.schedule_of(options), Rank(0, 1, device)
    optimizer = build_optimizer(
        model, "sgd", rate=schedule.rate, weight_decay=train_cifar10.WEIGHT_DECAY, decay_norms=True
    )
    task = train_cifar10.Cifar10Task(options, data, model, rank)
    updates = Updates(model, optimizer, data.train, task.mean_image.to(device))
    draws = cifar10.draws(len(data.train.labels), batch_size=options.batch_size, seed=options.seed)
    effective = {**asdict(schedule), "milestones": list(schedule.milestones), **arithmetic(device)}
    effective["train_set_sha256"] = data.fingerprint()
    run = Run(folder, {**to_config(replace(options, output=None)), "effective": effective})
    rates = [schedule.learning_rate(step) for step in range(schedule.steps)]
    changes = [step for step in range(1, schedule.steps) if rates[step] != rates[step - 1]]
    tests = {round(i * schedule.steps / TESTS) for i in range(1, TESTS + 1)}
    step, began, results = 0, time.monotonic(), {"error": None}
    try:
        for end in sorted({*range(STRETCH, schedule.steps, STRETCH), *changes, *tests}):
            started = time.monotonic()
            updates.fill(*map(torch.stack, zip(*(drawn(next(draws)) for _ in range(end - step)), strict=True)))
            waited = time.monotonic() - started
            updates.run(end - step, rates[step])
            loss, wrong = (values[: end - step].mean().item() for values in (updates.losses, updates.wrong))
            if not loss < float("inf"):
                raise UserError(f"{folder.name}: the loss is {loss} after {end} updates")
            seconds = (time.monotonic() - started) / (end - step)
            line = {"loss": loss, "loss_class": loss, "train_error": wrong, "lr": rates[step], "seconds": seconds}
            line |= {"data_seconds": waited / (end - step), "images_per_second": options.batch_size / seconds}
            run.record(end, line)
            step = end
            if step in tests:
                started = time.monotonic()
                results = task.evaluate(final=False)
                run.record(step, {**results, "seconds": time.monotonic() - started}, kind="eval")
            now = time.monotonic()
            if step >= 3 * STRETCH and now + (now - began) / step * (schedule.steps - step) > until:
                return {"error": None, "seconds": now - began, "updates": step}
        task.save(folder)
        content = {**results, **network, "parameters": count_parameters(model), "steps": step}
        write_atomically(folder / "results.json", json.dumps(content, indent=2) + "\n")
    finally:
        run.close()
    return {"error": results["error"], "seconds": time.monotonic() - began, "updates": step}


def experiment(setting: Setting, record: Record) -> None:
    """ResNet-20, and as many of the other NETS as fit into the minutes."""
    require("train", *NEEDED, user="this part")
    until = time.monotonic() + 60 * setting.minutes
    small = {"steps": 24, "batch_size": 8} if setting.quick else {}
    names = NETS[:2] if setting.quick else NETS
    nets = [
        train_cifar10.complete(
            train_cifar10.Options(
                data=Path(setting.data),
                depth=int(name.partition("-")[2]),
                plain=name.startswith("plain"),
                device=setting.device,
                precision="fp32",
                **small,
            )
        )
        for name in names
    ]
    data = cifar10.open_cifar10(nets[0].data)
    record.row("images", data.summary())
    for name, options in zip(names, nets, strict=True):
        if time.monotonic() > until:
            record.row(name, "no time left")
            continue
        found = train(options, setting.output / "cifar" / name, data, until=until)
        took = f"{found['updates']:,} updates in {found['seconds']:.0f} s"
        stopped = f"stopped after {took}: it would not finish within --minutes"
        record.row(name, stopped if found["error"] is None else f"test error {100 * found['error']:.2f} %, {took}")
