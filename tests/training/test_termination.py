import os
import signal
import threading

import pytest

from resbackbone.training.termination import EXIT_STATUS, Terminated, termination


def send_sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


def test_the_signal_stops_at_once_with_the_status_a_shell_reports():
    with pytest.raises(Terminated) as stopped, termination.handled():
        send_sigterm()
        raise AssertionError("went on")
    assert stopped.value.code == EXIT_STATUS == 143


def test_once_all_is_saved_the_status_is_0():
    with pytest.raises(Terminated) as stopped, termination.handled():
        termination.saved = True
        send_sigterm()
    assert stopped.value.code == 0


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
    before = signal.getsignal(signal.SIGTERM)
    with termination.handled(), termination.deferred():
        send_sigterm()
    assert signal.getsignal(signal.SIGTERM) is before
    with termination.handled():
        assert not termination.requested and not termination.saved


def test_in_another_thread_which_may_have_no_handler_nothing_is_handled():
    seen = []

    def work():
        with termination.handled():
            seen.append("done")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == ["done"]
