"""Finished runs of a table, a JSON line each, in a file that any machine can go on from."""

import json
import pathlib
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any


class Finished:
    """What was run is not run again: `get` a run by its key.

    A key holds everything that the table varies, fields of the config among them: a recipe that is
    changed is another run. What its config file says besides is not in it.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self._lines = [json.loads(line) for line in lines]

    def get(self, key: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What the run of a key found; where there is no line of it, `run()`, which becomes one."""
        asked = json.loads(json.dumps(key))  # tuples are lists there
        for line in self._lines:
            if line["run"] == asked:
                return line["found"]
        line = {
            "run": key,
            "found": run(),
            "date": time.strftime("%Y-%m-%d"),
            "jax": metadata.version("jax"),
        }
        text = json.dumps(line)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(text + "\n")
        self._lines.append(json.loads(text))
        return line["found"]
