"""tools/gpu_check.py: parts in processes of their own, whatever becomes of them; and what the parts find."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from commands import CIFAR, differing, metrics
from safetensors.torch import save_file

from resbackbone.tools import gpu_check, train_cifar10
from resbackbone.tools.benchmarks import contest

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "gpu_check.py"
cifar, equality, peers, records, runs, steps = (
    importlib.import_module(f"resbackbone.tools.gpu_checks.{name}")
    for name in ("cifar", "equality", "peers", "record", "runs", "steps")
)
Part, Record, Setting = gpu_check.Part, records.Record, records.Setting


@pytest.fixture
def setting(tmp_path):
    (tmp_path / "scratch").mkdir()
    return Setting("cpu", True, tmp_path, tmp_path / "scratch")


@pytest.fixture
def record(tmp_path):
    return Record(tmp_path / "record.json")


def ran(*words, python=sys.executable, **options):
    command = [python, TOOL, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, **{"timeout": 300, **options})


def content_of(folder):
    return json.loads((folder / "gpu_check.json").read_text())


# The command


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "--device cuda: this torch finds no GPU"),
        (["--device", "cuda:99"], "--device cuda:99: this "),
        (["--device", "tpu"], "unknown device 'tpu'; choose from cuda, cpu, mps"),
        (["cifar", "--device", "cpu"], "cifar needs --data DIR"),
    ],
)
def test_a_wrong_option_is_one_line(words, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(bool(words)))
    with pytest.raises(SystemExit) as exit:
        gpu_check.main(words)
    assert exit.value.code.startswith(f"error: {said}") and "\n" not in exit.value.code
    assert ("--device cpu --quick" in exit.value.code) == ("device" in said)
    assert not Path("runs").exists()


@pytest.mark.parametrize("words", [["--parts", "speed"], ["--minutes", "0"], ["--minutes", "nan"], ["everything"]])
def test_an_option_that_argparse_refuses_ends_with_its_status(words):
    with pytest.raises(SystemExit) as exit:
        gpu_check.main([*words, "--device", "cpu"])
    assert exit.value.code == 2


def test_parts_that_a_cpu_can_do_run_end_to_end_and_are_written_down(tmp_path):
    asked = ["machine", "waits", "profile"]
    run = ran("--device", "cpu", "--quick", "--parts", *asked, "--output", tmp_path / "out")
    assert run.returncode == 0, run.stdout + run.stderr
    content = content_of(tmp_path / "out")
    assert list(content["parts"]) == asked
    assert [found["status"] for found in content["parts"].values()] == ["ok", "skipped", "ok"]
    assert content["parts"]["waits"]["reason"] == "needs a GPU"
    assert content["parts"]["machine"]["rows"][0]["value"] == "all works"
    assert any("torchvision roi_align" in line for line in content["parts"]["machine"]["details"]["doctor"])
    assert content["machine"]["commit"] and content["machine"]["versions"]["torch"] and content["seconds"] > 1
    lines = run.stdout.splitlines()
    assert lines[-2] == "nothing wrong was found; skipped: waits" and any(
        line.startswith("machine            ok ") for line in lines
    )
    text = (tmp_path / "out" / "gpu_check.md").read_text()
    assert "### profile: ok" in text and "| doctor | all works | " in text and content["machine"]["commit"] in text
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"gpu_check.json", "gpu_check.md"}


@pytest.mark.slow
def test_everything_that_a_cpu_can_do_runs_end_to_end_where_the_package_is_not_installed(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(torch.__file__).parents[1])}  # an editable install is not found
    words = ["--device", "cpu", "--quick", "--output", tmp_path / "out"]
    run = ran(*words, python=sys._base_executable, env=environment, timeout=1800)
    assert run.returncode == 0, run.stdout + run.stderr
    parts = content_of(tmp_path / "out")["parts"]
    skipped = {"waits", "compile"}
    assert {name for name, found in parts.items() if found["status"] == "ok"} == {*gpu_check.PARTS} - skipped
    rows = parts["equality"]["rows"]
    assert len(rows) > 20 and all(row["ok"] is not False for row in rows)


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_leaves_what_is_done_and_no_process(tmp_path, signal_number):
    if signal.getsignal(signal_number) == signal.SIG_IGN:
        pytest.skip(f"{signal_number!r} is ignored here, as under nohup")
    words = ["--device", "cpu", "--quick", "--parts", "machine", "resume", "ranks", "--output", str(tmp_path)]
    process = subprocess.Popen([sys.executable, TOOL, *words], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("machine: ok")
    time.sleep(3)
    process.send_signal(signal_number)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    assert [found["status"] for found in content_of(tmp_path)["parts"].values()] == ["ok", "interrupted", "interrupted"]
    assert "look at: resume, ranks" in said and (tmp_path / "gpu_check.md").exists()
    left = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True).stdout
    assert not left.split()


@pytest.mark.parametrize("part", [*gpu_check.PARTS, *gpu_check.CIFAR])
def test_every_part_has_its_function(part):
    assert gpu_check.function_of(part).__doc__


# Parts that go wrong


@pytest.fixture
def parts(monkeypatch, tmp_path):
    """Makes a part of a function, to be run in this process: its name to what has been recorded."""

    def run(function):
        monkeypatch.setattr(gpu_check, "function_of", lambda part: function)
        words = {"device": "cpu", "quick": True, "output": str(tmp_path), "scratch": str(tmp_path)}
        status = gpu_check.run_part("fake", json.dumps(words))
        return status, json.loads((tmp_path / ".fake.json").read_text())

    return run


def test_a_part_is_ok_if_no_row_differs(parts):
    def check(setting, record):
        record.at_most("error", 1e-6, 1e-4)
        record.row("a step", "12 ms")
        record.detail("kernels", {"nms": 3})

    status, found = parts(check)
    assert (status, found["status"]) == (0, "ok") and found["details"] == {"kernels": {"nms": 3}}
    assert found["rows"][0] == {"what": "error", "value": 1e-6, "wanted": "at most 0.0001", "ok": True}


@pytest.mark.parametrize("value", [2e-4, float("nan"), float("inf")])
def test_a_part_differs_if_a_value_is_beyond_its_limit(parts, value):
    status, found = parts(lambda setting, record: record.at_most("error", value, 1e-4))
    assert (status, found["status"]) == (1, "differs")


@pytest.mark.parametrize(
    "error, status, reason",
    [
        (RuntimeError("no\nkernel image"), "failed", "RuntimeError: no kernel image"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory", "OutOfMemoryError: CUDA out of memory"),
        (RuntimeError("train_coco ended with 1: error: CUDA out of memory. Tried"), "out of memory", "RuntimeError"),
        (ModuleNotFoundError("No module named 'tyro'", name="tyro"), "skipped", "No module named 'tyro'"),
    ],
)
def test_what_ends_a_part_is_recorded_beside_its_rows(parts, error, status, reason):
    def check(setting, record):
        record.row("before", 1)
        raise error

    code, found = parts(check)
    assert (code, found["status"]) == (int(status != "skipped"), status) and found["reason"].startswith(reason)
    assert found["rows"][0]["what"] == "before"
    assert ("traceback" in found) == (status != "skipped") and "check" in found.get("traceback", "check")


SCRIPTS = {  # what stands in for a part's process; argv: its record, the share of batch sizes
    "fine": "write('ok')",
    "crashes": "print('Fatal: segmentation'); os.kill(os.getpid(), signal.SIGSEGV)",
    "hangs": "write('unfinished'); subprocess.Popen(['sleep', '1000', sys.argv[1]]); time.sleep(1000)",
    "full": "write('out of memory')",
    "share": "write('ok', sys.argv[2])",
}
PREFACE = """
import json, os, signal, subprocess, sys, time
def write(status, value=None):
    content = {"status": status, "rows": [{"what": "share", "value": value, "wanted": "", "ok": None}], "details": {}}
    open(sys.argv[1], "w").write(json.dumps(content))
"""


@pytest.fixture
def scripted(monkeypatch):
    def start(name, part, setting, left):
        file, log = setting.output / f".{name}.json", setting.output / f".{name}.log"
        argv = [sys.executable, "-c", PREFACE + SCRIPTS[name.split("-")[0]], file, str(setting.share)]
        with open(log, "wb") as said:
            process = subprocess.Popen(argv, stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
        return gpu_check.Running(name, process, file, log, min(part.seconds, left), by_deadline=left < part.seconds)

    monkeypatch.setattr(gpu_check, "start", start)
    monkeypatch.setattr(gpu_check, "SHORTEST", 1)


def results(setting, *names, seconds=5, minutes=1.0):
    deadline = time.monotonic() + 60 * minutes
    found = dict(gpu_check.run({name: Part("", seconds) for name in names}, setting, deadline))
    assert not subprocess.run(["pgrep", "-f", str(setting.output)], capture_output=True, text=True).stdout.split()
    return found


def test_a_part_that_crashes_is_recorded_with_what_it_said_and_the_next_one_starts(setting, scripted):
    found = results(setting, "crashes", "fine")
    assert [one["status"] for one in found.values()] == ["failed", "ok"]
    assert found["crashes"]["reason"] == f"its process ended with {-signal.SIGSEGV}"
    assert "Fatal: segmentation" in found["crashes"]["traceback"]


def test_a_part_that_hangs_is_stopped_with_all_that_it_started_and_keeps_its_rows(setting, scripted):
    found = results(setting, "hangs", "fine", seconds=2)
    assert [one["status"] for one in found.values()] == ["timed out", "ok"]
    assert found["hangs"]["reason"] == "stopped after 2 s" and found["hangs"]["rows"][0]["what"] == "share"


def test_after_a_part_that_ran_out_of_memory_batches_are_half_as_large(setting, scripted):
    found = results(setting, "share-1", "full-1", "share-2", "full-2", "share-3")
    assert [found[f"share-{i}"]["rows"][0]["value"] for i in (1, 2, 3)] == ["1.0", "0.5", "0.25"]
    assert Setting("cuda", True, Path(), Path(), share=0.25).batches(1, 2, 16, 256) == [1, 4, 64]


def test_what_the_time_does_not_suffice_for_is_no_fault(setting, scripted):
    found = results(setting, "hangs", "fine", minutes=3 / 60)
    assert [one["status"] for one in found.values()] == ["out of time", "out of time"]
    assert found["hangs"]["rows"] and found["fine"]["reason"] == "not started"
    content = {"parts": {name: {"seconds": 0, "reason": "", **one} for name, one in found.items()}}
    assert gpu_check.table(content).endswith(
        "nothing wrong was found; there was no time for hangs, fine (--minutes, --parts)"
    )
    assert not {"out of time", "skipped", "ok"} & set(gpu_check.BAD)


def test_processes_in_sessions_of_their_own_are_killed_too():
    code = "import subprocess, time; other = subprocess.Popen(['sleep', '1000'], start_new_session=True); "
    code += "print(other.pid, flush=True); time.sleep(1000)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(process.stdout.readline())
    gpu_check.kill_descendants(process.pid)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()


def test_parts_run_together_only_where_their_times_do_not_count():
    parts = {"a": Part("", 1), "b": Part("", 1, alone=False), "c": Part("", 1, alone=False), "d": Part("", 1)}
    assert gpu_check.grouped(parts, side_by_side=True) == [["a"], ["b", "c"], ["d"]]
    assert gpu_check.grouped(parts, side_by_side=False) == [["a"], ["b"], ["c"], ["d"]]


# What the parts find


@pytest.mark.parametrize("subject", equality.SUBJECTS)
def test_in_fp32_a_cpu_is_as_near_to_fp64_as_a_gpu_has_to_be(subject):
    assert 0 < equality.error_of(subject, "cpu", torch.float32) <= equality.LIMITS[torch.float32]


@pytest.mark.parametrize("subject", ["sum_cells", "RoIAlign", "FPN maps", "detections"])
def test_an_operator_that_computes_something_else_is_noticed(subject, monkeypatch):
    bag, conv2d = torch.nn.functional.embedding_bag, torch.nn.functional.conv2d

    def off(x):
        return 1 if x.dtype == torch.float64 else 1.001

    equality._reference(subject)
    monkeypatch.setattr(
        torch.nn.functional, "embedding_bag", lambda i, x, *a, **options: bag(i, x, *a, **options) * off(x)
    )
    monkeypatch.setattr(torch.nn.functional, "conv2d", lambda x, *arguments: conv2d(x, *arguments) * off(x))
    assert equality.error_of(subject, "cpu", torch.float32) > equality.LIMITS[torch.float32]


def test_detections_that_are_compared_are_some():
    found = equality.detections(equality.Maker("cpu", torch.float32))
    assert len(found) == 2 and all(len(of_image["boxes"]) > 5 for of_image in found)


def test_in_bf16_the_errors_are_between_torchvisions_in_bf16_and_with_fp32_activations():
    errors = equality.bf16_errors("cpu", 18)
    for name, own in errors["resbackbone"].items():
        assert errors["torchvision, autocast"][name] * 0.9 < own < errors["torchvision"][name]


def test_a_compiled_backbone_is_compared_with_the_eager_one():
    assert equality.compiled_error("cpu", backend="aot_eager") < 1e-5


def test_waits_are_counted_by_our_line_and_the_line_that_waits(setting, monkeypatch):
    def warned(sample):
        def call(self, labels):
            if self.positive_fraction == 0.5:  # the RPN's
                warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
            return sample(self, labels)

        return call

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    training, found = steps.Training(setting, 2), Counter()
    with steps.count_waits(found):
        warnings.warn("Synchronization debug mode does not yet detect all synchronizing operations", stacklevel=1)
        waiting = training.state.model.rpn.fg_bg_sampler
        monkeypatch.setattr(type(waiting), "__call__", warned(type(waiting).__call__))
        training.step()
    (line,) = found
    assert found.total() == 1 and re.fullmatch(r"detection/rpn\.py:\d+, in tests/tools/test_gpu_check\.py:\d+", line)


def test_busy_time_counts_overlapping_kernels_once():
    assert steps.covered([("a", 0.0, 2.0), ("b", 1.0, 3.0), ("c", 1.5, 1.75), ("d", 5.0, 6.0)]) == 4.0
    assert steps.covered([]) == 0.0


def test_a_resumed_run_with_other_images_or_weights_is_noticed(tmp_path, record):
    def run(name, ids, weight):
        (tmp_path / name).mkdir()
        save_file({"w": torch.tensor(weight)}, tmp_path / name / "model.safetensors")
        (tmp_path / f"{name}.ids").write_text("".join(f"{json.dumps(line)}\n" for line in ids))
        return tmp_path / name

    whole = [[step, [step * 7 % 5]] for step in range(1, 41)]
    first, same = run("whole", whole, [3.0, 4.0]), run("same", whole[:23] + whole[20:], [3.0, 4.0])
    other = run("other", whole[:23] + [[21, [99]]] + whole[21:], [3.0, 4.5])
    runs.compare("deterministic", first, same, record)
    runs.compare("deterministic", first, other, record)
    assert [row["ok"] for row in record.content["rows"]] == [True, True, False, False]
    assert record.content["rows"][3]["value"] == pytest.approx(0.1)


def test_a_time_stands_beside_that_of_the_fastest_other_package(record):
    seconds = {"resbackbone": [2.0], "resbackbone, fused": [1.0], "torchvision": [4.0], "timm": [5.0]}
    for times in (seconds, {"resbackbone": [0.002]}):
        work = contest.Workload("fp32", "cpu", 18, 64, 96, 1)
        peers.add_rows({**contest.empty_result("inference", work, list(times)), "seconds": times}, record)
    assert [(row["what"], row["value"]) for row in record.content["rows"]] == [
        ("inference, 1 images, fp32", "2000 ms, 0.50 of torchvision's"),
        ("inference, 1 images, fp32, fused", "1000 ms, 0.25 of torchvision's"),
        ("inference, 1 images, fp32", "2 ms"),
    ]


@pytest.fixture
def cifar_trained(monkeypatch, few_synthetic_images):
    """Trains a net of so many updates as the part cifar does, in ./graph, with `stretch` updates drawn at once."""

    def train(steps, stretch, seconds):
        monkeypatch.setattr(cifar, "STRETCH", stretch)
        options = train_cifar10.Options(
            data=Path("synthetic"), steps=steps, batch_size=8, device="cpu", precision="fp32"
        )
        data = cifar.cifar10.open_cifar10("synthetic")
        return cifar.train(train_cifar10.complete(options), Path("graph"), data, until=time.monotonic() + seconds)

    return train


def test_cifar_trains_as_train_cifar10_does(cifar_trained):
    found = cifar_trained(10, stretch=4, seconds=100)
    train_cifar10.main([*CIFAR, "--steps", "10", "--output", "loop"])
    assert differing("graph/model.safetensors", "loop/model.safetensors") == []
    assert found["updates"] == 10 and found["error"] == json.loads(Path("loop/results.json").read_text())["error"]
    losses = [line["loss"] for line in metrics(Path("loop"))]
    ends = [line["step"] for line in metrics(Path("graph"))]
    assert {4, 5, 7, 8, 10} <= set(ends) and ends[-1] == 10  # the rate drops at 5 and at 7
    counts = [end - begin for begin, end in pairwise([0, *ends])]
    total = sum(line["loss"] * count for line, count in zip(metrics(Path("graph")), counts, strict=True))
    assert total == pytest.approx(sum(losses), rel=1e-5)


def test_cifar_stops_a_net_that_would_not_be_done_in_time(cifar_trained):
    found = cifar_trained(1000, stretch=2, seconds=1)
    assert found["error"] is None and 6 <= found["updates"] < 1000 and not Path("graph/model.safetensors").exists()


def test_the_command_passes_cifar_its_data(tmp_path):
    run = ran("cifar", "--data", "synthetic", "--device", "cpu", "--quick", "--output", tmp_path)
    assert run.returncode == 0, run.stdout
    rows = content_of(tmp_path)["parts"]["cifar"]["rows"]
    assert [row["what"] for row in rows] == ["images", "resnet-20", "plain-20"] and "test error" in rows[1]["value"]


MEASURED = sorted((ROOT / "docs" / "benchmarks").glob("gpu_check-*.json"))


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.name)
def test_a_committed_table_is_that_of_its_json_and_of_a_commit_as_it_was(path):
    content = json.loads(path.read_text())
    assert path.with_suffix(".md").read_text() == gpu_check.markdown(content)
    assert re.fullmatch("[0-9a-f]{12}", content["machine"]["commit"])
