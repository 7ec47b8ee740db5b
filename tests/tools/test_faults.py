"""What happens to a training that is terminated, restarted, damaged or started twice; tools/soak.py does more of it."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import CIFAR, SIX_STEPS, TOOLS
from safetensors.torch import load_file, save_file

from detection.shapes import make_shapes
from resbackbone.cli.command import main_of, resume_command
from resbackbone.engine.checkpoints import checkpoints, step_of
from resbackbone.engine.lock import LOCK
from resbackbone.engine.state import TrainState
from resbackbone.engine.termination import EXIT_STATUS, Terminated
from resbackbone.tools import soak, train_cifar10
from resbackbone.tools.soaking import subject

pytestmark = pytest.mark.usefixtures("few_synthetic_images")


@pytest.fixture
def alone(six_steps_left_alone):
    return six_steps_left_alone


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def signalled(monkeypatch):
    """Lets SIGTERM, or another signal, arrive in the middle of update or evaluation number `at`, counted from 1."""

    def arrange(owner, name, at, number=signal.SIGTERM):
        original, calls = getattr(owner, name), []

        def called(*arguments, **options):
            calls.append(1)
            if len(calls) == at:
                os.kill(os.getpid(), number)
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, called)

    return arrange


@pytest.fixture
def differences(alone):
    """From the run left alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subject, "STEPS", 6)
        yield lambda run: subject.differences(run, alone)


@pytest.mark.parametrize(
    "number, status, word", [(signal.SIGTERM, 0, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
@pytest.mark.parametrize(
    "owner, name, at, step",
    [(TrainState, "update", 1, 1), (TrainState, "update", 5, 5), (train_cifar10, "test", 1, 3)],
    ids=["in the first update", "in a later one", "in an evaluation"],
)
def test_sigterm_and_ctrl_c_save_and_the_command_they_print_goes_on_as_if_left_alone(
    run, differences, signalled, monkeypatch, capsys, owner, name, at, step, number, status, word
):
    signalled(owner, name, at, number)
    monkeypatch.setattr("sys.argv", ["resbackbone-train-cifar10"])
    with pytest.raises(SystemExit) as stopped:
        main_of(lambda: train_cifar10.main([*SIX_STEPS, "--output", str(run)]))
    monkeypatch.undo()
    assert stopped.value.code == status
    said = capsys.readouterr().err.splitlines()[-1]
    command = f"resbackbone-train-cifar10 --output {run} --resume"
    assert said == f"{word} at step {step}, which is saved; continue with: {command}"
    assert checkpoints(run)[-1].name == f"step_{step:07d}"
    signalled(train_cifar10, "open_cifar10", 1, number)  # a resumed run, before it trains
    with pytest.raises(Terminated) as stopped:
        train_cifar10.main(shlex.split(command)[1:])
    assert stopped.value.code == status and f"{word} at step {step}, which is saved" in str(stopped.value)
    monkeypatch.undo()
    train_cifar10.main(shlex.split(command)[1:])
    assert differences(run) == []


@pytest.mark.skipif(sys.platform == "win32", reason="a terminal's Ctrl-C goes to a process group")
@pytest.mark.parametrize("pipe", ["| cat", "2>&1 | cat"])
def test_ctrl_c_saves_a_training_whose_output_goes_to_a_command_that_it_ends(run, pipe):
    argv = [sys.executable, str(TOOLS / "train_cifar10.py"), *CIFAR, "--steps", "5000", "--log-period", "1"]
    line = f"{shlex.join([*argv, '--output', str(run)])} {pipe}; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(["bash", "-c", f"trap : INT; {line}"], start_new_session=True, env=environment, **quiet)
    subject.wait_for(lambda: subject.last_step(run) >= 2, process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    assert step_of(checkpoints(run)[-1]) >= 2


def test_a_command_starts_again_as_it_was_started(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.orig_argv", [".venv/bin/python", "tools/train_coco.py", "--depth", "18"])
    monkeypatch.setattr("sys.argv", ["tools/train_coco.py", "--depth", "18"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tools").mkdir()
    assert resume_command(Path("a b")) == ".venv/bin/python tools/train_coco.py --output 'a b' --resume"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert resume_command(Path("a")) == "torchrun .. tools/train_coco.py --output a --resume"
    monkeypatch.setattr("sys.argv", ["/usr/lib/ipykernel_launcher.py", "-f", "kernel.json"])
    assert resume_command(Path("a")) == "the same with --output a --resume"


def test_sigterm_in_the_last_evaluation_exits_with_0_for_all_is_saved_and_before_training_with_143(run, signalled):
    signalled(train_cifar10, "test", 2)
    with pytest.raises(Terminated) as stopped:
        train_cifar10.main([*SIX_STEPS, "--output", str(run)])
    assert stopped.value.code == 0 and checkpoints(run)[-1].name == "step_0000006"
    signalled(train_cifar10, "open_cifar10", 1)
    with pytest.raises(Terminated) as stopped:
        train_cifar10.main([*SIX_STEPS, "--output", str(run.with_name("other"))])
    assert stopped.value.code == EXIT_STATUS
    assert not run.with_name("other").exists()


def test_sigterm_to_the_loaders_too_as_torchrun_and_schedulers_send_it_saves_and_exits_with_0(run, tmp_path):
    data = make_shapes(tmp_path / "shapes", train_images=8, val_images=1, size=64)
    argv = ["--recipe", "short", "--data", data, "--depth", "18", "--batch-size", "2", "--max-steps", "2000"]
    argv += ["--pictures", "0", "--device", "cpu", "--workers", "2", "--log-period", "1", "--output", run]
    process = subject.start_tool(["train_coco.py", *map(str, argv)], log=tmp_path / "log")
    subject.wait_for(lambda: subject.last_step(run) >= 2, process)
    assert subject.stop(process, signal.SIGTERM) == 0
    assert len(checkpoints(run)) == 1 and int(checkpoints(run)[0].name[5:]) >= 2


def test_a_run_killed_in_an_evaluation_has_it_when_it_is_resumed(run):
    def killed(*arguments, **options):
        raise MemoryError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(train_cifar10, "test", killed)
        train_cifar10.main([*SIX_STEPS, "--output", str(run), "--checkpoint-period", "3"])
    assert subject.metrics(run, "eval") == []
    train_cifar10.main([*SIX_STEPS, "--output", str(run), "--resume"])
    assert [line["step"] for line in subject.metrics(run, "eval")] == [3, 6]


def test_a_damaged_newest_checkpoint_is_said_and_the_run_goes_on_from_the_one_before(run, differences, capsys):
    train_cifar10.main([*SIX_STEPS, "--output", str(run), "--max-steps", "4"])
    file = checkpoints(run)[-1] / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 16
    file.write_bytes(content)
    capsys.readouterr()
    train_cifar10.main([*SIX_STEPS, "--output", str(run), "--resume", "--max-steps", "6"])
    said = capsys.readouterr().out
    assert "step_0000004 does not match its checksums; set aside as step_0000004.damaged" in said
    assert "resumed from step 2 to 6" in said
    assert differences(run) == []


def test_a_folder_that_another_process_writes_is_refused_and_left_as_it_is(run, six_steps_left_alone):
    run.mkdir(exist_ok=True)
    shutil.copy(six_steps_left_alone / "config.yaml", run)
    program = "import sys, time; from pathlib import Path; from resbackbone.engine.lock import lock_folder\n"
    program += "lock_folder(Path(sys.argv[1])); print(1, flush=True); time.sleep(60)"
    environment = {**os.environ, "PYTHONPATH": str(TOOLS.parent)}
    with subprocess.Popen([sys.executable, "-c", program, run], env=environment, stdout=subprocess.PIPE) as another:
        another.stdout.readline()
        before = sorted(path.name for path in run.iterdir())
        for flags in ([], ["--resume"]):
            with pytest.raises(SystemExit) as exit:
                main_of(lambda flags=flags: train_cifar10.main([*SIX_STEPS, "--output", str(run), *flags]))
            assert exit.value.code.startswith(f"error: --output {run} is being written by process {another.pid} on ")
        assert sorted(path.name for path in run.iterdir()) == before and LOCK in before
        another.kill()


@pytest.mark.slow
def test_a_worker_killed_under_torchrun_is_started_again_and_the_job_ends_as_if_left_alone(tmp_path):
    argv = ["train_cifar10.py", *CIFAR, "--steps", "40", "--checkpoint-period", "4", "--eval-period", "20"]
    for name, flags in (("alone", []), ("killed", ["--max-restarts", "1"])):
        launcher = [*subject.TORCHRUN, "2", "--standalone", *flags]
        words = [*argv, "--output", str(tmp_path / name)]
        process = subject.start_tool(words, log=tmp_path / "log", launcher=launcher)
        if name == "killed":
            subject.wait_for(lambda: subject.last_step(tmp_path / "killed") > 10, process)
            os.kill(subject.workers(process.pid)[1], signal.SIGKILL)
        assert process.wait(200) == 0
    assert subject.differences(tmp_path / "killed", tmp_path / "alone") == []


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_job_in_seconds_and_is_named(tmp_path):
    program = """
import sys, time
from resbackbone.checks import UserError
from resbackbone.engine.distributed import gather, launch

def work(rank):
    gather(0, rank)
    print("began", flush=True)
    if rank.rank == 1:
        raise UserError("no such image")
    gather(0, rank)

if __name__ == "__main__":
    from resbackbone.cli.command import main_of
    main_of(lambda: launch(work, (), device="cpu", processes=2))
"""
    (tmp_path / "program.py").write_text(program)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    began = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(TOOLS.parent), "OMP_NUM_THREADS": "1"}
    process = subprocess.run([*launcher, tmp_path / "program.py"], env=environment, capture_output=True, text=True)
    assert process.returncode == 1 and "error on rank 1: no such image" in process.stderr
    assert time.monotonic() - began < 60


def test_the_soak_names_the_faults_it_knows():
    with pytest.raises(ValueError, match="unknown fault 'fire'; choose from kill, terminate, damage, full-disk"):
        soak.main(["--faults", "fire"])


def test_what_differs_between_two_runs_is_found(alone, tmp_path, monkeypatch):
    monkeypatch.setattr(subject, "STEPS", 6)
    other = Path(shutil.copytree(alone, tmp_path / "other"))
    assert subject.differences(other, alone) == []
    lines = (other / "metrics.jsonl").read_text().splitlines()
    clocked = json.loads(lines[0]) | {"seconds": 1e9}
    (other / "metrics.jsonl").write_text("\n".join([json.dumps(clocked), *lines[1:]]))
    assert subject.differences(other, alone) == []
    (other / "metrics.jsonl").write_text("\n".join(lines[1:]))
    (other / "results.json").write_text("{}")
    weights = load_file(alone / "model.safetensors")
    save_file(
        weights | {"fc.bias": torch.nextafter(weights["fc.bias"], torch.tensor(9.0))}, other / "model.safetensors"
    )
    assert subject.differences(other, alone) == ["other/model.safetensors", "other/results.json", "other/metrics.jsonl"]
