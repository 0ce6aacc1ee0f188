"""The report of a finished run."""

import functools
import json
import logging

import numpy as np
import pytest
from PIL import Image

from lit_jax import pictures
from lit_jax.evaluation import geneval, run_report
from lit_jax.evaluation.label_classifier import LabelClassifier

LABELS = np.arange(9, dtype=np.int32) % 3


def shades(labels):
    """Images whose shade is their label, in [-1, 1]."""
    level = labels.astype(np.float32)[:, None, None, None] - 1
    return np.broadcast_to(0.8 * level, (len(labels), 4, 4, 1))


def draw(params, index, condition, on_batch):
    on_batch(len(index))
    images = shades(condition["label"]) * params["scale"]
    assert len(index) == len(images)
    return images + 0.01 * index[:, None, None, None].astype(np.float32)


PARAMS = {
    "teacher": {"scale": np.zeros((), np.float32), "other": np.zeros((3, 4), np.float32)},
    "student": {"scale": np.ones((), np.float32)},
}


@pytest.fixture
def report(tmp_path, caplog):
    """Writes a report and returns it with what was logged."""

    def write(**options):
        with caplog.at_level(logging.INFO, logger="absl"):
            result = run_report.report(
                {"teacher": draw, "student": draw},
                PARAMS,
                {"label": LABELS},
                tmp_path,
                asked={"step": 300},
                **options,
            )
        assert json.loads((tmp_path / "report.json").read_text()) == result
        return result, caplog.text

    return write


def write_metrics(workdir):
    lines = [
        {"step": 100, "train/loss": 3.0, "train/mse": 2.0, "train/grad_norm": 1.0},
        {"step": 100, "eval/fd_tiny_8": 70.0},
        {"step": 200, "train/loss": 2.0, "train/mse": 1.0, "train/grad_norm": 1.0},
        {"step": 300, "train/loss": 0.5, "train/mse": 0.25, "train/grad_norm": 1.0},
        {"step": 300, "eval/fd_tiny_8": 60.0},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (workdir / "metrics.jsonl").write_text(text)


def test_a_report_holds_the_first_and_the_last_losses(report, tmp_path):
    write_metrics(tmp_path)
    result, logged = report()
    assert result == {
        "asked": {"step": 300},
        "num_images": 9,
        "loss": {"loss": {"start": 3.0, "end": 0.5}, "mse": {"start": 2.0, "end": 0.25}},
        "parameters": {"teacher": 13, "student": 1},
    }
    for text in (
        "parameters     teacher 13, student 1",
        "loss terms     mean of steps 1 to 100 -> of the last ones, up to 300",
        "  loss         3.0000 -> 0.5000",
        "  mse          2.0000 -> 0.2500",
        f"pictures       {tmp_path}/samples.png, {tmp_path}/curves.png",
    ):
        assert text in logged
    assert "inheritance" not in logged and "labels read" not in logged


def test_the_picture_is_the_students(report, tmp_path):
    write_metrics(tmp_path)
    report()
    x = draw(PARAMS["student"], np.arange(9), {"label": LABELS}, lambda done: None)
    expected = pictures.square_grid(pictures.to_uint8(x))
    np.testing.assert_array_equal(Image.open(tmp_path / "samples.png"), expected)


def test_a_classifier_of_real_images_reads_the_labels(report, tmp_path):
    """The student draws the shade that it is asked for, the teacher the middle one always."""
    write_metrics(tmp_path)
    labels = np.arange(30) % 3
    classifier = LabelClassifier(pictures.to_uint8(shades(labels)), labels)
    result, logged = report(read_labels=functools.partial(classifier.accuracy, labels=LABELS))
    assert result["labels_read"] == {"teacher": pytest.approx(1 / 3), "student": 1.0}
    assert (
        "labels read    by a classifier of the real images, on 9 images each: "
        "teacher 33.3%, student 100.0%" in logged
    )


def test_prompts_are_scored_by_task_and_pictured_side_by_side(report, tmp_path):
    """The teacher's images are all grey, and right in one task; each caption has both images."""
    write_metrics(tmp_path)

    def score(images):
        right = {task: bool(images.max() > 200) for task in geneval.TASKS} | {"position": True}
        results = [
            {"tag": task, "prompt": "p", "correct": correct} for task, correct in right.items()
        ]
        unseen = {"tag": "colors", "prompt": "q", "correct": False, "seen": False}
        return geneval.score([*results, unseen])

    texts = [f"caption {i}" for i in range(9)]
    result, logged = report(captions=texts, score_prompts=score)
    assert result["geneval"]["teacher"]["overall"] == pytest.approx(1 / 6)
    assert result["geneval"]["student"]["overall"] == pytest.approx(5.5 / 6)
    assert "counting       0.000  1.000" in logged and "overall        0.167  0.917" in logged
    apart = (
        "colors         0.000  0.500\n    seen         0.000  1.000\n    unseen       0.000  0.000"
    )
    assert apart in logged
    # The teacher on the left, a white line, the student on the right, each pair over its caption.
    pair = [
        pictures.to_uint8(draw(PARAMS[name], np.arange(9), {"label": LABELS}, lambda done: None))
        for name in ("teacher", "student")
    ]
    line = np.full((*pair[0].shape[:2], 1, pair[0].shape[3]), 255, np.uint8)
    expected = pictures.square_grid(np.concatenate([pair[0], line, pair[1]], axis=2), texts)
    np.testing.assert_array_equal(Image.open(tmp_path / "samples.png"), expected)


def test_what_was_inherited_is_part_of_the_report(report, tmp_path):
    write_metrics(tmp_path)
    parts = {"inherited": {"a": 1000, "b": 500}, "at_init": {"c": 20}, "left_behind": {}}
    (tmp_path / "inheritance.json").write_text(json.dumps(parts))
    result, logged = report()
    assert result["inheritance"] == {"inherited": 1500, "at_init": 20, "left_behind": 0}
    assert "inheritance    1,500 inherited, 20 new, 0 of the source left behind" in logged


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"inherited": 3}'])
def test_a_damaged_file_of_inheritance_is_left_out(report, tmp_path, text):
    write_metrics(tmp_path)
    (tmp_path / "inheritance.json").write_text(text)
    result, logged = report()
    assert "inheritance" not in result and "inheritance.json is damaged" in logged


def test_a_finished_run_whose_metrics_are_gone_is_reported_all_the_same(report, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    result, logged = report()
    assert result["loss"] == {} and "up to 300" in logged


def test_images_that_are_not_finite_are_counted(report, tmp_path, monkeypatch):
    write_metrics(tmp_path)
    monkeypatch.setitem(PARAMS, "student", {"scale": np.float32(np.nan)})
    result, logged = report()
    assert result["images_not_finite"] == {"student": 9}
    assert "not finite     images of 9 each: student 9" in logged


def test_drawing_can_be_stopped(report, tmp_path):
    def stop(count):
        raise KeyboardInterrupt

    write_metrics(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        report(on_batch=stop)
    assert not (tmp_path / "report.json").exists()
