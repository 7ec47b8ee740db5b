"""What contributors rely on: hooks, CI and `make check` run the same pinned tools; the citation is valid."""

import re
from pathlib import Path

import yaml

import resbackbone

ROOT = Path(__file__).parents[1]


def test_a_commit_is_checked_by_the_tools_of_make_lint_in_the_versions_that_setup_pins():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"]  # another one would have a version of its own
    tools = {tuple(hook["entry"].split()[:2]) for hook in hooks[0]["hooks"]}
    makefile = (ROOT / "Makefile").read_text().replace("$(BIN)", ".venv/bin")
    lint = makefile.partition("\nlint:")[2].partition("\n\n")[0]
    for program, *words in tools:
        assert program.startswith(".venv/bin/")
        assert " ".join([program, *words]) in lint
        assert re.search(rf'"{Path(program).name}==[\d.]+"', (ROOT / "setup.py").read_text())


def test_the_citation_names_this_version_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)  # what the format requires
    assert citation["version"] == resbackbone.__version__
    assert "Apache License" in (ROOT / "LICENSE").read_text() and citation["license"] == "Apache-2.0"
    (paper,) = citation["references"]
    assert paper["url"].endswith("1512.03385") and paper["authors"][0]["family-names"] == "He"


def test_ci_runs_make_check_and_trains_with_the_oldest_versions_that_setup_admits():
    jobs = yaml.safe_load((ROOT / ".github/workflows/check.yml").read_text())["jobs"]
    assert {"run": "make check"} in jobs["check"]["steps"]
    matrix, setup = jobs["train"]["strategy"]["matrix"], (ROOT / "setup.py").read_text()
    assert {"macos-latest", "windows-latest"} <= set(matrix["os"])
    oldest = matrix["versions"][0]
    floors = dict(re.findall(r'"(torch|torchvision)>=([\d.]+)"', setup))
    assert oldest["torch"].split() == [f"{name}=={version}.*" for name, version in floors.items()]
    assert f'python_requires=">={oldest["python"]}"' in setup


def test_issue_templates_have_a_name_and_a_description():
    templates = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.md"))
    assert len(templates) == 2
    for template in templates:
        front = yaml.safe_load(template.read_text().split("---")[1])
        assert front["name"] and front["about"]
