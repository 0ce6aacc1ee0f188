"""The preparing job: ADM's crop, the shards and what is in them, interruptions, damage, refusals."""

import hashlib
import io
import json
import os
import pathlib
import shutil
import signal
import struct
import sys
import zlib

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from ml_collections import ConfigDict
from PIL import Image
from tiny_autoencoder import FACTOR, write_autoencoder

from configs import debug
from lit_jax import experiment, sharding
from lit_jax.data import dataset
from lit_jax.jobs import prepare
from lit_jax.runtime import exit_status, preemption

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
    """The first axis resampled: each output averages the inputs under a kernel as wide as the reduction; then rounded."""
    scale = len(pixels) / size
    width = max(scale, 1.0)
    support = {"box": 0.5, "bicubic": 2.0}[name] * width
    out = []
    for i in range(size):
        center = (i + 0.5) * scale
        low, high = (
            max(int(center - support + 0.5), 0),
            min(int(center + support + 0.5), len(pixels)),
        )
        weights = kernel(name, (np.arange(low, high) + 0.5 - center) / width)
        out.append(np.tensordot(weights / weights.sum(), pixels[low:high], axes=1))
    return np.clip(np.floor(np.array(out) + 0.5), 0, 255)


def resize(pixels, height, width, name):
    """Width first, then height, as Pillow did when ADM's statistics were made."""
    return resize_axis(resize_axis(pixels.swapaxes(0, 1), width, name).swapaxes(0, 1), height, name)


def center_crop_oracle(pixels, size):
    pixels = pixels.astype(np.float64)
    while min(pixels.shape[:2]) >= 2 * size:
        pixels = resize(pixels, pixels.shape[0] // 2, pixels.shape[1] // 2, "box")
    h, w = pixels.shape[:2]
    scale = size / min(h, w)
    pixels = resize(pixels, round(h * scale), round(w * scale), "bicubic")
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


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
def test_the_crop_is_box_halving_then_bicubic_then_the_middle(width, height):
    rng = np.random.default_rng(width)
    pixels = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    pixels[height // 3 :, width // 4 :] //= 2
    cropped = np.asarray(prepare.center_crop(Image.fromarray(pixels), SIZE), int)
    error = np.abs(cropped - center_crop_oracle(pixels, SIZE))
    # Pillow's weights have 22 bits: a value that falls on a rounding boundary may land on its other side.
    assert cropped.shape == (SIZE, SIZE, 3) and error.max() <= 1 and (error > 0).mean() < 0.01


def test_the_crop_of_an_image_twice_the_size_is_the_mean_of_its_squares():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    means = pixels.reshape(16, 2, 16, 2, 3).mean(axis=(1, 3))
    assert (
        np.abs(np.asarray(prepare.center_crop(Image.fromarray(pixels), 16)) - means).max() <= 1.0
    )  # two roundings


def test_an_image_of_the_size_is_left_alone():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    np.testing.assert_array_equal(
        np.asarray(prepare.center_crop(Image.fromarray(pixels), 16)), pixels
    )


# The job.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """23 images of many sizes and modes in three class folders, with a file that is no image beside them."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(23):
        path = folder / ("n03", "n01", "n02")[i % 3] / f"{i:02d}.{('png', 'jpeg')[i % 2]}"
        path.parent.mkdir(exist_ok=True)
        image = Image.fromarray(rng.integers(0, 256, (17 + 3 * i, 60 - 2 * i, 3)).astype(np.uint8))
        image.convert(
            ("RGB", "L", "P")[i % 3] if path.suffix == ".png" else ("RGB", "L", "CMYK")[i % 3]
        ).save(path)
    (folder / "n01" / "readme.txt").write_text("not an image")
    (folder / ".hidden").mkdir()
    return folder


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    return write_autoencoder(tmp_path_factory.mktemp("autoencoder") / "tiny-vae")


def make_config(tmp_path, folder, autoencoder="", **change) -> ConfigDict:
    config = debug.get_config()
    config.model.update(num_classes=3, in_channels=4 if autoencoder else 3)
    config.data.update(name="prepared", dir=str(tmp_path / "data"), num_threads=2)
    config.autoencoder.checkpoint = str(autoencoder)
    config.prepare.update(source=f"{folder}/", image_size=SIZE, batch_size=8, shard_records=5)
    config.prepare.update(change)
    return config


def run(config):
    prepare.run(config, pathlib.Path("unused"))
    return pathlib.Path(config.data.dir) / config.data.name / prepare.VERSION


def shard_files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.array_record-*"))}


def test_pixels_of_a_folder_come_back_in_order_with_label_and_id(folder, tmp_path):
    out = run(make_config(tmp_path, folder))
    source = dataset.open_dataset("prepared", str(tmp_path / "data"), "train")
    assert (
        isinstance(source, dataset.ImageDataset)
        and source.image_shape == (SIZE, SIZE, 3)
        and source.num_classes == 3
    )
    files = sorted(path.relative_to(folder) for path in folder.glob("n*/*.*g"))
    assert len(source) == len(files) == 23
    raw = tfds.builder_from_directory(str(out)).as_data_source(split="train")  # TFDS alone reads it
    for i, name in enumerate(files):
        expected = np.asarray(prepare.center_crop(Image.open(folder / name).convert("RGB"), SIZE))
        np.testing.assert_array_equal(source[i]["image"], expected)
        assert source[i]["label"] == sorted(("n01", "n02", "n03")).index(name.parts[0])
        assert raw[i]["id"].decode() == str(name)
    info = tfds.builder_from_directory(str(out)).info
    assert info.features["label"].names == ["n01", "n02", "n03"]
    assert info.splits["train"].shard_lengths == [5, 5, 5, 5, 3]


def test_counts_and_hashes_are_those_of_the_files(folder, tmp_path):
    out = run(make_config(tmp_path, folder))
    shards = json.loads((out / dataset.PREPARED).read_text())["splits"]["train"]["shards"]
    assert [count for count, _ in shards] == [5, 5, 5, 5, 3]
    assert [sha for _, sha in shards] == [
        hashlib.sha256(content).hexdigest() for content in shard_files(out).values()
    ]
    assert not list(out.glob("journal*")) and not list(out.glob("part*"))


@pytest.fixture(scope="module")
def latents(folder, autoencoder, tmp_path_factory):
    config = make_config(tmp_path_factory.mktemp("latents"), folder, autoencoder)
    return config, run(config)


def test_latents_are_the_posteriors_of_image_and_mirror_unscaled(folder, autoencoder, latents):
    config, _ = latents
    source = dataset.open_dataset("prepared", config.data.dir, "train")
    assert isinstance(source, dataset.LatentDataset) and source.image_shape == (
        SIZE // FACTOR,
        SIZE // FACTOR,
        4,
    )
    built, identity = experiment.autoencoder(config, sharding.make_mesh(devices=jax.devices()[:1]))
    pixels = prepare.open_images(f"{folder}/", "", "train", SIZE)
    for i in (0, 7, 22):
        x = pixels[i]["image"].astype(np.float32) / 127.5 - 1.0
        mean, log_variance = built.encode(np.stack([x, x[:, ::-1]]))
        record = source[i]
        assert record["mean"].dtype == record["log_variance"].dtype == np.float16
        np.testing.assert_allclose(record["mean"], mean, rtol=2e-3, atol=1e-3)
        np.testing.assert_allclose(record["log_variance"], log_variance, rtol=2e-3, atol=1e-3)
        assert (
            np.abs(record["mean"][0] - record["mean"][1]).max() > 0.01
        )  # a mirror is another image
    assert (
        source.autoencoder == identity
        and source.scaling_factor == 0.5
        and source.shift_factor == 0.1
    )
    assert identity["name"] == "tiny-vae"


def write_as_one_of(config, process_index, process_count, images=None):
    """What process `process_index` of `process_count` writes, without the metadata."""
    target = config.data
    images = images or prepare.open_images(config.prepare.source, "", "train", SIZE)
    folder = pathlib.Path(target.dir) / target.name / prepare.VERSION
    shards = prepare.Shards(folder, target.name, "train", len(images), config.prepare.shard_records)
    plan = {
        "source_split": "train",
        "source_list": images.listing,
        "records": len(images),
        "shard_records": shards.size,
    }
    about = {
        "source": images.name,
        "crop": "adm",
        "image_size": SIZE,
        "num_classes": 3,
        "class_names": prepare.hash_of(images.class_names),
        "autoencoder": None,
    }
    prepare.claim(folder, about, "train", plan)
    features = prepare.make_features(images, None)
    prepare.write_shards(
        shards,
        images,
        features,
        prepare.make_encoder(None, sharding.make_mesh()),
        num_threads=1,
        batch_size=2,
        process_index=process_index,
        process_count=process_count,
    )
    return shards, features, about


def test_three_processes_write_what_one_writes(folder, tmp_path):
    alone = run(make_config(tmp_path / "one", folder))
    config = make_config(tmp_path / "three", folder)
    for process in (2, 0, 1):
        shards, features, about = write_as_one_of(config, process, 3)
        owned = {s for s in shards.finished() if s % 3 == process}
        assert owned == set(range(process, 5, 3))
        prepare.verify(shards, process, 3)
    prepare.finish(shards, features, about)
    assert shard_files(shards.folder) == shard_files(alone)
    assert (shards.folder / dataset.PREPARED).read_bytes() == (
        alone / dataset.PREPARED
    ).read_bytes()


def test_a_failure_in_a_shard_loses_that_shard_alone_and_the_rest_is_not_written_again(
    folder, tmp_path
):
    config = make_config(tmp_path, folder)
    images = prepare.open_images(config.prepare.source, "", "train", SIZE)

    class Damaged:
        name, split, size, channels = images.name, images.split, images.size, images.channels
        class_names, num_classes, listing = images.class_names, images.num_classes, images.listing

        def __len__(self):
            return len(images)

        def __getitem__(self, index):
            if index == 13:
                raise ValueError("image 13 cannot be read")
            return images[index]

    with pytest.raises(ValueError, match="image 13 cannot be read"):
        write_as_one_of(config, 0, 1, Damaged())
    out = tmp_path / "data" / "prepared" / prepare.VERSION
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("prepared-*")}
    assert sorted(before) == [f"prepared-train.array_record-{s:05d}-of-00005" for s in (0, 1)]
    with pytest.raises(FileNotFoundError, match="is not finished; run the --mode=prepare"):
        dataset.open_dataset("prepared", config.data.dir, "train")
    run(config)
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("prepared-*")}
    assert len(after) == 5 and {name: after[name] for name in before} == before
    assert shard_files(out) == shard_files(run(make_config(tmp_path / "whole", folder)))


def test_sigterm_ends_it_with_75_and_the_same_command_goes_on(folder, tmp_path, monkeypatch):
    config, previous = make_config(tmp_path, folder), signal.getsignal(signal.SIGTERM)
    encoded = []

    def encode(images):
        encoded.append(len(images))
        if len(encoded) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"image": images}

    monkeypatch.setattr(prepare, "make_encoder", lambda *_: encode)
    with (
        pytest.raises(SystemExit) as stopped,
        exit_status.shared_fate(1.0),
        preemption.sigterm_stops(),
    ):
        run(config)
    assert (
        stopped.value.code == exit_status.EXIT_TRY_AGAIN
        and signal.getsignal(signal.SIGTERM) is previous
    )
    assert len(encoded) == 4
    assert shard_files(run(config)) == shard_files(run(make_config(tmp_path / "whole", folder)))


def test_a_finished_preparation_is_left_as_it_is(latents):
    config, out = latents
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.array_record*")}
    run(config)
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("*.array_record*")}


def test_a_second_split_joins_the_first(folder, tmp_path):
    config = make_config(tmp_path, folder)
    run(config)
    config.data.split = "validation"
    run(config)
    for split in ("train", "validation"):
        assert len(dataset.open_dataset("prepared", config.data.dir, split)) == 23


def test_damage_is_found(folder, tmp_path):
    config = make_config(tmp_path, folder)
    out = run(config)
    path = out / "prepared-train.array_record-00002-of-00005"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="00002-of-00005 has sha256"):
        run(config)
    path.unlink()
    before = shard_files(out)
    run(config)  # written again
    assert path.exists() and {**before, path.name: path.read_bytes()} == shard_files(out)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_size": 8}, "begun with image_size = 16, this run has 8"),
        ({"shard_records": 4}, "begun with shard_records = 5, this run has 4"),
    ],
)
def test_a_folder_takes_one_preparation(latents, change, message):
    config = latents[0].copy_and_resolve_references()
    config.prepare.update(change)
    with pytest.raises(ValueError, match=message):
        run(config)


def test_another_folder_of_the_same_name_is_refused(folder, tmp_path):
    """Another list, other files under the same names, or other classes: each would put new labels over old images."""
    config = make_config(tmp_path, folder)
    before = shard_files(run(config))
    for number, (old, new, message) in enumerate(
        (("n01", "n09", "class_names"), ("n01/19.jpeg", "n01/99.jpeg", "source_list"))
    ):
        other = tmp_path / str(number) / folder.name
        shutil.copytree(folder, other)
        (other / old).rename(other / new)
        with pytest.raises(ValueError, match=f"was begun with {message} = "):
            run(make_config(tmp_path, other))
    other = tmp_path / "2" / folder.name
    shutil.copytree(folder, other)
    next(other.glob("n02/*.png")).write_bytes(next(other.glob("n03/*.png")).read_bytes())
    with pytest.raises(ValueError, match="was begun with source_list = "):
        run(make_config(tmp_path, other))
    shutil.move(other, tmp_path / "3")
    shutil.copytree(folder, other)  # the same folder, elsewhere
    assert shard_files(run(make_config(tmp_path, other))) == before


def test_a_name_that_training_would_open_otherwise_is_refused(folder, tmp_path):
    config = make_config(tmp_path, folder)
    config.data.name = "cifar10"
    with pytest.raises(
        ValueError, match="data.name = cifar10 is the name of a data set of TFDS itself"
    ):
        run(config)
    assert not (tmp_path / "data").exists()
    (tmp_path / "data" / "prepared" / "2.0.0").mkdir(parents=True)
    with pytest.raises(
        ValueError, match="data.name = prepared: .* holds 2.0.0 beside the version 1.0.0"
    ):
        run(make_config(tmp_path, folder))
    assert not (tmp_path / "data" / "prepared" / "1.0.0").exists()


def test_another_autoencoder_is_refused(latents, tmp_path):
    config = latents[0].copy_and_resolve_references()
    config.autoencoder.checkpoint = str(write_autoencoder(tmp_path / "other", seed=1))
    with pytest.raises(
        ValueError, match="begun with autoencoder = .*tiny-vae.*this run has .*other"
    ):
        run(config)


def test_bad_input_is_named(folder, autoencoder, tmp_path):
    config = make_config(tmp_path, folder)
    for change, error, message in (
        ({"source": "/no/such/"}, FileNotFoundError, "no folder /no/such"),
        (
            {"source": "nothing"},
            FileNotFoundError,
            "prepare.source: no prepared TFDS data set 'nothing'",
        ),
        ({"source": f"{tmp_path}/"}, ValueError, "no class folders of images"),
        (
            {"split": "test"},
            ValueError,
            "prepare.split = test is of TFDS data sets; .* is an image folder",
        ),
        (
            {"source": "prepared", "dir": f"{tmp_path}/./data"},
            ValueError,
            "and also prepare.source",
        ),
        (
            {"source": "prepared"},
            ValueError,
            "data.name = prepared is what is written, and also prepare.source",
        ),
        ({"shard_records": 0}, ValueError, "prepare.shard_records must be at least 1, got 0"),
        (
            {"batch_size": 9},
            ValueError,
            "prepare.batch_size = 9 is not a multiple of the 8 devices",
        ),
    ):
        broken = config.copy_and_resolve_references()
        broken.prepare.update(change)
        with pytest.raises(error, match=message):
            run(broken)
    with pytest.raises(
        ValueError, match="prepare.image_size = 17 is not a multiple of the 2 pixels"
    ):
        run(make_config(tmp_path, folder, autoencoder, image_size=17))
    assert not (tmp_path / "data").exists()


def test_a_damaged_image_is_named(folder, tmp_path):
    for name in ("a/0.png", "a/1.png", "b/2.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20)).save(tmp_path / "images" / name)
    (tmp_path / "images" / "a/1.png").write_bytes(
        (tmp_path / "images" / "a/1.png").read_bytes()[:40]
    )
    with pytest.raises(ValueError, match="image 1 of train cannot be read: a/1.png"):
        run(make_config(tmp_path, tmp_path / "images"))
    bomb = bytearray((tmp_path / "images" / "a/0.png").read_bytes())
    bomb[16:24] = struct.pack(">II", 60_000, 60_000)  # the header's width and height, and its CRC
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    (tmp_path / "images" / "a/1.png").write_bytes(bomb)
    with pytest.raises(
        ValueError, match="image 1 of train cannot be read: a/1.png: .*decompression bomb"
    ):
        run(make_config(tmp_path / "again", tmp_path / "images"))


def write_source(folder, features, examples):
    """A TFDS data set in `folder`/NAME/2.0.0 of these examples, as tfds convert_format would leave it."""
    name = folder.name
    shards = prepare.Shards(folder / "2.0.0", name, "train", len(examples), len(examples))
    shards.folder.mkdir(parents=True)
    prepare.write_about(
        shards.folder,
        {"splits": {"train": {"records": len(examples), "shard_records": len(examples)}}},
    )
    shards.write(0, (features.serialize_example(example) for example in examples), 0)
    prepare.finish(shards, features, {"source": name, "image_size": 0, "autoencoder": None})
    (shards.folder / dataset.PREPARED).unlink()


def test_a_tfds_data_set_of_image_files_of_many_sizes_is_decoded_by_pillow(tmp_path):
    """As imagenet2012 is stored: JPEGs, a PNG and a CMYK among them; TFDS decodes none, so TensorFlow is not asked for."""
    assert "tensorflow" not in sys.modules
    rng, files = np.random.default_rng(0), []
    for i, (kind, mode) in enumerate(
        (("jpeg", "RGB"), ("png", "RGB"), ("jpeg", "CMYK"), ("jpeg", "L"), ("jpeg", "RGB"))
    ):
        files.append(io.BytesIO())
        image = Image.fromarray(
            rng.integers(0, 256, (20 + 30 * i, 90 - 9 * i, 3)).astype(np.uint8)
        ).convert(mode)
        image.save(files[-1], kind)
        files[-1].seek(0)
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(num_classes=3),
            "file_name": tfds.features.Text(),
        }
    )
    examples = [
        {"image": file, "label": i % 3, "file_name": f"n0{i}.JPEG"} for i, file in enumerate(files)
    ]
    write_source(tmp_path / "source" / "photos", features, examples)
    config = make_config(tmp_path, "unused", source="photos")
    config.prepare.dir = str(tmp_path / "source")
    run(config)
    opened = dataset.open_dataset("prepared", config.data.dir, "train")
    assert len(opened) == 5 and opened.image_shape == (SIZE, SIZE, 3)
    for i, file in enumerate(files):
        expected = prepare.center_crop(Image.open(file).convert("RGB"), SIZE)
        np.testing.assert_array_equal(opened[i]["image"], np.asarray(expected))
        assert opened[i]["label"] == i % 3 and opened.records[i]["id"].decode() == f"n0{i}.JPEG"
    assert "tensorflow" not in sys.modules


def test_a_tfds_data_set_of_grey_images_keeps_its_channel_and_its_ids(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (7, 20, 24, 1)).astype(np.uint8)
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Tensor(shape=(20, 24, 1), dtype=np.uint8),
            "label": tfds.features.ClassLabel(num_classes=3),
            "file_name": tfds.features.Text(),
        }
    )
    write_source(
        tmp_path / "source" / "grey",
        features,
        [
            {"image": image, "label": i % 3, "file_name": f"{i}.png"}
            for i, image in enumerate(pixels)
        ],
    )
    config = make_config(tmp_path, "unused", source="grey", split="train[1:6]", image_size=12)
    config.prepare.dir = str(tmp_path / "source")
    out = run(config)
    opened = dataset.open_dataset("prepared", config.data.dir, "train")
    assert opened.image_shape == (12, 12, 1) and len(opened) == 5 and opened.num_classes == 3
    expected = prepare.center_crop(Image.fromarray(pixels[4, ..., 0]), 12)
    np.testing.assert_array_equal(opened[3]["image"][..., 0], np.asarray(expected))
    raw = tfds.builder_from_directory(str(out)).as_data_source(split="train")
    assert [record["id"].decode() for record in raw] == [f"{i}.png" for i in range(1, 6)]
