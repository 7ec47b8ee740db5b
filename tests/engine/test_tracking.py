import sys
from types import SimpleNamespace

import pytest

from resbackbone.checks import UserError
from resbackbone.engine.lock import release_folder
from resbackbone.engine.run import Run
from resbackbone.engine.tracking import check_tracker

CONFIG = {"depth": 18, "effective": {"rate": 0.1}}


def wandb_of(calls):
    """Stands in for wandb, and notes what it is called with."""

    def init(**options):
        calls.append(("init", options["project"], options["name"], options["id"]))
        return SimpleNamespace(
            id="an-id",
            config=SimpleNamespace(update=lambda config, allow_val_change: calls.append(("config", config))),
            define_metric=lambda *names, step_metric: None,
            log=lambda values: calls.append(("log", values)),
            finish=lambda: calls.append(("finish",)),
        )

    return SimpleNamespace(init=init)


def mlflow_of(calls):
    def start_run(run_id, run_name):
        calls.append(("init", "resbackbone", run_name, run_id))
        return SimpleNamespace(info=SimpleNamespace(run_id="an-id"))

    return SimpleNamespace(
        set_experiment=lambda name: None,
        start_run=start_run,
        log_params=lambda params: calls.append(("config", params)),
        log_metrics=lambda values, step: calls.append(("log", {"step": step, **values})),
        end_run=lambda: calls.append(("finish",)),
    )


@pytest.mark.parametrize(
    "name, stub, config, again",
    [
        ("wandb", wandb_of, CONFIG, [("config", CONFIG)]),
        ("mlflow", mlflow_of, {"depth": 18, "effective.rate": 0.1}, []),  # its parameters cannot change
    ],
)
def test_a_tracker_gets_configuration_and_metrics_and_a_resumed_run_goes_on_in_it(
    tmp_path, monkeypatch, name, stub, config, again
):
    calls, folder = [], tmp_path / "mine"
    monkeypatch.setitem(sys.modules, name, stub(calls))
    for step in (1, 2):
        run = Run(folder, CONFIG, resumed_step=step - 1, tracker=name)
        run.record(step, {"loss": 0.5, "note": "not a number", "compared": False})
        run.record(step, {"AP": None, "AP50": 0.25}, kind="eval")
        run.close()
    logs = [[("log", {"step": step, "train/loss": 0.5}), ("log", {"step": step, "eval/AP50": 0.25})] for step in (1, 2)]
    assert calls == [
        *[("init", "resbackbone", "mine", None), ("config", config), *logs[0], ("finish",)],
        *[("init", "resbackbone", "mine", "an-id"), *again, *logs[1], ("finish",)],
    ]


def test_a_tracker_that_fails_is_one_line_and_ends_nothing(tmp_path, monkeypatch):
    def log_metrics(values, step):
        raise ConnectionError("no route\nto host")

    stub = mlflow_of([])
    stub.log_metrics = log_metrics
    monkeypatch.setitem(sys.modules, "mlflow", stub)
    said = []
    run = Run(tmp_path, CONFIG, tracker="mlflow", warn=said.append)
    for step in (1, 2):
        run.record(step, {"loss": 0.5})
    run.close()
    assert said == ["the tracker failed at step 1 and gets no more: no route to host"]
    assert (tmp_path / "metrics.jsonl").read_text().count("loss") == 2


@pytest.mark.parametrize("name, hint", [("wandb", "WANDB_MODE=offline"), ("mlflow", "MLFLOW_TRACKING_URI")])
def test_a_tracker_that_cannot_start_is_one_line_and_leaves_no_run_behind(tmp_path, monkeypatch, name, hint):
    def fails(**options):
        raise RuntimeError("No API key\nconfigured")

    stub = mlflow_of([])
    stub.init = stub.start_run = fails
    monkeypatch.setitem(sys.modules, name, stub)
    with pytest.raises(UserError, match=rf"tracker {name}: cannot start \(No API key configured\); {hint}"):
        Run(tmp_path / "run", CONFIG, tracker=name)
    release_folder(tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_an_unknown_tracker_and_one_that_is_not_installed_are_named(monkeypatch):
    monkeypatch.setattr("resbackbone.engine.tracking.find_spec", lambda name: None)
    for name, says in (
        ("comet", "unknown tracker 'comet'; choose from wandb, mlflow"),
        ("mlflow", "pip install mlflow"),
    ):
        with pytest.raises(ValueError, match=says):
            check_tracker(name)
