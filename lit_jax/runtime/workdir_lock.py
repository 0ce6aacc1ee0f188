"""The lock of a workdir: two runs that write to one would overwrite each other's files."""

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
    """Keeps other runs out of `workdir`; process 0 locks it for all processes of this run.

    The kernel holds the lock, not the file: it ends with the process, however
    that ends, so no lock is left behind. An object store has no locks; there
    the log says so.
    Raises: ValueError, on every process, when another run has the lock after
      WAIT_SECONDS.
    """
    with contextlib.ExitStack() as stack:
        other = ""
        if storage.is_object_store(workdir):
            _log_unlocked(workdir, "an object store has no locks")
        elif jax.process_index() == 0:
            file = stack.enter_context(open(epath.Path(workdir) / "lock", "a+"))
            other = _lock(file)
            # The file stays, for removing it would race with its next owner.
            if not other:
                stack.callback(file.truncate, 0)

        # All processes stop, and so none waits for the others in a barrier.
        if multihost_utils.broadcast_one_to_all(np.bool_(other)):
            raise ValueError(
                f"--workdir={workdir} is in use by "
                f"{other or 'another run, which process 0 names'}; let that end or stop it, "
                f"or use another --workdir"
            )
        yield


def _lock(file: TextIO) -> str:
    """Locks the file and writes this process into it; returns the other owner, "" for none."""
    deadline = time.monotonic() + WAIT_SECONDS
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
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
    file.flush()
    return ""


def _log_unlocked(path: epath.PathLike, reason: str) -> None:
    if jax.process_index() == 0:
        logging.info(
            "%s cannot be locked (%s): make sure that no second run uses this workdir",
            path,
            reason,
        )
