import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from commands import error_line
from torch import nn

from detection import scoring
from resbackbone.cli.command import main_of
from resbackbone.tools import benchmark
from resbackbone.tools.benchmarks import contest, data, detectors, machine, networks, report

ROOT = Path(__file__).parents[2]
TINY = ["--height", "48", "--width", "64", "--depth", "18", "--rounds", "1", "--scoring-images", "12"]
INSTALLED = [name for name in benchmark.PEERS if importlib.util.find_spec(name)]
DETECTING = [name for name in INSTALLED if name in detectors.DETECTORS]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(contest, "MATRIX_SIDE", 64)
    monkeypatch.setattr(benchmark, "ANNOTATION_IMAGES", 15)
    monkeypatch.setattr(data, "INPUT_IMAGES", 20)


@pytest.fixture
def without_memory(monkeypatch):
    """Memory is not measured: that takes a process for each contender."""
    monkeypatch.setattr(contest, "peak_in_fresh_process", lambda build, name, threads: (2**20, 2**20))


@pytest.fixture
def only_torchvision(monkeypatch):
    monkeypatch.setattr(benchmark, "with_peers", lambda *own, among=(): (*own, "torchvision"))


def times(content, job):
    """{contender: seconds} of the one contest of this job."""
    (result,) = [result for result in content["contests"] if result["job"] == job]
    return result["seconds"]


def result_with(names=(), **fields):
    return {**contest.Contest("training", names=tuple(names)).empty_result(), **fields}


@pytest.mark.parametrize("mode, size", [("fp32", 1), ("bf16-channels-last", 2)])
def test_every_package_does_the_network_jobs_and_computes_the_same(mode, size, without_memory, capsys):
    asked = ["inference", "training", "detector-inference", "detector-training"]
    if mode.startswith("bf16"):  # its only mode by default
        asked.append("imagenet")
    content = benchmark.main([*TINY, "--jobs", *asked, "--modes", mode, "--batch-sizes", str(size), "--output", "out"])
    assert json.loads(json.dumps(content)) == json.loads(Path("out/benchmark.json").read_text())
    assert content["finished"] and not content["failed"]
    assert [(r["job"], r["mode"]) for r in content["contests"]] == [(job, mode) for job in asked]
    assert {r["batch_size"] for r in content["contests"]} == {size}
    wanted = {
        "inference": ["resbackbone", "resbackbone, fused", *INSTALLED],
        "training": ["resbackbone", *INSTALLED],
        "detector-inference": ["resbackbone", "resbackbone, fused", *DETECTING],
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
    assert content["hardware"]["cores"] >= 1 and content["versions"]["torch"]
    text, said = Path("out/benchmark.md").read_text(), capsys.readouterr().out
    assert text.count("### ") == text.count("| **resbackbone** |") == len(asked) and "images/s" in text
    assert f"training step, {'one image' if size == 1 else '2 images'}, 48 pixels" in text and text in said


def test_every_second_image_of_a_batch_is_flipped_with_its_boxes():
    scene = detectors.drawn_scene().resized(48, 70)
    first, second, third = scene.batch(3, "cpu", torch.float64)
    assert torch.equal(first.pixels, third.pixels) and torch.equal(first.pixels.flip(2), second.pixels)
    assert torch.equal(first.boxes, scene.boxes.double()) and not torch.equal(first.boxes, second.boxes)
    torch.testing.assert_close(second.flipped().boxes, first.boxes)
    x1, y1, x2, y2 = scene.boxes.T
    assert ((x1 >= 0) & (x2 <= 70) & (x1 < x2) & (y1 >= 0) & (y2 <= 48) & (y1 < y2)).all()


def test_the_jobs_on_coco_files_and_the_input_pipelines_run_and_agree(without_memory):
    content = benchmark.main([*TINY, "--jobs", "scoring", "annotations", "input"])
    for job in ("scoring", "annotations"):
        assert list(times(content, job)) == ["resbackbone", "pycocotools"]
    assert [name.split(",")[0] for name in times(content, "input")].count("resbackbone") == 3
    assert content["contests"][0]["difference"]["pycocotools"] <= 1e-9


def test_files_made_for_scoring_have_something_to_score(tmp_path):
    truth = data.write_instances(tmp_path / "truth.json", 30)
    found = data.detections_for(truth, 30)
    assert found.shape == (3000, 7) and set(found[:, 0]) <= set(range(1, 31))
    written = json.loads((tmp_path / "truth.json").read_text())
    assert len(written["images"]) == 30 and len(written["annotations"]) == len(truth) > 150
    numbers = data.scoring(tmp_path / "truth.json", found, "pycocotools").run()["numbers"]
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
def test_outputs_that_differ_are_an_error_and_are_not_timed(job, mode, without_memory, only_torchvision, monkeypatch):
    table = detectors.DETECTORS if job.startswith("detector") else networks.BACKBONES
    build = table["torchvision"]

    def differently(depth, state):
        network = build(depth, state)
        with torch.no_grad():
            next(p for name, p in network.named_parameters() if name.endswith("layer3.0.conv2.weight")).mul_(0.5)
        return network

    monkeypatch.setitem(table, "torchvision", differently)
    said = error_line(benchmark.main, [*TINY, "--jobs", job, "annotations", "--modes", mode, "--output", "out"])
    assert f"1 failed: {job}, {mode}, 1 image: torchvision: its outputs differ from resbackbone's by " in said
    content = json.loads(Path("out/benchmark.json").read_text())
    assert content["finished"] and not times(content, job) and times(content, "annotations")
    assert ": no other package agrees with it" in Path("out/benchmark.md").read_text()


def test_one_number_of_twelve_that_differs_is_an_error(monkeypatch):
    score = scoring.score

    def off(*arguments, **options):
        box = score(*arguments, **options)["bbox"]
        return {"bbox": {**box, "ARs": (box["ARs"] or 0.0) + 1e-6}}

    monkeypatch.setattr(scoring, "score", off)
    assert "scoring: pycocotools: its outputs differ" in error_line(benchmark.main, [*TINY, "--jobs", "scoring"])


def test_without_any_peer_there_are_still_times_of_this_package(without_memory, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    content = benchmark.main([*TINY, "--jobs", "inference", "--modes", "fp32", "--output", "out"])
    assert list(times(content, "inference")) == ["resbackbone", "resbackbone, fused", "torch.mm"]
    text = Path("out/benchmark.md").read_text()
    assert "| **resbackbone** |" in text and "ratio" not in text
    assert all(f"Not measured: {name}, which is not installed." in text for name in benchmark.PEERS)
    assert "without timm, which is not installed" in capsys.readouterr().out


def test_a_contender_that_needs_a_missing_module_is_named_and_the_rest_done(without_memory, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    content = benchmark.main([*TINY, "--jobs", "annotations", "scoring", "--output", "out"])
    assert list(times(content, "annotations")) == ["resbackbone"] and times(content, "scoring")
    assert ": pycocotools: import of pycocotools.coco halted" in Path("out/benchmark.md").read_text()


def test_a_machine_with_little_installed_can_time_networks():
    absent = ("huggingface_hub", "matplotlib", "tensorboard", "timm", "detectron2")
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); from resbackbone.tools import benchmark"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--jobs", "training", "trainign"], "unknown job 'trainign'; choose from inference, training, "),
        (["--modes", "fp16"], "unknown mode 'fp16'; choose from fp32, fp32-channels-last, tf32-channels-last, bf"),
        (["--depth", "20"], "unknown depth 20; choose from 18, "),
        (["--rounds", "0"], "--rounds 0: must be at least 1"),
        (["--batch-sizes", "2", "0"], "--batch-sizes 0: must be at least 1"),
        (["--modes", "tf32-channels-last"], "--modes tf32-channels-last with --device cpu: TF32 needs --device cuda"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--jobs", "detector-training", "--data", "nowhere"], "--data nowhere: "),
    ],
)
def test_what_cannot_be_done_is_one_line(argv, said):
    assert said in error_line(benchmark.main, argv)


def test_an_interrupted_run_writes_what_it_has(without_memory, monkeypatch):
    seconds = iter([1.0, 1.0])

    def clock():
        content = json.loads(Path("out/benchmark.json").read_text())  # written before the next contest begins
        assert len(times(content, "annotations")["resbackbone"]) == 3 and not content["finished"]
        for value in seconds:
            return value
        raise KeyboardInterrupt

    monkeypatch.setattr(networks, "in_processes", lambda work, scratch, name: contest.Contender(dict, clock=clock))
    with pytest.raises(SystemExit) as exit:
        main_of(lambda: benchmark.main([*TINY, "--jobs", "annotations", "scaling", "--rounds", "3", "--output", "out"]))
    assert exit.value.code == "interrupted"
    content = json.loads(Path("out/benchmark.json").read_text())
    assert not content["finished"] and sum(map(len, times(content, "scaling").values())) == 2
    assert Path("out/benchmark.md").read_text().count("### ") == 2


@pytest.mark.parametrize("over_after", [0, 1])  # rounds
def test_what_no_longer_fits_the_budget_is_left_out_and_said(over_after):
    made = contest.Contest("quick", names=("a",), build=lambda name: contest.Contender(dict, clock=lambda: 1.0))
    result = made.empty_result()

    class Spent(contest.Limits):
        def is_over(self, seconds=0.0):
            return sum(map(len, result["seconds"].values())) >= over_after

    contest.measure(made, result, Spent(rounds=3))
    assert result["seconds"] == ({"a": [1.0]} if over_after else {}) and not result["failed"]
    what = "2 of 3 rounds" if over_after else "a"
    assert report.not_measured(result) == [f"quick: {what}: the budget is spent"]
    assert contest.Limits(deadline=time.monotonic() + 5).is_over(9) and not contest.Limits().is_over(9)


@pytest.mark.parametrize(
    "job, size, modes",
    [
        ("detector-training", 16, ["tf32-channels-last", "bf16-channels-last"]),
        ("imagenet", 256, ["bf16-channels-last", "bf16-compiled"]),
    ],
)
def test_each_batch_size_and_mode_is_a_contest_of_its_own(job, size, modes, tmp_path):
    options = benchmark.Options(batch_sizes=(1, size), height=64, device="cuda")
    found = list(benchmark.JOBS[job](job, options, tmp_path))
    assert [(c.batch_size, c.mode) for c in found] == [(s, mode) for s in (1, size) for mode in modes]
    assert all(set(c.items) == {c.batch_size} and f" 1 or {size}" in c.heading for c in found)


def test_a_compiled_network_is_compared_and_not_counted(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    work = networks.Workload("bf16-compiled", "cpu", 18, 48, 64, 1)
    result = measured(["resbackbone", "torchvision"], partial(networks.backbone, True, work), tolerance=0.03)
    assert not result["failed"] and not result["flops"] and len(result["seconds"]["resbackbone"]) == 3
    assert set(result["difference"]) == {"resbackbone", "torchvision"}


@pytest.mark.parametrize("on, switches", [(True, ("high", True)), (False, ("highest", False))])
def test_tf32_is_switched_in_products_and_convolutions_and_put_back(on, switches):
    def now():
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    before = now()
    with pytest.raises(ZeroDivisionError), contest.tf32(on):
        assert now() == switches
        raise ZeroDivisionError
    assert now() == before


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

    _, figures = contest.inspect(contest.Contender(run, module), on_gpu=False)
    assert figures["saved_bytes"] == 3 * 4000


def test_ours_keeps_no_more_for_backward_than_the_others():
    setting = networks.Workload("fp32", "cpu", 18, 64, 96, 1)
    saved = {}
    for name in ("resbackbone", "torchvision"):
        contender = networks.backbone(True, setting, name)
        saved[name] = contest.inspect(contender, on_gpu=False)[1]["saved_bytes"]
    assert 0 < saved["resbackbone"] <= saved["torchvision"]


def measured(names, build, **fields):
    """The result of a contest of three rounds."""
    made = contest.Contest("quick", "", tuple(names), build, **fields)
    result = made.empty_result()
    contest.measure(made, result, contest.Limits(rounds=3))
    return result


def that_output(outputs, **runs):
    """Builds contenders that output these numbers, or call what is given for their name."""

    def build(name):
        return contest.Contender(runs.get(name, lambda: {"x": torch.tensor(outputs[name])}))

    return build


def test_a_contender_that_differs_is_left_out_and_those_that_agree_are_timed():
    result = measured(
        ("resbackbone", "torchvision", "timm"), that_output({"resbackbone": 1.0, "torchvision": 1.5, "timm": 1.0})
    )
    assert set(result["seconds"]) == {"resbackbone", "timm"} and set(result["failed"]) == {"torchvision"}
    assert result["difference"]["torchvision"] == 0.5 and not result["tracebacks"]
    result = measured(("resbackbone", "torchvision"), that_output({"resbackbone": 1.0, "torchvision": 1.5}))
    assert not result["seconds"] and result["left_out"] == {"resbackbone": "no other package agrees with it"}


@pytest.mark.parametrize("fails_at", [1, 4])  # its first run; in the second round, after one that tells the repeats
@pytest.mark.parametrize("name", ["resbackbone", "timm"])
def test_a_contender_out_of_memory_does_not_lose_the_others(name, fails_at):
    runs = []

    def full():
        runs.append(name)
        if len(runs) >= fails_at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has")
        time.sleep(0.06)
        return {"x": torch.tensor(1.0)}

    names = ("resbackbone", "torchvision", "timm")
    result = measured(names, that_output(dict.fromkeys(names, 1.0), **{name: full}))
    assert {name: len(seconds) for name, seconds in result["seconds"].items()} == {n: 3 for n in names if n != name}
    assert result["failed"][name].startswith("OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0")
    assert "in full" in result["tracebacks"][name] and report.rows_of(result)[-1].ratio


def test_a_matrix_product_that_fails_loses_no_contender(monkeypatch):
    calls = []

    def fails_in_the_second_round(*_):
        calls.append(1)
        if len(calls) > 60:
            raise RuntimeError("no")

    monkeypatch.setattr(torch, "mm", fails_in_the_second_round)
    names = ("resbackbone", "timm")
    result = measured(names, that_output(dict.fromkeys(names, 1.0)), mode="fp32", batch_size=1)
    assert {name: len(seconds) for name, seconds in result["seconds"].items()} == dict.fromkeys(names, 3)
    assert result["failed"] == {"torch.mm": "RuntimeError: no"}


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
    assert own.ratio == pytest.approx([0.375, 0.5, 0.625])  # of 1/2, 2/8 and 3/4
    assert own.share == pytest.approx(0.25)  # 30/1 of 60/0.5, 30/2 of 60/1, 30/3 of 60/1
    assert rows["resbackbone, fused"].share == pytest.approx(5.0)  # it does the work of the one before the comma
    assert rows["timm"].ratio == [1, 1, 1] and rows["torchvision"].share is None


def test_two_processes_are_timed_beside_one_and_compared_by_the_image():
    (result,) = benchmark.main([*TINY, "--jobs", "scaling"])["contests"]
    seconds = {name: times[0] for name, times in result["seconds"].items()}
    two, one = report.rows_of(result)
    assert (two.name, one.name) == (networks.TWO, networks.ONE) and one.ratio[1] == 1
    assert two.ratio[1] == pytest.approx(seconds[networks.TWO] / 2 / seconds[networks.ONE])
    assert two.images_per_second == pytest.approx(2 / seconds[networks.TWO])


class Allocating:
    """Contenders that take 64 MB for a moment and keep 16."""

    def __call__(self, name):
        def run():
            torch.ones(16 * 2**20)
            return {"kept": torch.ones(4 * 2**20)}

        return contest.Contender(run)


class Failing:
    def __call__(self, name):
        os._exit(3)  # as if the system had killed it


@pytest.mark.skipif(not machine.CLEAR.exists(), reason="only Linux tells the peak of a process")
def test_memory_is_what_a_run_adds_at_most_and_in_the_end():
    peak, held = machine.peak_in_fresh_process(Allocating(), "any", 1)
    assert 64 <= peak / 2**20 < 110 and 16 <= held / 2**20 < 45  # 64 and 16, and what allocators round and keep
    assert machine.peak_in_fresh_process(Failing(), "any", 1) == (None, None)
    setting = networks.Workload("fp32", "cpu", 18, 64, 96, 1)
    peak, _ = machine.peak_in_fresh_process(partial(networks.backbone, True, setting), "resbackbone", 1)
    assert peak > 40e6  # the gradients of 11 M weights alone


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
    assert detectors.difference([wanted, swapped], [wanted, wanted]) == 0
    assert detectors.difference([wanted, {**swapped, "labels": torch.tensor([1, 2])}], [wanted, wanted]) == 1
    assert detectors.difference([{**wanted, "boxes": boxes + 1}], [wanted]) > 0.1
    assert detectors.difference([{name: x[:1] for name, x in wanted.items()}], [wanted]) == float("inf")


def test_detectron2_is_set_up_in_code_and_moves_as_a_whole():
    pytest.importorskip("detectron2")
    detector = detectors.build_detectron2(18, detectors.detector_weights(18)).to("meta")
    assert {tensor.device.type for tensor in (*detector.parameters(), *detector.buffers())} == {"meta"}
    assert not [name for m in detector.modules() for name, x in vars(m).items() if isinstance(x, torch.Tensor)]
    assert detector.network.device.type == "meta"


MEASURED = sorted((ROOT / "docs" / "benchmarks").glob("20*.json"))


@pytest.mark.skipif(not MEASURED, reason="no measured run is committed")
def test_the_tables_of_the_benchmark_page_are_those_of_the_measured_runs():
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    for path in MEASURED:
        assert report.markdown(json.loads(path.read_text())).strip() in page, path
