"""How far a job is, and where the time before its first step goes."""

import contextlib
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator

import jax
from absl import logging
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PROGRESS_SECONDS = 60.0


class StartUp:
    """Where the time from the launch of the program to its first step goes."""

    def __init__(self):
        self._last = time.monotonic()
        self._parts = {"imports": _process_age()}

    def lap(self, name: str) -> None:
        """Ends a part that began where the last one ended."""
        now = time.monotonic()
        self._parts[name] = self._parts.get(name, 0.0) + now - self._last
        self._last = now

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self._parts.items())
        return f"first step after {sum(self._parts.values()):.1f} s: {parts}"


def _process_age() -> float:
    """Seconds since this process was started, where /proc tells; else 0."""
    try:
        ticks = int(pathlib.Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    except FileNotFoundError:
        return 0.0
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))


@contextlib.contextmanager
def progress(name: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """How far a job over images is: a bar on a terminal, elsewhere a log line every PROGRESS_SECONDS; by process 0 alone.

    Yields a function that is told how many more are done.
    """
    terminal, shows = sys.stderr.isatty(), jax.process_index() == 0
    columns = (
        TextColumn(name),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("images"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not (terminal and shows)) as bar:
        task = bar.add_task("", total=total, completed=done)
        before, start = done, time.monotonic()
        logged = start

        def advance(count: int) -> None:
            nonlocal done, logged
            done += count
            bar.advance(task, count)
            now = time.monotonic()
            if shows and not terminal and now - logged >= PROGRESS_SECONDS:
                logged = now
                speed = (done - before) / (now - start)
                logging.info(
                    "%s: %d of %d images, %.1f images/s, %s left",
                    name,
                    done,
                    total,
                    speed,
                    _duration((total - done) / speed),
                )

        yield advance


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
