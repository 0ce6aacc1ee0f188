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

PROGRESS_SECONDS = 60.0  # between two log lines, where there is no terminal


class StartUp:
    """Measures where the time from the start of the program to its first step goes."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._parts = {"imports": _process_age()}

    def part_ended(self, name: str) -> None:
        """Gives the time since the part before to `name`."""
        now = time.monotonic()
        self._parts[name] = self._parts.get(name, 0.0) + now - self._last
        self._last = now

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self._parts.items())
        # Of all threads: on a machine with other work on it, it is what the start costs.
        cpu = time.process_time()
        return f"first step after {sum(self._parts.values()):.1f} s, {cpu:.1f} of CPU: {parts}"


def _process_age() -> float:
    """Seconds since this process was started; 0 where there is no /proc."""
    try:
        fields = pathlib.Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
    except FileNotFoundError:
        return 0.0
    # The 22nd field of proc(5), in clock ticks after the machine's start. The
    # two before the bracket are gone, which ends the program's name.
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    # Python's other clocks stop while the machine sleeps, or can be set.
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)


@contextlib.contextmanager
def progress(name: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Shows how far a job over images is; process 0 does it alone.

    A bar on a terminal, elsewhere a log line every PROGRESS_SECONDS.
    Args: done: images that were finished before this start; they do not count
      in the speed.
    Yields: a function that is told how many more images are done.
    """
    shows = jax.process_index() == 0
    terminal = sys.stderr.isatty()
    columns = (
        TextColumn(name),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("images"),
        TimeRemainingColumn(),
    )
    # Results of a job may go to stdout, into a file.
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not (terminal and shows)) as bar:
        task = bar.add_task("", total=total, completed=done)
        # A speed that counted these images would promise too much.
        before = done
        start = time.monotonic()
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
                    format_duration((total - done) / speed),
                )

        yield advance


def format_duration(seconds: float) -> str:
    """7384 s as "2h03m", 61 s as "1m01s"."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
