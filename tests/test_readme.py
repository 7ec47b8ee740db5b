import json
import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_readmes_python_runs_as_it_stands_and_prints_what_it_says(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert "Feature(channels=256, stride=16)" in capsys.readouterr().out
    assert list(names["maps"]["p2"].shape) == [2, 256, 120, 160]
    assert (tmp_path / "backbone.onnx").is_file()
    assert names["features"].feature_info.channels() == [256, 512, 1024, 2048]
    assert list(names["convnext"].features) == ["p2", "p3", "p4", "p5", "p6"]
    assert set(names["losses"]) == {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}


def test_every_command_and_page_the_readme_names_is_there():
    text = README.read_text()
    for path in {*re.findall(r"tools/\w+\.py", text), *re.findall(r"\]\(([^)#:]+)\)", text)}:
        assert (README.parent / path).is_file(), path


def test_every_measured_row_of_the_model_zoo_is_what_its_metrics_say():
    zoo = (README.parent / "MODEL_ZOO.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in zoo.splitlines() if "docs/results/" in line
    ]
    assert rows
    for row in rows:
        ap, ap50, folder = row[3], row[4], README.parent / re.search(r"\]\((.*?)\)", row[8])[1]
        assert (folder / "config.yaml").is_file() and (folder / "metrics.jsonl").is_file()
        box = json.loads((folder / "results.json").read_text())["bbox"]
        assert (f"{100 * box['AP']:.1f}", f"{100 * box['AP50']:.1f}") == (ap, ap50)
