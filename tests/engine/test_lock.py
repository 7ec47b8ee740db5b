import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from resbackbone.engine.lock import lock_folder, release_all_folders, release_folder
from resbackbone.engine.run import claim_folder

ROOT = Path(__file__).parents[2]
HOLDER = """
import sys, time
from pathlib import Path
from resbackbone.engine.lock import lock_folder

lock_folder(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(60)
"""


@pytest.fixture
def another(tmp_path):
    """A process that holds tmp_path/run."""
    command = [sys.executable, "-c", HOLDER, tmp_path / "run"]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_refused_and_learns_who_writes(another, tmp_path):
    with pytest.raises(
        ValueError, match=rf"run is being written by process {another.pid} on .+ since 20.+; choose another"
    ):
        claim_folder(tmp_path / "run", default=tmp_path)


def test_a_killed_process_holds_nothing(another, tmp_path):
    another.send_signal(signal.SIGKILL)
    another.wait()
    folder = claim_folder(tmp_path / "run", default=tmp_path)
    assert folder == tmp_path / "run"
    release_folder(folder)


def test_a_folder_that_stays_empty_is_removed_and_another_stays(tmp_path):
    for name in ("empty", "used"):
        lock_folder(tmp_path / name)
        lock_folder(tmp_path / name)  # again by the same process
    (tmp_path / "used" / "config.yaml").touch()
    release_folder(tmp_path / "empty")
    release_folder(tmp_path / "used")
    release_folder(tmp_path / "used")  # once more does no harm
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["used", "used/config.yaml"]


def test_parents_created_for_a_folder_are_removed_with_it_and_others_stay(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "there" / "run").mkdir(parents=True)
    lock_folder(tmp_path / "mine" / "runs" / "a")
    lock_folder(tmp_path / "there" / "run")
    lock_folder(tmp_path / "removed")
    shutil.rmtree(tmp_path / "removed")
    release_all_folders()
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["mine", "there", "there/run"]
