"""The runs of a table: finished ones are JSON lines of a file that any machine can go on from."""

import json
import os
import pathlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib import metadata
from typing import Any, TypeVar

T = TypeVar("T")


def run_all(runs: Sequence[Callable[[], T]], at_once: int) -> list[T]:
    """What the runs return, in their order; several at once have each its share of the cores.

    What a run starts as a process has the run's cores. Where one fails, those that have not started
    are cancelled.
    """
    if at_once == 1:
        return [run() for run in runs]
    cores = sorted(os.sched_getaffinity(0))
    shares: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
    for number in range(at_once):
        shares.put(cores[number::at_once] or cores)
    # Linux keeps the cores of each thread, and a process has those of the thread that starts it.
    pool = ThreadPoolExecutor(at_once, initializer=lambda: os.sched_setaffinity(0, shares.get()))
    try:
        futures = [pool.submit(run) for run in runs]
        for future in as_completed(futures):
            future.result()
        return [future.result() for future in futures]
    finally:
        pool.shutdown(cancel_futures=True)


class Finished:
    """What was run is not run again: `get` a run by its key.

    A key holds everything that decides what is found, see `key_of` in guidelines.py: a recipe that
    is changed is another run.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self._lines = [json.loads(line) for line in lines]
        self._lock = threading.Lock()

    def get(self, key: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What the run of a key found; where there is no line of it, `run()`, which becomes one."""
        asked = json.loads(json.dumps(key))  # tuples are lists there
        for line in self._lines:
            if line["run"] == asked:
                return line["found"]
        start = time.monotonic()
        line = {
            "run": key,
            "found": run(),
            "seconds": round(time.monotonic() - start),
            "date": time.strftime("%Y-%m-%d"),
            "jax": metadata.version("jax"),
        }
        text = json.dumps(line)
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(text + "\n")
            self._lines.append(json.loads(text))
        return line["found"]
