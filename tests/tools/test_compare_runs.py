import json
import re
from functools import partial
from pathlib import Path

import pytest
import yaml
from commands import error_line

from resbackbone.tools import compare_runs

error_of = partial(error_line, compare_runs.main)


def run_of(folder, *, ap=(0.25, 0.5), seconds=0.5, effective=(), **config):
    """A run with an evaluation after every 10 updates."""
    folder.mkdir(parents=True)
    lines = []
    for i, value in enumerate(ap, 1):
        train = {"loss": 2.0 / i, "lr": 0.1, "seconds": seconds, "images_per_second": 8 / seconds, "memory_mib": 1536.0}
        lines.append({"kind": "train", "step": 10 * i, **train})
        results = {"AP": value, "AP50": None if value is None else value + 0.1}
        lines.append({"kind": "eval", "step": 10 * i, **results, "seconds": 1.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    known = {"command": f"python {folder}", "train_set_sha256": "ab", "parameters": 41_500_000, **dict(effective)}
    content = {"depth": 18, "lr": None, "output": None, **config, "effective": known}
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    return str(folder)


def part(html, title):
    [content] = re.findall(rf"<section [^>]*>\s*<h2>{title}</h2>(.*?)</section>", html, re.DOTALL)
    return content


def rows(html):
    return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall("<tr>(<td.*?)</tr>", html, re.DOTALL)]


def test_the_table_and_the_page_have_results_cost_and_what_differs(tmp_path, capsys):
    first = run_of(tmp_path / "runs" / "a", lr=0.5)
    second = run_of(tmp_path / "runs" / "b <i>", ap=(0.125,), depth=50, effective={"training_images": 7})
    compare_runs.main([first, second])
    header, *lines, last = capsys.readouterr().out.splitlines()
    cells = [re.split("  +", line.strip()) for line in (header, *lines)]
    assert cells[0][:6] == ["run", "AP", "AP50", "after", "time", "images/s"]
    assert cells[1] == ["a", "50.0", "60.0", "20", "12 s", "16", "41.5 M", "1.5"]
    assert cells[2] == ["b <i>", "12.5", "22.5", "10", "6 s", "16", "41.5 M", "1.5"]
    assert last == f"written: {tmp_path / 'runs' / 'compare.html'}"
    html = (tmp_path / "runs" / "compare.html").read_text()
    assert rows(part(html, "Results")) == [cells[1], ["b &lt;i&gt;", *cells[2][1:]]]
    assert rows(part(html, "Options that differ")) == [
        ["depth", "18", "50"],
        ["lr", "0.5", "–"],
        ["training_images", "–", "7"],
    ]
    curves = re.findall(
        """<figcaption>([^<]*)</figcaption>|data-name="(.*?)" data-points='(.*?)'""", part(html, "Curves")
    )
    assert [title for title, *_ in curves if title] == ["AP, percent", "AP50, percent", "Loss", "Learning rate"]
    assert [[y for *_, y in json.loads(points)] for _, name, points in curves[1:3]] == [["25.0", "50.0"], ["12.5"]]


def test_runs_on_different_data_are_compared_with_a_note(tmp_path, capsys):
    folders = [
        run_of(tmp_path / name, effective={"train_set_sha256": name, "validation_images": count})
        for name, count in (("a", 87), ("b", 72))
    ]
    compare_runs.main([*folders, "--output", str(tmp_path / "out"), "--quiet"])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "note: the runs were trained on different data"
    assert said[1].startswith("note: the runs were evaluated on different images (72, 87 of them)")
    assert said[2:] == [f"written: {tmp_path / 'out' / 'compare.html'}"]
    assert "trained on different data" in part((tmp_path / "out" / "compare.html").read_text(), "Results")


def test_unfinished_runs_and_other_kinds_of_results_are_n_a(tmp_path, capsys):
    folders = [run_of(tmp_path / "a", ap=(None,)), run_of(tmp_path / "b", ap=()), run_of(tmp_path / "c", ap=())]
    (tmp_path / "c" / "metrics.jsonl").write_text('{"kind": "eval", "step": 5, "error": 0.0875, "seconds": 2}\n')
    compare_runs.main(folders)
    cells = [re.split("  +", line.strip()) for line in capsys.readouterr().out.splitlines()[:4]]
    assert [row[:5] for row in cells[1:]] == [
        ["a", "n/a", "n/a", "n/a", "10"],
        ["b", "n/a", "n/a", "n/a", "n/a"],
        ["c", "n/a", "n/a", "8.8", "5"],
    ]
    html = (tmp_path / "compare.html").read_text()
    assert "the runs have the same options" in html
    titles = re.findall(r"<figcaption>([^<]*)</figcaption>", part(html, "Curves"))
    assert titles == ["AP, percent", "AP50, percent", "error, percent", "Loss", "Learning rate"]


def test_a_folder_of_runs_is_all_of_them_and_what_is_no_run_is_passed_over(tmp_path, capsys):
    runs = [run_of(tmp_path / "runs" / name) for name in "ab"]
    (tmp_path / "runs" / "data").mkdir()
    compare_runs.main([str(tmp_path / "runs")])
    wanted = capsys.readouterr().out
    assert [line.split()[0] for line in wanted.splitlines()[1:3]] == ["a", "b"]
    compare_runs.main([*runs, str(tmp_path / "runs" / "data"), str(tmp_path / "runs" / "compare.html")])
    assert capsys.readouterr().out == wanted


def test_long_names_and_missing_checksums_confuse_no_runs(tmp_path, capsys):
    first, second = (run_of(tmp_path / ("x" * 85 + end)) for end in "ab")
    (Path(second) / "config.yaml").write_text("depth: 18\n")
    compare_runs.main([first, second])
    said = capsys.readouterr().out
    assert "note:" not in said and len(said.splitlines()) == 4


@pytest.mark.parametrize(
    "names, says",
    [
        (["a"], "a is a run; give"),
        (["a", "empty"], "a is a run; give"),
        (["empty"], "is no run (no metrics"),
        (["a", "none"], "none: no such folder"),
    ],
)
def test_what_is_no_pair_of_runs_is_one_line(tmp_path, capsys, names, says):
    run_of(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    assert says in error_of([str(tmp_path / name) for name in names], capsys)
