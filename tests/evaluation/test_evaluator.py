"""What scores are called, and settings that can never work."""

import pytest
from tiny_extractor import batches_of, make_extractor, random_images

from lit_jax.evaluation import references
from lit_jax.evaluation.evaluator import (
    EvaluationSettings,
    Evaluator,
    count_name,
    make_evaluator,
)


def evaluator_of(images):
    extractor = make_extractor()
    reference = references.collect(extractor, batches_of(images, 16), 16)
    settings = EvaluationSettings(reference="memory", batch_size=16)
    return Evaluator(settings, extractor, reference)


def test_scores_are_named_for_what_they_measure():
    evaluator = evaluator_of(random_images(50, seed=1))
    before = []
    scores = evaluator.score_images(random_images(43), before.append)
    assert before == [0, 16, 32]
    assert list(scores) == [
        "fd_tiny_43",
        "sfd_tiny_43",
        "is_tiny_43",
        "precision_tiny_43",
        "recall_tiny_43",
    ]
    assert count_name(50_000) == "50k" and count_name(1234) == "1234"
    assert scores["fd_tiny_43"] > 0.01

    same = evaluator.score_images(random_images(50, seed=1))
    assert abs(same["fd_tiny_50"]) < 1e-5
    assert same["precision_tiny_50"] == same["recall_tiny_50"] == 1.0


def test_settings_reach_the_scores_and_their_protocol():
    images = random_images(43)
    evaluator = evaluator_of(random_images(50, seed=1))
    other = Evaluator(
        EvaluationSettings("memory", batch_size=16, neighbours=7, split_size=10),
        evaluator.extractor,
        evaluator.reference,
    )
    scores = evaluator.score_images(images)
    changed = other.score_images(images)
    assert {name for name in scores if scores[name] != changed[name]} == {
        "is_tiny_43",
        "precision_tiny_43",
        "recall_tiny_43",
    }
    result = other.make_result(changed, 43, (8, 8, 3), {"seed": 0})
    assert result["scores"] == changed and result["device"]
    assert result["protocol"] == {
        "features": "tiny",
        "weights": "w1",
        "num_images": 43,
        "image_shape": [8, 8, 3],
        "reference": {},
        "neighbours": 7,
        "samples": {"seed": 0},
        "inception_score_split_size": 10,
    }


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(features="fid"), "features must be one of inception_adm.*; got 'fid'"),
        (dict(batch_size=0), "batch_size must be in .1, 1,000,000.; got 0"),
        (dict(neighbours=0), "neighbours must be at least 1; got 0"),
        (
            dict(num_neighbour_images=3),
            "neighbours = 3 needs more images than that, but the num_neighbour_images is 3",
        ),
    ],
)
def test_settings_check_themselves(fields, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        EvaluationSettings("memory", **fields)


def test_too_few_images_are_refused_before_the_reference_is_read(tmp_path):
    settings = EvaluationSettings("nowhere.npz", neighbours=5)
    with pytest.raises(FileNotFoundError, match="^reference = nowhere.npz not found"):
        make_evaluator(settings, 6, tmp_path, tmp_path)
    with pytest.raises(ValueError, match="^neighbours = 5 needs .* the number of images is 5"):
        make_evaluator(settings, 5, tmp_path, tmp_path)
