"""What a run writes for people.

Metrics as JSON lines and as TensorBoard events, and a progress line.
"""

import contextlib
import json
import math
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from PIL import Image

from lit_jax.runtime import progress, storage


@contextlib.contextmanager
def without(name: str) -> Iterator[None]:
    """What is imported meanwhile does not find the module `name`, unless it is loaded already."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # so imports are told that it is missing
    try:
        yield
    finally:
        del sys.modules[name]


# Where torch is installed, TensorBoardX loads it, for seconds and for nothing that is written here.
with without("torch"):
    from tensorboardX import summary
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.record_writer import RecordWriter

CLEAR_LINE = "\r\x1b[2K"  # of a terminal
EVENT_FILE_BYTES = 4 << 20  # of one object, in a store where files cannot grow


class MetricWriter:
    """Writes metrics.jsonl and TensorBoard events and shows progress.

    Only process 0 does; the others call it all the same.

    Args:
      workdir: where the files go.
      total_steps: at which the run ends, for the time left.
      images_per_step: of all devices together.
      flops_per_step: of all devices together.
      peak_flops: FLOP/s of all devices together, for MFU; None where it is
        not known.
      first_step: of the checkpoint from which the run goes on. Later lines
        are dropped.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        total_steps: int,
        images_per_step: int,
        flops_per_step: float,
        peak_flops: float | None,
        first_step: int = 0,
    ):
        self._total_steps = total_steps
        self._images_per_step = images_per_step
        self._flops_per_step = flops_per_step
        self._peak_flops = peak_flops
        self._clock: tuple[int, float] | None = None
        self._active = jax.process_index() == 0
        self._terminal = self._active and sys.stderr.isatty()
        if self._active:
            self._lines_path = epath.Path(workdir) / "metrics.jsonl"
            # They were written after the checkpoint, and will be again.
            forget_after(self._lines_path, first_step)
            self._lines = storage.open_to_append(self._lines_path)
            self._events_folder = epath.Path(workdir) / "tensorboard"
            self._events = _EventFile(self._events_folder)
            # TensorBoard drops what an earlier run wrote for later steps than
            # this.
            restart = SessionLog(status=SessionLog.START)
            self._write_events([Event(step=first_step + 1, session_log=restart)])
        if self._terminal:
            # Warnings would otherwise continue the progress line.
            logging.get_absl_handler().addFilter(_clear_line)

    def start(self, step: int) -> None:
        """Starts the clock at `step`.

        For the time after compilation, and after what is no training.
        """
        self._clock = (step, time.monotonic())

    def write(
        self,
        step: int,
        metrics: dict[str, float],
        seconds_waiting: float = 0.0,
    ) -> None:
        """Records training metrics of `step` and the speed since the last call.

        Args: seconds_waiting: how long of that time the loop waited for data.
        """
        metrics = metrics | self._rates(step, seconds_waiting)
        self.start(step)
        self._record(step, metrics)
        if self._active:
            self._show(progress_line(step, self._total_steps, metrics))

    def _rates(self, step: int, seconds_waiting: float) -> dict[str, float]:
        # No earlier call, or two for one step: there is no time to divide by.
        if not self._clock or step <= self._clock[0]:
            return {}
        elapsed = time.monotonic() - self._clock[1]
        seconds = elapsed / (step - self._clock[0])
        # The time of one step stands for all that are left.
        rates = {
            "train/images_per_second": self._images_per_step / seconds,
            "train/data_wait": seconds_waiting / elapsed,
            "train/seconds_left": (self._total_steps - step) * seconds,
        }
        if self._peak_flops:
            flops = self._flops_per_step / seconds
            rates["train/mfu"] = flops / self._peak_flops
        return rates

    def write_scores(self, step: int, scores: dict[str, float]) -> None:
        """Records an evaluation during training, as eval/NAME."""
        self._record(step, {f"eval/{name}": scores[name] for name in scores})
        texts = [f"{name} {value:.4g}" for name, value in scores.items()]
        logging.info("step %d: %s", step, ", ".join(texts))

    def add_picture(self, name: str, step: int, picture: Image.Image) -> None:
        """Adds a picture to TensorBoard."""
        if self._active:
            pixels = np.asarray(picture.convert("RGB"))
            content = summary.image(name, pixels, dataformats="HWC")
            self._write_events([Event(step=step, summary=content)])

    def _record(self, step: int, metrics: dict[str, float]) -> None:
        if not self._active:
            return
        line = json.dumps({"step": step} | metrics) + "\n"
        with storage.naming_file(self._lines_path):
            self._lines.write(line.encode())
            self._lines.flush()

        events = []
        for name, value in metrics.items():
            # TensorBoard cannot show the others.
            if math.isfinite(value):
                content = summary.scalar(name, value)
                events.append(Event(step=step, summary=content))
        self._write_events(events)

    def _write_events(self, events: list[Any]) -> None:
        with storage.naming_file(self._events_folder):
            self._events.write(events)

    def _show(self, line: str) -> None:
        if self._terminal:
            # Not rich's bar: its thread redraws between steps, when nothing is new, and takes
            # stderr from libraries that write there.
            # A line that wraps could not be cleared again.
            width = shutil.get_terminal_size().columns - 1
            sys.stderr.write(CLEAR_LINE + line[:width])
            sys.stderr.flush()
        else:
            logging.info("%s", line)

    def close(self) -> None:
        """Closes the files, without an error: all that is in them is flushed."""
        if self._terminal:
            logging.get_absl_handler().removeFilter(_clear_line)
            sys.stderr.write("\n")
        if self._active:
            for file in (self._lines, self._events):
                with contextlib.suppress(Exception):
                    file.close()


class _EventFile(RecordWriter):
    """A new file of TensorBoard events.

    Not tensorboardX's SummaryWriter: its thread dies on a full disk, and a
    program that goes on writing then waits for ever. Nor its EventsWriter,
    which opens the file with packages of its own on an object store.
    """

    def __init__(self, folder: epath.Path):
        folder.mkdir(exist_ok=True)
        # TensorBoard reads the files in the order of their names.
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
        self._writer = storage.open_to_append(folder / name, EVENT_FILE_BYTES)
        # The first event of a file tells how to read it.
        self.write([Event(file_version="brain.Event:2")])

    def write(self, events: list[Any]) -> None:
        """Writes Event messages, with the present time, and flushes them."""
        for event in events:
            # For people: TensorBoard shows when a value was written.
            event.wall_time = time.time()
            super().write(event.SerializeToString())
        self.flush()


def progress_line(step: int, total_steps: int, metrics: dict[str, float]) -> str:
    """The line by which a person follows a run."""
    parts = [f"step {step:,}/{total_steps:,}"]
    parts.append(f"loss {metrics['train/loss']:.4f}")
    # The first line after a start has nothing to compare the time with.
    if "train/images_per_second" in metrics:
        parts.append(f"{metrics['train/images_per_second']:.0f} images/s")
        if "train/mfu" in metrics:
            parts.append(f"MFU {metrics['train/mfu']:.1%}")
        parts.append(f"{metrics['train/data_wait']:.1%} waiting for data")
        left = progress.format_duration(metrics["train/seconds_left"])
        parts.append(f"{left} left")
    if metrics.get("train/skipped"):
        parts.append(f"{int(metrics['train/skipped'])} steps skipped")
    return "  ".join(parts)


def _clear_line(record: object) -> bool:
    """A log filter that keeps every record, on a line of its own."""
    sys.stderr.write(CLEAR_LINE)
    return True


def forget_after(path: epath.PathLike, step: int) -> None:
    """Drops the lines after `step`, which a resumed run will write again.

    A last line that a kill cut short goes too. Where another line is damaged,
    the file as it was stays under a name of its own, and the log says so.
    """
    path = epath.Path(path)
    if not path.exists():
        return
    # What a kill cut short has no end of line, or none of an object.
    content = path.read_bytes()
    whole, _, _ = content.rpartition(b"\n")
    rows = whole.split(b"\n") if whole else []
    read = [_parse(row) for row in rows]
    bad = read.count(None)
    if bad:
        aside = storage.unused(path.with_name(path.name + ".damaged"))
        aside.write_bytes(content)
        logging.warning(
            "%s has %d damaged lines; it is kept as %s, and goes on without them",
            path,
            bad,
            aside.name,
        )
    kept = [row for row, line in zip(rows, read) if line and line["step"] <= step]
    storage.replace_text(path, b"".join(row + b"\n" for row in kept).decode())


def read_training(workdir: epath.PathLike) -> list[dict[str, float]]:
    """The training lines of metrics.jsonl, without those of evaluations and damaged ones.

    Returns: [] where there is no file.
    """
    path = epath.Path(workdir) / "metrics.jsonl"
    rows = path.read_bytes().split(b"\n") if path.exists() else []
    lines = [line for line in map(_parse, rows) if line]
    # Every training line has a loss, and no line of an evaluation has.
    return [line for line in lines if "train/loss" in line]


def _parse(row: bytes) -> dict[str, float] | None:
    """A line of metrics.jsonl; None: it is not one that a run writes."""
    try:
        line = json.loads(row)
    # Bytes that are no text, or no JSON, or JSON of any depth or length.
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or type(line.get("step")) is not int:
        return None
    numbers = all(type(value) in (int, float) for value in line.values())
    return line if numbers else None
