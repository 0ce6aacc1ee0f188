"""Stopping on request, on every process at the same step, and a watch over steps that hang."""

import contextlib
import ctypes
import faulthandler
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
from absl import logging
from jax.experimental import multihost_utils

from lit_jax.runtime.exit_status import TryAgainError

# SIGHUP comes when the terminal goes, for one with its ssh connection.
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class Listener:
    """The handler of the signals that stop a run; a second Ctrl-C then ends it at once.

    Args: on_signal: is called with the number of the signal. It may raise.
    """

    def __init__(self, on_signal: Callable[[int], None]):
        self._on_signal = on_signal
        self._number = 0  # of the last signal
        self._previous: dict[int, Any] = {}
        self.service: Callable[[int], None] | None = None

    def __call__(self, number: int, frame: object) -> None:
        # By the kernel: what the first one waits for may not return to Python.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if number == signal.SIGHUP:
            leave_terminal(1, 2)
        self._number = number
        self._on_signal(number)

    def _send_again(self, discarded: Any) -> None:
        """Where Python discards what the handler raised, the signal comes a second time.

        It does so in callbacks of the garbage collector, of which JAX has one.
        """
        if not isinstance(discarded.exc_value, TryAgainError):
            self._outer_hook(discarded)
            return
        signal.signal(self._number, self)
        threading.Timer(0.05, os.kill, (os.getpid(), self._number)).start()

    def __enter__(self) -> "Listener":
        # Python allows signal handlers in the main thread only.
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                before = signal.getsignal(number)
                # nohup lets a run ignore SIGHUP, and a shell that starts it
                # in the background SIGINT.
                if before != signal.SIG_IGN:
                    self._previous[number] = before
                    signal.signal(number, self)
        self._outer_hook = sys.unraisablehook
        sys.unraisablehook = self._send_again
        return self

    def __exit__(self, *_: object) -> None:
        sys.unraisablehook = self._outer_hook
        for number, before in self._previous.items():
            signal.signal(number, before)

    def take_over(self) -> None:
        """Listens to SIGTERM again after jax.distributed.initialize.

        That starts a service with a handler of its own, which `Preemption`
        passes signals on to.
        """
        if signal.SIGTERM in self._previous:
            self.service = _c_handler(signal.SIGTERM)
            signal.signal(signal.SIGTERM, self)


def signals_stop() -> Listener:
    """Signals raise TryAgainError in the with-block, for jobs that lose nothing by that.

    Training has something to save first; it uses `Preemption`.
    """

    def stop(number: int) -> None:
        name = signal.Signals(number).name
        raise TryAgainError(f"stopped by {name}; run the same command again to go on")

    return Listener(stop)


def leave_terminal(*outputs: int) -> None:
    """Points file descriptors of a terminal to /dev/null.

    Without its other end every write to a terminal is an error, which would
    end the run before it has saved.
    """
    null = os.open(os.devnull, os.O_WRONLY)
    for output in outputs:
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(output).st_mode):
                os.dup2(null, output)
    os.close(null)


def _c_handler(number: int) -> Callable[[int], None]:
    """The handler that a library in C has set for a signal; the signal is ignored from then on."""
    library = ctypes.CDLL(None)
    library.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    library.signal.restype = ctypes.c_void_p
    address = library.signal(number, int(signal.SIG_IGN))
    return ctypes.CFUNCTYPE(None, ctypes.c_int)(address)


class StopRequest(Exception):
    """Training has been asked to save and stop."""


class Preemption:
    """Tells training to save and stop: on a signal, and on every process at the same place.

    A process that is alone listens to the signals itself. Several processes use JAX's
    preemption service: it is told of the signal, or of the platform's maintenance notice, of
    any of them, and agrees on a step number that none has reached yet. Here it is given the
    number of calls of `check` instead: that is the same on all processes too, and it goes on
    while pictures are drawn.
    """

    def __init__(self) -> None:
        self._told = False
        self._checks = 0
        self._alone = jax.process_count() == 1
        outer = signal.getsignal(signal.SIGTERM)
        self._service = outer.service if isinstance(outer, Listener) else None
        self._listener = Listener(self._tell)
        self._listener.__enter__()
        if not self._alone and self._service is None:
            self._listener.take_over()
            self._service = self._listener.service

    def _tell(self, number: int) -> None:
        self._told = True
        if self._service:
            self._service(signal.SIGTERM)

    def close(self) -> None:
        self._listener.__exit__()

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
