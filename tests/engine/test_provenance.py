import subprocess

import pytest
import torch

from resbackbone.engine import provenance


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "file").write_text("one")
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "file"], [*author, "commit", "-q", "-m", "one"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    monkeypatch.setattr(provenance, "ROOT", folder)
    return folder


def test_a_commit_is_marked_if_files_differ_from_it(checkout):
    clean = provenance.commit()
    assert len(clean) == 12
    (checkout / "file").write_text("two")
    assert provenance.commit() == f"{clean}+"


def test_an_installed_package_does_not_take_the_commit_of_the_repository_around_it(checkout, monkeypatch):
    (checkout / "site-packages").mkdir()
    monkeypatch.setattr(provenance, "ROOT", checkout / "site-packages")
    monkeypatch.delenv("RESBACKBONE_COMMIT", raising=False)
    assert provenance.commit() is None


def test_without_git_the_environment_names_the_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("RESBACKBONE_COMMIT", raising=False)
    assert provenance.commit() is None
    monkeypatch.setenv("RESBACKBONE_COMMIT", "0123456789ab")
    assert provenance.commit() == "0123456789ab"


@pytest.mark.parametrize(
    "argv, shown",
    [
        (["tools/train_coco.py", "--data", "my data"], ".venv/bin/python tools/train_coco.py --data 'my data'"),
        (["/usr/bin/resbackbone-train-coco", "--steps", "3"], "resbackbone-train-coco --steps 3"),
        (["/usr/lib/pytest/__main__.py", "--steps", "3"], None),  # a program that calls main(argv)
    ],
)
def test_the_command_is_the_one_that_was_typed(monkeypatch, argv, shown):
    monkeypatch.setattr("sys.argv", argv)
    monkeypatch.setattr("sys.orig_argv", [".venv/bin/python", *argv])
    assert provenance.command("train_coco") == shown
    monkeypatch.setattr("multiprocessing.parent_process", object)  # as in a process that was spawned for a GPU
    monkeypatch.setattr("sys.orig_argv", ["python", "-c", "spawn_main()", "--multiprocessing-fork"])
    assert provenance.command("train_coco") == (shown and shown.removeprefix(".venv/bin/"))


def test_the_hardware_names_the_processor_and_its_cores():
    name, cores = provenance.cpu()
    assert provenance.hardware(torch.device("cpu")).startswith(f"{name}, {cores} core") and name and cores > 0
