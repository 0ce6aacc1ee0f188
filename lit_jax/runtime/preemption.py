"""Stopping on request, on every process at the same step, and a watch over steps that do not end."""

import contextlib
import faulthandler
import signal
import sys
import threading
import time
from collections.abc import Iterator

import jax
from absl import logging
from jax.experimental import multihost_utils

from lit_jax.runtime import cluster, exit_status


@contextlib.contextmanager
def sigterm_stops() -> Iterator[None]:
    """SIGTERM ends what is inside by TryAgainError, for jobs that lose nothing so; training has `Preemption`."""

    def stop(*_):
        raise exit_status.TryAgainError("stopped by SIGTERM; run the same command again to go on")

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class StopRequest(Exception):
    """Training has been asked to save and stop."""


class Preemption:
    """Tells training to save and stop: on SIGTERM, and on every process at the same place.

    One process listens to the signal itself. Several use JAX's preemption service, which hears the SIGTERM (or the
    platform's maintenance notice) of any of them and agrees on a number that none has reached yet. It was made for steps;
    here it counts how often `check` was called, which is the same on all processes and goes on while pictures are drawn.
    """

    def __init__(self):
        self._told, self._checks = False, 0
        self._alone = jax.process_count() == 1
        if self._alone and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._tell)

    def _tell(self, *_) -> None:
        self._told = True

    def close(self) -> None:
        if hasattr(self, "_previous"):
            signal.signal(signal.SIGTERM, self._previous)

    def check(self, *_) -> None:
        """Raises StopRequest when it is time; every process calls it equally often: after each step and each batch drawn."""
        self._checks += 1
        if (
            self._told
            if self._alone
            else multihost_utils.reached_preemption_sync_point(self._checks)
        ):
            raise StopRequest


class Watchdog:
    """A thread that prints the stacks of all threads when no step has ended for `seconds`, again after as many; 0: never."""

    def __init__(self, seconds: float):
        self._seconds, self._closed = seconds, threading.Event()
        self._last, self._step = time.monotonic(), 0
        if seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def step_ended(self, step: int) -> None:
        self._last, self._step = time.monotonic(), step

    def _watch(self) -> None:
        reported = self._last
        while not self._closed.wait(
            max(0.01, max(self._last, reported) + self._seconds - time.monotonic())
        ):
            now = time.monotonic()
            if now - max(self._last, reported) >= self._seconds:
                reported = now
                logging.error(
                    "process %d: no step has ended for %.0f s (train.watchdog), the last was step %d; the stacks:",
                    cluster._runtime().process_id,
                    now - self._last,
                    self._step,
                )
                faulthandler.dump_traceback(sys.__stderr__)

    def close(self) -> None:
        self._closed.set()
