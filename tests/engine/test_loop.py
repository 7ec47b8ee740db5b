import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from resbackbone.engine import loop
from resbackbone.engine.average import build_average
from resbackbone.engine.best import read_best
from resbackbone.engine.checkpoints import last_whole_checkpoint
from resbackbone.engine.distributed import Rank
from resbackbone.engine.metrics import read_metrics
from resbackbone.engine.run import CLOCK, Run
from resbackbone.engine.schedule import Schedule
from resbackbone.engine.state import TrainState
from resbackbone.engine.task import Task


class Killed(BaseException):
    pass


class Scripted(Task):
    """A line fitted to noise; its evaluations give known scores by step. It dies at `dies`: (where, step)."""

    def __init__(self, scores, dies=None):
        self.scores, self.dies, self.step = scores, dies, 0

    def batches(self, start):
        for step in range(start, 10**6):
            self.dies_if("train", step)
            yield step

    def dies_if(self, *where):
        if self.dies == where:
            raise Killed

    def parts(self, batch):
        return [batch, batch + 0.5]

    def losses(self, model, part):
        return {"loss_line": (model(torch.randn(4, 3) + part) - 1).square().mean()}

    def save(self, model, folder):
        save_file(model.state_dict(), folder / "model.safetensors")

    def evaluate(self, model, *, final):
        self.step = model.passes.item() // 2
        return {"AP": self.scores[self.step]}

    def score(self, result):
        self.dies_if("score", self.step)
        return result["AP"]

    def summary(self, result):
        return f"AP {result['AP']}"

    def write_report(self, folder):
        self.dies_if("report", self.step)


class Line(nn.Linear):
    """Counts its passes in training, two for each update."""

    def __init__(self):
        super().__init__(3, 1)
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.passes += 1
        return super().forward(x)


SCORES = {1: 0.1, 2: 0.5, 3: 0.3, 4: 0.55, 5: 0.6, 6: 0.6, 7: 0.2, 8: 0.4}


def train(
    folder,
    *,
    dies=None,
    early_stop=0,
    period=1,
    said=print,
    decay=0.5,
    scores=SCORES,
    differs=False,
    log=1,
    steps=8,
):
    """Eight updates in `folder`, or the rest from its last checkpoint; a run that dies leaves the folder as it is."""
    torch.manual_seed(0)
    model, checkpoint = Line(), last_whole_checkpoint(folder)
    if checkpoint is not None:
        model.load_state_dict(load_file(checkpoint / "model.safetensors"))
    average = build_average(model, decay) if decay else None
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    state = TrainState(model, optimizer, Rank(0, 1, torch.device("cpu")), average=average)
    if checkpoint is not None:
        state.load(checkpoint)
    plan = loop.Plan(Schedule(0.01, 8), steps, 8, 0, "fp32", log, 3, period, early_stop)
    again = state.step >= plan.steps or plan.evaluates(state.step)
    run = Run(folder, {"kept": 1}, resumed_step=state.step, evaluates_again=again)
    task = Scripted(scores, dies)
    task.final_differs = differs
    try:
        loop.train(task, state, plan, run, lambda *_: None, said)
        loop.evaluate(task, state, run, final=True)
        task.save(state.evaluated, folder)
    except Killed:
        pass
    finally:
        run.close()


def evaluations(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["AP"]) for line in lines if line["kind"] == "eval"]


def content(folder):
    """Everything that a run leaves, without the clock."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]
        elif path.is_file() and "tfevents" not in name:
            found[name] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def straight(module_path):
    folder = module_path / "straight"
    train(folder)
    return folder


def test_best_holds_the_average_at_the_first_of_the_best_evaluations(straight):
    best = read_best(straight)
    assert (best["step"], best["score"], best["summary"], best["result"]) == (5, 0.6, "AP 0.6", {"AP": 0.6})
    weights = load_file(straight / "best/model.safetensors")
    assert weights["passes"] == 10
    checkpoint = straight / "checkpoints/step_0000006"
    following, raw = (load_file(checkpoint / f"{name}.safetensors") for name in ("average", "model"))
    expected = weights["weight"] * 0.5 + raw["weight"] * 0.5  # the next update of the average
    torch.testing.assert_close(following["weight"], expected)
    assert not torch.equal(following["weight"], raw["weight"])
    last, average = (
        load_file(straight / name)["weight"]
        for name in ("model.safetensors", "checkpoints/step_0000008/average.safetensors")
    )
    assert torch.equal(last, average)


@pytest.mark.parametrize(
    "dies",
    [("train", 1), ("train", 4), ("train", 7)]
    + [(where, step) for where in ("score", "report") for step in (1, 2, 3, 5, 6, 8)],
)
def test_a_run_killed_anywhere_and_resumed_leaves_what_one_left_alone_does_best_and_average_included(
    straight, tmp_path, dies
):
    train(tmp_path, dies=dies)
    assert content(tmp_path) != content(straight)
    train(tmp_path)
    assert content(tmp_path) == content(straight)


def test_a_best_folder_lost_between_two_renames_comes_back(straight, tmp_path):
    train(tmp_path, dies=("report", 5))
    (tmp_path / "best").rename(tmp_path / ".best.1.old.tmp")
    train(tmp_path)
    assert content(tmp_path) == content(straight)


def test_early_stop_ends_after_so_many_evaluations_that_are_not_better_and_stays_ended(straight, tmp_path):
    said = []
    train(tmp_path, early_stop=2, said=said.append)
    assert said[-1] == "stopped early at step 7: 2 evaluations in a row were no better than that of step 5, AP 0.6"
    assert evaluations(tmp_path) == [(step, SCORES[step]) for step in range(1, 8)]  # the final one is not repeated
    assert last_whole_checkpoint(tmp_path).name == "step_0000007"
    before = content(tmp_path)
    for period in (1, 2):  # with 2 it would not be evaluated there again
        train(tmp_path, early_stop=2, period=period, said=said.append)
        assert content(tmp_path) == before | {"metrics.jsonl": content(tmp_path)["metrics.jsonl"]}
        assert said[-1].startswith("stopped early at step 7")
    train(tmp_path, early_stop=3)
    assert read_best(tmp_path) == read_best(straight)
    for file in ("model.safetensors", "checkpoints/step_0000008/average.safetensors"):
        assert (tmp_path / file).read_bytes() == (straight / file).read_bytes()


@pytest.mark.parametrize("dies", [("train", 4), ("report", 5), ("score", 7)])
def test_a_killed_run_stops_where_one_left_alone_stops(tmp_path, dies):
    train(tmp_path / "alone", early_stop=2)
    train(tmp_path / "run", early_stop=2, dies=dies)
    train(tmp_path / "run", early_stop=2)
    assert content(tmp_path / "run") == content(tmp_path / "alone")


@pytest.mark.parametrize("dies", [("train", 3), ("score", 6)])
def test_a_run_that_stops_early_between_two_lines_has_the_metrics_of_every_update(tmp_path, dies):
    options = {"early_stop": 1, "period": 3, "log": 4, "scores": {3: 0.5, 6: 0.4}}
    said = []
    train(tmp_path / "alone", said=said.append, **options)
    assert said[-1] == "stopped early at step 6: 1 evaluation was no better than that of step 3, AP 0.5"
    assert [line["step"] for line in read_metrics(tmp_path / "alone", "train")] == [3, 4, 6]
    train(tmp_path / "run", dies=dies, **options)
    train(tmp_path / "run", **options)
    assert content(tmp_path / "run") == content(tmp_path / "alone")


@pytest.mark.parametrize("differs", [False, True])
@pytest.mark.parametrize("score", [0.1, 0.9])
def test_the_last_evaluation_of_a_run_cut_short_counts_neither_as_best_nor_for_an_early_stop(tmp_path, score, differs):
    options = {"early_stop": 2, "period": 2, "scores": {2: 0.5, 3: score, 4: 0.4, 6: 0.6, 8: 0.3}, "differs": differs}
    train(tmp_path / "alone", **options)
    train(tmp_path / "run", steps=3, **options)
    assert read_best(tmp_path / "run")["step"] == 2
    train(tmp_path / "run", **options)
    assert evaluations(tmp_path / "run") == [(step, options["scores"][step]) for step in (2, 3, 4, 6, 8)]
    for name in ("best/best.json", "best/model.safetensors", "model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_a_final_evaluation_of_another_kind_is_made_and_is_not_compared(tmp_path):
    train(tmp_path, differs=True, scores=SCORES | {8: 0.9})
    assert read_best(tmp_path)["step"] == 5 and evaluations(tmp_path)[-1] == (8, 0.9)


def test_without_evaluations_on_the_way_or_without_a_score_nothing_is_kept(tmp_path):
    train(tmp_path / "final alone", period=0)
    train(tmp_path / "undefined", scores=dict.fromkeys(SCORES, None) | {3: math.nan})
    assert not list(tmp_path.glob("*/best"))


@pytest.mark.parametrize(
    "before, after, says", [(0.5, 0, "with an average .* without one"), (0, 0.5, "without an average .* with one")]
)
def test_a_run_is_not_resumed_with_an_average_it_never_had_or_without_its_own(tmp_path, before, after, says):
    train(tmp_path, decay=before)
    with pytest.raises(ValueError, match=f"step_0000008: is of a run {says}"):
        train(tmp_path, decay=after)


def test_the_time_left_forgets_the_slow_first_updates_and_counts_the_evaluations_to_come():
    pace = loop.Pace(loop.Plan(Schedule(0.01, 1000), 1000, 8, 0, "fp32", 20, 100, 100))
    assert pace.seconds_left(1) == math.inf
    pace.updates.extend([60.0, 5.0, *[0.5] * 7])
    assert pace.seconds_left(10) == 990 * 0.5
    pace.evaluation = 20.0
    assert pace.seconds_left(100) == 900 * 0.5 + (9 + 1) * 20  # those at 100, 200, .. 900, and the final one
    assert pace.seconds_left(999) == 0.5 + 20
    pace.updates.extend([0.5, 1.5] * 100)
    assert pace.seconds_left(999) == 1.0 + 20
