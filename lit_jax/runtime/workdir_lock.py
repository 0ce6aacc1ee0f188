"""Locks of folders: two runs that write to one would overwrite each other's files."""

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from typing import TextIO

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from lit_jax.runtime import storage

# A run that was told to stop may still be saving when the next one starts.
WAIT_SECONDS = 10


@contextlib.contextmanager
def lock_workdir(workdir: epath.PathLike) -> Iterator[None]:
    """Keeps other runs out of `workdir`; see `lock_folder`."""
    with lock_folder(workdir, f"--workdir={workdir}", "another --workdir"):
        yield


@contextlib.contextmanager
def lock_folder(folder: epath.PathLike, name: str, instead: str) -> Iterator[None]:
    """Keeps other runs out of a folder, which it makes; process 0 locks it for all processes.

    The kernel holds the lock, not the file: it ends with the process, however
    that ends, so no lock is left behind. An object store has no locks; there
    the log says so.
    Args:
      name: the folder, as the error calls it.
      instead: what the user could use.
    Raises: ValueError, on every process, when another run has the lock after
      WAIT_SECONDS.
    """
    with contextlib.ExitStack() as stack:
        other = ""
        if storage.is_object_store(folder):
            _log_unlocked(folder, "an object store has no locks")
        elif jax.process_index() == 0:
            path = epath.Path(folder)
            path.mkdir(parents=True, exist_ok=True)
            other = stack.enter_context(lock_file(path / "lock", WAIT_SECONDS))

        # All processes stop, and so none waits for the others in a barrier.
        if multihost_utils.broadcast_one_to_all(np.bool_(other)):
            raise ValueError(
                f"{name} is in use by "
                f"{other or 'another run, which process 0 names'}; let that end or stop it, "
                f"or use {instead}"
            )
        yield


@contextlib.contextmanager
def lock_file(path: epath.PathLike, seconds: float) -> Iterator[str]:
    """Locks a local file for this process alone, and writes into it which process that is.

    Args: seconds: how long another owner is waited for.
    Yields: the other owner; "" when this process has the lock.
    """
    with open(path, "a+") as file:
        other = _lock(file, seconds)
        try:
            yield other
        finally:
            # The file stays, for removing it would race with its next owner.
            if not other:
                file.truncate(0)


def _lock(file: TextIO, seconds: float) -> str:
    """Locks the file and writes this process into it; returns the other owner, "" for none."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.seek(0)
                return file.read().strip() or "another process"
            time.sleep(0.2)
        except OSError as error:  # a mounted object store, for one
            _log_unlocked(file.name, error.strerror or str(error))
            return ""

    # A process that was killed left its name in the file.
    file.truncate(0)
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    # On a full disk the lock holds all the same: only its owner has no name.
    with contextlib.suppress(OSError):
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
        file.flush()
    return ""


def _log_unlocked(path: epath.PathLike, reason: str) -> None:
    if jax.process_index() == 0:
        logging.info(
            "%s cannot be locked (%s): make sure that no second run uses this folder",
            path,
            reason,
        )
