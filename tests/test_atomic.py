import os
import subprocess
import sys

import pytest

from resbackbone.atomic import folder_atomically, open_atomically, write_atomically


def test_text_and_bytes_are_written_over_what_was_there(tmp_path):
    path = tmp_path / "file.txt"
    write_atomically(path, "ünlike")
    assert path.read_text(encoding="utf-8") == "ünlike"
    write_atomically(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    with open_atomically(path) as file:
        file.write(b"in ")
        file.write(b"pieces")
    assert path.read_bytes() == b"in pieces"
    assert os.listdir(tmp_path) == ["file.txt"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_the_old_file_survives_a_failure_while_writing(tmp_path, monkeypatch, step):
    path = tmp_path / "file.txt"
    write_atomically(path, "old")

    def disk_full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, step, disk_full)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_the_old_file_survives_a_killed_writer(tmp_path):
    (tmp_path / "file.txt").write_text("old")
    killed = (
        "import os, resbackbone.atomic as a; os.fsync = lambda _: os._exit(9); a.write_atomically('file.txt', 'new')"
    )
    assert subprocess.run([sys.executable, "-c", killed], cwd=tmp_path).returncode == 9
    assert (tmp_path / "file.txt").read_text() == "old"


def test_a_folder_appears_whole_and_in_place_of_an_older_one(tmp_path):
    path = tmp_path / "deep" / "folder"
    with folder_atomically(path) as folder:
        (folder / "a").write_text("1")
        (folder / "b").write_text("1")
        assert not path.exists()
    with folder_atomically(path) as folder:
        (folder / "a").write_text("2")
        assert (path / "a").read_text() == "1"
    assert {p.name: p.read_text() for p in path.iterdir()} == {"a": "2"}
    assert os.listdir(path.parent) == ["folder"]


def test_the_old_folder_survives_a_failure_while_writing(tmp_path):
    path = tmp_path / "folder"
    with folder_atomically(path) as folder:
        (folder / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), folder_atomically(path) as folder:
        (folder / "a").write_text("new")
        raise KeyboardInterrupt
    assert (path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["folder"]
