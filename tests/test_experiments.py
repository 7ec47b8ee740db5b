"""docs/experiments/bccd.md against the runs that it describes."""

import json
import re
import statistics
from pathlib import Path

import yaml

DOCS = Path(__file__).parents[1] / "docs"
FOLDER = DOCS / "experiments"
TEXT = (FOLDER / "bccd.md").read_text(encoding="utf-8")


def table(section: str) -> list[list[str]]:
    """The cells of each row of the table in the section, without its head."""
    lines = TEXT.partition(f"\n## {section}\n")[2].partition("\n## ")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")][2:]


def figures(runs: list[Path], key: str) -> list[float]:
    return [100 * json.loads((run / "results.json").read_text())["bbox"][key] for run in runs]


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def test_the_table_of_detectors_is_what_their_runs_gave_and_other_pages_say_the_same():
    for name, *cells, link in table("Detectors"):
        runs = sorted((FOLDER / re.search(r"\((.*)\)", link)[1]).glob("seed-*"))
        assert [run.name for run in runs] == ["seed-0", "seed-1", "seed-2"]
        assert cells[:3] == [spread(figures(runs, key)) for key in ("AP", "AP50", "AP75")], name
        configs = [yaml.safe_load((run / "config.yaml").read_text()) for run in runs]
        assert [config.pop("seed") for config in configs] == [0, 1, 2]
        updates = [config["effective"]["steps"] for config in configs]
        assert cells[4] == (str(updates[0]) if len({*updates}) == 1 else f"{min(updates)} to {max(updates)}"), name
    [ten_minutes] = [row for row in table("Detectors") if row[-1].endswith("bccd-r18-fpn-scratch)")]
    for page in (DOCS / "own_data.md", DOCS.parent / "README.md"):
        text = " ".join(page.read_text(encoding="utf-8").split())
        assert f"AP {ten_minutes[1]} and AP50 {ten_minutes[2]}" in text, page


def test_the_table_of_a_recipes_parts_is_what_their_runs_gave():
    rows = table("Parts of a recipe")
    runs = sorted(path.parent for path in FOLDER.glob("bccd/*/results.json"))
    assert {run.name.rpartition("-")[0] for run in runs} == {row[0].strip("`") for row in rows}
    for name, flags, *cells in rows:
        own = [run for run in runs if run.name.rpartition("-")[0] == name.strip("`")]
        ap, ap50, ap75 = (figures(own, key) for key in ("AP", "AP50", "AP75"))
        assert cells == [spread(ap), f"{statistics.mean(ap50):.1f}", f"{statistics.mean(ap75):.1f}"], name
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
