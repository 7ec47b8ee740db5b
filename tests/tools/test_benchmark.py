import gc
import importlib.util
import json
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from commands import error_line
from torch import nn

from detection import scoring as own_scoring
from resbackbone.cli.command import main_of
from resbackbone.tools import benchmark
from resbackbone.tools.benchmarks import contest, detectors, machine, networks, report, runtimes, scoring

ROOT = Path(__file__).parents[2]
TINY = ["--height", "64", "--width", "96", "--depth", "18", "--rounds", "1", "--output", "out"]
INSTALLED = [name for name in ("torchvision", "timm", "detectron2") if importlib.util.find_spec(name)]
DETECTING = [name for name in INSTALLED if name in detectors.DETECTORS]
RUNTIMES = [name for name in runtimes.RUNTIMES if importlib.util.find_spec(name)]
SMALL = contest.Workload("fp32", "cpu", 18, 64, 96, 1)


@pytest.fixture(scope="module", autouse=True)
def little_garbage():
    """Every contender collects garbage; what other tests imported need not be looked through each time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def short_turns(monkeypatch):
    monkeypatch.setattr(contest, "TURN", 0.02)


@pytest.fixture
def without_memory(monkeypatch):
    """Memory is not measured: that takes a process for each contender."""
    monkeypatch.setattr(contest, "peak_in_fresh_process", lambda build: 2**20)


def content_of(folder="out"):
    return json.loads(Path(folder, "benchmark.json").read_text())


@pytest.fixture
def few_exports(monkeypatch, mode):
    """No detector is exported for the runtimes, which takes half a minute, and no trunk in the quick case."""
    for name in ("detector-inference", "inference") if mode == "fp32" else ("detector-inference",):
        job = benchmark.JOBS[name]
        names = tuple(one for one in job.names if one not in runtimes.RUNTIMES)
        monkeypatch.setitem(benchmark.JOBS, name, replace(job, names=names))


@pytest.mark.parametrize("mode, size", [("fp32", 1), pytest.param("bf16-channels-last", 2, marks=pytest.mark.slow)])
def test_every_package_does_the_network_jobs_and_computes_the_same(mode, size, without_memory, few_exports, capsys):
    asked = ["inference", "pyramid-inference", "training", "detector-inference", "detector-training"]
    if mode.startswith("bf16"):  # its only mode by default
        asked.append("imagenet")
    content = benchmark.main([*TINY, "--jobs", *asked, "--modes", mode, "--batch-sizes", str(size)])
    assert json.loads(json.dumps(content)) == content_of()
    assert [(r["job"], r["mode"]) for r in content["contests"]] == [(job, mode) for job in asked]
    assert {r["batch_size"] for r in content["contests"]} == {size}
    suited = [name for name in RUNTIMES if name != "onnxruntime" or mode == "fp32"]  # it has no bf16
    wanted = {
        "inference": ["resbackbone", "resbackbone, fused", *INSTALLED, *(suited if mode.startswith("bf16") else [])],
        "pyramid-inference": ["resbackbone", "resbackbone, fused", *DETECTING, *suited],
        "training": ["resbackbone", *INSTALLED],
        "detector-inference": ["resbackbone", "resbackbone, fused", *DETECTING],
        "detector-training": ["resbackbone", *DETECTING],
        "imagenet": ["resbackbone", *(name for name in INSTALLED if name != "detectron2")],
    }
    for result in content["contests"]:
        names = wanted[result["job"]]
        assert result["names"] == names and set(result["seconds"]) == {*names} and not result["failed"]
        assert all(len(seconds) == 1 and seconds[0] > 0 for seconds in result["seconds"].values())
        for kind in ("difference", "peak_bytes"):
            assert set(result[kind]) == set(names)
        assert set(result["saved_bytes"]) == {*names} - {*RUNTIMES}
        assert max(result["difference"].values()) <= result["tolerance"]
        assert any(result["difference"].values()) or result["job"] == "imagenet"  # there the same operations
        trains = "inference" not in result["job"]
        assert all((count > 1e5) == trains for count in result["saved_bytes"].values())
    assert content["hardware"]["cores"] >= 1 and content["versions"]["torch"]
    text, said = Path("out/benchmark.md").read_text(), capsys.readouterr().out
    assert text.count("### ") == text.count("| **resbackbone** |") == len(asked) and "images/s" in text
    assert "training step, 64 x 96\n\n| images | mode |" in text and text in said


@pytest.mark.parametrize("mode, cpu", [("fp32", RUNTIMES), ("bf16-channels-last", ["openvino"])])
def test_runtimes_take_part_on_a_cpu_in_the_precisions_that_they_have(mode, cpu):
    work = replace(SMALL, mode=mode)
    assert {*cpu} <= {name for name in runtimes.RUNTIMES if runtimes.suits(name, work)} <= {*runtimes.RUNTIMES}
    assert runtimes.suits("onnxruntime", work) == (mode == "fp32")
    assert not any(runtimes.suits(name, replace(work, device="cuda")) for name in runtimes.RUNTIMES)
    assert runtimes.suits("resbackbone, fused", work) and runtimes.suits("timm", replace(work, device="cuda"))


@pytest.mark.slow
@pytest.mark.parametrize("mode, size", [("fp32", 1), ("bf16-channels-last", 2)])
def test_runtimes_detect_what_the_detector_does(mode, size, without_memory):
    # Detectors are compared on images of 64 x 64 pixels; timed on them too, the runtimes need one export.
    settings = ["--width", "64", "--jobs", "detector-inference", "--modes", mode, "--batch-sizes", str(size)]
    (result,) = benchmark.main([*TINY, *settings])["contests"]
    suited = [name for name in RUNTIMES if name != "onnxruntime" or mode == "fp32"]
    assert suited and {*suited} <= {*result["seconds"]} and not result["failed"]
    assert all(0 < result["difference"][name] <= 1e-5 for name in suited)


def test_drawn_images_differ_and_contain_their_boxes():
    (first, second), targets = detectors.drawn(2, 48, 70, "cpu", torch.float64)
    assert first.shape == (3, 48, 70) and first.dtype == torch.float64 and not torch.equal(first, second)
    for target in targets:
        x1, y1, x2, y2 = target["boxes"].T
        assert ((x1 >= 0) & (x2 <= 70) & (x1 < x2) & (y1 >= 0) & (y2 <= 48) & (y1 < y2)).all()
        assert target["labels"].min() >= 1 and target["labels"].max() <= detectors.CLASSES


def test_both_scorers_find_the_same_numbers_and_something_to_score():
    work = contest.Workload("fp64", "cpu", 50, 0, 0, 12)
    own, theirs = (scoring.contender(work, name).run() for name in ("resbackbone", "pycocotools"))
    assert contest.relative_difference(own, theirs) <= 1e-9 and 0.05 < own["numbers"][0] < 0.95


@pytest.mark.parametrize(
    "job, mode",
    [("training", "bf16-channels-last"), ("detector-inference", "fp32")],
)
def test_outputs_that_differ_are_an_error_and_are_not_timed(job, mode, without_memory, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", {"torchvision": 1, "pycocotools": 1}.get)
    table = detectors.DETECTORS if job.startswith("detector") else networks.BACKBONES
    build = table["torchvision"]

    def differently(depth, state):
        network = build(depth, state)
        with torch.no_grad():
            next(p for name, p in network.named_parameters() if name.endswith("layer3.0.conv2.weight")).mul_(0.5)
        return network

    monkeypatch.setitem(table, "torchvision", differently)
    said = error_line(benchmark.main, [*TINY, "--jobs", job, "--modes", mode])
    assert f" failed: {job}, {mode}, 1 image: torchvision: OutputsDiffer: from resbackbone's by " in said
    assert "resbackbone: no other package agrees with it" in said
    assert not content_of()["contests"][0]["seconds"] and "no other package" in Path("out/benchmark.md").read_text()


def test_one_number_of_twelve_that_differs_is_an_error(monkeypatch, without_memory):
    score = own_scoring.score

    def off(*arguments, **options):
        box = score(*arguments, **options)["bbox"]
        return {"bbox": {**box, "ARs": (box["ARs"] or 0.0) + 1e-6}}

    monkeypatch.setattr(own_scoring, "score", off)
    said = error_line(benchmark.main, [*TINY, "--jobs", "scoring", "--batch-sizes", "12"])
    assert "scoring, fp64, 12 images: pycocotools: OutputsDiffer: from resbackbone's by " in said


def test_without_any_peer_there_are_still_times_of_this_package(without_memory, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    content = benchmark.main([*TINY, "--jobs", "inference", "--modes", "fp32"])
    assert sorted(content["contests"][0]["seconds"]) == ["resbackbone", "resbackbone, fused"]
    text = Path("out/benchmark.md").read_text()
    assert "| **resbackbone** |" in text and "| ratio of" not in text
    assert all(f"Not measured: {name}, which is not installed." in text for name in benchmark.PEERS)


def test_a_machine_with_little_installed_can_time_networks():
    absent = ("huggingface_hub", "matplotlib", "tensorboard", "timm", "detectron2")
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); from resbackbone.tools import benchmark"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "argv, said",
    [
        (
            ["--jobs", "training", "trainign"],
            "unknown job 'trainign'; choose from training, detector-training, imagenet, ",
        ),
        (["--modes", "fp16"], "unknown mode of training on cpu 'fp16'; choose from fp32, fp32-channels-last, bf16-"),
        (["--depth", "20"], "unknown depth 20; choose from 18, "),
        (["--rounds", "0"], "--rounds 0: must be at least 1"),
        (["--batch-sizes", "2", "0"], "--batch-sizes 0: must be at least 1"),
        (["--modes", "tf32-channels-last"], "unknown mode of training on cpu 'tf32-channels-last'; choose from fp32"),
        (["--device", "tpu"], "unknown device 'tpu'"),
    ],
)
def test_what_cannot_be_done_is_one_line(argv, said):
    assert said in error_line(benchmark.main, argv)


@pytest.fixture
def quick(monkeypatch, without_memory):
    """Makes `run` the only contender of the only job, "quick"."""

    def make(run):
        job = contest.Job("Quick", ("resbackbone",), lambda work, name: contest.Contender(run), ("fp32",))
        monkeypatch.setattr(benchmark, "JOBS", {"quick": job})

    return make


def test_an_interrupted_run_writes_what_it_has(quick):
    runs = iter(range(16))  # a contest of 3 rounds makes a first run, one that tells the repeats, and two a round

    def run():
        time.sleep(0.02)
        if next(runs) == 13:
            assert len(content_of()["contests"]) == 1  # written before the next contest begins
            raise KeyboardInterrupt
        return {}

    quick(run)
    with pytest.raises(SystemExit) as exit:
        main_of(lambda: benchmark.main([*TINY, "--batch-sizes", "1", "2", "--rounds", "3"]))
    assert exit.value.code == 130
    assert [len(result["seconds"]["resbackbone"]) for result in content_of()["contests"]] == [3, 1]
    assert Path("out/benchmark.md").read_text().count("| **resbackbone** |") == 2


def test_what_no_longer_fits_the_budget_is_left_out_and_said(quick):
    quick(lambda: time.sleep(0.6) or {})
    content = benchmark.main([*TINY, "--batch-sizes", "1", "2", "--rounds", "3", "--budget", "1"])
    assert len(content["contests"]) == len(content["contests"][0]["seconds"]["resbackbone"]) == 1
    assert content["skipped"][-1] == "quick, fp32, 2 images: the budget is spent"
    assert "Not measured: quick, fp32, 2 images: the budget" in Path("out/benchmark.md").read_text()


@pytest.mark.parametrize(
    "job, size, modes",
    [
        ("detector-training", 16, ["fp32", "tf32-channels-last", "bf16-channels-last"]),
        ("imagenet", 256, ["bf16-channels-last", "bf16-compiled"]),
    ],
)
def test_each_batch_size_and_mode_is_a_contest_of_its_own(job, size, modes, monkeypatch):
    monkeypatch.setattr(benchmark, "choose_device", str)
    found = benchmark.contests_of(benchmark.Options((job,), batch_sizes=(1, size), device="cuda:1"))
    assert [(work.batch_size, work.mode) for _, work in found] == [(s, mode) for s in (1, size) for mode in modes]
    assert {name for name, _ in benchmark.contests_of(benchmark.Options())} == {*benchmark.JOBS} - {"imagenet"}


def test_a_compiled_network_is_compared_and_not_counted(monkeypatch, without_memory):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    names, work = ["resbackbone", "torchvision"], replace(SMALL, mode="bf16-compiled")
    result = measured(names, lambda _, name: networks.backbone(True, work, name), tolerance=0.03)
    assert not result["failed"] and not result["saved_bytes"] and len(result["seconds"]["resbackbone"]) == 3
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

    result = {"saved_bytes": {}}
    contest.inspect(contest.Contender(run, module), "any", result, on_gpu=False)
    assert result["saved_bytes"] == {"any": 3 * 4000}


def test_ours_keeps_no_more_for_backward_than_the_others():
    result = {"saved_bytes": {}}
    for name in ("resbackbone", "torchvision"):
        contest.inspect(networks.backbone(True, SMALL, name), name, result, on_gpu=False)
    assert 0 < result["saved_bytes"]["resbackbone"] <= result["saved_bytes"]["torchvision"]


def measured(names, build, **fields):
    """The result of a contest of three rounds."""
    result = contest.empty_result("quick", SMALL, names)
    contest.measure(contest.Job("", tuple(names), build, ("fp32",), **fields), SMALL, result, rounds=3)
    return result


def that_output(outputs, **runs):
    """Builds contenders that output these numbers, or call what is given for their name."""

    def build(work, name):
        return contest.Contender(runs.get(name, lambda: {"x": torch.tensor(outputs[name])}))

    return build


def test_a_contender_that_differs_is_left_out_and_those_that_agree_are_timed(without_memory):
    result = measured(
        ("resbackbone", "torchvision", "timm"), that_output({"resbackbone": 1.0, "torchvision": 1.5, "timm": 1.0})
    )
    assert set(result["seconds"]) == {"resbackbone", "timm"} and set(result["failed"]) == {"torchvision"}
    assert result["difference"]["torchvision"] == 0.5
    result = measured(("resbackbone", "torchvision"), that_output({"resbackbone": 1.0, "torchvision": 1.5}))
    assert not result["seconds"] and result["failed"]["resbackbone"] == "no other package agrees with it"


@pytest.mark.parametrize(  # in its first run; in the second round, after one that tells the repeats
    "name, fails_at", [("resbackbone", 1), ("timm", 5)]
)
def test_a_contender_out_of_memory_does_not_lose_the_others(name, fails_at, without_memory):
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


def test_a_ratio_is_to_the_fastest_other_package_round_by_round():
    seconds = {
        "resbackbone": [1.0, 2.0, 3.0],
        "resbackbone, fused": [0.1, 0.1, 0.1],
        "torchvision": [9.0, 9.0, 9.0],
        "timm": [2.0, 8.0, 4.0],
    }
    result = {**contest.empty_result("training", SMALL, list(seconds)), "seconds": seconds}
    rows = {row.name: row for row in report.rows_of(result)}
    assert list(rows) == result["names"] and rows["resbackbone"].seconds == 2.0
    assert rows["resbackbone"].ratio == pytest.approx([0.375, 0.5, 0.625])  # of 1/2, 2/8 and 3/4
    assert rows["timm"].ratio == [1, 1, 1]
    assert "| 1 | fp32 | timm | 4 s | 0.25 | 1 |" in report.table([result])
    with_runtime = {**result, "names": [*seconds, "openvino"], "seconds": {**seconds, "openvino": [1.0, 1.0, 2.0]}}
    ours, *_, timm, openvino = report.rows_of(with_runtime)
    assert (ours.ratio, timm.ratio) == (rows["resbackbone"].ratio, [1, 1, 1])  # no reference, however fast it is
    assert openvino.ratio == pytest.approx([0.3125, 0.5, 0.5])  # of 1/2, 1/8 and 2/4


@pytest.mark.parametrize("build", [networks.backbone, detectors.contender])
@pytest.mark.parametrize("name", ["resbackbone", "resbackbone, fused", "torchvision"])
def test_memory_that_is_freed_is_kept_in_the_turns_of_a_fused_network_alone(build, name, monkeypatch):
    events = []
    monkeypatch.setattr(contest, "keep_freed_memory", events.append)
    contender = build(False, SMALL, name)._replace(run=lambda: events.append("run"))
    turn = contest.timed(contender)
    events.clear()
    turn()
    assert events[:2] == [name == "resbackbone, fused", "run"] and {*events[2:]} == {"run"}  # the first is not timed


class Allocating:
    """Contenders that take 64 MB for a moment."""

    def __call__(self):
        return contest.Contender(lambda: torch.ones(16 * 2**20).sum())


@pytest.mark.skipif(not machine.CLEAR.exists(), reason="only Linux tells the peak of a process")
def test_memory_is_what_a_run_adds_at_most():
    assert 64 <= machine.peak_in_fresh_process(Allocating()) / 2**20 < 110  # and what allocators round
    peak = machine.peak_in_fresh_process(partial(networks.backbone, True, SMALL, "resbackbone"))
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
    assert detector.model.device.type == "meta"


def test_the_tables_on_the_benchmark_page_are_those_of_the_measured_run():
    page = (ROOT / "docs" / "benchmarks.md").read_text().splitlines()
    newest = max((ROOT / "docs" / "benchmarks").glob("20*-cpu.json"))
    results = json.loads(newest.read_text())["contests"]
    measured, newer = {result["job"] for result in results}, {"imagenet", "pyramid-inference"}
    assert benchmark.JOBS.keys() - newer <= measured <= benchmark.JOBS.keys()
    for result in results:
        assert {*report.table([result])} <= {*page}, result["job"]


def test_the_ratios_of_the_other_processor_are_those_of_its_run():
    page = " ".join((ROOT / "docs" / "benchmarks.md").read_text().split())
    results = json.loads((ROOT / "docs" / "benchmarks" / "2026-11-23-cpu.json").read_text())["contests"]
    for mode in ("bf16-channels-last", "fp32"):
        contests = [result for result in results if result["job"] in benchmark.JOBS and result.get("mode") == mode]
        ratios = [f"{report.rows_of(result)[0].ratio[1]:.2f}" for result in contests]
        assert f"{', '.join(ratios[:3])} and {ratios[3]} in the" in page, ratios
