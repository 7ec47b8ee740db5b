import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from resbackbone.engine.termination import Terminated, termination, worker_processes


def send_sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    "number, command, saved, status, message",
    [
        (signal.SIGTERM, "", None, 143, "terminated"),
        (signal.SIGTERM, "again", None, 143, "terminated before the first update; there was nothing to save"),
        (signal.SIGTERM, "again", 7, 0, "terminated at step 7, which is saved; continue with: again"),
        (signal.SIGINT, "", None, 130, "interrupted"),
        (signal.SIGINT, "again", None, 130, "interrupted before the first update; there was nothing to save"),
        (signal.SIGINT, "again", 7, 130, "interrupted at step 7, which is saved; continue with: again"),
    ],
)
def test_a_signal_stops_at_once_and_says_what_is_saved(number, command, saved, status, message):
    with pytest.raises(Terminated) as stopped, termination.handled():
        termination.saved, termination.resume_command = saved, command
        os.kill(os.getpid(), number)
        raise AssertionError("not stopped")
    assert (stopped.value.code, str(stopped.value)) == (status, message)


def test_ctrl_c_that_a_shell_ignores_for_background_jobs_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with termination.handled():
            os.kill(os.getpid(), signal.SIGINT)
            assert not termination.requested
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_second_ctrl_c_stops_wherever_the_process_is(capfd):
    with termination.handled(), termination.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        assert termination.requested
        send_sigterm()  # as a parent that was interrupted too forwards it
        assert capfd.readouterr().err.count("stopping soon; Ctrl-C again stops at once") == 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("not stopped")


def test_a_deferred_signal_is_noted_and_one_in_a_part_that_is_not_stops():
    with termination.handled():
        with termination.deferred():
            assert not termination.requested
            send_sigterm()
            assert termination.requested
            with pytest.raises(Terminated), termination.deferred(False):
                send_sigterm()
            send_sigterm()  # deferred again
        with pytest.raises(Terminated) as stopped:
            termination.stop(together=True)
        assert stopped.value.together


def test_afterwards_the_signal_does_what_it_did_before_and_nothing_is_remembered():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with termination.handled(), termination.deferred():
        os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    with termination.handled():
        assert not termination.requested and not termination.interrupted and termination.saved is None


class Pids:
    """Sample 0 is the process that makes it."""

    def __getitem__(self, i):
        return os.getpid()

    def __len__(self):
        return 100


def loads():
    """A loader's batches, and the process that makes them."""
    batches = iter(DataLoader(Pids(), batch_size=None, **worker_processes(1)))
    return batches, next(batches)


def is_there(pid):
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ends(pid, seconds=20):
    deadline = time.monotonic() + seconds
    while is_there(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_there(pid)


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers take SIGTERM as usual")


@on_linux
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_data_loaders_worker_heeds_no_signal_of_others(number):
    batches, worker = loads()
    subprocess.run(["kill", f"-{int(number)}", str(worker)], check=True)
    assert not ends(worker, 0.5) and list(batches) == [worker] * 99


@on_linux
def test_a_data_loaders_worker_ends_when_its_parent_terminates_it_or_exits():
    _batches, worker = loads()
    os.kill(worker, signal.SIGTERM)
    assert ends(worker, 5)
    here = Path(__file__)
    program = f"import sys; sys.path.insert(0, {str(here.parent)!r})\nimport {here.stem} as own\n"
    program += "batches, pid = own.loads()\nprint(pid, flush=True)\n"
    for ending in ("", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"):
        environment = {**os.environ, "PYTHONPATH": str(here.parents[2])}
        argv = [sys.executable, "-c", program + ending]
        process = subprocess.run(argv, stdout=subprocess.PIPE, text=True, timeout=60, env=environment)
        assert ends(int(process.stdout)) and process.returncode in (0, -signal.SIGKILL)
