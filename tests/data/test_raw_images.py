"""ADM's crop against Pillow's resampling written out; images of folders, local or in a bucket."""

import numpy as np
import object_store
import pytest
from PIL import Image

from lit_jax.data.raw_images import ImageSettings, center_crop, open_images

SIZE = 16


# The crop.


def kernel(name, x):
    if name == "box":
        return np.where((-0.5 < x) & (x <= 0.5), 1.0, 0.0)
    x = np.abs(x)
    a = -0.5  # Keys' cubic
    return np.where(
        x < 1,
        (a + 2) * x**3 - (a + 3) * x**2 + 1,
        np.where(x < 2, a * (x**3 - 5 * x**2 + 8 * x - 4), 0.0),
    )


def resize_axis(pixels, size, name):
    """The first axis resampled, then rounded.

    Each output averages the inputs under a kernel as wide as the reduction.
    """
    scale = len(pixels) / size
    width = max(scale, 1.0)
    support = {"box": 0.5, "bicubic": 2.0}[name] * width
    out = []
    for i in range(size):
        center = (i + 0.5) * scale
        low = max(int(center - support + 0.5), 0)
        high = min(int(center + support + 0.5), len(pixels))
        weights = kernel(name, (np.arange(low, high) + 0.5 - center) / width)
        out.append(np.tensordot(weights / weights.sum(), pixels[low:high], axes=1))
    return np.clip(np.floor(np.array(out) + 0.5), 0, 255)


def resize(pixels, height, width, name):
    """Width first, then height, as Pillow did when ADM's statistics were made."""
    wide = resize_axis(pixels.swapaxes(0, 1), width, name).swapaxes(0, 1)
    return resize_axis(wide, height, name)


def center_crop_oracle(pixels, h, w):
    pixels = pixels.astype(np.float64)
    while pixels.shape[0] >= 2 * h and pixels.shape[1] >= 2 * w:
        pixels = resize(pixels, pixels.shape[0] // 2, pixels.shape[1] // 2, "box")
    height, width = pixels.shape[:2]
    scale = max(h / height, w / width)
    pixels = resize(pixels, round(height * scale), round(width * scale), "bicubic")
    top, left = (pixels.shape[0] - h) // 2, (pixels.shape[1] - w) // 2
    return pixels[top : top + h, left : left + w]


@pytest.mark.parametrize("sides", [(SIZE, SIZE), (12, 20)])
@pytest.mark.parametrize(
    "width, height",
    [
        (16, 16),
        (32, 32),
        (33, 47),
        (31, 40),
        (9, 13),
        (100, 70),
        (65, 64),
        (131, 260),
        (32, 66),
        (40, 300),
    ],
)
def test_the_crop_is_box_halving_then_bicubic_then_the_middle(width, height, sides):
    rng = np.random.default_rng(width)
    pixels = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    pixels[height // 3 :, width // 4 :] //= 2
    size = SIZE if sides == (SIZE, SIZE) else sides
    cropped = np.asarray(center_crop(Image.fromarray(pixels), size), int)
    error = np.abs(cropped - center_crop_oracle(pixels, *sides))
    # Pillow's weights have 22 bits: a value that falls on a rounding boundary may land on its
    # other side.
    assert cropped.shape == (*sides, 3) and error.max() <= 1 and (error > 0).mean() < 0.01


def test_the_crop_of_an_image_twice_the_size_is_the_mean_of_its_squares():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    means = pixels.reshape(16, 2, 16, 2, 3).mean(axis=(1, 3))
    cropped = np.asarray(center_crop(Image.fromarray(pixels), 16))
    assert np.abs(cropped - means).max() <= 1.0  # two roundings


def test_an_image_of_the_size_is_left_alone():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    cropped = np.asarray(center_crop(Image.fromarray(pixels), 16))
    np.testing.assert_array_equal(cropped, pixels)


# Folders.


def test_a_folder_in_a_bucket_has_the_same_images(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for name in ("b/1.png", "a/0.png", "a/2.jpg", "a/notes.txt"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (20, 24, 3)).astype(np.uint8)
        if path.suffix == ".txt":
            path.write_text("not an image")
        else:
            Image.fromarray(pixels).save(path)
    local = open_images(f"{tmp_path}/images/", "", "train", ImageSettings(SIZE))
    with object_store.serve(monkeypatch):
        object_store.upload(tmp_path / "images", "bucket/images")
        remote = open_images("gs://bucket/images/", "", "train", ImageSettings(SIZE))
        assert len(local) == len(remote) == 3
        assert remote.class_names == local.class_names == ("a", "b")
        assert remote.name == local.name == "images"
        assert remote.listing == local.listing  # so either goes on where the other stopped
        for i, name in enumerate(("a/0.png", "a/2.jpg", "b/1.png")):
            assert remote[i]["id"] == local[i]["id"] == name
            assert remote[i]["label"] == local[i]["label"] == (name[0] == "b")
            np.testing.assert_array_equal(remote[i]["image"], local[i]["image"])
        with pytest.raises(FileNotFoundError, match="^name = 'gs://bucket/none' is no folder"):
            open_images("gs://bucket/none/", "", "train", ImageSettings(SIZE))
