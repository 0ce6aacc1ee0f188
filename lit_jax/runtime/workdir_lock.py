"""The lock of a workdir: two runs that write to one would cut each other's files to pieces."""

import contextlib
import fcntl
import os
import pathlib
import socket
import time
from collections.abc import Iterator
from typing import TextIO

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

WAIT_SECONDS = (
    10  # a run that was told to stop may overlap a little with the one that goes on from it
)


@contextlib.contextmanager
def lock_workdir(workdir: pathlib.Path) -> Iterator[None]:
    """Keeps other runs out of `workdir`; process 0 does it for all processes of this one.

    The lock is the kernel's, not the file: it goes with the process in whatever way that ends, so none is ever stale.
    Raises: ValueError, on every process, when another run still holds it after WAIT_SECONDS.
    """
    with contextlib.ExitStack() as stack:
        owner = ""
        if jax.process_index() == 0:
            file = stack.enter_context(open(workdir / "lock", "a+"))
            owner = _lock(file)
            if not owner:
                stack.callback(file.truncate, 0)
        if multihost_utils.broadcast_one_to_all(np.bool_(owner)):
            raise ValueError(
                f"--workdir={workdir} is in use by {owner or 'another run, which process 0 names'}; let that end "
                f"or stop it, or use another --workdir"
            )
        yield


def _lock(file: TextIO) -> str:
    """Locks the file and writes into it who holds it; returns who else does, "" for nobody."""
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
        except OSError as error:
            logging.info(
                "%s cannot be locked (%s): see to it yourself that no second run uses this workdir",
                file.name,
                error.strerror,
            )
            return ""
    file.truncate(0)  # who was killed has left its name
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
    file.flush()
    return ""
