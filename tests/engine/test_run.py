import contextlib
import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from resbackbone.engine.checkpoints import checkpoints
from resbackbone.engine.distributed import Rank
from resbackbone.engine.lock import release_folder
from resbackbone.engine.run import Run, claim_folder, latest_folder, read_yaml
from resbackbone.engine.state import TrainState


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write_a_file(folder):
    (folder / "model.txt").write_text("weights")


def train_state():
    model = torch.nn.Linear(3, 2)
    return TrainState(model, torch.optim.SGD(model.parameters(), 0.1), Rank(0, 1, torch.device("cpu")))


def test_a_run_keeps_its_configuration_and_one_json_object_a_line(tmp_path):
    folder = tmp_path / "runs" / "first"
    config = {"rate": 0.02, "data": None, "levels": ["p2", "p3"], "name": "Füße: [not a list]", "on": "on", "empty": ""}
    run = Run(folder, config)
    run.record(1, {"loss": 0.5, "lr": 0.1})
    run.record(1, {"AP": None, "AP50": 0.25}, kind="eval")
    assert metrics(folder) == [  # there before the run is closed: it may be killed
        {"kind": "train", "step": 1, "loss": 0.5, "lr": 0.1},
        {"kind": "eval", "step": 1, "AP": None, "AP50": 0.25},
    ]
    run.close()
    run.close()  # twice does no harm
    assert read_yaml(folder / "config.yaml") == config
    events = EventAccumulator(str(folder)).Reload()
    assert sorted(events.Tags()["scalars"]) == ["eval/AP50", "train/loss", "train/lr"]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 0.5)]


def test_metrics_after_the_resumed_step_are_forgotten_and_so_is_a_half_written_line(tmp_path):
    run = Run(tmp_path, {})
    for step in (1, 2, 3):
        run.record(step, {"loss": float(step)})
    run.record(2, {"AP": 0.5}, kind="eval")
    run.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 1')  # killed here
    resumed = Run(tmp_path, {}, resumed_step=2)
    resumed.record(3, {"loss": 30.0})
    resumed.close()
    assert [(line["kind"], line["step"], line.get("loss")) for line in metrics(tmp_path)] == [
        ("train", 1, 1.0),
        ("train", 2, 2.0),
        ("train", 3, 30.0),
    ]
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_the_evaluation_of_the_resumed_step_comes_again_and_those_before_stay(tmp_path):
    with contextlib.closing(Run(tmp_path, {})) as run:
        for step in (2, 4):
            run.record(step, {"loss": 1.0})
            run.record(step, {"AP": step / 10}, kind="eval")
    with contextlib.closing(Run(tmp_path, {}, resumed_step=4)) as run:
        run.record(4, {"AP": 0.5}, kind="eval")
    lines = [(line["kind"], line["step"], line.get("AP")) for line in metrics(tmp_path)]
    assert lines == [("train", 2, None), ("eval", 2, 0.2), ("train", 4, None), ("eval", 4, 0.5)]
    kept = metrics(tmp_path)
    Run(tmp_path, {}, resumed_step=4, evaluates_again=False).close()
    assert metrics(tmp_path) == kept


def test_a_rank_that_does_not_write_leaves_no_trace(tmp_path):
    run = Run(tmp_path / "run", {}, writes=False)
    run.record(1, {"loss": 1.0})
    run.save(train_state(), write_a_file)
    run.close()
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_holds_the_model_and_the_state_of_its_step(tmp_path):
    run, state = Run(tmp_path, {}), train_state()
    state.step = 7
    run.save(state, write_a_file)
    run.close()
    [folder] = checkpoints(tmp_path)
    assert folder.name == "step_0000007" and (folder / "model.txt").read_text() == "weights"
    other = train_state()
    other.load(folder)
    assert other.step == 7


def test_without_an_output_the_folder_is_a_new_one_and_the_latest_is_the_last_that_exists(tmp_path):
    wanted = tmp_path / "run"
    assert latest_folder(wanted) == wanted
    for name in ("run", "run-2", "run-3"):
        folder = claim_folder(None, default=wanted)
        assert folder == latest_folder(wanted) == tmp_path / name
        (folder / "config.yaml").touch()  # a folder that stays empty is removed
        release_folder(folder)


@pytest.mark.parametrize(
    "content, reason",
    [
        (None, "cannot be read"),
        (b"a: [1", "not YAML"),
        (b"\xff\xfe\x00", "not YAML"),
        (b"- 1", "must hold options"),
        (b"", "must hold options"),
    ],
)
def test_a_file_that_holds_no_options_is_refused_by_name(tmp_path, content, reason):
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=reason) as error:
        read_yaml(path)
    assert str(path) in str(error.value)
