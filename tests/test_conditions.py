"""What a model is told of an image, against what the records of a data set hold."""

import types

import numpy as np
import pytest

from lit_jax import conditions
from lit_jax.data.dataset import ImageDataset
from lit_jax.models.dit import DiTConfig
from lit_jax.models.pixart import PixArtConfig

LABELLED = DiTConfig(1, 32, 2, num_classes=10)
CAPTIONED = PixArtConfig(1, 32, 2, caption_channels=16, caption_length=20)


def digits(num_classes):
    record = {"image": np.zeros((8, 8, 1), np.uint8), "label": 0}
    return ImageDataset("digits", "train", [record], (8, 8, 1), num_classes)


def captions(**text):
    """A data set of captions whose features are stored."""
    text = dict(width=16, max_length=20) | text
    return types.SimpleNamespace(
        name="told", condition_fields=("caption", "caption_mask"), text=text
    )


def test_a_data_set_of_the_same_conditions_is_taken():
    conditions.check_dataset(LABELLED, digits(10))
    conditions.check_dataset(CAPTIONED, captions())
    conditions.check_dataset(CAPTIONED, captions(max_length=7))


@pytest.mark.parametrize("classes", [9, 11])
def test_another_number_of_classes_is_refused(classes):
    """JAX would clamp a label outside of the table, and read a row that nobody trained."""
    with pytest.raises(ValueError, match=f"num_classes = 10, but .* digits has {classes} classes"):
        conditions.check_dataset(LABELLED, digits(classes))


@pytest.mark.parametrize(
    "model, data, message",
    [
        (LABELLED, captions(), "told label of an image, but the records of told have caption"),
        (CAPTIONED, digits(10), "told caption, caption_mask of .* records of digits have label"),
        (CAPTIONED, captions(width=32), "caption_channels = 16, but .* told have 32 channels"),
        (CAPTIONED, captions(max_length=21), "caption_length = 20, but .* up to 21 tokens"),
    ],
)
def test_other_conditions_are_refused_with_both_sides(model, data, message):
    with pytest.raises(ValueError, match=message):
        conditions.check_dataset(model, data)
