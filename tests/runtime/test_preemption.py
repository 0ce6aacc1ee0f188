"""Signals that stop a run: SIGTERM, SIGHUP and SIGINT are answered alike."""

import ctypes
import gc
import os
import pty
import signal
import time

import pytest

from lit_jax.runtime import exit_status, preemption


@pytest.fixture
def before():
    """The handlers before a test, which must leave them as they were."""
    handlers = {number: signal.getsignal(number) for number in preemption.SIGNALS}
    yield handlers
    assert {number: signal.getsignal(number) for number in preemption.SIGNALS} == handlers


@pytest.mark.parametrize("number", preemption.SIGNALS)
def test_a_signal_ends_a_job_in_one_line_with_75(before, number, capsys):
    with pytest.raises(SystemExit) as end, exit_status.shared_fate(1.0):
        with preemption.signals_stop():
            os.kill(os.getpid(), number)
    assert end.value.code == exit_status.EXIT_TRY_AGAIN
    name = signal.Signals(number).name
    assert capsys.readouterr().err == f"stopped by {name}; run the same command again to go on\n"


def test_a_signal_is_answered_although_it_came_in_a_callback_of_the_collector(before):
    """Python discards what is raised there, and JAX has such a callback."""
    sent = []

    def callback(phase, info):
        if not sent:
            sent.append(phase)
            os.kill(os.getpid(), signal.SIGINT)

    gc.callbacks.append(callback)
    try:
        with pytest.raises(exit_status.TryAgainError, match="^stopped by SIGINT"):
            with preemption.signals_stop():
                gc.collect()
                time.sleep(30)
    finally:
        gc.callbacks.remove(callback)
    assert sent


def test_training_hears_of_a_signal_at_its_next_check(before):
    with preemption.signals_stop():
        stop = preemption.Preemption()
        stop.check()
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(preemption.StopRequest):
            stop.check()
        stop.close()


def test_the_kernel_answers_a_second_ctrl_c(before):
    """Python's own handler would wait until a library in C returns."""
    stop = preemption.Preemption()
    os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    stop.close()


def test_a_signal_that_the_run_was_told_to_ignore_is_ignored(before):
    """So does nohup with SIGHUP."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with preemption.signals_stop():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before[signal.SIGHUP])


def test_jaxs_service_is_told_of_any_signal_that_training_hears_of(before, monkeypatch):
    """jax.distributed.initialize sets a handler for SIGTERM in C, behind Python's back."""
    told = []
    service = ctypes.CFUNCTYPE(None, ctypes.c_int)(told.append)
    library = ctypes.CDLL(None)
    monkeypatch.setattr(preemption.jax, "process_count", lambda: 2)
    with preemption.signals_stop() as listener:
        library.signal(signal.SIGTERM, service)
        listener.take_over()
        # During the start there is nothing to save, and no step at which to agree.
        with pytest.raises(exit_status.TryAgainError):
            os.kill(os.getpid(), signal.SIGTERM)
        assert not told
        stop = preemption.Preemption()
        os.kill(os.getpid(), signal.SIGHUP)
        assert told == [signal.SIGTERM]
        stop.close()


def test_a_run_whose_terminal_is_gone_can_still_write(tmp_path):
    """Its log would end it otherwise, before it has saved."""
    master, terminal = pty.openpty()
    os.close(master)
    with pytest.raises(OSError):
        os.write(terminal, b"step 1")
    log = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    preemption.leave_terminal(terminal, log)
    assert os.write(terminal, b"step 2") == os.write(log, b"step 2") == 6
    os.close(terminal)
    os.close(log)
    assert (tmp_path / "log").read_bytes() == b"step 2"
