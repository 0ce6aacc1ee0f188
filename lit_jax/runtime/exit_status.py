"""How a run ends. The exit status is all that a launcher has to know:

0    done
1    it cannot run like this (bad input, processes that do not agree, a loss
     that is not finite): do not try again
70   something broke, a disk at any time or a chip once training had begun: run
     the same command again to go on (the third such end of a training in a
     row without a new checkpoint is 1)
75   stopped from outside, by SIGTERM or because another process is gone: run
     the same command again to go on
"""

import contextlib
import errno
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import NoReturn

import jax
from etils import epath

from lit_jax.runtime import cluster, storage

EXIT_BAD_INPUT = 1
EXIT_CRASHED = 70  # EX_SOFTWARE of sysexits.h
EXIT_TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h

MOST_CRASHES = 3  # in a row without a new checkpoint: what breaks every time is not repeated
ANSWER_SECONDS = 10  # how much longer than the heartbeat the other processes have to answer
CRASH_FILE_BYTES = 80

# What a disk, or the way to it, says that may work again later.
DISK_ERRORS = {
    errno.EIO,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ESTALE,
    errno.ENXIO,
    errno.ENOTCONN,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ECONNRESET,
}

GO_ON = "run the same command again to go on from the last checkpoint"


class TryAgainError(Exception):
    """The run stopped in good order, and the same command continues it."""


class GiveUpError(ValueError):
    """The run would come to the same end again, even though training had begun."""


class CrashError(Exception):
    """Something broke after training had begun; `__cause__` says what.

    Args: count: counts this crash; returns how many in a row began from the
      same step.
    """

    def __init__(self, count: Callable[[], int]):
        super().__init__()
        self.count = count


class Crashes:
    """A with-block whose errors are crashes once `begun` is set.

    Before, they are bad input, but for those of a disk.

    Args:
      path: the file in which this process counts its crashes.
      step: that of the checkpoint from which the run goes on.
    """

    def __init__(self, path: epath.PathLike, step: int):
        self.begun = False
        self._path = epath.Path(path)
        self._step = step
        self._before = 0

    def __enter__(self) -> "Crashes":
        # There may be no file yet, or a damaged one.
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            before = json.loads(self._path.read_text())
            self._before = before["crashes"] if before["step"] == self._step else 0
        self._write(self._before)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        expected = isinstance(error, TryAgainError | GiveUpError)
        broke = self.begun or (error is not None and is_of_disk(error))
        if broke and isinstance(error, Exception) and not expected:
            raise CrashError(self._count) from error

    def _count(self) -> int:
        # The disk may be what has failed, or the way to an object store, which
        # has errors of its own.
        with contextlib.suppress(Exception):
            self._write(self._before + 1)
        return self._before + 1

    def _write(self, crashes: int) -> None:
        text = json.dumps({"step": self._step, "crashes": crashes}).ljust(CRASH_FILE_BYTES)
        if storage.is_object_store(self._path):
            self._path.write_text(text)
        else:
            # In place and of the same length: a full disk has no room for
            # more.
            with open(self._path, "r+" if self._path.exists() else "w") as file:
                file.write(text)


@contextlib.contextmanager
def shared_fate(heartbeat: float, memory_advice: str = "") -> Iterator[None]:
    """Turns the error that ends a job into one of the exit statuses, and into one line.

    Args:
      heartbeat: seconds of silence after which another process counts as gone.
      memory_advice: what takes less memory, for the line that says that there
        is not enough.
    """
    try:
        yield
    except Exception as raised:
        error = _say_what_memory(raised, memory_advice)
        several = jax.distributed.is_initialized()
        if isinstance(error, CrashError):
            assert error.__cause__ is not None
            status, message = _judge_crash(error, error.__cause__, heartbeat)
            _leave(status, message)
        if isinstance(error, TimeoutError):
            # At once, for the thread that waits for the other processes does
            # not end.
            _leave(EXIT_TRY_AGAIN, str(error))
        if is_of_disk(error):
            _leave(EXIT_CRASHED, f"{_describe(error, heartbeat)[0]}; {GO_ON}")
        if several:
            _leave(*_judge_together(error, heartbeat))
        if isinstance(error, TryAgainError):
            sys.stderr.write(f"{error}\n")
            sys.exit(EXIT_TRY_AGAIN)
        if error is raised:
            raise
        raise error from raised


def _say_what_memory(error: Exception, advice: str) -> Exception:
    """The error; where there was not enough memory, one that says so in a line."""
    if isinstance(error, CrashError) and isinstance(error.__cause__, Exception):
        error.__cause__ = _say_what_memory(error.__cause__, advice)
        return error
    shortage = memory_shortage(error)
    return ValueError(f"{shortage}; {advice}".rstrip("; ")) if shortage else error


def is_of_disk(error: BaseException) -> bool:
    """Whether an error, or what caused it, is one of `DISK_ERRORS`."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in DISK_ERRORS:
            return True
        cause = cause.__cause__
    return False


def memory_shortage(error: BaseException) -> str:
    """What an error says of memory that could not be had, in a line; "" for other errors."""
    # XLA has no class of its own for it, and says it in several ways.
    text = str(error)
    if not isinstance(error, MemoryError):
        of_xla = isinstance(error, jax.errors.JaxRuntimeError)
        if not of_xla or not re.search(r"(?i)out of memory|resource_exhausted", text):
            return ""
    amount = re.search(r"(?i)allocat\w* (?:request for )?([\d.]+) ?(bytes|[KMGT]i?B?)\b", text)
    if amount is None:
        first = (text.splitlines() or [""])[0]
        return f"out of memory: {first}".rstrip(": ")
    number = float(amount[1])
    if amount[2] == "bytes":
        return f"out of memory: {number / 2**30:.2f} GiB ({number:.0f} bytes) cannot be allocated"
    return f"out of memory: {amount[1]} {amount[2]} cannot be allocated"


def _judge_crash(error: CrashError, cause: BaseException, heartbeat: float) -> tuple[int, str]:
    """Status and message for what broke after training had begun."""
    message, lost = _describe(cause, heartbeat)
    if lost:
        return EXIT_TRY_AGAIN, message
    count = error.count()
    if count < MOST_CRASHES:
        return EXIT_CRASHED, f"{message}; {GO_ON}"
    return EXIT_BAD_INPUT, (
        f"{message}; crash {count} in a row without a new checkpoint, mend the cause first"
    )


def _judge_together(error: Exception, heartbeat: float) -> tuple[int, str]:
    """Status and message for an error before training began, in one of several processes."""
    if isinstance(error, TryAgainError):
        return EXIT_TRY_AGAIN, str(error)
    message, lost = _describe(error, heartbeat)
    return EXIT_TRY_AGAIN if lost else EXIT_BAD_INPUT, message


def _describe(error: BaseException, heartbeat: float) -> tuple[str, bool]:
    """The line that says what broke, and whether that is the loss of another process."""
    if isinstance(error, ValueError | OSError):
        return f"error: {' '.join(str(error).split())}", False

    traceback.print_exception(error)
    # A collective fails like this when a process of it is gone.
    if jax.distributed.is_initialized():
        lost = cluster.lost_processes(heartbeat + ANSWER_SECONDS)
        if lost:
            names = ", ".join(map(str, lost))
            return f"process {names} is gone, so this one stops; {GO_ON}", True
    return f"error: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}", False


def _leave(status: int, message: str) -> NoReturn:
    """Ends the process at once.

    A normal end would first wait for the other processes, a lost one among
    them, and for threads that may never end.
    """
    sys.stderr.write(message + "\n")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
