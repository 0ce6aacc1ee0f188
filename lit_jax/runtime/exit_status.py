"""How a run ends: exit statuses that a launcher understands, and what counts as which."""

import contextlib
import json
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from lit_jax.runtime import cluster

EXIT_CRASHED = 70  # EX_SOFTWARE of sysexits.h


MOST_CRASHES = 3  # in a row without a new checkpoint: what breaks every time is not tried for ever


EXIT_TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h


class TryAgainError(Exception):
    """The run stopped in good order, and the same command continues it."""


class CrashError(Exception):
    """Something broke after training had begun; its cause says what.

    Args: count: counts it, and says how often in a row that was from the same step.
    """

    def __init__(self, count: Callable[[], int]):
        super().__init__()
        self.count = count


class GiveUpError(ValueError):
    """A run that would come to the same end again, however far it has come."""


class Crashes:
    """A with-block whose errors are crashes once `begun` is set; before, they are those of the input.

    Args: path: where this process counts them. step: the one that it has gone on from.
    """

    def __init__(self, path: pathlib.Path, step: int):
        self.begun, self._path, self._step, self._before = False, path, step, 0

    def __enter__(self) -> "Crashes":
        with contextlib.suppress(
            OSError, ValueError, LookupError, TypeError
        ):  # none yet, or not ours
            before = json.loads(self._path.read_text())
            self._before = before["crashes"] if before["step"] == self._step else 0
        self._write(self._before)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if (
            self.begun
            and isinstance(error, Exception)
            and not isinstance(error, (TryAgainError, GiveUpError))
        ):
            raise CrashError(self._count) from error

    def _count(self) -> int:
        with contextlib.suppress(OSError):  # the disk may be what has failed
            self._write(self._before + 1)
        return self._before + 1

    def _write(self, crashes: int) -> None:
        """Over what is there, of the same length: a disk that has filled up has no room for more."""
        with open(self._path, "r+" if self._path.exists() else "w") as file:
            file.write(json.dumps({"step": self._step, "crashes": crashes}).ljust(80))


@contextlib.contextmanager
def shared_fate(heartbeat: float) -> Iterator[None]:
    """Turns the end of a job into the exit statuses above.

    One of several processes leaves at once, and so does a crashed one: a normal exit would first wait for the others, a
    lost one among them, and for threads that may never end.
    Args: heartbeat: seconds of silence after which another process counts as gone.
    """
    try:
        yield
    except Exception as error:
        several, crash = (
            cluster._runtime().num_processes > 1,
            error if isinstance(error, CrashError) else None,
        )
        error = crash.__cause__ if crash else error
        if isinstance(error, TryAgainError) or isinstance(error, TimeoutError) and not crash:
            status, message = EXIT_TRY_AGAIN, str(error)
        elif not several and not crash:
            raise
        else:
            message, again, lost = (
                f"error: {' '.join(str(error).split())}",
                "; run the same command again to go on",
                [],
            )
            if not isinstance(error, (ValueError, OSError)):
                traceback.print_exception(error)
                message = f"error: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                lost = cluster.lost_processes(heartbeat + cluster.ANSWER_SECONDS) if several else []
            if lost:
                status = EXIT_TRY_AGAIN
                message = f"process {', '.join(map(str, lost))} is gone, so this one stops{again} from the last checkpoint"
            elif crash and (count := crash.count()) < MOST_CRASHES:
                status, message = EXIT_CRASHED, f"{message}{again} from the last checkpoint"
            elif crash:
                status, message = (
                    1,
                    f"{message}; crash {count} in a row without a new checkpoint, mend the cause first",
                )
            else:
                status = 1
        sys.stderr.write(message + "\n")
        sys.stdout.flush()
        sys.stderr.flush()
        if several or crash:
            os._exit(status)
        sys.exit(status)
