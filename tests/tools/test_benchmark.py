import importlib
import importlib.util
import json
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from resbackbone.training.command import main_of

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
benchmark = importlib.import_module("benchmark")
coco_files, contest, detectors, jobs, machine, memory, networks, processes, report = (
    importlib.import_module(f"benchmarks.{name}")
    for name in ("coco_files", "contest", "detectors", "jobs", "machine", "memory", "networks", "processes", "report")
)

TINY = ["--height", "64", "--width", "96", "--depth", "18", "--rounds", "1", "--matrix-side", "64"]
TINY += ["--scoring-images", "12", "--annotation-images", "15", "--imagenet-batch-size", "2"]
INSTALLED = [name for name in jobs.PEERS if importlib.util.find_spec(name)]
DETECTING = [name for name in INSTALLED if name in detectors.DETECTORS]


@pytest.fixture(autouse=True)
def empty_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("RESBACKBONE_DEBUG", "DETECTRON2_DATASETS", "COCO_DIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def without_processes(monkeypatch):
    """Memory is not measured, as that takes a process for each contender; and whatever else the machine does counts."""
    monkeypatch.setattr(contest, "peak_in_fresh_process", lambda build, name, threads: (2**20, 2**20))
    monkeypatch.setattr(contest, "OTHERS_LIMIT", float("inf"))


def error_of(argv):
    with pytest.raises(SystemExit) as exit:
        main_of(lambda: benchmark.main(argv))
    assert exit.value.code.startswith("error: ") and len(exit.value.code.splitlines()) == 1
    return exit.value.code


def times(content, **wanted):
    """{contender: seconds} of the one contest that has these values."""
    (result,) = [r for r in content["contests"] if all(r[name] == value for name, value in wanted.items())]
    return result["seconds"]


def result_with(names=(), **fields):
    return {**contest.empty_result(contest.Contest("training", tuple(names))), **fields}


@pytest.mark.parametrize("mode", ["fp32", "bf16-channels-last"])
def test_every_package_does_the_network_jobs_and_computes_the_same(mode, without_processes, capsys):
    asked = ["inference", "training", "detector-inference", "detector-training", "imagenet"]
    content = benchmark.main([*TINY, "--jobs", *asked, "--modes", mode, "--output", "out"])
    assert json.loads(json.dumps(content)) == json.loads(Path("out/benchmark.json").read_text())
    assert content["finished"]
    assert [(r["job"], r["mode"]) for r in content["contests"]] == [(job, mode) for job in asked]
    wanted = {
        "inference": ["resbackbone", "resbackbone, fused", *INSTALLED],
        "training": ["resbackbone", *INSTALLED],
        "detector-inference": ["resbackbone", *DETECTING],
        "detector-training": ["resbackbone", *DETECTING],
        "imagenet": ["resbackbone", *(name for name in INSTALLED if name != "detectron2")],
    }
    for result in content["contests"]:
        names = wanted[result["job"]]
        assert result["names"] == names and set(result["seconds"]) == {*names, "torch.mm"}
        assert all(len(seconds) == 1 and seconds[0] > 0 for seconds in result["seconds"].values())
        for kind in ("difference", "flops", "saved_bytes"):
            assert set(result[kind]) == set(names)
        assert max(result["difference"].values()) <= result["tolerance"] and min(result["flops"].values()) > 1e6
        assert any(result["difference"].values()) or result["job"] == "imagenet"  # there the same operations
        trains = "inference" not in result["job"]
        assert all((count > 1e5) == trains for count in result["saved_bytes"].values())
    for key in ("date", "command", "commit", "hardware", "versions", "options", "jobs"):
        assert content[key]
    assert content["hardware"]["cores"] >= 1 and content["versions"]["torch"]
    text, said = Path("out/benchmark.md").read_text(), capsys.readouterr().out
    assert text.count("### ") == 5 and text.count("| **resbackbone** |") == 5 and "images/s" in text
    assert "detector-training" in said and mode in said
    assert Path("out/benchmark.png").stat().st_size > 5000 and Path("out/benchmark.svg").is_file()


def test_the_jobs_on_coco_files_and_the_input_pipelines_run_and_agree(without_processes, monkeypatch):
    monkeypatch.setattr(jobs, "INPUT_IMAGES", 20)
    content = benchmark.main([*TINY, "--jobs", "scoring", "annotations", "input"])
    for job in ("scoring", "annotations"):
        assert list(times(content, job=job)) == ["resbackbone", "pycocotools"]
    assert [name.split(",")[0] for name in times(content, job="input")].count("resbackbone") == 3
    assert content["contests"][0]["difference"]["pycocotools"] <= 1e-9


def test_files_made_for_scoring_have_something_to_score(tmp_path):
    truth = coco_files.write_instances(tmp_path / "truth.json", 30)
    found = coco_files.detections_for(truth, 30, 50)
    assert found.shape == (1500, 7) and set(found[:, 0]) <= set(range(1, 31))
    written = json.loads((tmp_path / "truth.json").read_text())
    assert len(written["images"]) == 30 and len(written["annotations"]) == len(truth) > 150
    numbers = coco_files._pycocotools(tmp_path / "truth.json", found)()["numbers"]
    assert 0.05 < numbers[0] < 0.95


@pytest.mark.parametrize(
    "job, mode",
    [
        ("inference", "fp32"),
        ("training", "bf16-channels-last"),
        ("detector-inference", "fp32"),
        ("detector-training", "bf16-channels-last"),
    ],
)
def test_outputs_that_differ_are_an_error_and_are_not_timed(job, mode, without_processes, monkeypatch):
    table = detectors.DETECTORS if job.startswith("detector") else networks.BACKBONES
    build = table["torchvision"]

    def differently(depth, state):
        network = build(depth, state)
        with torch.no_grad():
            next(p for name, p in network.named_parameters() if name.endswith("layer3.0.conv2.weight")).mul_(0.5)
        return network

    monkeypatch.setitem(table, "torchvision", differently)
    said = error_of([*TINY, "--jobs", "imagenet", job, "--modes", mode, "--peers", "torchvision", "--output", "out"])
    assert f"{job}, {mode}: torchvision's outputs differ from resbackbone's by " in said
    content = json.loads(Path("out/benchmark.json").read_text())
    assert [result["job"] for result in content["contests"]] == ["imagenet"] and not content["finished"]


def test_one_number_of_twelve_that_differs_is_an_error(monkeypatch):
    ours = coco_files._ours

    def off(annotations, rows):
        return lambda: {"numbers": ours(annotations, rows)()["numbers"] + torch.eye(12)[5] * 1e-6}

    monkeypatch.setattr(coco_files, "_ours", off)
    assert "scoring: pycocotools's outputs differ" in error_of([*TINY, "--jobs", "scoring"])


def test_a_package_that_is_not_installed_is_said_and_left_out(without_processes, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "timm" else find(name))
    content = benchmark.main([*TINY, "--jobs", "training", "--modes", "fp32", "--peers", "torchvision", "timm"])
    assert list(times(content, job="training")) == ["resbackbone", "torchvision", "torch.mm"]
    assert "without timm, which is not installed" in capsys.readouterr().out


def test_without_any_peer_there_are_still_times_of_this_package(without_processes, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    content = benchmark.main([*TINY, "--jobs", "inference", "--modes", "fp32", "--output", "out"])
    assert list(times(content, job="inference")) == ["resbackbone", "resbackbone, fused", "torch.mm"]
    text = Path("out/benchmark.md").read_text()
    assert "| **resbackbone** |" in text and "ratio" not in text and not Path("out/benchmark.png").exists()
    assert all(f"Not measured: {name}, which is not installed." in text for name in jobs.PEERS)


def test_a_job_whose_package_is_missing_is_said_and_the_others_are_done(without_processes, monkeypatch):
    monkeypatch.setitem(sys.modules, "benchmarks.detectors", None)  # as if torchvision could not be imported
    content = benchmark.main([*TINY, "--jobs", "detector-training", "training", "--modes", "fp32", "--peers"])
    assert [result["job"] for result in content["contests"]] == ["training"]
    assert content["skipped"][0].startswith("detector-training, which needs what is not installed")


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--jobs", "training", "trainign"], "unknown job 'trainign'; choose from inference, training, "),
        (["--modes", "fp16"], "unknown mode 'fp16'; choose from fp32, fp32-channels-last, bf16-channels-last"),
        (["--peers", "mmdetection"], "unknown peer 'mmdetection'; choose from torchvision, timm, detectron2"),
        (["--depth", "20"], "unknown depth 20; choose from 18, 34, 50, 101, 152"),
        (["--rounds", "0"], "--rounds 0: 1 or more is wanted"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--render", "missing.json"], "--render missing.json: not a benchmark.json"),
    ],
)
def test_what_cannot_be_done_is_one_line(argv, said):
    assert said in error_of(argv)


def test_an_interrupted_run_writes_what_it_has(without_processes, monkeypatch):
    share, rounds = contest.Others.share, []

    def interrupted(self):
        rounds.append(self)
        if len(rounds) == 5:
            raise KeyboardInterrupt
        return share(self)

    monkeypatch.setattr(contest.Others, "share", interrupted)
    argv = [*TINY, "--jobs", "training", "imagenet", "--modes", "fp32", "--peers", "--rounds", "3", "--output", "out"]
    with pytest.raises(SystemExit) as exit:
        main_of(lambda: benchmark.main(argv))
    assert exit.value.code == "interrupted"
    content = json.loads(Path("out/benchmark.json").read_text())
    assert not content["finished"]
    assert [len(times(content, job=job)["resbackbone"]) for job in ("training", "imagenet")] == [3, 1]
    assert Path("out/benchmark.md").read_text().count("### ") == 2


def test_render_writes_the_same_tables_again(without_processes):
    benchmark.main([*TINY, "--jobs", "training", "--modes", "fp32", "--peers", "torchvision", "--output", "out"])
    Path("again.json").write_bytes(Path("out/benchmark.json").read_bytes())
    benchmark.main(["--render", "again.json"])
    assert Path("again.md").read_text() == Path("out/benchmark.md").read_text()
    assert Path("again.png").is_file() and Path("again.svg").is_file()


def test_what_no_longer_fits_the_budget_is_left_out_and_said(without_processes, monkeypatch):
    argv = [*TINY, "--jobs", "training", "compiled-training", "input", "--modes", "fp32", "--peers", "--output", "out"]
    content = benchmark.main([*argv, "--budget", "50"])  # less than a compilation is expected to take
    assert list(times(content, job="training")) == ["resbackbone", "torch.mm"]
    assert [result["job"] for result in content["contests"]] == ["training", "input"]
    left_out = "without resbackbone, resbackbone, compiled: the budget is spent"
    assert content["skipped"] == [f"compiled-training fp32: {left_out}"]
    monkeypatch.setattr(benchmark, "check_counts", lambda *_, **__: None)
    content = benchmark.main([*argv, "--budget", "1e-9"])
    assert content["contests"] == [] and content["skipped"] == [
        f"{job}: the budget is spent" for job in ("training", "compiled-training", "input")
    ]


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1000))

    def forward(self, x):
        y = x * self.weight  # saves x, and weight only if x wants a gradient
        return (y * y.exp()).sum()  # saves y and its exponential, which both operations keep


def test_bytes_saved_for_backward_count_each_storage_once_and_no_parameter():
    module, x = Sum(), torch.ones(1000, requires_grad=True)

    def run():
        module(x).backward()
        return {}

    _, figures = contest.inspect(contest.Contender(run, module), network=True, on_gpu=False)
    assert figures["saved_bytes"] == 3 * 4000


def test_ours_keeps_no_more_for_backward_than_the_others():
    setting = networks.Setting("fp32", "cpu", 18, 64, 96, 1)
    saved = {}
    for name in ("resbackbone", "torchvision"):
        contender = networks.backbone(setting, True, name)
        saved[name] = contest.inspect(contender, network=True, on_gpu=False)[1]["saved_bytes"]
    assert 0 < saved["resbackbone"] <= saved["torchvision"]


def quick(names, **fields):
    """A contest of contenders that do nothing, and the result of three rounds."""
    made = contest.Contest("quick", names, lambda name: contest.Contender(dict), **fields)
    result = contest.empty_result(made)
    arguments = {"threads": 1, "clock": contest.Clock("cpu"), "side": 8, "deadline": float("inf")}
    contest.hold(made, result, rounds=3, **arguments)
    return result


def test_a_round_that_others_disturbed_is_made_again_up_to_a_limit(monkeypatch):
    shares = iter([0.5, 0.01, 0.07, 0.0, 0.059])
    monkeypatch.setattr(contest.Others, "share", lambda self: next(shares))
    result = quick(("resbackbone", "timm"))
    assert result["others"] == [0.01, 0.0, 0.059] and result["thrown_away"] == 2
    assert [len(seconds) for seconds in result["seconds"].values()] == [3, 3]
    monkeypatch.setattr(contest.Others, "share", lambda self: 0.9)
    result = quick(("resbackbone", "timm"))
    assert result["thrown_away"] == 3 and result["others"] == [0.9, 0.9, 0.9]


def test_the_share_of_others_is_what_is_busy_without_this_process(monkeypatch):
    monkeypatch.setattr(contest.os, "cpu_count", lambda: 4)
    busy, own, now = iter([100.0, 107.0]), iter([10.0, 15.0]), iter([0.0, 2.0])
    monkeypatch.setattr(contest, "_busy_seconds", lambda: next(busy))
    monkeypatch.setattr(contest, "_own_seconds", lambda: next(own))
    monkeypatch.setattr(contest.time, "monotonic", lambda: next(now))
    assert contest.Others().share() == pytest.approx((7 - 5) / (2 * 4))


@pytest.mark.skipif(not contest.STAT.exists(), reason="only Linux tells how busy it is")
def test_the_systems_busy_time_contains_this_process():
    busy, own = contest._busy_seconds(), contest._own_seconds()
    until = time.process_time() + 0.3
    while time.process_time() < until:
        pass
    assert contest._own_seconds() - own >= 0.28 and contest._busy_seconds() - busy >= 0.25


def test_without_a_count_by_the_system_no_round_is_thrown_away(monkeypatch):
    monkeypatch.setattr(contest, "STAT", Path("nowhere"))
    assert contest.Others().share() == 0.0 and quick(("resbackbone",))["thrown_away"] == 0


def test_a_ratio_is_to_the_fastest_other_package_round_by_round():
    result = result_with(
        ["resbackbone", "resbackbone, fused", "torchvision", "timm"],
        seconds={
            "resbackbone": [1.0, 2.0, 3.0],
            "resbackbone, fused": [0.1, 0.1, 0.1],
            "torchvision": [9.0, 9.0, 9.0],
            "timm": [2.0, 8.0, 4.0],
            "torch.mm": [0.5, 1.0, 1.0],
        },
        flops={"resbackbone": 30, "timm": 40},
        matrix_product_flops=60,
        items={"resbackbone": 8, "resbackbone, fused": 8, "torchvision": 8, "timm": 8},
    )
    rows = {row.name: row for row in report.rows_of(result)}
    assert list(rows) == result["names"]
    own = rows["resbackbone"]
    assert own.seconds == 2.0 and own.images_per_second == 4.0
    assert own.ratio == pytest.approx((0.375, 0.5, 0.625))  # of 1/2, 2/8 and 3/4
    assert own.share == pytest.approx(0.25)  # 30/1 of 60/0.5, 30/2 of 60/1, 30/3 of 60/1
    assert rows["resbackbone, fused"].share == pytest.approx(5.0)  # it does the work of the one before the comma
    assert rows["timm"].ratio == (1, 1, 1) and rows["torchvision"].share is None


def test_two_processes_are_compared_by_the_image():
    result = result_with(
        [processes.TWO, processes.ONE],
        seconds={processes.TWO: [3.0], processes.ONE: [2.0]},
        reference=processes.ONE,
        items={processes.TWO: 2, processes.ONE: 1},
    )
    two, one = report.rows_of(result)
    assert two.ratio.median == 0.75 and two.images_per_second == pytest.approx(2 / 3) and one.ratio.median == 1


def test_training_in_two_processes_is_timed_beside_one(tmp_path):
    setting = networks.Setting("fp32", "cpu", 18, 33, 47, 1)
    seconds = processes.scaling(setting, tmp_path, 2)
    assert list(seconds) == [processes.TWO, processes.ONE]
    assert all(len(each) == 2 and min(each) > 0 for each in seconds.values())


def test_an_import_is_timed_without_torch():
    began = time.perf_counter()
    seconds = processes.importing("resbackbone").clock()
    assert 0 < seconds < 0.5 * (time.perf_counter() - began)


class Allocating:
    """Contenders that take 64 MB for a moment and keep 16."""

    def __call__(self, name):
        def run():
            torch.ones(16 * 2**20)
            return {"kept": torch.ones(4 * 2**20)}

        return contest.Contender(run)


class Failing:
    def __call__(self, name):
        raise SystemExit(3)


@pytest.mark.skipif(not memory.CLEAR.exists(), reason="only Linux tells the peak of a process")
def test_memory_is_what_a_run_adds_at_most_and_in_the_end():
    peak, held = memory.peak_in_fresh_process(Allocating(), "any", 1)
    assert 64 <= peak / 2**20 < 110 and 16 <= held / 2**20 < 45  # 64 and 16, and what allocators round and keep
    assert memory.peak_in_fresh_process(Failing(), "any", 1) == (None, None)


@pytest.mark.skipif(not memory.CLEAR.exists(), reason="only Linux tells the peak of a process")
def test_a_backbones_step_can_be_measured_in_a_fresh_process():
    setting = networks.Setting("fp32", "cpu", 18, 64, 96, 1)
    peak, _ = memory.peak_in_fresh_process(partial(networks.backbone, setting, True), "resbackbone", 1)
    assert peak > 40e6  # the gradients of 11 M weights alone


@pytest.mark.parametrize(
    "value, said", [(0.8234, "0.823"), (1234.5, "1230"), (2e6, "2000000"), (0.00001234, "0.000012"), (12.0, "12")]
)
def test_numbers_have_three_digits_and_no_exponent(value, said):
    assert report.number(value) == said


def test_tensors_differ_by_their_relative_norm_and_infinitely_if_they_are_not_finite():
    nan = {"x": torch.tensor([1.0, float("nan")])}
    assert contest.relative_difference(nan, {"x": torch.ones(2)}) == float("inf")
    assert contest.relative_difference({"x": torch.ones(3)}, {"x": torch.ones(2)}) == float("inf")
    near, wanted = torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])
    assert contest.relative_difference({"x": wanted, "y": near}, {"x": wanted, "y": wanted}) == pytest.approx(0.1)


def test_detections_agree_in_any_order_of_equal_scores():
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40]])
    wanted = {"boxes": boxes, "scores": torch.tensor([0.5, 0.5]), "labels": torch.tensor([1, 2])}
    swapped = {**wanted, "boxes": boxes.flip(0), "labels": torch.tensor([2, 1])}
    assert detectors.difference(swapped, wanted) == 0
    assert detectors.difference({**swapped, "labels": torch.tensor([1, 2])}, wanted) == 1
    assert detectors.difference({**wanted, "boxes": boxes + 1}, wanted) > 0.1
    assert detectors.difference({name: x[:1] for name, x in wanted.items()}, wanted) == float("inf")


def test_the_worst_of_losses_and_gradient_tells_how_much_detectors_differ():
    wanted = {"loss_objectness": torch.tensor(4.0), "gradient": torch.tensor([3.0, 4.0])}
    assert detectors.difference({**wanted, "loss_objectness": torch.tensor(4.4)}, wanted) == pytest.approx(0.1)
    got = {**wanted, "gradient": torch.tensor([3.0, 4.5])}
    assert detectors.difference(got, wanted) == pytest.approx(0.1)


MEASURED = sorted((ROOT / "docs" / "benchmarks").glob("*.json"))


@pytest.mark.skipif(not MEASURED, reason="no measured run is committed")
def test_the_tables_of_the_benchmark_page_are_those_of_the_measured_runs():
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    for path in MEASURED:
        assert report.markdown(json.loads(path.read_text())).strip() in page, path
