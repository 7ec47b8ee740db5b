import torch

from resbackbone.cli import load, options

CORES = {0, 1, 2}


def reading(monkeypatch, *seconds):
    """`_computed` gives these one after the other."""
    readings = iter(seconds)
    monkeypatch.setattr(load, "_computed", lambda: next(readings))
    monkeypatch.setattr(load.time, "sleep", lambda _: None)
    times = iter((10.0, 10.0, 12.0))  # the start, before the sleep, after it
    monkeypatch.setattr(load.time, "monotonic", lambda: next(times))


def test_what_a_command_computes_itself_does_not_count_as_load(monkeypatch):
    reading(monkeypatch, (100.0, 5.0), (105.0, 7.0))
    assert load.Load().cores_of_others() == (5.0 - 2.0) / 2


def test_where_the_system_does_not_tell_there_is_no_load(monkeypatch):
    reading(monkeypatch, None, None)
    assert load.Load().cores_of_others() == 0


def test_linux_tells_how_long_the_cores_have_computed():
    everyone, own = load._computed()
    assert everyone > own > 0


def threads_chosen(monkeypatch, others):
    chosen = []
    monkeypatch.setattr(load.START, "cores_of_others", lambda: others)
    monkeypatch.setattr(options.os, "sched_getaffinity", lambda _: CORES)
    monkeypatch.setattr(torch, "get_num_threads", lambda: len(CORES))
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    options.leave_busy_cores()
    return chosen


def test_a_command_leaves_busy_cores_to_others_and_says_so(monkeypatch, capsys):
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert threads_chosen(monkeypatch, 1.2) == [2]
    assert "other processes use 1.2 cores, so this one computes with 2 of 3 threads" in capsys.readouterr().out
    assert threads_chosen(monkeypatch, 9.0) == [1]
    capsys.readouterr()
    assert threads_chosen(monkeypatch, 0.4) == [] and capsys.readouterr().out == ""


def test_a_number_of_threads_in_the_environment_decides(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads_chosen(monkeypatch, 2.0) == []
