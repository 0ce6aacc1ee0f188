"""Folders of images to score: which files, in which order, as which pixels, known by what."""

import json
import logging

import numpy as np
import pytest
from etils import epath
from PIL import Image
from tiny_extractor import random_images

from lit_jax.data import raw_images
from lit_jax.evaluation import images


def save(folder, name, pixels):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def open_folder(folder):
    return images.open_images(epath.Path(folder))


def all_of(opened, batch_size=3):
    batches = list(opened.batches(opened.count, batch_size))
    assert max(map(len, batches)) <= batch_size
    return np.concatenate(batches)


NAMES = (
    "000.png",
    "00000/samples/0000.png",
    "00000/samples/0001.png",
    "cat/a.png",
    "cat/more/b.png",
    "dog/a.png",
    "dog.png",
)


def test_folders_in_folders_are_read_in_the_order_of_their_paths(tmp_path):
    pixels = dict(zip(NAMES, random_images(len(NAMES))))
    for name in reversed(NAMES):
        save(tmp_path, name, pixels[name])
    for litter in (".a.png", "__MACOSX/cat/a.png", "cat/._a.png"):
        save(tmp_path, litter, random_images(1, size=4)[0])
    # GenEval's overview of a prompt's images; any other grid.png is an image.
    save(tmp_path, "00000/grid.png", random_images(1, size=16)[0])
    (tmp_path / "00000/metadata.jsonl").write_text("{}")
    opened = open_folder(tmp_path)
    assert (opened.count, opened.shape) == (len(NAMES), (8, 8, 3))
    expected = np.stack([pixels[name] for name in sorted(NAMES)])
    np.testing.assert_array_equal(all_of(opened), expected)
    np.testing.assert_array_equal(next(opened.batches(5, 8)), expected[:5])
    save(tmp_path, "dog/grid.png", pixels["dog.png"])
    assert open_folder(tmp_path).count == len(NAMES) + 1


def test_no_more_than_a_batch_is_read_ahead(tmp_path, monkeypatch):
    for i, image in enumerate(random_images(9)):
        save(tmp_path, f"{i}.png", image)
    opened = open_folder(tmp_path)
    read = []
    decode = raw_images.decode
    monkeypatch.setattr(
        raw_images, "decode", lambda image, *how: read.append(image) or decode(image, *how)
    )
    for number, _ in enumerate(opened.batches(9, 2)):
        assert len(read) == min(2 * number + 2, 9)


def test_images_of_different_sizes_are_both_named_with_their_sizes(tmp_path):
    save(tmp_path, "a.png", random_images(1)[0])
    save(tmp_path, "b/c.png", random_images(1)[0][:4])
    message = "different sizes: a.png is 8 x 8 pixels, b/c.png is 8 x 4 pixels"
    with pytest.raises(ValueError, match=message):
        open_folder(tmp_path)


def test_grey_alpha_and_16_bits_become_8_bits_of_1_or_3_channels(tmp_path, caplog):
    """As in preparing a data set: transparent pixels are white, of 16 bits the upper 8 count."""
    grey = random_images(1)[0][..., 0]
    transparent = np.stack([grey, grey, grey, np.zeros_like(grey)], -1)
    transparent[2:] |= np.array([0, 0, 0, 255], np.uint8)
    on_white = np.where(transparent[..., 3:] == 0, 255, transparent[..., :3])
    save(tmp_path, "a.png", grey)
    save(tmp_path, "b.png", grey.astype(np.uint16) * 256 + 17)
    opened = open_folder(tmp_path)
    assert opened.shape == (8, 8, 1)
    np.testing.assert_array_equal(all_of(opened), np.stack([grey, grey])[..., None])
    save(tmp_path, "c.png", transparent)
    opened = open_folder(tmp_path)
    assert opened.shape == (8, 8, 3)
    rgb = grey[..., None].repeat(3, -1)
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        np.testing.assert_array_equal(all_of(opened), np.stack([rgb, rgb, on_white]))
    assert f"{tmp_path}: 1 images are transparent, put on white" in caplog.messages


def test_the_hash_sees_pixels_and_order_but_no_names(tmp_path):
    pixels = random_images(2)
    hashes = {}
    for folder, names, order in (
        ("first", "ab", (0, 1)),
        ("renamed", "xy", (0, 1)),
        ("swapped", "ab", (1, 0)),
        ("fewer", "a", (0,)),
    ):
        for name, i in zip(names, order):
            save(tmp_path / folder, f"{name}.png", pixels[i])
        hashes[folder] = open_folder(tmp_path / folder).content_hash()
    assert hashes["first"] == hashes["renamed"] and len(hashes["first"]) == 16
    assert len(set(hashes.values())) == 3


def test_what_the_sampling_job_left_is_read_and_its_damage_named(tmp_path):
    save(tmp_path, "a.png", random_images(1)[0])
    opened = open_folder(tmp_path)
    assert opened.about("protocol") == {}
    (tmp_path / "protocol.json").write_text(json.dumps({"steps": 250}))
    assert opened.about("protocol") == {"steps": 250}
    (tmp_path / "protocol.json").write_text("{")
    with pytest.raises(ValueError, match="protocol.json cannot be read as a JSON object"):
        opened.about("protocol")


@pytest.mark.parametrize("whole", [False, True])
def test_a_file_that_is_no_image_is_named(tmp_path, whole):
    """At once where its header says so, else when its pixels are read."""
    for name in "ab":
        save(tmp_path, f"{name}.png", random_images(1, size=64)[0])
    content = (tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").write_bytes(content[: len(content) // 2] if whole else b"no image")
    with pytest.raises(ValueError, match=f"{tmp_path}: b.png cannot be read"):
        all_of(open_folder(tmp_path))


def test_a_folder_without_images_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match=r"holds no images \(.jpg, "):
        open_folder(tmp_path)
