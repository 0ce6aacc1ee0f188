"""Folders of images as they are found, and pictures of every kind, as records."""

import io
import logging
import pathlib

import numpy as np
import pytest
from PIL import Image

from lit_jax.data.raw_images import BrokenImageError, ImageSettings, open_images

SIZE = 4


def save(path: pathlib.Path, image: Image.Image | None = None, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.new("RGB", (SIZE, SIZE))).save(path, **options)


def read_one(tmp_path, image, ending="png", save_options=None, **settings):
    """The record of a picture in a folder of its own."""
    save(tmp_path / "a" / f"0.{ending}", image, **(save_options or {}))
    images = open_images(f"{tmp_path}/", "", "train", ImageSettings(SIZE, **settings))
    return images[0]


# Folders.


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.INFO, logger="absl")
    return caplog


def open_folder(folder):
    return open_images(f"{folder}/", "", "train", ImageSettings(SIZE))


def names_of(images):
    return [images[i]["id"] for i in range(len(images))]


def test_what_other_programs_leave_in_a_folder_is_skipped_and_counted(tmp_path, warnings):
    save(tmp_path / "a" / "g0.png")
    for name in (
        "__MACOSX/a/._g0.png",
        "a/._g1.png",
        "a/.DS_Store",
        "a/@eaDir/g0.png",
        ".x/y.png",
        "$RECYCLE.BIN/z.png",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"no picture")
    (tmp_path / "a" / "notes.txt").write_text("no picture")
    save(tmp_path / "cover.png")
    images = open_folder(tmp_path)
    assert images.class_names == ("a",) and names_of(images) == ["a/g0.png"]
    assert "6 hidden files and folders are skipped" in warnings.text
    assert "1 files are skipped, for they do not end in .jpg" in warnings.text
    assert "1 images that lie beside the class folders are skipped" in warnings.text


def test_a_link_to_nothing_and_a_folder_called_as_an_image_are_broken_images(tmp_path):
    save(tmp_path / "a" / "ok.png")
    (tmp_path / "a" / "dead.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "a" / "folder.png").mkdir()
    (tmp_path / "a" / "text.png").write_bytes(b"no picture")
    images = open_folder(tmp_path)
    for number, name in enumerate(("dead.png", "folder.png", "ok.png", "text.png")):
        if name != "ok.png":
            with pytest.raises(BrokenImageError, match=name) as caught:
                images[number]
            assert "BytesIO" not in str(caught.value)


def test_a_class_folder_without_images_is_named(tmp_path, warnings):
    for name in ("a/0.png", "a/1.png", "c/0.png", "c/1.png"):
        save(tmp_path / name)
    (tmp_path / "b").mkdir()
    images = open_folder(tmp_path)
    assert images.class_names == ("a", "b", "c")
    assert [images[i]["label"] for i in range(4)] == [0, 0, 2, 2]
    assert "1 class folders hold no image, and count as classes all the same: b" in warnings.text


def test_folders_in_a_class_folder_are_of_that_class(tmp_path):
    for name in ("a/x.png", "a/sub/x.png", "b/deep/down/y.png"):
        save(tmp_path / name)
    (tmp_path / "b" / "deep" / "up").symlink_to(tmp_path / "b")  # a circle
    images = open_folder(tmp_path)
    assert names_of(images) == ["a/sub/x.png", "a/x.png", "b/deep/down/y.png"]
    assert [images[i]["label"] for i in range(3)] == [0, 0, 1]


def test_a_folder_without_class_folders_is_one_class(tmp_path, warnings):
    for name in ("1.png", "0.gif"):
        save(tmp_path / name)
    (tmp_path / "empty").mkdir()
    images = open_folder(tmp_path)
    assert (images.num_classes, images.class_names) == (1, None)
    assert names_of(images) == ["0.gif", "1.png"]
    assert "2 images and no class folders: one class" in warnings.text


def test_classes_that_are_called_as_splits_are_asked_about(tmp_path, warnings):
    for name in ("train/a/0.png", "val/a/0.png"):
        save(tmp_path / name)
    open_folder(tmp_path)
    assert "the classes are called train, val: are these splits?" in warnings.text


def test_a_name_that_is_not_utf8_is_written_as_text(tmp_path):
    folder = tmp_path / "images"
    save(folder / "x" / "0.png")
    (folder / "x").rename(folder / b"caf\xe9".decode("utf-8", "surrogateescape"))
    images = open_folder(folder)
    assert images.class_names == (r"caf\xe9",)
    assert images[0]["id"] == r"caf\xe9/0.png"
    (next(folder.iterdir()) / "0.png").write_bytes(b"no picture")
    with pytest.raises(BrokenImageError, match=r"cannot be read: caf\\xe9/0.png: ") as error:
        open_folder(folder)[0]
    str(error.value).encode()


def test_a_folder_may_be_named_without_a_slash(tmp_path, monkeypatch, warnings):
    save(tmp_path / "pets" / "cat" / "0.png")
    monkeypatch.chdir(tmp_path)
    images = open_images("pets", str(tmp_path / "data"), "train", ImageSettings(SIZE))
    assert images.class_names == ("cat",)
    assert "pets is no data set of" in warnings.text


# Pictures.


def spot(mode: str) -> Image.Image:
    """An opaque red square in the middle of transparent pixels whose hidden colour is green."""
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[..., 1] = 255
    pixels[4:12, 4:12] = (255, 0, 0, 255)
    image = Image.fromarray(pixels)
    if mode == "P":
        index = (pixels[..., 0] > 0).astype(np.uint8)
        image = Image.fromarray(index, "P")
        image.putpalette([0, 255, 0, 255, 0, 0])
        image.info["transparency"] = 0
    return image


@pytest.mark.parametrize("mode", ["RGBA", "P"])
@pytest.mark.parametrize(
    "settings, corner",
    [({}, (255, 255, 255)), ({"background": "#102030"}, (16, 32, 48)), ({"background": ""}, None)],
)
def test_transparent_pixels_have_the_colour_of_the_background(tmp_path, mode, settings, corner):
    record = read_one(tmp_path, spot(mode), **settings)
    np.testing.assert_array_equal(record["image"][0, 0], corner or (0, 255, 0))
    np.testing.assert_array_equal(record["image"][1:3, 1:3, 0], 255)
    words = f"transparent, put on {settings.get('background', 'white')}"
    assert record["treated"] == ([words] if corner else [])


def test_an_alpha_that_hides_nothing_changes_nothing(tmp_path):
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(4, 4, 4))
    image.putalpha(255)
    record = read_one(tmp_path, image)
    np.testing.assert_array_equal(record["image"], np.asarray(image)[..., :3])
    assert not record["treated"]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_exif_says(tmp_path, orientation):
    stored = np.arange(16, dtype=np.uint8).reshape(4, 4) * 16
    # EXIF 2.32, 4.6.4.A: where the first row and column of what is stored belong.
    shown = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.T,
        6: stored.T[:, ::-1],
        7: stored.T[::-1, ::-1],
        8: stored.T[::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"save_options": {"exif": exif}}
    image = Image.fromarray(stored)
    record = read_one(tmp_path, image, **options)
    np.testing.assert_array_equal(record["image"][..., 0], shown)
    assert record["treated"] == ["turned as their EXIF says"] * (orientation > 1)
    record = read_one(tmp_path, image, exif_orientation=False, **options)
    np.testing.assert_array_equal(record["image"][..., 0], stored)


def test_of_16_bits_the_upper_8_are_taken(tmp_path):
    values = np.arange(16, dtype=np.uint16).reshape(4, 4) * 4369
    for ending in ("png", "tiff"):
        record = read_one(tmp_path / ending, Image.fromarray(values), ending)
        np.testing.assert_array_equal(record["image"][..., 1], values // 256)
        assert record["treated"] == ["of 16 bits, of which the upper 8 are taken"]


def test_values_without_a_known_range_are_refused(tmp_path):
    floats = Image.fromarray(np.full((4, 4), 0.5, np.float32))
    with pytest.raises(BrokenImageError, match="a/0.tiff: its values have no known range"):
        read_one(tmp_path, floats, "tiff")


@pytest.mark.parametrize("ending", ["gif", "webp", "png"])
def test_of_an_animation_the_first_frame_is_taken(tmp_path, ending):
    frames = [Image.new("RGB", (SIZE, SIZE), colour) for colour in ("red", "blue")]
    options = {"save_all": True, "append_images": frames[1:]}
    if ending == "webp":
        options["lossless"] = True
    record = read_one(tmp_path, frames[0], ending, options)
    np.testing.assert_array_equal(record["image"][0, 0], (255, 0, 0))
    assert record["treated"] == ["of several frames, of which the first is taken"]


def test_a_photograph_with_a_preview_is_no_animation(tmp_path):
    frames = [Image.new("RGB", (SIZE, SIZE), colour) for colour in ("red", "blue")]
    file = io.BytesIO()
    frames[0].save(file, "MPO", save_all=True, append_images=frames[1:])
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.jpg").write_bytes(file.getvalue())
    assert not open_folder(tmp_path)[0]["treated"]


def test_an_image_above_the_limit_of_pixels_is_not_decoded(tmp_path):
    image = Image.new("RGB", (11, 10))
    message = "a/0.png: it has 11 x 10 = 110 pixels, max_pixels = 109"
    with pytest.raises(BrokenImageError, match=message):
        read_one(tmp_path, image, max_pixels=109)
    assert read_one(tmp_path, image, max_pixels=110)["image"].shape == (SIZE, SIZE, 3)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"background": "whit"}, "^background must be a colour, .*; got 'whit'"),
        ({"background": "#11223380"}, "^background must be a colour"),
        ({"size": (4, 0)}, r"^size must be a side in .*; got \(4, 0\)"),
        ({"size": 10**7}, "^size must be a side in "),
        ({"max_pixels": 0}, "^max_pixels must be at least 1"),
    ],
)
def test_settings_that_cannot_be_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        ImageSettings(**{"size": SIZE} | wrong)
