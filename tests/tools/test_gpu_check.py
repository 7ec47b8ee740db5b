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
from pathlib import Path

import pytest
import torch

from resbackbone.tools import gpu_check
from resbackbone.tools.benchmarks import contest

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "gpu_check.py"
equality, records, runs, speed, steps = (
    importlib.import_module(f"resbackbone.tools.gpu_checks.{name}")
    for name in ("equality", "record", "runs", "speed", "steps")
)
Record, Setting = records.Record, records.Setting


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
        ([], "--device cuda:0: this torch finds no GPU"),
        (["--device", "cuda:99"], "--device cuda:99: this "),
        (["--device", "tpu"], "unknown device 'tpu'; choose from cuda, cpu, mps"),
    ],
)
def test_a_device_that_there_is_not_is_one_line(words, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(bool(words)))
    with pytest.raises(SystemExit) as exit:
        gpu_check.main(words)
    assert exit.value.code.startswith(f"error: {said}") and "\n" not in exit.value.code
    assert "--device cpu runs" in exit.value.code
    assert not Path("runs").exists()


def test_parts_that_a_cpu_can_do_run_end_to_end_and_are_written_down(tmp_path):
    asked = ["machine", "waits"]
    run = ran("--device", "cpu", "--parts", *asked, "--output", tmp_path / "out")
    assert run.returncode == 0, run.stdout + run.stderr
    content = content_of(tmp_path / "out")
    assert list(content["parts"]) == asked
    assert [found["status"] for found in content["parts"].values()] == ["ok", "skipped"]
    assert content["parts"]["waits"]["reason"] == "needs a GPU"
    assert content["parts"]["machine"]["rows"][0]["value"] == "all works"
    assert any("torchvision operators" in line for line in content["parts"]["machine"]["details"]["doctor"])
    assert content["machine"]["commit"] and content["machine"]["versions"]["torch"] and content["seconds"] > 1
    lines = run.stdout.splitlines()
    assert lines[0].startswith("machine: ok, ") and lines[-2] == "nothing wrong was found; skipped: waits"
    text = (tmp_path / "out" / "gpu_check.md").read_text()
    assert "### machine: ok" in text and "| doctor | all works | " in text and content["machine"]["commit"] in text
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"gpu_check.json", "gpu_check.md"}


@pytest.mark.slow
def test_everything_that_a_cpu_can_do_runs_end_to_end_where_the_package_is_not_installed(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(torch.__file__).parents[1])}  # an editable install is not found
    words = ["--device", "cpu", "--minutes", "30", "--output", tmp_path / "out"]
    run = ran(*words, python=sys._base_executable, env=environment, timeout=1800)
    assert run.returncode == 0, run.stdout + run.stderr
    parts = content_of(tmp_path / "out")["parts"]
    assert {name for name, found in parts.items() if found["status"] == "ok"} == {*gpu_check.PARTS} - {"waits"}
    rows = parts["equality"]["rows"]
    assert len(rows) > 15 and all(row["ok"] is not False for row in rows)


@pytest.mark.parametrize(
    "signal_number",
    [signal.SIGINT, *(pytest.param(other, marks=pytest.mark.slow) for other in (signal.SIGTERM, signal.SIGHUP))],
)
def test_ctrl_c_leaves_what_is_done_and_no_process(tmp_path, signal_number):
    if signal.getsignal(signal_number) == signal.SIG_IGN:
        pytest.skip(f"{signal_number!r} is ignored here, as under nohup")
    words = ["--device", "cpu", "--parts", "machine", "resume", "ranks", "--output", str(tmp_path)]
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


@pytest.mark.parametrize("part", gpu_check.PARTS)
def test_every_part_has_its_function(part):
    assert gpu_check.function_of(part).__doc__


# Parts that go wrong


@pytest.fixture
def parts(monkeypatch, tmp_path):
    """Makes a part of a function, to be run in this process: its name to what has been recorded."""

    def run(function):
        monkeypatch.setattr(gpu_check, "function_of", lambda part: function)
        status = gpu_check.run_part(Setting("fake", "cpu", tmp_path))
        return status, json.loads((tmp_path / "record.json").read_text())

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
        (torch.OutOfMemoryError("CUDA out of memory"), "failed", "OutOfMemoryError: CUDA out of memory"),
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


SCRIPTS = {  # what stands in for a part's process; argv: its record
    "fine": "write('ok')",
    "crashes": "print('Fatal: segmentation'); os.kill(os.getpid(), signal.SIGSEGV)",
    "hangs": "write('unfinished'); subprocess.Popen(['sleep', '1000', sys.argv[1]]); time.sleep(1000)",
}
PREFACE = """
import json, os, signal, subprocess, sys, time
def write(status):
    content = {"status": status, "rows": [{"what": "before", "value": 1, "wanted": "", "ok": None}], "details": {}}
    open(sys.argv[1], "w").write(json.dumps(content))
"""


@pytest.fixture
def scripted(monkeypatch, tmp_path):
    """Runs scripts as parts; returns what is recorded of each."""

    def command_of(part, device, folder, seconds):
        return [sys.executable, "-c", PREFACE + SCRIPTS[part], folder / "record.json"]

    def run(*names, seconds=60.0):
        deadline = time.monotonic() + seconds
        found = {
            name: gpu_check.isolated(name, "cpu", tmp_path / name, deadline - time.monotonic(), []) for name in names
        }
        assert not subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True).stdout.split()
        return found

    monkeypatch.setattr(gpu_check, "command_of", command_of)
    monkeypatch.setattr(gpu_check, "SHORTEST", 1)
    return run


def test_a_part_that_crashes_is_recorded_with_what_it_said_and_the_next_one_starts(scripted):
    found = scripted("crashes", "fine")
    assert [one["status"] for one in found.values()] == ["failed", "ok"]
    assert found["crashes"]["reason"] == f"its process ended with {-signal.SIGSEGV}"
    assert "Fatal: segmentation" in found["crashes"]["traceback"]


def test_a_part_that_hangs_is_stopped_with_all_that_it_started_and_keeps_its_rows(scripted, monkeypatch):
    monkeypatch.setattr(gpu_check, "LIMIT", 0.5)
    found = scripted("hangs", "fine")
    assert [one["status"] for one in found.values()] == ["timed out", "ok"]
    assert found["hangs"]["reason"] == "stopped after 2 s" and found["hangs"]["rows"][0]["what"] == "before"


def test_what_the_time_does_not_suffice_for_is_no_fault(scripted):
    found = scripted("hangs", "fine", seconds=3)
    assert [one["status"] for one in found.values()] == ["out of time", "out of time"]
    assert found["hangs"]["rows"] and found["fine"]["reason"] == "not started"
    assert gpu_check.summary({"parts": found}) == "nothing wrong was found; out of time: hangs, fine"
    assert not {"out of time", "skipped", "ok"} & set(gpu_check.BAD)


def test_batches_are_smaller_on_a_gpu_of_little_memory(monkeypatch):
    class Card:
        total_memory = records.ENOUGH / 4

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    assert Setting("waits", "cuda:0", Path()).batches(1, 2, 16, 256) == [1, 2, 4, 64]


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


# What the parts find


@pytest.mark.parametrize("subject", equality.SUBJECTS)
def test_in_fp32_a_cpu_is_as_near_to_fp64_as_a_gpu_has_to_be(subject):
    assert 0 < equality.error_of(subject, "cpu", torch.float32) <= equality.LIMITS[torch.float32]


@pytest.mark.parametrize("subject", ["RoIAlign", "FPN maps", "detections"])
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


def test_waits_are_counted_by_the_line_that_waits(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)

    def step():
        warnings.warn("Synchronization debug mode does not yet detect all synchronizing operations", stacklevel=1)
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    [(line, count)] = steps.waits_of(step).items()
    assert count == 2 and re.fullmatch(r"tests/tools/test_gpu_check\.py:\d+", line)


def test_a_profile_has_the_time_of_a_step_and_the_operators_in_it(record, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "WARM_UP", 1)
    monkeypatch.setattr(steps, "STEPS", 1)
    steps.profiled(Setting("profile", "cpu", tmp_path), record)
    assert [row["what"] for row in record.content["rows"]] == ["2 images: a step", "2 images: waiting for data"]
    assert any("aten::" in line for line in record.content["details"]["2 images: profile"])


def test_a_time_stands_beside_that_of_the_fastest_other_package(record):
    seconds = {"resbackbone": [2.0], "torchvision": [4.0], "timm": [5.0]}
    work = contest.Workload("fp32", "cpu", 18, 64, 96, 1)
    result = contest.empty_result("inference", work, [*seconds, "detectron2"])
    speed.add_rows(result | {"failed": {"detectron2": "OutOfMemoryError: no"}, "seconds": seconds}, record)
    assert [(row["what"], row["value"], row["ok"]) for row in record.content["rows"]] == [
        ("inference, fp32, 1 image: resbackbone", "2000 ms, 0.50 of torchvision's", None),
        ("inference, fp32, 1 image: torchvision", "4000 ms, 1.00 of torchvision's", None),
        ("inference, fp32, 1 image: timm", "5000 ms, 1.25 of torchvision's", None),
        ("inference, fp32, 1 image: detectron2: OutOfMemoryError: no", "failed", False),
    ]


MEASURED = sorted((ROOT / "docs" / "benchmarks").glob("gpu_check-*.json"))


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.name)
def test_a_committed_table_is_that_of_its_json_and_of_a_commit_as_it_was(path):
    content = json.loads(path.read_text())
    assert path.with_suffix(".md").read_text() == gpu_check.markdown(content)
    assert re.fullmatch("[0-9a-f]{12}", content["machine"]["commit"])
