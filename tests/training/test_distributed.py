import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from resbackbone.training.distributed import (
    Rank,
    RankShare,
    any_rank,
    broadcast,
    count_processes,
    gather,
    launch,
    native_precision,
)

ROOT = Path(__file__).parents[2]

# What each of the processes that torchrun starts runs; it writes what it saw to a file of its own.
PROGRAM = """
import json, math, sys, torch
from resbackbone.training.distributed import any_rank, broadcast, gather, launch
from resbackbone.training.errors import quick_exit
from resbackbone.training.state import NonFinite, TrainState

def work(rank, folder):
    seen = {"rank": rank.rank, "ranks": rank.ranks, "main": rank.is_main, "device": str(rank.device)}
    seen["gathered"] = gather({"from": rank.rank, "n": [rank.rank] * (rank.rank + 1)}, rank)
    seen["broadcast"] = broadcast(f"of {rank.rank}", rank)
    flags = torch.tensor([True, rank.is_main, not rank.is_main, False])
    seen["any"] = any_rank(flags, rank).tolist()

    weight = torch.nn.Parameter(torch.tensor(2.0))
    state = TrainState(torch.nn.ParameterList([weight]), torch.optim.SGD([weight], 1.0), rank)
    try:
        state.update(lambda factor: {"loss": weight * factor}, [1.0 if rank.is_main else math.nan], learning_rate=1.0)
    except NonFinite as error:
        seen["non-finite"] = str(error)
    seen["weight"] = weight.item()
    seen["stopping"] = []
    for stop in (False, not rank.is_main):
        state.update(lambda factor: {"loss": weight * factor}, [0.75], learning_rate=1.0, stop=stop)
        seen["stopping"].append(state.stopping)
    seen["weight after"] = weight.item()
    with open(f"{folder}/{rank.rank}.json", "w") as file:
        json.dump(seen, file)

if __name__ == "__main__":
    with quick_exit():
        launch(work, (sys.argv[1],), device="cpu", processes=2)
        assert not torch.distributed.is_initialized()  # the group is given back
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What the two processes of a torchrun saw."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "program.py").write_text(PROGRAM)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*torchrun, folder / "program.py", folder],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in "01"]


def test_every_process_of_torchruns_knows_its_place(seen):
    assert [(s["rank"], s["ranks"], s["main"], s["device"]) for s in seen] == [
        (0, 2, True, "cpu"),
        (1, 2, False, "cpu"),
    ]


def test_what_every_rank_has_is_gathered_at_rank_0_in_order(seen):
    assert seen[0]["gathered"] == [{"from": 0, "n": [0]}, {"from": 1, "n": [1, 1]}]
    assert seen[1]["gathered"] is None


def test_what_rank_0_has_is_broadcast_to_every_rank(seen):
    assert [s["broadcast"] for s in seen] == ["of 0", "of 0"]


def test_what_one_rank_says_every_rank_knows(seen):
    assert [s["any"] for s in seen] == [[True, True, True, False]] * 2


def test_a_wish_of_one_rank_to_stop_stops_every_rank_after_the_same_update(seen):
    assert [s["stopping"] for s in seen] == [[False, True]] * 2
    assert [s["weight after"] for s in seen] == [0.5, 0.5]


def test_a_loss_that_is_not_finite_on_one_rank_stops_every_rank_before_the_update(seen):
    assert [s["weight"] for s in seen] == [2.0, 2.0]
    assert seen[0]["non-finite"] == "step 0 is not finite: on another rank"
    assert seen[1]["non-finite"] == "step 0 is not finite: loss is nan"


def test_processes_are_spawned_without_torchrun_and_one_that_fails_ends_the_command_in_one_line(tmp_path):
    program = """
import sys
from pathlib import Path
from resbackbone.training.distributed import gather, launch

def work(rank, folder):
    everyone = gather(rank.rank, rank)
    if rank.is_main:
        Path(folder, "seen").write_text(str(everyone))
    else:
        raise ValueError("no such image")

if __name__ == "__main__":
    launch(work, (sys.argv[1],), device="cpu", processes=2)
"""
    (tmp_path / "program.py").write_text(program)
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "RESBACKBONE_DEBUG")}
    run = subprocess.run(
        [sys.executable, tmp_path / "program.py", tmp_path],
        env={**env, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (tmp_path / "seen").read_text() == "[0, 1]"
    assert run.returncode == 1
    assert "error on rank 1: no such image" in run.stderr.splitlines()
    assert "Traceback" not in run.stderr


def test_a_process_alone_gathers_broadcasts_and_agrees_with_itself():
    alone = Rank(0, 1, torch.device("cpu"))
    assert alone.is_main
    assert gather("a", alone) == ["a"]
    assert broadcast("a", alone) == "a"
    assert any_rank(torch.tensor([True, False]), alone).tolist() == [True, False]


@pytest.fixture
def no_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def with_gpus(monkeypatch, count):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_without_torchrun_the_function_is_called_right_here(no_torchrun):
    called = []
    launch(lambda rank, *arguments: called.append((rank, arguments)), (1, "b"), device="cpu", processes=1)
    assert called == [(Rank(0, 1, torch.device("cpu")), (1, "b"))]


@pytest.mark.parametrize(
    "device, gpus, there, processes",
    [("cpu", None, 0, 1), ("cpu", 1, 4, 1), ("cuda", None, 4, 4), ("cuda", 2, 4, 2), ("cuda:3", None, 4, 1)],
)
def test_processes_are_one_a_gpu_or_just_this_one(device, gpus, there, processes, no_torchrun, monkeypatch):
    with_gpus(monkeypatch, there)
    assert count_processes(device, gpus) == processes


def test_under_torchrun_its_number_counts(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert count_processes("cpu", None) == 16
    with_gpus(monkeypatch, 8)
    assert count_processes("cuda", None) == 16


@pytest.mark.parametrize(
    "device, gpus, there, message",
    [
        ("cuda", None, 0, "--device cuda: no GPU that this torch can use; python tools/doctor.py says why"),
        ("cuda", 5, 4, "--gpus 5: this machine has 4"),
        ("cuda", 0, 4, "--gpus 0: this machine has 4"),
        ("cuda:4", None, 4, "--device cuda:4: this machine has 4 GPUs, cuda:0 to cuda:3"),
        ("cpu", 2, 4, "--gpus 2 with --device cpu: several CPU processes are started with torchrun"),
        ("gpu", None, 4, "unknown device 'gpu'; choose from cuda, cpu"),
    ],
)
def test_a_device_that_is_not_there_is_an_error_that_says_so(device, gpus, there, message, no_torchrun, monkeypatch):
    with_gpus(monkeypatch, there)
    with pytest.raises(ValueError, match=message):
        count_processes(device, gpus)


def test_the_precision_of_a_cpu_is_one_that_it_has():
    assert native_precision("cpu") in ("bf16", "fp32")


@pytest.mark.parametrize("count, ranks", [(10, 1), (10, 2), (10, 3), (2, 5), (0, 3)])
def test_the_shares_of_all_ranks_hold_every_image_once(count, ranks):
    shares = [RankShare(count, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert sorted(index for share in shares for index in share) == list(range(count))
    assert [len(share) for share in shares] == [len(list(share)) for share in shares]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
