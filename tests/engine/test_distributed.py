import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from resbackbone.checks import UserError
from resbackbone.engine import distributed as distributed_module
from resbackbone.engine.distributed import Rank, any_rank, broadcast, count_processes, gather, launch

ROOT = Path(__file__).parents[2]

# What each of the processes that torchrun starts runs; it writes what it saw to a file of its own.
PROGRAM = """
import json, math, sys, torch
from resbackbone.engine.distributed import any_rank, broadcast, from_main, gather, launch
from resbackbone.engine.termination import quick_exit
from resbackbone.engine.state import NonFinite, TrainState
from resbackbone.image_io import read_image

def tried(make, rank):
    try:
        return from_main(make, rank)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

def work(rank, folder):
    seen = {"rank": rank.rank, "ranks": rank.ranks, "main": rank.is_main, "device": str(rank.device)}
    seen["gathered"] = gather({"from": rank.rank, "n": [rank.rank] * (rank.rank + 1)}, rank)
    seen["broadcast"] = broadcast(f"of {rank.rank}", rank)
    made = [lambda: f"by {rank.rank}", lambda: read_image("nowhere.png"), lambda: open(f"{folder}/nowhere")]
    seen["from main"] = [tried(make, rank) for make in made]
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


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def run_program(folder, program, *launcher):
    """Run a program with `folder` as its argument."""
    (folder / "program.py").write_text(program)
    hidden = ("RANK", "WORLD_SIZE", "RESBACKBONE_DEBUG")
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    command = [sys.executable, *launcher, folder / "program.py", folder]
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def seen(module_path):
    """What the two processes of a torchrun saw."""
    run = run_program(module_path, PROGRAM, *TORCHRUN)
    assert run.returncode == 0, run.stderr
    return [json.loads((module_path / f"{rank}.json").read_text()) for rank in "01"]


def test_the_processes_of_torchrun_know_their_rank_and_exchange_values(seen):
    assert [(s["rank"], s["ranks"], s["main"], s["device"]) for s in seen] == [
        (0, 2, True, "cpu"),
        (1, 2, False, "cpu"),
    ]
    assert [s["gathered"] for s in seen] == [[{"from": 0, "n": [0]}, {"from": 1, "n": [1, 1]}], None]
    assert [s["broadcast"] for s in seen] == ["of 0", "of 0"]
    assert [s["any"] for s in seen] == [[True, True, True, False]] * 2


def test_what_the_first_rank_makes_or_raises_reaches_all(seen):
    assert seen[0]["from main"] == seen[1]["from main"]
    made, bad_image, missing = seen[1]["from main"]
    assert made == "by 0"
    assert bad_image.startswith("BadImage: image nowhere.png: ") and missing.startswith("FileNotFoundError: ")


def test_when_one_rank_asks_to_stop_every_rank_stops_after_the_same_update(seen):
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
from resbackbone.checks import UserError
from resbackbone.cli.errors import one_line_errors
from resbackbone.engine.distributed import gather, launch

def work(rank, folder):
    everyone = gather(rank.rank, rank)
    if rank.is_main:
        Path(folder, "seen").write_text(str(everyone))
    else:
        raise UserError("no such image")

if __name__ == "__main__":
    launch(work, (sys.argv[1],), device="cpu", processes=2, guard=one_line_errors)
"""
    run = run_program(tmp_path, program)
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


# What each of two processes runs: a step of a detector, with DDP and without.
STEP = """
import json, sys, warnings, torch
from detection import build_faster_rcnn
from resbackbone import build_resnet_backbone
from resbackbone.engine.distributed import distributed, launch
from resbackbone.engine.termination import quick_exit

def work(rank, folder):
    torch.manual_seed(0)
    backbone = build_resnet_backbone(18, levels=("c4", "c5"))  # trained norms; stage 5 becomes the box head
    options = {"rpn_batch_size_per_image": 16, "box_batch_size_per_image": 8, "rpn_post_nms_top_n_train": 20}
    detector = build_faster_rcnn(backbone, 3, variant="c4", min_size=64, max_size=96, **options)
    detector.to(memory_format=torch.channels_last).train()
    target = {"boxes": torch.tensor([[5.0, 9.0, 40.0, 50.0]]), "labels": torch.tensor([2])}
    gradients = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for model in (detector, distributed(detector, rank)):
            torch.manual_seed(1)
            detector.zero_grad()
            sum(model([torch.rand(3, 64, 70)], [target]).values()).backward()
            gradients.append({name: p.grad.clone() for name, p in detector.named_parameters()})
    alone, together = gradients
    strides = [name for name, p in detector.named_parameters() if p.grad.stride() != p.stride()]
    apart = max(((together[n] - alone[n]).norm() / alone[n].norm().clamp(min=1e-6)).item() for n in alone)
    with open(f"{folder}/{rank.rank}.json", "w") as file:
        json.dump({"said": [str(w.message) for w in said], "strides": strides, "apart": apart}, file)

if __name__ == "__main__":
    with quick_exit():
        launch(work, (sys.argv[1],), device="cpu", processes=2)
"""


def test_gradients_have_the_memory_layout_of_ddps_buckets(tmp_path):
    run = run_program(tmp_path, STEP, *TORCHRUN)
    assert run.returncode == 0, run.stderr
    for rank in "01":
        seen = json.loads((tmp_path / f"{rank}.json").read_text())
        assert not [line for line in seen["said"] if "stride" in line] and not seen["strides"]
        assert seen["apart"] < 1e-3  # both ranks had the same images
    assert "stride" not in run.stderr


@pytest.fixture
def no_torchrun(monkeypatch):
    for name in (
        "RANK",
        "WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "LOCAL_RANK",
        "SLURM_LOCALID",
        "CUDA_VISIBLE_DEVICES",
    ):
        monkeypatch.delenv(name, raising=False)


def with_gpus(monkeypatch, count):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    "device, gpus, there, processes",
    [("cpu", None, 0, 1), ("cpu", 1, 4, 1), ("cuda", None, 4, 4), ("cuda", 2, 4, 2), ("cuda:3", None, 4, 1)],
)
def test_processes_are_one_a_gpu_or_just_this_one(device, gpus, there, processes, no_torchrun, monkeypatch):
    with_gpus(monkeypatch, there)
    assert count_processes(device, gpus) == processes


@pytest.mark.parametrize(
    "environment, visible, index",
    [
        ({"RANK": "13", "LOCAL_RANK": "5"}, 8, 5),  # torchrun
        ({"RANK": "13", "SLURM_LOCALID": "5"}, 8, 5),  # srun on 2 machines of 8 GPUs
        ({"RANK": "13"}, 8, 5),
        ({"RANK": "13", "LOCAL_RANK": "5", "CUDA_VISIBLE_DEVICES": "7"}, 1, 0),
        ({"RANK": "13", "SLURM_LOCALID": "5"}, 1, 0),  # srun --gpus-per-task=1: each sees its own GPU alone
    ],
)
def test_a_process_takes_the_gpu_of_its_place_on_its_machine(environment, visible, index, no_torchrun, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with_gpus(monkeypatch, visible)
    used = []
    monkeypatch.setattr(distributed_module, "use", used.append)
    for name in ("init_process_group", "barrier", "destroy_process_group"):
        monkeypatch.setattr(torch.distributed, name, lambda *_, **__: None)
    launch(lambda rank: used.append(rank.device), (), device="cuda", processes=16)
    assert used == [torch.device("cuda", index)] * 2


@pytest.mark.parametrize(
    "device, visible, environment, message",
    [
        ("cuda", 1, {"LOCAL_RANK": "1"}, "LOCAL_RANK=1, but this machine has 1 GPU: start no more than 1 process$"),
        ("cuda", 2, {"LOCAL_RANK": "2"}, "LOCAL_RANK=2, but this machine has 2 GPUs: start no more than 2 processes"),
        ("cuda", 2, {"SLURM_LOCALID": "7"}, "SLURM_LOCALID=7, but this machine has 2 GPUs"),
        ("cuda:1", 2, {"LOCAL_RANK": "1"}, "cuda:1: each of the 3 processes takes a GPU of its own; use"),
    ],
)
def test_processes_that_have_no_gpu_of_their_own_are_refused(
    device, visible, environment, message, no_torchrun, monkeypatch
):
    for name, value in {"RANK": "2", **environment}.items():
        monkeypatch.setenv(name, value)
    with_gpus(monkeypatch, visible)
    with pytest.raises(ValueError, match=message):
        launch(print, (), device=device, processes=3)


def test_one_process_makes_its_device_the_current_one_and_calls_the_function(no_torchrun, monkeypatch):
    used = []
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", used.append)
    launch(lambda *arguments: used.append(arguments), (1, "b"), device="cuda:1", processes=1)
    assert used == [1, "high", (Rank(0, 1, torch.device("cuda:1")), 1, "b")]


def test_a_launcher_must_set_the_number_of_ranks_which_then_counts(no_torchrun, monkeypatch):
    with_gpus(monkeypatch, 8)
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(
        UserError, match="RANK is set without WORLD_SIZE, MASTER_ADDR, MASTER_PORT: start with torchrun"
    ):
        count_processes("cpu", None)
    for name, value in {"WORLD_SIZE": "16", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert count_processes("cpu", None) == count_processes("cuda", None) == 16


@pytest.mark.parametrize(
    "device, gpus, there, message",
    [
        ("cuda", 5, 4, "5: this machine has 4 GPUs"),
        ("cuda", 0, 4, "0: this machine has 4 GPUs"),
        ("cuda:4", None, 4, "cuda:4: this machine has 4 GPUs, cuda:0 to cuda:3"),
        ("cpu", 2, 4, "2: the device is cpu; leave it out"),
    ],
)
def test_gpus_that_this_machine_lacks_are_refused(device, gpus, there, message, no_torchrun, monkeypatch):
    with_gpus(monkeypatch, there)
    with pytest.raises(ValueError, match=message):
        count_processes(device, gpus)


@pytest.mark.parametrize("count, ranks", [(10, 1), (10, 2), (10, 3), (2, 5), (0, 3)])
def test_the_shares_of_all_ranks_hold_every_image_once(count, ranks):
    shares = [Rank(rank, ranks, torch.device("cpu")).share(count) for rank in range(ranks)]
    assert sorted(index for share in shares for index in share) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
