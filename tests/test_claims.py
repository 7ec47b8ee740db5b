"""What pages say of files and exit statuses is what the commands do: one small run, and everything made of it."""

import json
import os
import re
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from test_docs import PAGES, ROOT, code_in, table_rows

from detection.shapes import make_shapes
from resbackbone.cli.command import main_of
from resbackbone.engine.state import TrainState
from resbackbone.tools import detect, doctor, evaluate_coco, inspect_data, publish, train_coco

TRAINING = ["--data", "my_folder", "--recipe", "short", "--batch-size", "2", "--log-period", "1", "--device", "cpu"]
MADE_OF_A_RUN = {"detected", "detected-best", "eval-best", "hub"}  # in its folder, by other commands


@pytest.fixture(scope="module")
def place(module_path):
    """A folder with the data set my_folder and the run runs/mine of it, and what other commands make of that run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(module_path)
        make_shapes("my_folder", train_images=4, val_images=2, size=64)
        train_coco.main([*TRAINING, "--max-steps", "2", "--eval-period", "1", "--output", "runs/mine"])
        evaluate_coco.main(["runs/mine/best", "--device", "cpu"])
        for run in ("runs/mine", "runs/mine/best"):
            detect.main([run, "my_folder/val2017", "--device", "cpu"])
        inspect_data.main(["my_folder"])
        publish.main(["runs/mine", "--repo", "owner/name", "--licence", "mit"])
    return module_path


@pytest.fixture
def here(place, tmp_path, monkeypatch):
    """`place` is the current folder, and in tmp_path tests may write."""
    monkeypatch.chdir(place)
    return tmp_path


def files_of(page: str, heading: str) -> list[list[str]]:
    """The rows of the table of files below a heading of a page."""
    text = (ROOT / page).read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return [row for row in table_rows(text) if row[0] != "file"]


def test_a_run_writes_the_files_of_the_table_and_no_others(place):
    run, rows = place / "runs/mine", files_of("docs/getting_started.md", "What a run writes")
    names = [name.replace("NNNNNNN", "0000002").rstrip("/") for first, _ in rows for name in code_in(first)]
    written = {name: {path.relative_to(run).parts[0] for path in run.glob(name)} for name in names}
    assert len(names) > 8 and all(written.values())
    assert {path.name for path in run.iterdir()} - MADE_OF_A_RUN == set().union(*written.values())
    (best,) = (content for first, content in rows if code_in(first) == ["best/"])
    assert {path.name for path in (run / "best").iterdir()} == {name for name in code_in(best) if "." in name}


def test_every_path_below_a_run_that_a_page_names_is_there(place):
    in_a_run = re.compile(r"(?:\bruns/(?!detect\b|degradation\b)(\w[\w-]*)|\bRUN)/([\w.-][\w./-]*)")
    named = {place for page in PAGES for place in in_a_run.findall(page.read_text(encoding="utf-8"))}
    named = {(run, name.rstrip("/")) for run, name in named if not name.startswith("bad_batch_")}
    assert {name for _, name in named} > {*MADE_OF_A_RUN, "data.html"}
    for run, name in named:
        folder = place / "runs" / (run if run == "data-my_folder" else "mine")
        assert any(folder.glob(re.sub(r"\d{7}", "*", name))), f"{run}/{name}"


def test_detect_writes_the_files_of_its_table_with_these_keys(place):
    rows = files_of("docs/detect.md", "Outputs")
    (pictures, _), (listed, content), *of_videos = rows
    detected = place / "runs/mine/detected"
    names = {f"{path.stem}{Path(code_in(pictures)[0]).suffix}" for path in (place / "my_folder/val2017").iterdir()}
    assert {path.name for path in detected.iterdir()} == names | {code_in(listed)[0]}
    entries = json.loads((detected / "detections.json").read_text())
    keys = {"image", "category", "image_id", "category_id", "bbox", "score"}
    assert entries and keys == set(entries[0]) and keys <= set(code_in(content))


def status_of(command: Callable[[], object]) -> int:
    """The exit status of a command that is called as from a shell."""
    try:
        main_of(command)
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    return 0


def of_training(folder, *words):
    return status_of(lambda: train_coco.main([*TRAINING, "--output", str(folder / "run"), *words]))


def of_a_loss_that_is_not_finite(folder, monkeypatch):
    status = of_training(folder, "--lr", "1e17")
    (batch,) = (folder / "run").glob("bad_batch_step_*_rank_0.safetensors")
    assert {"image_0", "boxes_0", "labels_0"} <= set(load_file(batch))
    return status


def of_a_broken_installation(folder, monkeypatch):
    monkeypatch.setattr(doctor, "operators", lambda: 1 / 0)
    return doctor.main([])


def of_a_signal(number, folder, monkeypatch, *, owner: Any = TrainState, name="update", saved=("step_0000001",)):
    """The status of a training that a signal reaches when it calls this function."""
    original = getattr(owner, name)

    def called(*arguments, **options):
        os.kill(os.getpid(), number)
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, called)
    status = of_training(folder, "--max-steps", "9")
    assert tuple(path.name for path in folder.glob("run/checkpoints/*")) == saved
    return status


def of_detection(folder, *words):
    return status_of(lambda: detect.main(["runs/mine", *map(str, words), "--output", str(folder), "--device", "cpu"]))


def of_a_broken_image(folder, monkeypatch, *words):
    (folder / "in").mkdir()
    (folder / "in/empty.jpg").touch()
    status = of_detection(folder, folder / "in/empty.jpg", "my_folder/val2017", *words)
    assert {path.stem for path in folder.glob("*.jpg")} == {path.stem for path in Path("my_folder/val2017").iterdir()}
    return status


def of_an_interrupted_detection(folder, monkeypatch):
    find = detect.predictions

    def predictions(*arguments, **options):
        os.kill(os.getpid(), signal.SIGINT)
        return find(*arguments, **options)

    monkeypatch.setattr(detect, "predictions", predictions)
    status = of_detection(folder, "my_folder/val2017")
    assert {entry["image_id"] for entry in json.loads((folder / "detections.json").read_text())} == {1}
    return status


SITUATIONS: dict[str, Callable[[Path, pytest.MonkeyPatch], int]] = {
    "wrong option": lambda folder, monkeypatch: of_training(folder, "--depth", "19"),
    "loss is not finite": of_a_loss_that_is_not_finite,
    "broken installation": of_a_broken_installation,
    "SIGTERM": partial(of_a_signal, signal.SIGTERM),
    "SIGTERM before training": partial(of_a_signal, signal.SIGTERM, owner=train_coco, name="open_data", saved=()),
    "Ctrl-C": partial(of_a_signal, signal.SIGINT),
    "broken image": of_a_broken_image,
    "broken image skipped": lambda folder, monkeypatch: of_a_broken_image(folder, monkeypatch, "--skip-bad-images"),
    "Ctrl-C in detection": of_an_interrupted_detection,
}
CLAIMS = [  # a page, its words, which end with the status, and the situation
    ("command_line", "what you gave and what is accepted, and exits with status 1", "wrong option"),
    ("troubleshooting", "is one line on stderr, with exit status 1", "loss is not finite"),
    ("troubleshooting", "Its exit status is 1 if something that is installed does not work", "broken installation"),
    ("getting_started", "Ctrl-C ends a run after the current update, saves a checkpoint, .* status 130", "Ctrl-C"),
    ("getting_started", "SIGTERM, which schedulers send, does the same and exits with status 0", "SIGTERM"),
    ("reliability", "agree on the update, save and exit with status 0", "SIGTERM"),
    ("reliability", "before the first update, with status 143", "SIGTERM before training"),
    ("reliability", "Ctrl-C . the same, with status 130", "Ctrl-C"),
    ("scaling", "rank 0 saves, and the exit status is 0", "SIGTERM"),
    ("detect", "An image that cannot be read is named, .* the exit status is 1", "broken image"),
    ("detect", "with `--skip-bad-images` it is 0", "broken image skipped"),
    ("detect", "Ctrl-C ends the command after the images or frames at hand. .* status is 130", "Ctrl-C in detection"),
]
NOT_TRIED_HERE = [
    "the rest is measured, and the exit status is 1",  # tests/tools/test_benchmark.py
    "The exit status is 1 if something is wrong",  # tests/tools/test_gpu_check.py
    "A camera ends so, with status 0",  # tests/tools/test_detect.py
    "the system kills the process: status 137",
    "SIGTERM . (detector|classifier) . 5 . exit status 0",  # measured by the soak
]


def words_of(page: str) -> str:
    return " ".join((ROOT / f"docs/{page}.md").read_text(encoding="utf-8").split())


@pytest.mark.parametrize("situation", SITUATIONS)
def test_commands_end_with_the_exit_status_that_pages_state(situation, here, monkeypatch):
    status = SITUATIONS[situation](here, monkeypatch)
    claims = [(page, words) for page, words, of in CLAIMS if of == situation]
    assert claims
    for page, words in claims:
        (said,) = re.findall(words, words_of(page))
        assert int(re.findall(r"\d+", said)[-1]) == status


def test_every_exit_status_on_a_page_is_among_those_that_are_tried():
    for page in (ROOT / "docs").glob("*.md"):
        text = words_of(page.stem)
        known = [words for name, words, _ in CLAIMS if name == page.stem] + NOT_TRIED_HERE
        places = [place.span() for words in known for place in re.finditer(words, text)]
        for stated in re.finditer(r"\bstatus(?: is)? \d+|exits? with \d+", text):
            assert any(start <= stated.start() < end for start, end in places), text[stated.start() - 80 : stated.end()]
