import dataclasses
import importlib
import re
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
COMMANDS = sorted(path.stem for path in TOOLS.glob("*.py") if "parse(Options, argv)" in path.read_text())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_commands_help_has_all_its_options_each_with_a_text_and_examples_that_can_be_typed(name, capsys):
    command = importlib.import_module(f"resbackbone.tools.{name}")
    with pytest.raises(SystemExit) as exit:
        command.main(["--help"])
    assert exit.value.code in (0, None)
    text = capsys.readouterr().out
    fields = [field.name for field in dataclasses.fields(command.Options) if field.name != "recipe_values"]
    for field in fields:
        flag = field.replace("_", "-")
        assert re.search(rf"^[│ ] (--{flag}|\[?{field.upper()})\b", text, re.M), field
    assert not re.search(r"^[│ ] --\S+( \S+)? +\(default: ", text, re.M)  # a flag without a text
    assert re.search("\n\nExamples:\n  (python|pip) ", text)
    examples = [line for line in text.splitlines() if line.startswith("  python tools/")]
    assert examples and examples[0].startswith(f"  python tools/{name}.py")
    for line in examples:
        if line.startswith(f"  python tools/{name}.py"):
            for flag in re.findall(r"(?<= )--([a-z0-9-]+)", line):
                assert flag.removeprefix("no-").replace("-", "_") in fields, flag
