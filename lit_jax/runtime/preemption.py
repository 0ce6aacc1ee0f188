"""Stopping on request, on every process at the same step, and a watch over steps that hang."""

import contextlib
import faulthandler
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from absl import logging
from jax.experimental import multihost_utils

from lit_jax.runtime.exit_status import TryAgainError


@contextlib.contextmanager
def sigterm_stops() -> Iterator[None]:
    """SIGTERM raises TryAgainError in the block, for jobs that lose nothing by that.

    Training has something to save first; it uses `Preemption`.
    """

    def stop(*_: Any) -> None:
        raise TryAgainError("stopped by SIGTERM; run the same command again to go on")

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class StopRequest(Exception):
    """Training has been asked to save and stop."""


class Preemption:
    """Tells training to save and stop: on SIGTERM, and on every process at the same place.

    A process that is alone listens to the signal itself. Several processes
    use JAX's preemption
    service: it receives the SIGTERM, or the platform's maintenance notice, of
      any of them, and agrees on a step number that none has reached yet. Here
      it is given the number of calls of `check` instead: that is the same on
      all processes too, and it goes on while pictures are drawn.
    """

    def __init__(self) -> None:
        self._told = False
        self._checks = 0
        self._alone = jax.process_count() == 1
        self._restore: Callable[[], Any] = lambda: None
        # Python allows signal handlers in the main thread only.
        if self._alone and threading.current_thread() is threading.main_thread():
            previous = signal.signal(signal.SIGTERM, self._tell)
            self._restore = lambda: signal.signal(signal.SIGTERM, previous)

    def _tell(self, *_: Any) -> None:
        self._told = True

    def close(self) -> None:
        self._restore()

    # It takes arguments so that it can be called with the images of a batch.
    def check(self, *_: Any) -> None:
        """Raises StopRequest when it is time.

        Every process calls it equally often: after each step and each batch
        of images.
        """
        self._checks += 1
        told = self._told
        if not self._alone:
            told = multihost_utils.reached_preemption_sync_point(self._checks)
        if told:
            raise StopRequest


class Watchdog:
    """A thread that prints the stacks of all threads when no step has ended for some time.

    Args: seconds: how long; it prints again after as many. 0: never.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._closed = threading.Event()
        self._last = time.monotonic()
        self._step = 0
        # Not asked for in the thread: that would wait for the devices, which
        # may be what hangs.
        self._process = jax.process_index() if jax.distributed.is_initialized() else 0
        # A daemon, for it must not keep a run alive whose main thread failed.
        if seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def step_ended(self, step: int) -> None:
        """Tells the watchdog that `step` has ended."""
        self._last = time.monotonic()
        self._step = step

    def _watch(self) -> None:
        reported = self._last
        while True:
            due = max(self._last, reported) + self._seconds
            if self._closed.wait(max(0.0, due - time.monotonic())):
                return
            # A step may have ended while the thread waited.
            if time.monotonic() < max(self._last, reported) + self._seconds:
                continue
            reported = time.monotonic()
            logging.error(
                "process %d: no step has ended for %.0f s (train.watchdog), the last was step %d; "
                "the stacks:",
                self._process,
                reported - self._last,
                self._step,
            )
            # Not sys.stderr, which may be something without a file
            # descriptor.
            faulthandler.dump_traceback(sys.__stderr__ or 2)

    def close(self) -> None:
        self._closed.set()
