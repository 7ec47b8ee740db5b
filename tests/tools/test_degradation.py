import importlib
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from commands import error_line
from PIL import Image

from resbackbone.tools import degradation, train_cifar10

error_of = partial(error_line, degradation.main)

QUICK = ["--data", "synthetic", "--device", "cpu", "--batch-size", "4", "--log-period", "1", "--eval-period", "1"]
TWO_DEPTHS = [*QUICK, "--steps", "2", "--depths", "20", "32"]


pytestmark = pytest.mark.usefixtures("few_synthetic_images")


def recorded(folder, *, plain, depth, train, test=(), **config):
    """A run's folder with these errors recorded at updates 10, 20, ..: what read_run reads."""
    folder.mkdir(parents=True)
    recipe = {"steps": 100, "batch_size": 128, "precision": "fp32", "seed": 0}
    effective = {"train_set_sha256": "abc"}
    content = {"depth": depth, "plain": plain, "shortcut": None, **recipe, "effective": effective, **config}
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    lines = [
        {"kind": "train", "step": 10 * (i + 1), "train_error": error, "seconds": 3.0} for i, error in enumerate(train)
    ]
    lines += [{"kind": "eval", "step": step, "error": error, "seconds": 30.0} for step, error in test]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_every_net_is_trained_in_its_folder_and_drawn_and_tabulated(capsys):
    degradation.main([*TWO_DEPTHS, "--output", "all"])
    names = ["plain-20", "plain-32", "resnet-20", "resnet-32"]
    assert all((Path("all") / name / "results.json").is_file() for name in names)
    content = json.loads(Path("all/degradation.json").read_text())
    assert [row["network"] for row in content["runs"]] == names
    assert [row["parameters"] for row in content["runs"]] == [269_722, 464_154] * 2
    assert [row["shortcut"] for row in content["runs"]] == ["none", "none", "A", "A"]
    assert content["recipe"]["steps"] == 2 and content["recipe"]["batch_size"] == 4
    for row in content["runs"]:
        results = json.loads((Path("all") / row["network"] / "results.json").read_text())
        assert row["test_error"] == results["error"] and row["updates"] == 2
    with Image.open("all/degradation.png") as figure:
        assert figure.width > 2 * 400
    assert Path("all/degradation.md").read_text() in capsys.readouterr().out


def test_started_again_it_leaves_what_is_finished_and_goes_on_with_what_is_not(capsys):
    argv = [*QUICK, "--steps", "2", "--depths", "20", "--output", "all"]
    shared = [*QUICK, "--steps", "2"]
    train_cifar10.main([*shared, "--plain", "--output", "all/plain-20"])
    train_cifar10.main([*shared, "--shortcut", "A", "--output", "all/resnet-20", "--max-steps", "1"])
    finished = {p: p.stat().st_mtime_ns for p in Path("all/plain-20").rglob("*")}
    capsys.readouterr()
    degradation.main(argv)
    said = capsys.readouterr().out
    assert "all/plain-20 is finished" in said and "resumed from step 1 to 2" in said
    assert finished == {p: p.stat().st_mtime_ns for p in Path("all/plain-20").rglob("*")}
    assert json.loads(Path("all/resnet-20/results.json").read_text())["steps"] == 2
    said = error_of([*argv, "--steps", "3"], capsys)
    assert "--steps 3: the run in all/plain-20 was made with 2" in said


def test_three_shortcuts_are_compared_in_one_table():
    degradation.main([*QUICK, "--steps", "1", "--depths", "20", "--shortcuts", "--output", "all"])
    rows = json.loads(Path("all/shortcuts.json").read_text())["runs"]
    assert [(row["network"], row["shortcut"]) for row in rows] == [
        ("resnet-20", "A"),
        ("resnet-20-B", "B"),
        ("resnet-20-C", "C"),
    ]
    a, b, c = (row["parameters"] for row in rows)
    assert b - a == 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64  # two projections and their norms
    assert c > b and all(row["minutes"] > 0 for row in rows)
    assert Path("all/shortcuts.png").is_file() and "| resnet-20-C | C |" in Path("all/shortcuts.md").read_text()


def test_plot_only_tabulates_what_is_recorded_of_runs_that_are_not_finished():
    train = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.12, 0.10]
    recorded(Path("all/plain-20"), plain=True, depth=20, train=train, test=[(50, 0.5), (100, 0.25)])
    recorded(Path("all/resnet-20"), plain=False, depth=20, train=train[:4])
    degradation.main(["--plot-only", "--output", "all", "--depths", "20"])
    plain, residual = json.loads(Path("all/degradation.json").read_text())["runs"]
    assert (plain["updates"], residual["updates"]) == (100, 40)
    assert plain["train_error"] == 0.10 and residual["train_error"] == 0.6  # of the last tenth
    assert plain["test_error"] == 0.25 and residual["test_error"] is None
    assert plain["minutes"] == pytest.approx((100 * 3 + 2 * 30) / 60)  # seconds are recorded for each update
    assert "| plain-20 | none | 0.27 M | 100 | 10.00 | 25.00 | 6.0 |" in Path("all/degradation.md").read_text()


def test_training_error_is_drawn_dashed_and_test_error_bold_and_as_recorded(monkeypatch):
    recorded(Path("all/plain-20"), plain=True, depth=20, train=[0.9, 0.5], test=[(10, 0.6), (20, 0.4)])
    recorded(Path("all/resnet-20"), plain=False, depth=20, train=[0.8, 0.3], test=[(20, 0.2)])
    pyplot = importlib.import_module("matplotlib.pyplot")
    figures, subplots = [], pyplot.subplots

    def noted(*args, **kwargs):
        figures.append(subplots(*args, **kwargs))
        return figures[-1]

    monkeypatch.setattr(pyplot, "subplots", noted)
    degradation.main(["--plot-only", "--output", "all", "--depths", "20"])
    left, right = figures[0][1][0]
    assert (left.get_title(), right.get_title()) == ("plain", "residual")
    dashed, bold = left.lines
    assert dashed.get_linestyle() == "--" and bold.get_linestyle() == "-"
    assert bold.get_linewidth() > dashed.get_linewidth()
    assert dashed.get_xydata().tolist() == [[10, 0.9], [20, 0.5]]
    assert bold.get_xydata().tolist() == [[10, 0.6], [20, 0.4]]
    assert right.lines[0].get_xydata().tolist() == [[10, 0.8], [20, 0.3]]
    assert left.get_ylim() == right.get_ylim() and left.get_ylim()[1] >= 0.9


def test_a_long_curve_is_averaged_over_equal_stretches():
    points = np.array([(i + 1, float(i % 2)) for i in range(1000)])
    binned = degradation.binned(points)
    assert [update for update, _ in binned] == list(range(10, 1001, 10))
    assert {error for _, error in binned} == {0.5}


def test_residual_nets_alone_are_one_panel_and_runs_without_updates_or_of_other_recipes_are_refused(capsys):
    recorded(Path("all/plain-20"), plain=True, depth=20, train=[0.9])
    recorded(Path("all/resnet-20"), plain=False, depth=20, train=[0.9], steps=200)
    recorded(Path("all/resnet-32"), plain=False, depth=32, train=[])
    argv = ["--plot-only", "--output", "all", "--depths"]
    assert "the runs in all differ in steps" in error_of([*argv, "20"], capsys)
    assert "all/resnet-32: has recorded no updates yet" in error_of([*argv, "32", "--no-plain"], capsys)
    degradation.main([*argv, "20", "--no-plain"])
    with Image.open("all/degradation.png") as figure:
        assert figure.width < 2 * 400


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--depths", "20", "57"], "unknown depth 57; choose from 20, 32, 44, 56, 110, 1202"),
        (["--depths"], "--depths"),
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--plot-only", "--output", "nowhere"], "nowhere/plain-20/config.yaml: cannot be read"),
        (["--data", "nowhere"], "--data nowhere: no such folder"),
    ],
)
def test_a_wrong_option_is_one_line_that_names_it(capsys, argv, says):
    assert says in error_of([*QUICK, *argv], capsys)
    assert list(Path().iterdir()) == []
