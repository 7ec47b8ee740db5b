"""Tests of options, one-line errors and progress."""

import io
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from resbackbone.checks import UserError
from resbackbone.cli import command, errors
from resbackbone.cli.command import (
    Progress,
    be_quiet,
    console,
    from_config,
    main_of,
    parse,
    progress_console,
    to_config,
    track,
)
from resbackbone.cli.options import MachineOptions, RunOptions, training_options


@dataclass(frozen=True)
class Options:
    """Train something."""

    data: Path | None = None
    """Folder
    of images."""
    depth: int = 50
    rate: float = 0.02
    max_steps: int | None = None
    norm: str = "BN"
    resume: bool = False
    config: Path | None = None


def one_line(argv, **options) -> str:
    with pytest.raises(ValueError) as error:
        parse(Options, argv, **options)
    assert "\n" not in str(error.value) and "│" not in str(error.value)
    return str(error.value)


@dataclass(frozen=True)
class Grouped(RunOptions, MachineOptions):
    """Options in groups."""


def test_options_are_groups_of_the_help_and_flags_have_no_prefix(capsys):
    with pytest.raises(SystemExit) as exit:
        parse(Grouped, ["--help"])
    assert exit.value.code in (0, None)
    text = capsys.readouterr().out
    assert text.index("Tests of options") < text.index("Run options") < text.index("--max-steps INT")
    assert text.index("--max-steps INT") < text.index("Machine options")
    assert "(default: None)" not in text
    options = parse(Grouped, ["--seed", "3", "--output", "run"], default=Grouped(gpus=2, log_period=7))
    assert options == Grouped(seed=3, output=Path("run"), gpus=2, log_period=7)
    assert list(to_config(options))[:2] == ["output", "resume"]  # in the order of the help


def test_the_terminal_alone_breaks_the_lines_of_an_options_text(capsys):
    with pytest.raises(SystemExit):
        parse(Options, ["-h"])
    assert "Folder of images." in capsys.readouterr().out


def test_options_are_the_defaults_and_over_them_the_flags():
    assert parse(Options, []) == Options()
    assert parse(Options, ["--data", "a/b", "--max-steps", "3", "--rate=0.5", "--resume"]) == Options(
        data=Path("a/b"), max_steps=3, rate=0.5, resume=True
    )
    assert parse(Options, ["--depth", "18"], default=Options(depth=34, norm="GN")) == Options(depth=18, norm="GN")
    assert parse(Options, ["--data=~/photos"]).data == Path.home() / "photos"


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--no-such-option", "1"], "no option --no-such-option nor one like it"),
        (["--depth", "fifty"], "--depth fifty: must be a whole number"),
        (["--max-steps", "many"], "--max-steps many: must be a whole number"),
        (["--depth"], "--depth: needs a value, a whole number"),
        (["stray"], "stray: belongs to no option"),
        (["--config", "no.yaml"], "--config no.yaml: cannot be read (No such file or directory)"),
    ],
)
def test_a_mistake_is_answered_in_one_line_that_names_it(argv, message, capsys):
    assert message in one_line(argv)
    assert not capsys.readouterr().err  # the caller prints, once


@pytest.mark.parametrize("spelling", [["--config", "{}"], ["--config={}"]])
def test_a_config_file_is_under_the_flags_wherever_it_stands(spelling, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("depth: 18\nrate: 1\nnorm: GN\n")
    config = [word.format(path) for word in spelling]
    for argv in (["--norm", "BN", *config], [*config, "--norm", "BN"]):
        options = parse(Options, argv)
        assert (options.depth, options.rate, options.norm) == (18, 1.0, "BN")
        assert isinstance(options.rate, float)


@dataclass(frozen=True)
class Lists:
    """Options of several values each."""

    sources: tuple[str, ...] = ()
    config: Path | None = None


def test_an_option_of_several_values_is_a_list_in_a_config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("sources: [a, b]\n")
    assert from_config(Lists, path) == Lists(sources=("a", "b"))


def test_what_a_run_wrote_comes_back(tmp_path):
    options = Options(data=Path("some/where"), rate=1e-4, max_steps=7, resume=True)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**to_config(options), "effective": {"rate": 3}}))
    assert from_config(Options, path) == options
    path.write_text(path.read_text() + "removed_since: false\n")
    assert from_config(Options, path) == options


@pytest.mark.parametrize(
    "text, message",
    [
        ("depht: 18", "no option --depht; did you mean --depth?"),
        ("depth: fifty", "--depth fifty: must be a whole number"),
        ("depth: 18.5", "--depth 18.5: must be a whole number"),
        ("depth: true", "--depth: needs a value, a whole number"),
        ("resume: 1", "--resume=1: takes no value"),
        ("max_steps: many", "--max-steps many: must be a whole number"),
        ("rate: [1, 2]", "2: one word too many after --rate 1"),
    ],
)
def test_a_config_with_an_unknown_option_or_a_wrong_type_is_refused_by_name(text, message, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        from_config(Options, path)
    assert str(path) in one_line(["--config", str(path)])


@pytest.mark.parametrize(
    "error, line",
    [
        (UserError("two\n  lines"), "error: two lines"),
        (FileNotFoundError(2, "No such file", "x.json"), "error: x.json: No such file"),
        (MemoryError(), "error: out of memory; lower --batch-size or raise --accumulate"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a capacity .."),
            "error: CUDA out of memory. Tried to allocate 2.00 GiB; lower --batch-size or raise --accumulate",
        ),
    ],
)
def test_a_users_mistake_ends_the_command_with_one_line(error, line, monkeypatch):
    def command():
        raise error

    monkeypatch.delenv("RESBACKBONE_DEBUG", raising=False)
    with pytest.raises(SystemExit) as exit:
        main_of(command)
    assert exit.value.code == line  # Python prints it on stderr, status 1
    monkeypatch.setenv("RESBACKBONE_DEBUG", "1")
    with pytest.raises(type(error)):
        main_of(command)


@pytest.mark.parametrize(
    "saved, said", [(None, "interrupted"), (7, "interrupted; step 7 is saved; continue with: again --resume")]
)
def test_ctrl_c_at_once_ends_a_command_with_what_is_saved_and_the_status_of_shells(saved, said, capsys, monkeypatch):
    monkeypatch.setattr(errors.termination, "saved", saved)
    monkeypatch.setattr(errors.termination, "resume_command", "again --resume")
    with pytest.raises(SystemExit) as exit, errors.one_line_errors():
        raise KeyboardInterrupt
    assert exit.value.code == 130 and capsys.readouterr().err == f"{said}\n"


def test_ctrl_c_while_a_command_imports_is_one_line_and_a_signal():
    program = "import resbackbone.cli; raise KeyboardInterrupt"  # as an import raises it
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stderr == "interrupted\n" and run.returncode == -signal.SIGINT


def test_a_rank_that_is_not_the_first_says_which_it_is(monkeypatch):
    monkeypatch.delenv("RESBACKBONE_DEBUG", raising=False)
    monkeypatch.setattr(errors, "HEAD_START", 0.0)
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit) as exit, errors.one_line_errors():
        raise UserError("no such image")
    assert exit.value.code == "error on rank 3: no such image"


@pytest.mark.parametrize(
    "last_line, status, said",
    [("", 0, ""), ("raise UserError('x')", 1, "error: x"), ("sys.exit(143)", 143, ""), ("sys.exit()", 0, "")],
)
def test_a_rank_exits_with_its_status_at_once_and_takes_its_workers_along(last_line, status, said):
    code = f"""
import atexit, multiprocessing, sys, time
from resbackbone.checks import UserError
from resbackbone.cli.command import main_of
def command():
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(100,)).start()  # would be waited for
    print("worked")
    {last_line}
atexit.register(print, "Python's own way out")
main_of(command)
"""
    environment = {name: value for name, value in os.environ.items() if name != "RESBACKBONE_DEBUG"} | {"RANK": "0"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout) == (status, "worked\n")
    assert run.stderr.startswith(said) and len(run.stderr.splitlines()) == bool(said)


def test_our_own_mistake_keeps_its_traceback_and_success_says_nothing():
    for mistake in (AssertionError, ValueError, KeyError):
        with pytest.raises(mistake):
            main_of(lambda mistake=mistake: (_ for _ in ()).throw(mistake))
    assert main_of(lambda: "result") is None


def test_a_log_gets_a_line_for_every_note(capsys):
    assert list(track(iter("abc"), 3, "letters")) == ["a", "b", "c"]
    with Progress("train", 10, start=4) as progress:
        progress.update(5)
        progress.update(6, "loss 0.5")
    with Progress("train", 10, shown=False) as progress:
        progress.update(6, "another rank")
    with Progress("frames", None) as progress:
        progress.update(3, "dark")
    assert capsys.readouterr().out == "train 6/10, 0:00:01 left, loss 0.5\nframes 3, dark\n"


# The terminal


@pytest.fixture
def terminal(monkeypatch):
    """What a terminal of 80 columns is sent."""
    out = io.StringIO()
    options = {"force_terminal": True, "width": 80, "legacy_windows": False, **command.PLAIN}
    monkeypatch.setattr(command, "progress_console", Console(file=out, **options))
    return out


def screen(sent):
    """The lines sent to a terminal without their colours and cursor movements."""
    written = sent.getvalue().replace("\r\x1b[2K", "\n")  # the bar is drawn over
    return [line.rstrip() for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", written).splitlines()]


def test_a_terminal_shows_notes_and_below_them_a_bar_with_the_time_left(terminal):
    note = f"loss 0.5 ({'rpn_box 0.1 ' * 5}), 3.2 images/s, data 4%, 900 MiB, AP 37.0, AP50 58.0"
    with Progress("train", 10, start=4) as progress:
        progress.update(5)
        progress.update(7, note)
    lines = screen(terminal)
    assert re.match(r"train .* 7/10 0:00:0\d 0:00:0\d left$", lines[-1])
    assert f"train 7/10, 0:00:01 left, {note}" in lines
    with Progress("train", 10) as progress:
        progress.update(3, note, math.inf)
        progress.update(4, note, 83.4)
    assert {f"train 3/10, {note}", f"train 4/10, 0:01:23 left, {note}"} <= set(screen(terminal))
    assert list(track("ab", None, "frames")) == ["a", "b"]
    assert re.match(r"frames .* 2/\? 0:00:0\d$", [line for line in screen(terminal) if line][-1])


# --quiet


@dataclass(frozen=True)
class Quiet(RunOptions, MachineOptions):
    """Train quietly."""


@pytest.fixture
def restored():
    yield
    be_quiet(None)


@pytest.mark.parametrize("is_terminal", [False, True])
def test_quiet_silences_notes_and_progress_and_neither_results_nor_the_next_command(
    is_terminal, restored, terminal, capsys
):
    shown = command.progress_console if is_terminal else progress_console
    for argv, said in ((["--quiet"], ["result"]), ([], ["note", "train 6/10, loss 0.5", "result"])):
        command.progress_console = shown  # as `terminal` does, which puts the real one back
        parse(Quiet, argv)
        shown.print("note")
        with Progress("train", 10, start=5) as progress:
            progress.update(6, "loss 0.5")
        console.print("result")
        lines = [*screen(terminal), *capsys.readouterr().out.splitlines()]
        if argv or not is_terminal:
            assert lines == said
        else:
            assert "note" in lines and "train 6/10, loss 0.5" in lines
    parse(Quiet, ["--quiet"])
    parse(Options, [])  # has no such option
    assert not shown.quiet


def test_quiet_is_of_a_call_and_not_of_the_run(tmp_path, restored):
    assert "quiet" not in to_config(Quiet(quiet=True))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_config(Quiet(seed=3))))
    argv = ["--quiet", "--output", str(tmp_path)]
    options = replace(parse(Quiet, argv), resume=True)
    again = training_options(options, argv, lambda options: options, lambda _: tmp_path)
    assert again == replace(Quiet(seed=3), quiet=True, output=tmp_path, resume=True)


# Completion


def test_bash_completes_the_flags_of_a_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tools/cmd.py"])
    with pytest.raises(SystemExit):
        parse(Options, ["--tyro-print-completion", "bash"])
    script = tmp_path / "completion.bash"
    script.write_text(
        capsys.readouterr().out + "\nCOMP_WORDS=(cmd --ma) COMP_CWORD=1 COMP_LINE='cmd --ma' COMP_POINT=8\n"
        "$(complete -p cmd | sed 's/.*-F \\([^ ]*\\).*/\\1/') cmd --ma cmd\nprintf '%s\\n' \"${COMPREPLY[@]}\"\n"
    )
    run = subprocess.run(["bash", str(script)], capture_output=True, text=True)
    assert run.stdout.split() == ["--max-steps"], run.stderr
