import dataclasses
import importlib
import io
import re
from pathlib import Path

import pytest
import tyro
from rich.console import Console

from resbackbone.cli.help import GROUPS, print_help

TOOLS = Path(__file__).parents[2] / "tools"
COMMANDS = sorted(path.stem for path in TOOLS.glob("*.py") if "parse(Options, argv)" in path.read_text())
TRAININGS = ("train_coco", "pretrain", "train_cifar10")


@dataclasses.dataclass(frozen=True)
class Shared:
    device: str = "cpu"
    """Where it runs."""
    workers: int | None = None
    """Processes."""


@dataclasses.dataclass(frozen=True)
class Options(Shared):
    """Not what is printed."""

    run: tyro.conf.Positional[str] = ""
    """A run's folder.
    Or a file."""
    images: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Some images."""
    scales: tuple[int, ...] = (200, 400)
    """Sides."""
    eval_period: int = 0
    """Updates."""
    pictures: bool = True
    """Draw them."""
    overwrite: bool = False
    """What is there."""
    rate: float | None = None
    bare: str = "[x]"


def help_of(options, description="It does something.", width=100):
    out = io.StringIO()
    print_help(Console(file=out, width=width, markup=False, highlight=False, soft_wrap=True), options, description)
    return out.getvalue()


def test_options_stand_under_what_they_are_about_with_kind_text_and_default():
    lines = [line.rstrip() for line in help_of(Options).splitlines()]
    assert lines[:3] == ["usage: python tools/test_help.py RUN IMAGE... [OPTIONS]", "", "It does something."]
    text = "\n".join(lines[3:])
    assert (
        re.sub(" {2,}", "  ", text)
        == """
Arguments
  RUN  A run's folder. Or a file.
  IMAGE...  Some images.

Evaluation
  --eval-period N  Updates. (default: 0)
  --scales N ..  Sides. (default: 200 400)

Machine
  --device NAME  Where it runs. (default: cpu)
  --workers N  Processes.

Options
  --[no-]pictures  Draw them. (default: yes)
  --overwrite  What is there.
  --rate X
  --bare NAME  (default: [x])
  -h, --help  Show this and exit."""
    )


def test_a_narrow_terminal_wraps_texts_and_cuts_no_flag():
    lines = help_of(Options, "It does something. " * 9, width=40).splitlines()
    assert all(len(line) <= 40 for line in lines if not line.startswith("usage"))
    assert any(line.startswith("  --[no-]pictures  ") for line in lines)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_commands_help_has_all_its_options_each_with_a_text_and_examples_that_can_be_typed(name, capsys):
    command = importlib.import_module(f"resbackbone.tools.{name}")
    with pytest.raises(SystemExit) as exit:
        command.main(["--help"])
    assert exit.value.code == 0
    said = capsys.readouterr().out
    assert f"usage: python tools/{name}.py" in said
    fields = [field.name for field in dataclasses.fields(command.Options)]
    for field in fields:
        flag = field.replace("_", "-")
        assert re.search(rf"^  (--(\[no-\])?{flag}|{field.upper().rstrip('S')}\S*) ", said, re.M), field
    assert not re.search(r"^  --\S+( \S+)?( \.\.)?\s*$", said, re.M)  # a flag without a word on it
    examples = said.split("\nExamples\n")[1].splitlines()
    own = [line for line in examples if line.startswith(f"  python tools/{name}.py")]
    assert own and own[0] == examples[0]
    for line in own:
        for flag in re.findall(r"(?<= )--([a-z0-9-]+)", line):
            assert flag.removeprefix("no-").replace("-", "_") in fields, flag


@pytest.mark.parametrize("name", TRAININGS)
def test_a_trainings_options_are_nearly_all_in_a_group(name):
    named = {option for names in GROUPS.values() for option in names}
    fields = {field.name for field in dataclasses.fields(importlib.import_module(f"resbackbone.tools.{name}").Options)}
    assert fields - named == set()
