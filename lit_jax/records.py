"""What a run leaves for people: a progress line, metrics as JSON lines and TensorBoard events, image grids, MFU."""
import contextlib
import json
import math
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

PROGRESS_SECONDS = 60.0

# Peak dense bf16 FLOP/s of one chip, by jax's device_kind; vendors' figures.
PEAK_FLOPS = {
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5": 459e12, "TPU v5p": 459e12,
    "TPU v6 lite": 918e12, "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H200": 989e12,
}

CLEAR_LINE = "\r\x1b[2K"  # of a terminal


class Records:
    """Writes metrics.jsonl and TensorBoard events and shows progress; only process 0 writes."""

    def __init__(self, workdir: pathlib.Path, *, total_steps: int, images_per_step: int, flops_per_step: float,
                 first_step: int = 0):
        self._total, self._images, self._flops = total_steps, images_per_step, flops_per_step
        self._active = jax.process_index() == 0
        self._terminal = self._active and sys.stderr.isatty()
        self._clock = None
        peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
        self._peak = peak and peak * jax.device_count()
        if self._active:
            forget_after(workdir / "metrics.jsonl", first_step)
            self._file = open(workdir / "metrics.jsonl", "a")
            # Not a SummaryWriter: its thread dies on a full disk, and who goes on writing to it stands still for ever.
            self._folder = workdir / "tensorboard"
            self._folder.mkdir(exist_ok=True)
            self._events = EventsWriter(str(self._folder / "events"))
            self._write_event(first_step + 1, session_log=SessionLog(status=SessionLog.START))  # what was after it is void
        if self._terminal:
            logging.get_absl_handler().addFilter(_clear_line)

    def start(self, step: int) -> None:
        """Starts the clock at `step`, after compilation, so that the first rate is a rate."""
        self._clock = (step, time.monotonic())

    def write(self, step: int, metrics: dict[str, float], seconds_waiting: float = 0.0) -> dict[str, float]:
        """Records training metrics of `step` together with the speed since the last call.

        Args: seconds_waiting: how long of that time the loop stood still for want of data.
        """
        if self._clock and step > self._clock[0]:
            elapsed = time.monotonic() - self._clock[1]
            seconds = elapsed / (step - self._clock[0])
            metrics = metrics | {"train/images_per_second": self._images / seconds,
                                 "train/data_wait": seconds_waiting / elapsed,
                                 "train/seconds_left": (self._total - step) * seconds}
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
        logging.info("step %d: %s", step, ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))

    def _record(self, step: int, metrics: dict[str, float]) -> None:
        if self._active:
            with naming(self._file.name):
                self._file.write(json.dumps({"step": step} | metrics) + "\n")
                self._file.flush()
            for name, value in metrics.items():
                if math.isfinite(value):  # TensorBoard has no picture of the others
                    self._write_event(step, summary=summary.scalar(name, value))

    def add_picture(self, name: str, step: int, picture: Image.Image) -> None:
        if self._active:
            self._write_event(step, summary=summary.image(name, np.asarray(picture.convert("RGB")), dataformats="HWC"))

    def _write_event(self, step: int, **content: Any) -> None:
        with naming(self._folder):
            self._events.write_event(Event(wall_time=time.time(), step=step, **content))
            self._events.flush()

    def _show(self, step: int, metrics: dict[str, float]) -> None:
        line = f"step {step:,}/{self._total:,}  loss {metrics['train/loss']:.4f}"
        if "train/images_per_second" in metrics:
            line += f"  {metrics['train/images_per_second']:.0f} images/s"
            if "train/mfu" in metrics:
                line += f"  MFU {metrics['train/mfu']:.1%}"
            line += f"  {metrics['train/data_wait']:.1%} waiting for data"
            line += f"  {_duration(metrics['train/seconds_left'])} left"
        if metrics.get("train/skipped"):
            line += f"  {int(metrics['train/skipped'])} steps skipped"
        if self._terminal:
            # A line that wraps could not be cleared again.
            sys.stderr.write(CLEAR_LINE + line[:shutil.get_terminal_size().columns - 1])
            sys.stderr.flush()
        else:
            logging.info(line)

    def close(self) -> None:
        if self._terminal:
            logging.get_absl_handler().removeFilter(_clear_line)
            sys.stderr.write("\n")
        if self._active:
            for file in (self._file, self._events):
                with contextlib.suppress(OSError):  # all is flushed; what could not be written has been told
                    file.close()


@contextlib.contextmanager
def naming(path: pathlib.Path | str) -> Iterator[None]:
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
    part.write_text("".join(line for line, read in zip(whole, _parse(path, whole)) if read["step"] <= step))
    os.replace(part, path)


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
    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TextColumn("images"), TimeRemainingColumn())
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
                logging.info("%s: %d of %d images, %.1f images/s, %s left", name, done, total, speed,
                             _duration((total - done) / speed))

        yield advance


def read_training(workdir: pathlib.Path) -> list[dict[str, float]]:
    """The training lines of metrics.jsonl; evaluations are lines of their own and left out."""
    path = workdir / "metrics.jsonl"
    return [line for line in _parse(path, path.read_text().splitlines()) if "train/loss" in line]


def _parse(path: pathlib.Path, lines: list[str]) -> list[dict[str, float]]:
    """The lines of a metrics file. Raises: ValueError naming the file and the line that is none."""
    try:
        return [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} has a line that is no JSON: {error.doc.strip()[:80]}; remove it") from error


def plot_curves(workdir: pathlib.Path) -> None:
    """Draws workdir/curves.png: each loss term of metrics.jsonl over the steps; nothing if it has no steps."""
    from matplotlib.figure import Figure  # here: it takes a second; no pyplot, which would look for a display

    lines = read_training(workdir)
    if not lines:
        return
    terms = [name for name in ("loss", "mse", "vb", "kd_noise", "kd_variance") if f"train/{name}" in lines[-1]]
    figure = Figure(figsize=(3 * len(terms), 2.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(terms), squeeze=False)[0], terms):
        points = [(line["step"], line[f"train/{name}"]) for line in lines if f"train/{name}" in line]
        axes.plot(*zip(*points), color="tab:blue")
        axes.set(title=name, xlabel="step", yscale="log" if min(y for _, y in points) > 0 else "linear")
        axes.grid(alpha=0.3)
    figure.savefig(workdir / "curves.png", dpi=110)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


def to_uint8(x: np.ndarray) -> np.ndarray:
    """[-1, 1] to uint8 as DiT's sampling does: 127.5 x + 128, clamped, truncated."""
    return np.clip(127.5 * np.asarray(x, np.float32) + 128.0, 0, 255).astype(np.uint8)


def image_grid(rows: list[np.ndarray], titles: list[str] | None = None, *, scale: int = 0) -> Image.Image:
    """One picture of rows of uint8 images, each (n, h, w, 1 or 3), a title left of each row.

    Args: scale: pixels an image pixel becomes; 0 enlarges small images to about 56 pixels.
    """
    h, w = rows[0].shape[1:3]
    scale = scale or max(1, round(56 / h))
    font = ImageFont.load_default(14)
    margin = max((int(font.getlength(title)) + 12 for title in titles), default=0) if titles else 0
    gap = 2
    columns = max(len(row) for row in rows)
    size = (margin + columns * (w * scale + gap) + gap, len(rows) * (h * scale + gap) + gap)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for r, row in enumerate(rows):
        top = gap + r * (h * scale + gap)
        if titles:
            draw.text((6, top + h * scale // 2 - 8), titles[r], fill="black", font=font)
        for c, image in enumerate(row):
            tile = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).convert("RGB")
            left = margin + gap + c * (w * scale + gap)
            picture.paste(tile.resize((w * scale, h * scale), Image.Resampling.NEAREST), (left, top))
    return picture


def square_grid(images: np.ndarray) -> Image.Image:
    """One picture of all images (n, h, w, C), as square as it gets."""
    columns = math.ceil(math.sqrt(len(images)))
    return image_grid([images[i:i + columns] for i in range(0, len(images), columns)])
