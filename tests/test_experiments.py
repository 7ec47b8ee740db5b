"""docs/experiments/README.md against the runs that it describes."""

import json
import statistics
from pathlib import Path

import yaml

FOLDER = Path(__file__).parents[1] / "docs" / "experiments"


def test_the_table_of_a_recipes_parts_is_what_their_runs_gave():
    section = (FOLDER / "README.md").read_text(encoding="utf-8").partition("## Parts of a recipe")[2]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if "| `" in line]
    runs = sorted(path.parent for path in FOLDER.glob("bccd/*/results.json"))
    assert {run.name.rpartition("-")[0] for run in runs} == {row[0].strip("`") for row in rows}
    for name, flags, *figures in rows:
        own = [run for run in runs if run.name.rpartition("-")[0] == name.strip("`")]
        results = [json.loads((run / "results.json").read_text())["bbox"] for run in own]
        ap, ap50, ap75 = ([100 * result[key] for result in results] for key in ("AP", "AP50", "AP75"))
        spread = f"{statistics.mean(ap):.1f} ± {statistics.stdev(ap):.1f}"
        if name == "`scratch`":
            for page in (FOLDER.parent / "own_data.md", FOLDER.parents[1] / "README.md"):
                text = page.read_text(encoding="utf-8")
                assert f"AP {statistics.mean(ap):.1f} and AP50 {statistics.mean(ap50):.1f}" in text, page
        assert figures[:3] == [spread, f"{statistics.mean(ap50):.1f}", f"{statistics.mean(ap75):.1f}"], name
        for run in own:
            config = yaml.safe_load((run / "config.yaml").read_text())
            assert run.name.endswith(f"-{config['seed']}")
            config["steps"] = config["effective"]["steps"]
            wanted = {"steps": [400], "recipe": ["short"]}
            for flag in [flag for flag in flags.strip("`").split("--") if flag.strip()]:
                key, *values = flag.split()
                wanted[key.replace("-", "_")] = [yaml.safe_load(value) for value in values]
            for key, values in wanted.items():
                assert config[key] == (values if isinstance(config[key], list) else values[0]), run.name
