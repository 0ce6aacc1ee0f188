"""What a run leaves for people: lines, events, pictures, rates."""

import io
import json
import logging
import resource
import sys
import time

import absl.logging
import jax
import numpy as np
import pytest
from PIL import Image

from lit_jax import pictures
from lit_jax.runtime import metric_writer, progress


def read_lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def make_writer(folder, **change):
    return metric_writer.MetricWriter(
        folder,
        **dict(total_steps=100, images_per_step=32, flops_per_step=1e9, peak_flops=None) | change,
    )


def test_metrics_become_json_lines_and_events(tmp_path):
    log = make_writer(tmp_path)
    for step in (10, 20):
        log.write(step, {"train/loss": 1.0 / step, "train/skipped": 0.0})
    log.add_picture("preview", 20, Image.new("L", (4, 4)))
    log.close()
    lines = read_lines(tmp_path)
    assert [(line["step"], line["train/loss"]) for line in lines] == [(10, 0.1), (20, 0.05)]
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    assert all(tag in content for tag in (b"train/loss", b"train/images_per_second", b"preview"))


def test_a_resumed_run_appends_and_forgets_the_steps_that_it_makes_again(tmp_path):
    log = make_writer(tmp_path)
    for step in (1, 2, 3):
        log.write(step, {"train/loss": 1.0})
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "train/lo')  # a kill in the middle of a line
    log = make_writer(tmp_path, first_step=2)
    for step in (3, 4):
        log.write(step, {"train/loss": 2.0})
    log.close()
    assert [(line["step"], line["train/loss"]) for line in read_lines(tmp_path)] == [
        (1, 1.0),
        (2, 1.0),
        (3, 2.0),
        (4, 2.0),
    ]


def test_the_rate_is_that_of_the_steps_since_the_last_line(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    log = make_writer(tmp_path)
    log.write(1, {"train/loss": 1.0})
    assert "train/images_per_second" not in read_lines(tmp_path)[-1]  # nothing to compare with
    now[0] += 8.0
    log.write(5, {"train/loss": 1.0})  # 4 steps, 2 s each
    metrics = read_lines(tmp_path)[-1]
    assert metrics["train/images_per_second"] == pytest.approx(16.0)
    assert metrics["train/seconds_left"] == pytest.approx(190.0)
    now[0] += 1000.0  # a preview, say
    log.start(5)
    now[0] += 1.0
    log.write(6, {"train/loss": 1.0})
    assert read_lines(tmp_path)[-1]["train/images_per_second"] == pytest.approx(32.0)
    log.close()


@pytest.mark.parametrize("peak", [8e9, None])
def test_mfu_is_reported_where_the_peak_is_known(tmp_path, monkeypatch, peak):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    log = make_writer(tmp_path, flops_per_step=6e9, peak_flops=peak)
    log.start(0)
    now[0] = 2.0
    log.write(1, {"train/loss": 1.0})
    expected = pytest.approx(6e9 / 2.0 / 8e9) if peak else None
    assert read_lines(tmp_path)[0].get("train/mfu") == expected
    log.close()


def test_a_long_job_logs_how_far_it_is_where_there_is_no_terminal(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "absl")
    clock = iter((0.0, 30.0, 70.0, 100.0, 200.0))
    monkeypatch.setattr(metric_writer.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(metric_writer.sys.stderr, "isatty", lambda: False, raising=False)
    with progress.progress(
        "preparing", 1000, 400
    ) as advance:  # 400 were there already: they are no speed
        for count in (10, 60, 30, 100):
            advance(count)
    assert [record.getMessage() for record in caplog.records] == [
        "preparing: 470 of 1000 images, 1.0 images/s, 8m50s left",
        "preparing: 600 of 1000 images, 1.0 images/s, 6m40s left",
    ]


def test_the_progress_line_says_what_matters(tmp_path, monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    log = make_writer(tmp_path, total_steps=2000)
    log.start(0)
    now[0] = 8.0
    with caplog.at_level(logging.INFO, logger="absl"):
        log.write(1000, {"train/loss": 0.25, "train/skipped": 3.0}, seconds_waiting=2.0)
    log.close()
    assert read_lines(tmp_path)[0]["train/data_wait"] == 0.25
    assert caplog.messages == [
        "step 1,000/2,000  loss 0.2500  4000 images/s  25.0% waiting for data  "
        "0m08s left  3 steps skipped"
    ]


def test_on_a_terminal_one_line_makes_room_for_the_log(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen, clear = Terminal(), "\r\x1b[2K"
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "40")
    log = make_writer(tmp_path, total_steps=2000)
    log.start(0)
    log.write(1, {"train/loss": 0.5})
    log.write(2, {"train/loss": 0.25})
    screen.write("|")
    warning = logging.makeLogRecord({"levelno": logging.WARNING})
    assert absl.logging.get_absl_handler().filter(warning)
    log.close()
    first, second = screen.getvalue().removeprefix(clear).split("|")[0].split(clear)
    assert first.startswith("step 1/2,000  loss 0.5000  ") and second.startswith(
        "step 2/2,000  loss 0.2500  "
    )
    assert len(first) == len(second) == 39  # a wrapped line could not be written over
    assert screen.getvalue().endswith("|" + clear + "\n")
    assert absl.logging.get_absl_handler().filter(warning) and screen.getvalue().endswith(
        "|" + clear + "\n"
    )


def test_what_is_not_finite_is_in_the_lines_but_no_event(tmp_path, caplog):
    log = make_writer(tmp_path)
    log.write(1, {"train/loss": float("nan"), "train/skipped": 1.0})
    log.close()
    assert np.isnan(read_lines(tmp_path)[0]["train/loss"])
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/skipped" in events.read_bytes() and b"train/loss" not in events.read_bytes()
    assert "NaN or Inf" not in caplog.text


@pytest.mark.parametrize(
    "write, name",
    [
        (lambda log: log.write(1, {"train/loss": 1.0, "x" * 5000: 1.0}), "metrics.jsonl"),
        (
            lambda log: log.add_picture("preview", 1, Image.effect_noise((64, 64), 100)),
            "tensorboard",
        ),
    ],
)
def test_what_a_full_disk_does_not_take_is_named_at_once_and_closing_says_no_more(
    tmp_path, write, name
):
    log = make_writer(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=f"{tmp_path}/{name} cannot be written: File too large"):
            write(log)
        log.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_damaged_file_is_set_aside_and_the_run_goes_on(tmp_path, caplog):
    good = b'{"step": 1, "train/loss": 2.0}\n'
    later = b'{"step": 4, "train/loss": 1.0}\n'
    damaged = (
        b"{}\n",
        b'{"step": "two", "train/loss": 1.0}\n',
        b'{"step": true}\n',
        b'{"step": 2, "train/loss": "low"}\n',
        b"[1]\n",
        b"\xff\x00\x80 rubbish\n",
        b"[" * 100_000 + b"\n",
        b"\n",
    )
    path = tmp_path / "metrics.jsonl"
    for number, rubbish in enumerate(damaged):
        path.write_bytes(good + rubbish + later)
        assert [line["step"] for line in metric_writer.read_training(tmp_path)] == [1, 4]
        caplog.clear()
        metric_writer.forget_after(path, 3)
        assert path.read_bytes() == good
        aside = f"metrics.jsonl.damaged{f'.{number}' if number else ''}"
        assert (tmp_path / aside).read_bytes() == good + rubbish + later
        assert f"{path} has 1 damaged lines; it is kept as {aside}, and" in caplog.text


def test_a_line_that_a_kill_cut_short_is_no_damage(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "train/loss": 2.0}\n{"step": 2, "tra')
    metric_writer.forget_after(path, 5)
    assert path.read_text() == '{"step": 1, "train/loss": 2.0}\n'
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"] and not caplog.text


def test_only_the_first_process_writes(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    log = make_writer(tmp_path)
    with caplog.at_level(logging.INFO, logger="absl"):
        log.write(1, {"train/loss": 1.0})
    log.add_picture("preview", 1, Image.new("L", (4, 4)))
    log.close()
    assert not list(tmp_path.iterdir()) and not caplog.messages


@pytest.mark.parametrize("losses", [[3.0, 1.0, 0.1], [0.5, -0.2, 0.1], [1.0]])
def test_curves_are_drawn(tmp_path, losses):
    log = make_writer(tmp_path)
    for step, loss in enumerate(losses):
        log.write(step, {"train/loss": loss, "train/mse": loss, "train/grad_norm": 1.0})
    log.close()
    pictures.plot_curves(tmp_path)
    picture = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB")).astype(int)
    blue = (picture[..., 2] - picture[..., 0] > 60).sum()
    assert len(losses) == 1 or blue > 100


def test_uint8_is_dits_clamped_and_truncated():
    x = np.array([-1.5, -1.0, -0.999, 0.0, 0.5, 0.99, 1.0, 1.5], np.float32)
    np.testing.assert_array_equal(pictures.to_uint8(x), [0, 0, 0, 128, 191, 254, 255, 255])


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_shows_each_image_in_its_place(channels):
    rng = np.random.default_rng(0)
    rows = [
        rng.integers(0, 256, (3, 4, 5, channels), np.uint8),
        rng.integers(0, 256, (2, 4, 5, channels), np.uint8),
    ]
    picture = pictures.image_grid(rows, scale=2)
    pixels = np.asarray(picture)
    assert pixels.shape == (2 * (4 * 2 + 2) + 2, 3 * (5 * 2 + 2) + 2, 3)
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            top, left = 2 + r * 10, 2 + c * 12
            tile = pixels[top : top + 8 : 2, left : left + 10 : 2]
            np.testing.assert_array_equal(tile, np.broadcast_to(image, (4, 5, 3)))
    assert (pixels[12:20, 26:36] == 255).all()  # the place the shorter row leaves
    titled = pictures.image_grid(rows, ["teacher", "student"], scale=2)
    assert titled.height == picture.height
    margin = titled.width - picture.width
    assert (np.asarray(titled)[:, :margin] < 128).any() and margin > 40
    np.testing.assert_array_equal(np.asarray(titled)[:, margin:], pixels)


def test_small_images_are_enlarged_and_squares_are_square():
    images = np.zeros((10, 28, 28, 1), np.uint8)
    picture = pictures.square_grid(images)
    assert picture.size == (4 * 58 + 2, 3 * 58 + 2)  # 28 pixels become 56
    assert pictures.square_grid(np.zeros((1, 128, 128, 3), np.uint8)).size == (132, 132)


@pytest.mark.parametrize(
    "seconds, text", [(0.4, "0m00s"), (61, "1m01s"), (3600, "1h00m"), (90000, "25h00m")]
)
def test_durations_are_short(seconds, text):
    assert progress.format_duration(seconds) == text
