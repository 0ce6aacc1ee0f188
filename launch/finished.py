"""Finished runs of a table, a JSON line each, in a file that any machine can go on from."""

import json
import pathlib
import time
from importlib import metadata
from typing import Any


class Finished:
    """What was run is not run again: `find` a run by its key, or `add` it.

    A key holds everything that the table varies, fields of the config among them: a recipe that is
    changed is another run. What its config file says besides is not in it.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self._lines = [json.loads(line) for line in lines]

    def find(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """What the run found; None where it was not run."""
        asked = json.loads(json.dumps(key))  # tuples are lists there
        return next((line["found"] for line in self._lines if line["run"] == asked), None)

    def add(self, key: dict[str, Any], found: dict[str, Any]) -> None:
        """Appends a line: key, what was found, the date and the version of JAX."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = {
            "run": key,
            "found": found,
            "date": time.strftime("%Y-%m-%d"),
            "jax": metadata.version("jax"),
        }
        text = json.dumps(line)
        with self.path.open("a") as file:
            file.write(text + "\n")
        self._lines.append(json.loads(text))
