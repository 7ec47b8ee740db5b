import errno
import json
from pathlib import Path

import pytest
from safetensors import SafetensorError

from resbackbone.engine.checkpoints import (
    CHECKSUMS,
    KEPT,
    checkpoints,
    last_whole_checkpoint,
    resume_point,
    save_checkpoint,
)


def save(run, step, content="weights"):
    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_text(f"{content} {step}")
        (folder / "state.json").write_text("{}")

    save_checkpoint(run, step, write, nbytes=2_500_000)


def names(paths):
    return [path.name for path in paths]


def test_the_last_three_checkpoints_are_kept_oldest_first(tmp_path):
    for step in (5, 50, 500, 9_999_999, 10_000_000):
        save(tmp_path, step)
    assert KEPT == 3
    assert names(checkpoints(tmp_path)) == ["step_0000500", "step_9999999", "step_10000000"]
    assert sorted(names((tmp_path / "checkpoints").iterdir())) == sorted(names(checkpoints(tmp_path)))


def test_a_checkpoint_that_was_not_finished_is_none(tmp_path):
    save(tmp_path, 1)

    def killed(folder):
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 2, killed, nbytes=1)
    (tmp_path / "checkpoints" / ".step_0000003.77.tmp").mkdir()  # what a kill without an exception leaves
    (tmp_path / "checkpoints" / "step_0000004.damaged").mkdir()
    (tmp_path / "checkpoints" / "step_0000005").touch()
    assert names(checkpoints(tmp_path)) == ["step_0000001"]


def test_a_checkpoint_of_the_same_step_is_written_over(tmp_path):
    assert checkpoints(tmp_path) == [] and resume_point(tmp_path) is None
    save(tmp_path, 1)
    save_checkpoint(tmp_path, 1, lambda folder: (folder / "other").write_text("new"), nbytes=3)
    assert sorted(names(checkpoints(tmp_path)[0].iterdir())) == [CHECKSUMS, "other"]


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGE = {
    "truncated": lambda folder: (folder / "model.safetensors").write_bytes(b"weigh"),
    "empty": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "a bit flipped": lambda folder: flip_a_bit(folder / "model.safetensors"),
    "a bit flipped in the smaller file": lambda folder: flip_a_bit(folder / "state.json"),
    "a file gone": lambda folder: (folder / "state.json").unlink(),
    "no checksums": lambda folder: (folder / CHECKSUMS).unlink(),
    "half of the checksums": lambda folder: (folder / CHECKSUMS).write_bytes((folder / CHECKSUMS).read_bytes()[:30]),
    "checksums of something else": lambda folder: (folder / CHECKSUMS).write_text(json.dumps([1])),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_run_resumes_from_the_one_before(tmp_path, damage, capsys):
    for step in (10, 20, 30):
        save(tmp_path, step)
    damage(tmp_path / "checkpoints" / "step_0000030")
    assert last_whole_checkpoint(tmp_path).name == "step_0000020"
    assert resume_point(tmp_path).name == "step_0000020"
    [line] = capsys.readouterr().out.splitlines()
    assert "damaged: " in line and "step_0000030" in line and "set aside as step_0000030.damaged" in line
    assert names(checkpoints(tmp_path)) == ["step_0000010", "step_0000020"]
    save(tmp_path, 30)  # the step comes again
    assert resume_point(tmp_path).name == "step_0000030"
    damage(tmp_path / "checkpoints" / "step_0000030")  # and so may the damage
    assert resume_point(tmp_path).name == "step_0000020"


def test_a_run_with_no_whole_checkpoint_is_not_started_over(tmp_path):
    for step in (10, 20):
        save(tmp_path, step)
        flip_a_bit(tmp_path / "checkpoints" / f"step_00000{step}" / "model.safetensors")
    with pytest.raises(ValueError, match="all of its 2 checkpoints are damaged; choose another folder"):
        resume_point(tmp_path)
    assert names(checkpoints(tmp_path)) == ["step_0000010", "step_0000020"]


FULL = {
    "written by Python": OSError(errno.ENOSPC, "No space left on device"),
    "written by safetensors": SafetensorError(
        f"Error while serializing: I/O error: No space left on device (os error {errno.ENOSPC})"
    ),
}


@pytest.mark.parametrize("error", FULL.values(), ids=FULL)
def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one_and_says_what_space_is_needed(tmp_path, error):
    def full(folder):
        (folder / "model.safetensors").write_text("hal")
        raise error

    with pytest.raises(
        ValueError, match=r"step 1: cannot be written .* 2 MB are needed, \d+ MB .*; there is no earlier one"
    ):
        save_checkpoint(tmp_path, 1, full, nbytes=2_400_000)
    save(tmp_path, 10)
    with pytest.raises(ValueError, match=r"MB are free; the run can be resumed from step_0000010"):
        save_checkpoint(tmp_path, 20, full, nbytes=2_400_000)
    assert names((tmp_path / "checkpoints").iterdir()) == ["step_0000010"]
    assert resume_point(tmp_path).name == "step_0000010"
