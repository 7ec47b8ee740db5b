"""An experiment tracker that a run's configuration and metrics also go to: Weights & Biases or MLflow."""

import os
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from resbackbone.checks import UserError, one_of

TRACKERS = ("wandb", "mlflow")
PROJECT = "resbackbone"  # unless WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME names another
HINTS = {
    "wandb": "WANDB_MODE=offline needs no account",
    "mlflow": "MLFLOW_TRACKING_URI names the server or a folder",
}


def check_tracker(name: str | None) -> None:
    """Raise ValueError if the tracker is unknown or not installed."""
    if name is not None and find_spec(one_of("tracker", name, TRACKERS)) is None:
        raise UserError(f"{name}: is not installed; pip install {name} (TensorBoard's events are written without it)")


def open_tracker(
    name: str, folder: Path, config: Mapping[str, Any]
) -> tuple[Callable[[int, Mapping[str, float]], object], Callable[[], object]]:
    """Start the tracker's run for a run's folder, or continue it; returns log(step, values) and its end.

    Servers, keys and offline modes are set by the trackers' own variables: WANDB_MODE, MLFLOW_TRACKING_URI, ..
    Raises ValueError if it cannot start.
    """
    try:
        return _start(name, folder, config)
    except Exception as error:  # no key, no server, ..: each tracker has exceptions of its own
        why = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"tracker {name}: cannot start ({why}); {HINTS[name]}") from None


def _start(
    name: str, folder: Path, config: Mapping[str, Any]
) -> tuple[Callable[[int, Mapping[str, float]], object], Callable[[], object]]:
    named = folder / f"{name}_run.txt"  # a resumed run continues the same one
    known = named.read_text() if named.exists() else None
    if name == "wandb":
        import wandb

        project = os.environ.get("WANDB_PROJECT", PROJECT)
        tracked = wandb.init(project=project, name=folder.name, dir=folder, id=known, resume="allow")
        tracked.config.update(dict(config), allow_val_change=True)
        tracked.define_metric("*", step_metric="step")  # wandb's own steps cannot go back, as a resumed run's do
        named.write_text(tracked.id)
        return lambda step, values: tracked.log({"step": step, **values}), tracked.finish
    import mlflow

    if "MLFLOW_EXPERIMENT_NAME" not in os.environ:
        mlflow.set_experiment(PROJECT)
    identity = mlflow.start_run(run_id=known, run_name=folder.name).info.run_id
    if known is None:  # parameters cannot change
        mlflow.log_params(_flat(config))
    named.write_text(identity)
    return lambda step, values: mlflow.log_metrics(dict(values), step=step), mlflow.end_run


def _flat(config: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= _flat(value, f"{above}{name}.") if isinstance(value, Mapping) else {f"{above}{name}": value}
    return flat
