"""Images and texts in npz files: streamed in file order, and nothing in the file is trusted."""

import json

import numpy as np
import pytest
from etils import epath
from tiny_extractor import random_images

from lit_jax.evaluation import npz


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("num_images, batch_size", [(23, 8), (16, 8), (5, 64)])
def test_images_stream_from_npz_in_file_order(tmp_path, save, num_images, batch_size):
    images = random_images(23)
    path = epath.Path(tmp_path) / "images.npz"
    save(path, arr_0=images, arr_1=np.arange(23), protocol=json.dumps({"steps": 250}))
    assert npz.image_shape(path) == (23, 8, 8, 3)
    batches = list(npz.image_batches(path, num_images, batch_size))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    np.testing.assert_array_equal(np.concatenate(batches), images[:num_images])
    assert npz.read_json(path, "protocol") == {"steps": 250}
    assert npz.read_json(path, "speed") == {}


@pytest.mark.parametrize(
    "images, message",
    [
        (np.zeros((2, 8, 8, 3), np.float32), "float32"),
        (np.zeros((2, 8, 8), np.uint8), r"\(2, 8, 8\)"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"\(2, 3, 8, 8\)"),
        (np.asfortranarray(np.zeros((2, 8, 8, 3), np.uint8)), "Fortran"),
        (np.zeros((4, 0, 0, 3), np.uint8), r"arr_0 is uint8 \(4, 0, 0, 3\)"),
    ],
)
def test_arrays_that_are_no_images_are_named(tmp_path, images, message):
    path = epath.Path(tmp_path) / "x.npz"
    np.savez(path, arr_0=images)
    with pytest.raises(ValueError, match=f"x.npz: .*{message}"):
        npz.image_shape(path)


def test_files_that_hold_no_images_are_named(tmp_path):
    path = epath.Path(tmp_path) / "x.npz"
    np.savez(path, other=np.zeros(3))
    with pytest.raises(ValueError, match="not an npz with an array 'arr_0'"):
        npz.image_shape(path)
    path.write_bytes(b"no zip")
    with pytest.raises(ValueError, match="not an npz"):
        npz.image_shape(path)
    with pytest.raises(FileNotFoundError, match="nowhere.npz not found"):
        npz.image_shape(epath.Path(tmp_path) / "nowhere.npz")


def test_a_file_that_is_shorter_than_its_header_says_is_named(tmp_path):
    path = epath.Path(tmp_path) / "x.npz"
    np.savez(path, arr_0=random_images(8))
    with pytest.raises(ValueError, match="x.npz is truncated: its header promises 8 images"):
        list(npz.image_batches(path, 12, 4))
