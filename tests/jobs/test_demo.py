"""The demo's page: what it draws is what was asked for; a browser asks in tests/in_browser.py."""

import logging
import os
import re
import signal
import socket
import threading

import gradio_client
import numpy as np
import pytest
from PIL import Image
from tiny_dataset import put_digits

from configs import quickstart
from lit_jax.data.dataset import open_dataset, read_all
from lit_jax.evaluation.label_classifier import LabelClassifier
from lit_jax.jobs import demo
from lit_jax.runtime import preemption

STEPS = 6


def make_studio(no_workdir):
    """The shipped teacher beside itself: no LiT is at hand that draws digits."""
    config = quickstart.get_config()
    config.model.attention = "softmax"
    config.sample.checkpoint = config.teacher.checkpoint
    config.sample.steps = STEPS
    return demo.Studio(config, no_workdir)


def make_reader(folder):
    """Tells the digit that a picture shows, by a classifier of the real ones."""
    directory = put_digits(folder)
    classifier = LabelClassifier(*read_all(open_dataset("mnist_digits", directory, "train")))

    def read(image):
        """Args: image: a `View`'s, or one that `enlarge` made of it."""
        small = image[:: image.shape[0] // 28, :: image.shape[1] // 28, :1][:28, :28]
        shares = [classifier.accuracy(small[None], np.array([label])) for label in range(10)]
        return int(np.argmax(shares))

    return read


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    return make_studio(tmp_path_factory.mktemp("no_workdir"))


@pytest.fixture(scope="module")
def read_digit(tmp_path_factory):
    return make_reader(tmp_path_factory.mktemp("digits"))


def request(**change):
    asked = dict(wanted="7", seed=1, cfg_scale=3.0, sampler="dpm++", steps=STEPS)
    return demo.Request(**asked | change)


def test_pictures_come_step_by_step_and_end_as_the_class_that_was_asked_for(studio, read_digit):
    seen = list(studio.draw(request()))
    assert seen[0]["teacher"].line == "compiling"
    seen = [views for views in seen if views["student"].image is not None]
    assert len(seen) == STEPS
    for name in ("teacher", "student"):
        assert read_digit(seen[-1][name].image) == 7
        assert seen[-1][name].image.shape == (28, 28, 1)
        assert seen[2][name].line.startswith(f"step 3 of {STEPS}, ")
        assert re.fullmatch(rf"\d+\.\d\d s an image, {STEPS} steps", seen[-1][name].line)
    # The same weights and the same noise.
    np.testing.assert_array_equal(seen[-1]["teacher"].image, seen[-1]["student"].image)
    assert (seen[0]["student"].image != seen[-1]["student"].image).any()


def test_it_draws_what_the_sampler_draws(studio):
    """Image 0 of the seed, by the program that draws all steps at once."""
    sampler, params = studio.models["student"]
    sampler = sampler.with_settings(studio.settings(request())).with_seed(1)
    whole = sampler(params, np.array([0]), {"label": np.array([7], np.int32)})[0]
    (*_, last) = studio.draw(request())
    step = np.abs(last["student"].image / 127.5 - 128 / 127.5 - np.clip(whole, -1, 1))
    assert step.max() < 2 / 127.5  # a grey level, for uint8 truncates


def test_a_request_that_cannot_be_drawn_is_named(studio):
    with pytest.raises(ValueError, match="steps = 1: between 2 and 1000 of 1000"):
        next(studio.draw(request(sampler="ddpm", steps=1)))


def test_small_pictures_are_enlarged_pixel_by_pixel():
    image = np.arange(4, dtype=np.uint8).reshape(2, 2, 1)
    large = demo.enlarge(image)
    assert large.shape == (256, 256, 3) and (large[:128, :128] == 0).all()
    assert (large[128:, 128:] == 3).all() and demo.enlarge(None) is None
    assert demo.enlarge(np.zeros((512, 512, 3), np.uint8)).shape == (512, 512, 3)


def test_a_port_that_is_taken_is_named(studio):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        page = demo.make_page(studio)
        with pytest.raises(OSError, match=f"demo.port = {port} on demo.host = 127.0.0.1"):
            demo.serve(page, "127.0.0.1", port)


def test_sigterm_closes_the_page_which_is_its_good_end(studio, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(demo, "Studio", lambda *_: studio)
    serve = demo.serve

    def serve_and_be_told(*args):
        address = serve(*args)
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return address

    monkeypatch.setattr(demo, "serve", serve_and_be_told)
    monkeypatch.setattr(logging.getLogger("absl"), "propagate", True)
    config = quickstart.get_config()
    config.demo.port = 0
    with preemption.signals_stop(), caplog.at_level("INFO"):
        demo.run(config, tmp_path)
    assert "the page is at http://127.0.0.1:" in caplog.text
    assert "the page is closed" in caplog.text


def test_without_gradio_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install gradio"):
        demo.run(quickstart.get_config(), tmp_path)


def test_a_program_asks_the_page_over_http_and_gets_both_pictures(studio, read_digit, tmp_path):
    """The same function as the page's button, and the call of docs/demo.md."""
    page = demo.make_page(studio)
    address = demo.serve(page, "127.0.0.1", 0)
    assert address.startswith("http://127.0.0.1:")
    try:
        client = gradio_client.Client(address, verbose=False, download_files=tmp_path)
        job = client.submit("3", 0, 3.0, "dpm++", STEPS, api_name="/draw")
        *images, teacher_line, student_line = job.result(timeout=600)
    finally:
        page.close()
    for path in images:
        assert read_digit(np.asarray(Image.open(path).convert("RGB"))) == 3
    for line in (teacher_line, student_line):
        assert re.fullmatch(rf"\d+\.\d\d s an image, {STEPS} steps", line)
