"""The lock of a workdir: who is kept out, and that nobody is who should not be."""

import errno
import logging
import os
import socket
import threading

import pytest

from lit_jax.runtime import workdir_lock


def test_a_second_run_is_refused_and_told_the_owner(tmp_path, monkeypatch):
    monkeypatch.setattr(workdir_lock, "WAIT_SECONDS", 0.3)
    with workdir_lock.lock_workdir(tmp_path):
        before = (tmp_path / "lock").read_text()
        owner = f"process {os.getpid()} on {socket.gethostname()} since 20.* UTC"
        refusal = f"--workdir={tmp_path} is in use by {owner}; "
        for _ in range(2):  # being refused frees nothing
            with (
                pytest.raises(ValueError, match=refusal) as error,
                workdir_lock.lock_workdir(tmp_path),
            ):
                pass
        assert "\n" not in str(error.value) and (tmp_path / "lock").read_text() == before
        with workdir_lock.lock_workdir(tmp_path.parent):
            pass
    assert (tmp_path / "lock").read_text() == ""


def test_it_is_free_again_after_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(workdir_lock, "WAIT_SECONDS", 0.0)
    with pytest.raises(KeyError), workdir_lock.lock_workdir(tmp_path):
        raise KeyError
    with workdir_lock.lock_workdir(tmp_path):
        pass


def test_a_run_that_is_ending_is_waited_for(tmp_path):
    leave, holds = threading.Event(), threading.Event()

    def hold():
        with workdir_lock.lock_workdir(tmp_path):
            holds.set()
            leave.wait()

    owner = threading.Thread(target=hold)
    owner.start()
    holds.wait()
    threading.Timer(1.0, leave.set).start()
    with workdir_lock.lock_workdir(tmp_path):
        assert leave.is_set()
    owner.join()


def test_a_folder_without_locks_is_used_with_a_note(tmp_path, monkeypatch, caplog):
    """What object stores mounted as folders answer."""

    def flock(*_):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(workdir_lock.fcntl, "flock", flock)
    with caplog.at_level(logging.INFO, logger="absl"), workdir_lock.lock_workdir(tmp_path):
        pass
    assert f"{tmp_path}/lock cannot be locked (Operation not supported)" in caplog.text


def test_a_folder_is_made_and_named_as_the_caller_says(tmp_path, monkeypatch):
    monkeypatch.setattr(workdir_lock, "WAIT_SECONDS", 0.0)
    place = tmp_path / "new" / "set"
    with workdir_lock.lock_folder(place, f"the data set {place}", "another data.name"):
        message = f"^the data set {place} is in use by process .* or use another data.name$"
        with (
            pytest.raises(ValueError, match=message),
            workdir_lock.lock_folder(place, f"the data set {place}", "another data.name"),
        ):
            pass
