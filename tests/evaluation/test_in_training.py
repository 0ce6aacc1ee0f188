"""Previews and scores during training: the same images at every step, from the parameters given."""

import json

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_extractor import batches_of, make_extractor, random_images

from lit_jax import pictures
from lit_jax.evaluation import in_training, references, reports
from lit_jax.evaluation.evaluator import EvaluationSettings, Evaluator

CONDITION = {"label": np.arange(6, dtype=np.int32) % 3}


def draw(params, index, condition, on_batch):
    """A sampler whose images depend on all that it is given, in batches of four."""
    images = []
    for start in range(0, len(index), 4):
        rows = slice(start, start + 4)
        noise = random_images(len(index), seed=params["seed"])[rows] / 127.5 - 1
        level = 0.02 * index[rows] + 0.1 * condition["label"][rows]
        images.append(np.float32(0.5 * noise + level[:, None, None, None]))
        on_batch(min(rows.stop, len(index)))
    return np.concatenate(images)


def drawn(seed):
    x = draw({"seed": seed}, np.arange(6), CONDITION, lambda done: None)
    return pictures.to_uint8(x)


@pytest.fixture
def previews(tmp_path):
    samplers = {"teacher": draw, "student": draw}
    return in_training.Previews(samplers, CONDITION, tmp_path / "previews")


def test_previews_show_the_same_images_at_every_step(previews, tmp_path):
    """The teacher is drawn once: later parameters under its name change nothing."""
    for step, teacher, student in ((100, 0, 1), (200, 7, 2)):
        params = {"teacher": {"seed": teacher}, "student": {"seed": student}}
        picture = np.asarray(previews.draw(params, step))
        expected = pictures.image_grid([drawn(0), drawn(student)], ["teacher", "student"])
        np.testing.assert_array_equal(picture, expected)
        path = tmp_path / "previews" / f"step_{step:07d}.png"
        assert str(previews.path(step)) == str(path)
        np.testing.assert_array_equal(Image.open(path), picture)


def test_a_preview_that_is_interrupted_leaves_nothing(previews, tmp_path):
    done = []

    def stop(count):
        done.append(count)
        if len(done) == 3:
            raise KeyboardInterrupt

    params = {"teacher": {"seed": 0}, "student": {"seed": 1}}
    with pytest.raises(KeyboardInterrupt):
        previews.draw(params, 100, stop)
    assert done == [4, 6, 4] and not (tmp_path / "previews").exists()


@pytest.fixture
def evaluator():
    extractor = make_extractor()
    reference = references.collect(extractor, batches_of(random_images(20, seed=5), 8), 8)
    settings = EvaluationSettings("memory", batch_size=8, neighbours=2)
    return Evaluator(settings, extractor, reference)


def test_scores_in_training_are_those_of_the_drawn_images(evaluator, tmp_path):
    def brightness(images):
        return float(images.mean()) / 255

    evaluation = in_training.PeriodicEvaluation(
        evaluator, draw, CONDITION, {"seed": 0, "weights": "EMA"}, tmp_path, brightness
    )
    done = []
    for step, seed in ((400, 1), (800, 2)):
        scores = evaluation.score({"seed": seed}, step, done.append)
        read = brightness(drawn(seed))
        assert scores == evaluator.score_images(drawn(seed)) | {"labels_read": read}
        path = tmp_path / f"evaluation_{step:07d}.json"
        assert str(evaluation.path(step)) == str(path)
        result = json.loads(path.read_text())
        assert result["scores"] == scores
        assert result["protocol"]["samples"] == {"seed": 0, "weights": "EMA", "step": step}
        assert result["protocol"]["num_images"] == 6
        assert result["protocol"]["image_shape"] == [8, 8, 3]
        assert "fd_tiny_6" in path.with_suffix(".md").read_text()
    assert done == 2 * [4, 6, 0]  # two batches are drawn, one is scored

    names = ("evaluation_0000400.json", "evaluation_0000800.json")
    results = {name: reports.read_result(tmp_path / name) for name in names}
    assert reports.compare(results, ("samples.step",)).x_name == "samples.step"


def draw_broken(params, index, condition, on_batch):
    """Images of which one holds a NaN and one an infinity."""
    images = draw(params, index, condition, on_batch)
    images[1, 0, 0, 0] = np.nan
    images[4, 0, 0, 0] = np.inf
    return images


def test_a_preview_says_how_many_images_are_not_finite(tmp_path, caplog):
    previews = in_training.Previews({"student": draw_broken}, CONDITION, tmp_path)
    picture = previews.draw({"student": {"seed": 1}}, 100)
    expected = drawn(1)
    expected[[1, 4]] = 0
    shown = pictures.image_grid([expected], ["student, 2 not finite"])
    np.testing.assert_array_equal(np.asarray(picture), shown)
    assert "2 of 6 images of the student are not finite" in caplog.text


def test_images_that_are_not_finite_are_counted_not_scored(evaluator, tmp_path):
    evaluation = in_training.PeriodicEvaluation(evaluator, draw_broken, CONDITION, {}, tmp_path)
    scores = evaluation.score({"seed": 1}, 400)
    assert scores == {"images_not_finite": 2}
    assert json.loads(evaluation.path(400).read_text())["scores"] == scores


def test_only_process_0_writes(evaluator, previews, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    previews.draw({"teacher": {"seed": 0}, "student": {"seed": 1}}, 1)
    evaluation = in_training.PeriodicEvaluation(evaluator, draw, CONDITION, {}, tmp_path)
    assert evaluation.score({"seed": 1}, 1)
    assert not list(tmp_path.iterdir())
