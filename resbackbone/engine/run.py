"""A run's folder: configuration, metrics, TensorBoard events, and checkpoints to resume from."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import yaml

from resbackbone.atomic import remove_unfinished, write_atomically
from resbackbone.checks import UserError
from resbackbone.engine.checkpoints import save_checkpoint
from resbackbone.engine.lock import lock_folder, release_folder
from resbackbone.engine.metrics import read_metrics
from resbackbone.engine.state import TrainState
from resbackbone.engine.tracking import open_tracker

CLOCK = {  # metrics that differ between equal runs
    *("seconds", "data_seconds", "forward_seconds", "backward_seconds", "optimizer_seconds"),
    *("images_per_second", "memory_mib"),
}


class Run:
    """The folder of one training run, which only one process writes (rank 0: `writes`; see `lock_folder`).

    It holds `config.yaml`, the run's whole configuration; `metrics.jsonl`, one JSON object a line, and the same for
    TensorBoard in `events.out.tfevents.*`; the last three `checkpoints/step_NNNNNNN/`; and `best/` if it `keeps_best`
    (see `best.keep_if_best`). A resumed run drops the metrics after `resumed_step` and, if it `evaluates_again` there,
    that step's evaluation. A `tracker` ("wandb" or "mlflow") gets the metrics and the configuration too; `warn` gets a
    line if it fails.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        config: Mapping,
        *,
        resumed_step: int = 0,
        evaluates_again: bool = True,
        writes: bool = True,
        tracker: str | None = None,
        warn: Callable[[str], object] = print,
    ):
        self.folder, self.writes, self._warn = Path(folder), writes, warn
        self.keeps_best = self.is_cut = False  # `loop.train` sets them; `is_cut`: see `loop.Plan.cuts`
        self.evaluated: tuple[int, Mapping] | None = None  # step and result of this process's last evaluation
        self._track: Callable[[int, Mapping[str, float]], object] | None = None
        self._end_tracking: Callable[[], object] = lambda: None
        self._events: Any = None  # TensorBoard's SummaryWriter, where this process writes
        if not writes:
            return
        lock_folder(self.folder)
        remove_unfinished(self.folder)
        remove_unfinished(self.folder / "checkpoints")
        if tracker is not None:  # before config.yaml, which makes the folder a run's: it may fail
            self._track, self._end_tracking = open_tracker(tracker, self.folder, config)
        write_atomically(self.folder / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))
        path, kept = self.folder / "metrics.jsonl", []
        if path.exists():
            last = {"train": resumed_step, "eval": resumed_step - evaluates_again}
            kept = [line for line in read_metrics(self.folder) if line["step"] <= last.get(line.get("kind", ""), 0)]
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._metrics = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed in close()
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only rank 0 needs it

        self._events = SummaryWriter(str(self.folder), purge_step=resumed_step + 1 if resumed_step else None)

    def record(self, step: int, values: Mapping[str, float | None], *, kind: str = "train") -> None:
        """Append a line to the metrics, and its numbers to TensorBoard under `kind/`; `kind` is "train" or "eval"."""
        if not self.writes:
            return
        try:
            self._metrics.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self._metrics.flush()
            numbers = {
                f"{kind}/{name}": value
                for name, value in values.items()
                if isinstance(value, int | float) and not isinstance(value, bool)
            }
            for name, value in numbers.items():
                self._events.add_scalar(name, value, step)
        except OSError as error:
            raise UserError(f"metrics of step {step}: cannot be written to {self.folder} ({error.strerror})") from None
        if self._track is not None:
            try:
                self._track(step, numbers)
            except Exception as error:  # noqa: BLE001 - a server that fails must not end a training
                self._warn(f"the tracker failed at step {step} and gets no more: {' '.join(str(error).split())}")
                self._track = None

    def save(self, state: TrainState, write_model: Callable[[Path], None]) -> None:
        """Write a checkpoint: the files of `write_model(folder)` and the state."""
        if not self.writes:
            return

        def write(folder: Path) -> None:
            write_model(folder)
            state.save(folder)

        os.fsync(self._metrics.fileno())
        save_checkpoint(self.folder, state.step, write, nbytes=state.nbytes)

    def close(self) -> None:
        if self._events is not None:
            self._events.close()
            self._metrics.close()
            self._events = None
            self._end_tracking()
            release_folder(self.folder)


def read_yaml(path: str | os.PathLike) -> dict:
    """Read a YAML file of `name: value` lines, such as config.yaml. Raises ValueError if it is anything else."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold options as lines `name: value`")
    return content


def claim_folder(output: Path | None, *, default: Path) -> Path:
    """Lock a run's folder and return it: `output`, or the first of `default`, `default-2`, .. that does not exist.

    Raises ValueError if another process writes to it.
    """
    folder = output or next(folder for folder in _numbered(default) if not folder.exists())
    lock_folder(folder)
    return folder


def latest_folder(default: Path) -> Path:
    """The last of `default`, `default-2`, .. that exists, or else `default`."""
    return [default, *takewhile(Path.exists, _numbered(default))][-1]


def _numbered(default: Path) -> Iterator[Path]:
    yield default
    yield from (default.with_name(f"{default.name}-{number}") for number in count(2))
