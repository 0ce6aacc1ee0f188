"""What a run leaves for people: a progress line, metrics as JSON lines and TensorBoard events, image grids, MFU."""

import contextlib
import json
import math
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from PIL import Image
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from lit_jax.costs import chips
from lit_jax.runtime import progress

CLEAR_LINE = "\r\x1b[2K"  # of a terminal


class MetricWriter:
    """Writes metrics.jsonl and TensorBoard events and shows progress; only process 0 writes."""

    def __init__(
        self,
        workdir: pathlib.Path,
        *,
        total_steps: int,
        images_per_step: int,
        flops_per_step: float,
        first_step: int = 0,
    ):
        self._total, self._images, self._flops = total_steps, images_per_step, flops_per_step
        self._active = jax.process_index() == 0
        self._terminal = self._active and sys.stderr.isatty()
        self._clock = None
        peak = chips.PEAK_FLOPS.get(jax.devices()[0].device_kind)
        self._peak = peak and peak * jax.device_count()
        if self._active:
            forget_after(workdir / "metrics.jsonl", first_step)
            self._file = open(workdir / "metrics.jsonl", "a")
            # Not a SummaryWriter: its thread dies on a full disk, and who goes on writing to it stands still for ever.
            self._folder = workdir / "tensorboard"
            self._folder.mkdir(exist_ok=True)
            self._events = EventsWriter(str(self._folder / "events"))
            self._write_event(
                first_step + 1, session_log=SessionLog(status=SessionLog.START)
            )  # what was after it is void
        if self._terminal:
            logging.get_absl_handler().addFilter(_clear_line)

    def start(self, step: int) -> None:
        """Starts the clock at `step`, after compilation, so that the first rate is a rate."""
        self._clock = (step, time.monotonic())

    def write(
        self, step: int, metrics: dict[str, float], seconds_waiting: float = 0.0
    ) -> dict[str, float]:
        """Records training metrics of `step` together with the speed since the last call.

        Args: seconds_waiting: how long of that time the loop stood still for want of data.
        """
        if self._clock and step > self._clock[0]:
            elapsed = time.monotonic() - self._clock[1]
            seconds = elapsed / (step - self._clock[0])
            metrics = metrics | {
                "train/images_per_second": self._images / seconds,
                "train/data_wait": seconds_waiting / elapsed,
                "train/seconds_left": (self._total - step) * seconds,
            }
            if self._peak:
                metrics["train/mfu"] = self._flops / seconds / self._peak
        self.start(step)
        self._record(step, metrics)
        if self._active:
            self._show(step, metrics)
        return metrics

    def write_scores(self, step: int, scores: dict[str, float]) -> None:
        """Records an evaluation during training, as eval/NAME."""
        self._record(step, {f"eval/{name}": value for name, value in scores.items()})
        logging.info(
            "step %d: %s", step, ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
        )

    def _record(self, step: int, metrics: dict[str, float]) -> None:
        if self._active:
            with naming_file(self._file.name):
                self._file.write(json.dumps({"step": step} | metrics) + "\n")
                self._file.flush()
            for name, value in metrics.items():
                if math.isfinite(value):  # TensorBoard has no picture of the others
                    self._write_event(step, summary=summary.scalar(name, value))

    def add_picture(self, name: str, step: int, picture: Image.Image) -> None:
        if self._active:
            self._write_event(
                step,
                summary=summary.image(name, np.asarray(picture.convert("RGB")), dataformats="HWC"),
            )

    def _write_event(self, step: int, **content: Any) -> None:
        with naming_file(self._folder):
            self._events.write_event(Event(wall_time=time.time(), step=step, **content))
            self._events.flush()

    def _show(self, step: int, metrics: dict[str, float]) -> None:
        line = f"step {step:,}/{self._total:,}  loss {metrics['train/loss']:.4f}"
        if "train/images_per_second" in metrics:
            line += f"  {metrics['train/images_per_second']:.0f} images/s"
            if "train/mfu" in metrics:
                line += f"  MFU {metrics['train/mfu']:.1%}"
            line += f"  {metrics['train/data_wait']:.1%} waiting for data"
            line += f"  {progress._duration(metrics['train/seconds_left'])} left"
        if metrics.get("train/skipped"):
            line += f"  {int(metrics['train/skipped'])} steps skipped"
        if self._terminal:
            # A line that wraps could not be cleared again.
            sys.stderr.write(CLEAR_LINE + line[: shutil.get_terminal_size().columns - 1])
            sys.stderr.flush()
        else:
            logging.info(line)

    def close(self) -> None:
        if self._terminal:
            logging.get_absl_handler().removeFilter(_clear_line)
            sys.stderr.write("\n")
        if self._active:
            for file in (self._file, self._events):
                with contextlib.suppress(
                    OSError
                ):  # all is flushed; what could not be written has been told
                    file.close()


@contextlib.contextmanager
def naming_file(path: pathlib.Path | str) -> Iterator[None]:
    """Names the file in an OSError that does not."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from error


def _clear_line(record: object) -> bool:
    """A log filter that lets everything pass, onto a line of its own: the progress line makes room."""
    sys.stderr.write(CLEAR_LINE)
    return True


def forget_after(path: pathlib.Path, step: int) -> None:
    """Drops the lines of a metrics file that a resumed run will write again, and a last one that a kill cut short."""
    if not path.exists():
        return
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]
    part = path.with_suffix(".part")
    part.write_text(
        "".join(line for line, read in zip(whole, _parse(path, whole)) if read["step"] <= step)
    )
    os.replace(part, path)


def read_training(workdir: pathlib.Path) -> list[dict[str, float]]:
    """The training lines of metrics.jsonl; evaluations are lines of their own and left out."""
    path = workdir / "metrics.jsonl"
    return [line for line in _parse(path, path.read_text().splitlines()) if "train/loss" in line]


def _parse(path: pathlib.Path, lines: list[str]) -> list[dict[str, float]]:
    """The lines of a metrics file. Raises: ValueError naming the file and the line that is none."""
    try:
        return [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} has a line that is no JSON: {error.doc.strip()[:80]}; remove it"
        ) from error
