"""The lock of a workdir: who is kept out, and that nobody is who should not be."""
import errno
import logging
import os
import socket
import threading

import pytest

from lit_jax import workdirs


def test_a_second_run_is_refused_and_told_the_owner(tmp_path, monkeypatch):
    monkeypatch.setattr(workdirs, "WAIT_SECONDS", 0.3)
    with workdirs.own(tmp_path):
        before = (tmp_path / "lock").read_text()
        refusal = f"--workdir={tmp_path} is in use by process {os.getpid()} on {socket.gethostname()} since 20.* UTC; "
        for _ in range(2):      # being refused frees nothing
            with pytest.raises(ValueError, match=refusal) as error, workdirs.own(tmp_path):
                pass
        assert "\n" not in str(error.value) and (tmp_path / "lock").read_text() == before
        with workdirs.own(tmp_path.parent):
            pass
    assert (tmp_path / "lock").read_text() == ""


def test_it_is_free_again_after_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(workdirs, "WAIT_SECONDS", 0.0)
    with pytest.raises(KeyError), workdirs.own(tmp_path):
        raise KeyError
    with workdirs.own(tmp_path):
        pass


def test_a_run_that_is_ending_is_waited_for(tmp_path):
    leave, holds = threading.Event(), threading.Event()

    def hold():
        with workdirs.own(tmp_path):
            holds.set()
            leave.wait()

    owner = threading.Thread(target=hold)
    owner.start()
    holds.wait()
    threading.Timer(1.0, leave.set).start()
    with workdirs.own(tmp_path):
        assert leave.is_set()
    owner.join()


def test_a_folder_without_locks_is_used_with_a_note(tmp_path, monkeypatch, caplog):
    """What object stores mounted as folders answer."""
    def flock(*_):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(workdirs.fcntl, "flock", flock)
    with caplog.at_level(logging.INFO, logger="absl"), workdirs.own(tmp_path):
        pass
    assert f"{tmp_path}/lock cannot be locked (Operation not supported)" in caplog.text
