"""The pages: their Python runs, their commands and links are there, their figures are those that were measured."""

import ast
import importlib
import json
import pkgutil
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from functools import reduce
from pathlib import Path

import pytest
from PIL import Image

from detection import build_faster_rcnn, save_detector
from detection.recipes import RECIPES
from resbackbone import build_resnet_backbone
from resbackbone.cli.command import parse
from resbackbone.tools import train_coco

ROOT = Path(__file__).parents[1]
TOOLS = ROOT / "tools"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
NOT_RUN = "# not run by the tests: "  # first line of a block that cannot be, and why
MOST_NOT_RUN = 4
EXPECTED = {  # what a page's blocks print or leave behind, beside running
    "README.md": "Feature(channels=256, stride=16)",
    "docs/getting_started.md": "p6 256 64 [1, 256, 8, 10]",
    "docs/backbone.md": "[1, 128, 13, 17] [1, 256, 7, 9]",
    "docs/weights.md": "layer2.0.bn1.weight",
    "docs/frameworks.md": "[[1, 256, 4, 4], [1, 512, 2, 2]]",
    "docs/pretraining.md": "25.56 M, 4.09 G",
}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """[tool, word, ..] of every `tools/NAME.py` command of a page, in blocks and in the text; comments are left out."""
    text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
    in_text = re.findall(r"`([^`\n]*tools/[^`\n]*)`", text)
    in_blocks = [line for line in text.splitlines() if "tools/" in line and "`" not in line]
    found = []
    for line in [*in_text, *in_blocks]:
        if match := re.search(r"(?:python|torchrun|srun)\b.*?tools/([a-z]\w*)\.py(.*)", line):
            found.append([match[1], *(word for word in shlex.split(match[2], comments=True) if word != "...")])
    return found


def slugs(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.replace("`", "")).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=name_of)
def test_the_python_of_a_page_runs_as_it_stands(page, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "".join(python_blocks(page))
    for run in re.findall(r'load_detector\("(runs/\w+)"\)', text):  # a command before it makes that
        backbone = build_resnet_backbone(18, fpn=True, fpn_channels=16)
        Path(run).mkdir(parents=True, exist_ok=True)
        detector = build_faster_rcnn(backbone, 10, representation_size=16, min_size=64)
        save_detector(detector, Path(run, "model.safetensors"))
    Image.new("RGB", (60, 50)).save("photo.jpg")
    names = {}
    for block in python_blocks(page):
        if not block.startswith(NOT_RUN):
            exec(compile(block, str(page), "exec"), names)
    assert EXPECTED.get(name_of(page), "") in capsys.readouterr().out


def test_few_blocks_are_not_run_and_each_says_why():
    blocks = [block for page in PAGES for block in python_blocks(page)]
    reasons = [block.splitlines()[0].removeprefix(NOT_RUN) for block in blocks if block.startswith("# not run")]
    assert len(reasons) <= MOST_NOT_RUN and all(len(reason.split()) > 3 for reason in reasons)
    assert set(EXPECTED) <= {name_of(page) for page in PAGES if python_blocks(page)}


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name_of)
def test_every_command_of_a_page_is_one_that_its_tool_understands(page, capsys):
    for tool, *words in commands(page):
        words = ["--resume" if word == "$resume" else word for word in words]  # set by a line above it, in scaling.md
        module = importlib.import_module(f"resbackbone.tools.{tool}")
        if not hasattr(module, "Options"):
            # gpu_check.py refuses a device that this machine lacks
            assert not words or module.parse([*words, "--device", "cpu"]), f"tools/{tool}.py takes no options"
            continue
        if "--config" in words:  # a file that is not here
            at = words.index("--config")
            del words[at : at + 2]
            assert "config" in module.Options.__dataclass_fields__
        try:
            parse(module.Options, words)
        except SystemExit as exit:
            assert exit.code in (0, None) and "--help" in words
        except ValueError as error:
            pytest.fail(f"tools/{tool}.py {shlex.join(words)}: {error}")


def imported(page: Path) -> set[str]:
    """The names of this package that a page imports in its Python."""
    names = set()
    for node in (node for block in python_blocks(page) for node in ast.walk(ast.parse(block))):
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.startswith(("resbackbone.", "detection."))}


def test_every_name_that_a_page_imports_is_on_the_page_of_the_api():
    entry = r"^::: (\S+)\n(?:    options:\n      members: \[(.*)\])?"
    entries = re.findall(entry, (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    public = {name for name, _ in entries}
    public |= {f"{name}.{member}" for name, members in entries for member in members.split(", ") if member}
    here = {name for name in public if not name.startswith("resbackbone.adapters.detectron2")}  # needs detectron2
    objects = {id(pkgutil.resolve_name(name)) for name in here}
    names = set().union(*(imported(page) for page in PAGES))
    assert names
    assert not {name for name in names - public if id(pkgutil.resolve_name(name)) not in objects}


def table_rows(text: str) -> list[list[str]]:
    """The cells of each row of a page's tables, headers included."""
    rows = re.findall(r"^\| (.*) \|$", text, re.MULTILINE)
    return [[cell.strip() for cell in row.split(" | ")] for row in rows if not row.startswith("---")]


def code_in(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def test_our_commands_and_options_beside_those_of_other_packages_are_there():
    options = {f"--{name.replace('_', '-')}" for name in train_coco.Options.__dataclass_fields__}
    options |= {f"--no-{name.removeprefix('--')}" for name in options}
    ours = [code for _, *cells in table_rows((ROOT / "docs/migrating.md").read_text()) for code in code_in(cells[-1])]
    commands, flags = ([x for x in ours if re.match(start, x)] for start in (r"\w+\.py ", "--"))
    assert len(commands) > 20 and len(flags) > 60
    for command in commands:
        tool, *words = shlex.split(command)
        parse(importlib.import_module(f"resbackbone.tools.{tool.removesuffix('.py')}").Options, words)
    for name, values in re.findall(r"(--[a-z][\w.-]*)((?: [\w.]+)*)", " ".join(flags)):
        if name.startswith("--recipe."):
            reduce(getattr, name[len("--recipe.") :].replace("-", "_").split("."), RECIPES["1x"])
            words = [name, *values.split()] if values else []
            train_coco.recipe_of(replace(parse(train_coco.Options, words), recipe="1x"))
        else:
            assert name in options


def test_messages_on_the_page_of_troubles_are_those_of_the_code():
    of_others = {"CUDA out of memory", "operator torchvision::nms does not exist"}
    literals = []  # a message's values are ".." in it
    for path in (path for folder in ("resbackbone", "detection", "tools") for path in (ROOT / folder).rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        docstrings = {node.value for node in nodes if isinstance(node, ast.Expr)}
        for node in (node for node in nodes if node not in docstrings):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            literals.append("..".join(str(part.value) for part in parts if isinstance(part, ast.Constant)))
    rows = table_rows((ROOT / "docs/troubleshooting.md").read_text())
    messages = {code for first, *_ in rows for code in code_in(first) if len(code.split()) > 2} - of_others
    assert len(messages) > 25
    for message in messages:
        pieces = re.compile(".*".join(re.escape(piece.strip()) for piece in message.split("..")), re.DOTALL)
        assert any(map(pieces.search, literals)), message


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_a_page_names_is_there(page):
    text = page.read_text(encoding="utf-8")
    folders = "tools|examples|configs|resbackbone|detection|tests"
    for path in re.findall(rf"(?<![\w/])(?:{folders})/[a-z][\w/]*\.(?:py|yaml)", text):
        assert (ROOT / path).is_file(), path
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ((?!PYTHON)[a-z-]+)", text, re.MULTILINE)) <= targets
    extras = set(re.findall(r'"(\w+)": [A-Z[]', (ROOT / "setup.py").read_text()))
    assert set(re.findall(r"\.\[(\w+)\]", text)) <= extras
    for path, anchor in re.findall(r"\]\((?!\w+:)([^)#]*)(#[^)]*)?\)", text):
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor[1:] in slugs(target), path + anchor


def test_the_readmes_ratios_are_those_on_the_page_of_benchmarks():
    table = (ROOT / "README.md").read_text().partition("\nTime relative to the fastest")[2].split("\n\n")[1]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert header[1:] == ["fp32", "fused", "OpenVINO", "bf16, channels last", "fused", "OpenVINO"] and rows
    sections = (ROOT / "docs/benchmarks.md").read_text().split("\n### ")
    for name, *ratios in rows:
        (section,) = [section for section in sections if section.startswith(name)]
        found = re.findall(r"^\|(?: \d+ \| ([\w-]+) \|)? ([^|]+) \|.*?\| ([\d.]+) \(", section, re.MULTILINE)
        ratio_of = {(mode.replace("fp64", "fp32") or "fp32", package): ratio for mode, package, ratio in found}
        packages = ("**resbackbone**", "**resbackbone, fused**", "openvino")
        modes = ("fp32", "bf16-channels-last")
        assert ratios == [ratio_of.get((mode, package), "") for mode in modes for package in packages], name


def test_every_measured_row_of_the_model_zoo_is_what_its_metrics_say():
    zoo = (ROOT / "MODEL_ZOO.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in zoo.splitlines() if "docs/results/" in line
    ]
    assert rows
    for row in rows:
        ap, ap50, folder = row[3], row[4], ROOT / re.search(r"\]\((.*?)\)", row[8])[1]
        assert (folder / "config.yaml").is_file() and (folder / "metrics.jsonl").is_file()
        results = json.loads((folder / "results.json").read_text())
        box = results.get("bbox")
        first, second = (box["AP"], box["AP50"]) if box else (results["top1"], results["top5"])
        assert (f"{100 * first:.1f}", f"{100 * second:.1f}") == (ap, ap50)


@pytest.fixture(scope="module")
def site(module_path):
    """The folder of the site, built without a warning."""
    pytest.importorskip("material", reason="mkdocs-material is not installed: pip install -e '.[docs]'")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed: pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(module_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return module_path


def test_the_site_asks_nothing_of_the_network(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 15 and (site / "examples/plain_pytorch.py").is_file()
    assert "<code>frozen_through</code>: " in (site / "api.html").read_text()  # from a docstring, as a list
    for page in pages:
        loaded = re.findall(r"<(?:link|script|img|iframe)\b[^>]*?\b(?:href|src)=\"?(https?:[^\" >]+)", page.read_text())
        assert not loaded, page
        assert "assets/iframe-worker.js" in page.read_text()  # without it, pages of file:// cannot search


def test_the_search_finds_words_in_pages_that_are_opened_from_files(site, chromium):
    page = chromium.new_page()
    page.goto((site / "experiments/bccd.html").as_uri())
    page.get_by_role("textbox", name="Search").click()
    page.keyboard.type("microscope")
    results = page.locator(".md-search-result__item")
    results.first.wait_for()
    assert "BCCD" in " ".join(results.all_inner_texts())
