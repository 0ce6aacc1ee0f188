"""The preparing job: the shards and what is in them, interruptions, damage, refusals."""

import dataclasses
import errno
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
from etils import epath
from ml_collections import ConfigDict
from PIL import Image
from tiny_autoencoder import FACTOR, write_autoencoder
from tiny_dataset import write_tfds

from configs import debug
from lit_jax import checkpoint, sharding
from lit_jax.data import pipeline
from lit_jax.data.dataset import PREPARED, ImageDataset, LatentDataset, open_dataset
from lit_jax.data.encoding import make_encoder, make_features
from lit_jax.data.raw_images import ImageSettings, center_crop, open_images
from lit_jax.data.shards import VERSION, Shards
from lit_jax.experiment import Experiment
from lit_jax.jobs import prepare, sample
from lit_jax.runtime import exit_status, preemption, workdir_lock

SIZE = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """23 images of many sizes and modes in three class folders, and a file that is none."""
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
    prepare.run(config, epath.Path("unused"))
    return pathlib.Path(config.data.dir) / config.data.name / VERSION


def shard_files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.array_record-*"))}


def test_pixels_of_a_folder_come_back_in_order_with_label_and_id(folder, tmp_path):
    out = run(make_config(tmp_path, folder))
    images = open_dataset("prepared", str(tmp_path / "data"), "train")
    assert isinstance(images, ImageDataset)
    assert images.image_shape == (SIZE, SIZE, 3) and images.num_classes == 3
    files = sorted(path.relative_to(folder) for path in folder.glob("n*/*.*g"))
    assert len(images) == len(files) == 23
    raw = tfds.builder_from_directory(str(out)).as_data_source(split="train")  # TFDS alone reads it
    for i, name in enumerate(files):
        expected = np.asarray(center_crop(Image.open(folder / name).convert("RGB"), SIZE))
        np.testing.assert_array_equal(images[i]["image"], expected)
        assert images[i]["label"] == sorted(("n01", "n02", "n03")).index(name.parts[0])
        assert raw[i]["id"].decode() == str(name)
    info = tfds.builder_from_directory(str(out)).info
    assert info.features["label"].names == ["n01", "n02", "n03"]
    assert info.splits["train"].shard_lengths == [5, 5, 5, 5, 3]


def test_counts_and_hashes_are_those_of_the_files(folder, tmp_path):
    out = run(make_config(tmp_path, folder))
    shards = json.loads((out / PREPARED).read_text())["splits"]["train"]["shards"]
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
    latents = open_dataset("prepared", config.data.dir, "train")
    assert isinstance(latents, LatentDataset)
    assert latents.image_shape == (SIZE // FACTOR, SIZE // FACTOR, 4)
    experiment = Experiment(config)
    pixels = open_images(f"{folder}/", "", "train", ImageSettings(SIZE))
    for i in (0, 7, 22):
        x = pixels[i]["image"].astype(np.float32) / 127.5 - 1.0
        mean, log_variance = experiment.autoencoder.encode(np.stack([x, x[:, ::-1]]))
        record = latents[i]
        assert record["mean"].dtype == record["log_variance"].dtype == np.float16
        np.testing.assert_allclose(record["mean"], mean, rtol=2e-3, atol=1e-3)
        np.testing.assert_allclose(record["log_variance"], log_variance, rtol=2e-3, atol=1e-3)
        # A mirror is another image.
        assert np.abs(record["mean"][0] - record["mean"][1]).max() > 0.01
    assert latents.autoencoder == experiment.autoencoder_identity
    assert latents.scaling_factor == 0.5 and latents.shift_factor == 0.1
    assert latents.autoencoder["name"] == "tiny-vae"


def write_as_one_of(config, process_index, process_count, images=None):
    """What process `process_index` of `process_count` writes, without the metadata."""
    target = config.data
    images = images or open_images(config.prepare.source, "", "train", ImageSettings(SIZE))
    shards = Shards(
        folder=epath.Path(target.dir) / target.name / VERSION,
        name=target.name,
        split="train",
        num_records=len(images),
        size=config.prepare.shard_records,
        process_index=process_index,
        process_count=process_count,
    )
    about = {"crop": "adm", **images.about(), "autoencoder": None}
    prepare.enter_folder(shards, images, about)
    features = make_features(images, None)
    encode = make_encoder(None, sharding.make_mesh())
    prepare.write_shards(
        shards,
        images,
        features,
        encode,
        batch_size=2,
        num_threads=1,
        skip_broken=config.prepare.skip_broken,
    )
    return shards, features, about


def test_three_processes_write_what_one_writes(folder, tmp_path):
    alone = run(make_config(tmp_path / "one", folder))
    config = make_config(tmp_path / "three", folder)
    for process in (2, 0, 1):
        shards, features, about = write_as_one_of(config, process, 3)
        owned = {s for s in shards.finished() if s % 3 == process}
        assert owned == set(range(process, 5, 3))
        shards.verify()
    shards.finish(features, about)
    assert shard_files(shards.folder) == shard_files(alone)
    assert (shards.folder / PREPARED).read_bytes() == (alone / PREPARED).read_bytes()


def test_a_failure_in_a_shard_loses_that_shard_alone_and_the_rest_is_not_written_again(
    folder, tmp_path
):
    config = make_config(tmp_path, folder)
    images = open_images(config.prepare.source, "", "train", ImageSettings(SIZE))

    def read(index):
        if index == 13:
            raise ValueError("it is damaged")
        return images.read(index)

    damaged = dataclasses.replace(images, read=read)
    with pytest.raises(ValueError, match="image 13 of .* cannot be read: .*it is damaged"):
        write_as_one_of(config, 0, 1, damaged)
    out = tmp_path / "data" / "prepared" / VERSION
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("prepared-*")}
    assert sorted(before) == [f"prepared-train.array_record-{s:05d}-of-00005" for s in (0, 1)]
    with pytest.raises(FileNotFoundError, match="is not finished; run the --mode=prepare"):
        open_dataset("prepared", config.data.dir, "train")
    run(config)
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("prepared-*")}
    assert len(after) == 5 and {name: after[name] for name in before} == before
    assert shard_files(out) == shard_files(run(make_config(tmp_path / "whole", folder)))


def test_sigterm_ends_it_with_75_and_the_same_command_goes_on(folder, tmp_path, monkeypatch):
    config, previous = make_config(tmp_path, folder), signal.getsignal(signal.SIGTERM)
    encoded = []

    def make_stopping_encoder(autoencoder, mesh):
        encode = make_encoder(autoencoder, mesh)

        def encode_and_stop(images):
            encoded.append(len(images))
            if len(encoded) == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return encode(images)

        return encode_and_stop

    monkeypatch.setattr(prepare, "make_encoder", make_stopping_encoder)
    with (
        pytest.raises(SystemExit) as stopped,
        exit_status.shared_fate(1.0),
        preemption.signals_stop(),
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
        assert len(open_dataset("prepared", config.data.dir, split)) == 23


def test_a_split_that_is_not_finished_does_not_stop_another_one(folder, tmp_path):
    config = make_config(tmp_path, folder)
    write_as_one_of(config, 0, 2)  # half of its shards, as a killed run leaves them
    config.data.split = "validation"
    run(config)
    assert len(open_dataset("prepared", config.data.dir, "validation")) == 23
    with pytest.raises(ValueError, match="split = 'train' is not one of the splits of prepared"):
        open_dataset("prepared", config.data.dir, "train")
    config.data.split = "train"
    run(config)
    assert len(open_dataset("prepared", config.data.dir, "train")) == 23


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
    """Another list, other files under the same names, or other classes.

    Each would put new labels over old images.
    """
    config = make_config(tmp_path, folder)
    before = shard_files(run(config))
    for number, (old, new, message) in enumerate(
        (
            ("n01", "n09", "other class names than those of this run, which are n02, n03, n09"),
            ("n01/19.jpeg", "n01/99.jpeg", "source_list = "),
        )
    ):
        other = tmp_path / str(number) / folder.name
        shutil.copytree(folder, other)
        (other / old).rename(other / new)
        with pytest.raises(ValueError, match=f"was begun with {message}"):
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
        ({"source": "/no/such/"}, FileNotFoundError, "^prepare.source = '/no/such' is no folder"),
        (
            {"source": "nothing"},
            FileNotFoundError,
            "^prepare.source = 'nothing' is no prepared TFDS data set in data.dir = ",
        ),
        (
            {"source": "cifar10", "dir": f"{tmp_path}/elsewhere"},
            FileNotFoundError,
            f"data set in prepare.dir = '{tmp_path}/elsewhere', .*`tfds build cifar10 --data_dir=",
        ),
        ({"source": f"{tmp_path}/"}, ValueError, "^prepare.source = .*no class folders of images"),
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
        ({"shard_records": 0}, ValueError, "^prepare.shard_records must be in .1, .*; got 0"),
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
    remote = config.copy_and_resolve_references()
    remote.data.dir = "gs://bucket/data"
    with pytest.raises(ValueError, match="^data.dir = gs://bucket/data is no local folder"):
        prepare.run(remote, epath.Path("unused"))
    assert not (tmp_path / "data").exists()


def test_a_damaged_image_is_named(folder, tmp_path):
    for name in ("a/0.png", "a/1.png", "b/2.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20)).save(tmp_path / "images" / name)
    (tmp_path / "images" / "a/1.png").write_bytes(
        (tmp_path / "images" / "a/1.png").read_bytes()[:40]
    )
    with pytest.raises(ValueError, match="image 1 of .*/images cannot be read: a/1.png"):
        run(make_config(tmp_path, tmp_path / "images"))
    bomb = bytearray((tmp_path / "images" / "a/0.png").read_bytes())
    bomb[16:24] = struct.pack(">II", 60_000, 60_000)  # the header's width and height, and its CRC
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    (tmp_path / "images" / "a/1.png").write_bytes(bomb)
    with pytest.raises(
        ValueError,
        match="a/1.png: it has 60000 x 60000 = 3,600,000,000 pixels, max_pixels = 178,956,970",
    ):
        run(make_config(tmp_path / "again", tmp_path / "images"))


def test_a_tfds_data_set_of_image_files_of_many_sizes_is_decoded_by_pillow(tmp_path):
    """As imagenet2012 is stored: JPEGs, a PNG and a CMYK among them.

    TFDS decodes none of them, so it does not ask for TensorFlow.
    """
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
    write_tfds(tmp_path / "tfds" / "photos", features, examples)
    config = make_config(tmp_path, "unused", source="photos")
    config.prepare.dir = str(tmp_path / "tfds")
    run(config)
    opened = open_dataset("prepared", config.data.dir, "train")
    assert len(opened) == 5 and opened.image_shape == (SIZE, SIZE, 3)
    for i, file in enumerate(files):
        expected = center_crop(Image.open(file).convert("RGB"), SIZE)
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
    write_tfds(
        tmp_path / "tfds" / "grey",
        features,
        [
            {"image": image, "label": i % 3, "file_name": f"{i}.png"}
            for i, image in enumerate(pixels)
        ],
    )
    config = make_config(tmp_path, "unused", source="grey", split="train[1:6]", image_size=12)
    config.prepare.dir = str(tmp_path / "tfds")
    out = run(config)
    opened = open_dataset("prepared", config.data.dir, "train")
    assert opened.image_shape == (12, 12, 1) and len(opened) == 5 and opened.num_classes == 3
    expected = center_crop(Image.fromarray(pixels[4, ..., 0]), 12)
    np.testing.assert_array_equal(opened[3]["image"][..., 0], np.asarray(expected))
    raw = tfds.builder_from_directory(str(out)).as_data_source(split="train")
    assert [record["id"].decode() for record in raw] == [f"{i}.png" for i in range(1, 6)]


# Splits, broken images, TFDS sets of other kinds.


def make_split(tmp_path, split, names=("a/k.png", "b/k.png"), size=(40, 40)):
    rng = np.random.default_rng(len(split))
    for name in names:
        path = tmp_path / "F" / split / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size, 3)).astype(np.uint8)).save(path)
    return tmp_path / "F" / split


def test_the_folder_of_another_split_joins_and_other_classes_are_refused(tmp_path):
    for split, folder in (("train", "train"), ("validation", "val")):
        config = make_config(tmp_path, make_split(tmp_path, folder, ("a/k.png", "b/k.png")))
        config.data.split = split
        for _ in range(2):  # the second time it checks what is there
            out = run(config)
    for split in ("train", "validation"):
        assert len(open_dataset("prepared", config.data.dir, split)) == 2
    text = tfds.builder_from_directory(str(out)).info.description
    assert text == "train and val, ADM centre crop to 16 pixels."
    config = make_config(tmp_path, make_split(tmp_path, "test", ("a/k.png", "c/k.png")))
    config.data.split = "test"
    with pytest.raises(
        ValueError, match="was begun with other class names than those of this run, which are"
    ):
        run(config)
    config = make_config(tmp_path, make_split(tmp_path, "val"))
    with pytest.raises(ValueError, match="was begun with source = train, this run has val"):
        run(config)


def test_a_folder_of_before_the_new_fields_goes_on_with_what_they_were(folder, tmp_path):
    """Older versions knew of no background and no EXIF, and had one source for all splits."""
    config = make_config(tmp_path, folder, background="", exif_orientation=False)
    out = run(config)
    about = json.loads((out / PREPARED).read_text())
    for name in ("background", "exif_orientation"):
        del about[name]
    about["source"] = about["splits"]["train"].pop("source")
    (out / PREPARED).write_text(json.dumps(about))
    run(config)
    config.prepare.background = "white"
    with pytest.raises(ValueError, match="was begun with background = , this run has white"):
        run(config)


@pytest.fixture(scope="module")
def with_broken(tmp_path_factory):
    """11 images; those with the numbers 0, 6 and 9 hold nothing that can be read."""
    folder = tmp_path_factory.mktemp("broken") / "images"
    (folder / "a").mkdir(parents=True)
    for i in range(11):
        path = folder / "a" / f"{i:02d}.png"
        Image.new("RGB", (20, 20), (i, 0, 0)).save(path)
        if i in (0, 6, 9):
            path.write_bytes(path.read_bytes()[: 4 * i])
    return folder


def test_broken_images_are_left_out_up_to_a_limit_and_named(with_broken, tmp_path):
    config = make_config(tmp_path, with_broken, shard_records=3, skip_broken=2)
    with pytest.raises(ValueError, match="image 9 of .*a/09.png: .*prepare.skip_broken = 2: a "):
        run(config)
    config.prepare.skip_broken = 3
    out = run(config)  # goes on
    split = json.loads((out / PREPARED).read_text())["splits"]["train"]
    assert sorted(split["skipped"]) == ["a/00.png", "a/06.png", "a/09.png"]
    assert "image 6 of" in split["skipped"]["a/06.png"]
    assert [count for count, _ in split["shards"]] == [2, 3, 2, 1]
    images = open_dataset("prepared", config.data.dir, "train")
    reds = [int(images[i]["image"][0, 0, 0]) for i in range(len(images))]
    assert reds == [1, 2, 3, 4, 5, 7, 8, 10]
    # A damaged shard is written again with the same images left out.
    before = shard_files(out)
    (out / "prepared-train.array_record-00002-of-00004").unlink()
    run(config)
    assert shard_files(out) == before
    whole = run(make_config(tmp_path / "whole", with_broken, shard_records=3, skip_broken=3))
    assert shard_files(whole) == before


def test_the_broken_images_of_all_processes_count(with_broken, tmp_path):
    config = make_config(tmp_path, with_broken, shard_records=3, skip_broken=3)
    for process in (0, 1):
        write_as_one_of(config, process, 2)
    config.prepare.skip_broken = 2
    with pytest.raises(ValueError, match="3 images cannot be read, prepare.skip_broken = 2; the"):
        run(config)


def test_a_shard_of_broken_images_alone_is_empty(with_broken, tmp_path):
    config = make_config(tmp_path, with_broken, shard_records=1, skip_broken=3)
    run(config)
    assert len(open_dataset("prepared", config.data.dir, "train")) == 8


def test_an_error_of_the_disk_is_no_broken_image(with_broken, tmp_path, monkeypatch):
    config = make_config(tmp_path, with_broken, skip_broken=11)

    def read_bytes(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(type(epath.Path("/")), "read_bytes", read_bytes)
    with pytest.raises(ValueError, match="image 0 of .*a/00.png: .*Input/output error"):
        run(config)


GREY = tfds.features.Tensor(shape=(16, 16, 1), dtype=np.uint8, encoding="bytes")


@pytest.mark.parametrize("label", [tfds.features.Scalar(np.int64), None])
def test_a_tfds_data_set_whose_labels_are_numbers_or_not_there(tmp_path, label):
    """Such labels do not say how many classes there are; no label is one class."""
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 1)).astype(np.uint8)
    fields = {"image": GREY} | ({"label": label} if label else {})
    examples = [{"image": image, "label": i % 3} for i, image in enumerate(images)]
    examples = [{name: example[name] for name in fields} for example in examples]
    directory = tmp_path / "tfds"
    write_tfds(directory / "plain", tfds.features.FeaturesDict(fields), examples)
    config = make_config(tmp_path, "unused", source="plain", dir=str(directory))
    run(config)
    prepared = open_dataset("prepared", config.data.dir, "train")
    read = open_dataset("plain", str(directory), "train", classes=3)
    for found in (prepared, read):
        assert found.num_classes == (3 if label else 1)
        labels = [int(found[i]["label"]) for i in range(4)]
        assert labels == ([0, 1, 2, 0] if label else [0] * 4)
        np.testing.assert_array_equal(found[3]["image"], images[3])
    if label:
        with pytest.raises(ValueError, match="^name = 'plain' has the label .* how many classes"):
            open_dataset("plain", str(directory), "train")
        config = make_config(tmp_path / "2", "unused", source="plain", dir=str(directory))
        config.model.num_classes = 2
        with pytest.raises(ValueError, match="image 2 of plain.* has label 2, there are 2 classes"):
            run(config)


def test_a_name_with_a_slash_may_be_a_config_of_a_tfds_data_set(tmp_path):
    features = tfds.features.FeaturesDict(
        {"image": GREY, "label": tfds.features.ClassLabel(num_classes=3)}
    )
    examples = [{"image": np.full((16, 16, 1), i, np.uint8), "label": i} for i in range(3)]
    directory = tmp_path / "tfds"
    write_tfds(directory / "resized" / "16x16", features, examples, "resized")
    config = make_config(
        tmp_path, "unused", source="resized/16x16", dir=str(directory), split="train[1:]"
    )
    run(config)
    prepared = open_dataset("prepared", config.data.dir, "train")
    assert [int(prepared[i]["label"]) for i in range(len(prepared))] == [1, 2]
    assert len(open_dataset("resized/16x16", str(directory), "train[:2]")) == 2
    config.prepare.source = "resized/8x8"
    message = "^prepare.source = 'resized/8x8' is no folder, and no data set in prepare.dir = "
    with pytest.raises(FileNotFoundError, match=message):
        run(config)


def test_a_second_preparation_of_the_same_set_is_refused_and_told_the_owner(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(workdir_lock, "WAIT_SECONDS", 0.0)
    config = make_config(tmp_path, folder)
    place = tmp_path / "data" / "prepared"
    with workdir_lock.lock_folder(place, "", ""):
        message = f"^the data set {place} is in use by process {os.getpid()} on .*another data.name"
        with pytest.raises(ValueError, match=message):
            run(config)
        assert not (place / VERSION).exists()
        config.data.name = "other"
        run(config)


# Images that are not square.


def test_rectangular_images_are_prepared_trained_on_and_sampled(folder, tmp_path):
    config = make_config(tmp_path, folder, image_size=(8, 16))
    config.model.update(input_size=(8, 16), depth=1, width=8, num_heads=1, attention="softmax")
    config.student.init = "random"
    config.train.update(batch_size=8, preview_every=0)
    config.report.update(num_images=0, read_labels=False)
    config.sample.update(steps=1, num_images=3, batch_size=8, cfg_scale=1.0)
    out = run(config)
    about = json.loads((out / PREPARED).read_text())
    assert about["image_size"] == [8, 16]
    experiment = Experiment(config)
    images = experiment.dataset
    assert images.image_shape == (8, 16, 3)
    path = sorted(folder.glob("n01/*.*g"))[1]
    expected = center_crop(Image.open(path).convert("RGB"), (8, 16))
    np.testing.assert_array_equal(images[1]["image"], np.asarray(expected))

    # A step on them, by its shapes.
    experiment.check_data()
    rows = sharding.batch_sharding(experiment.mesh)
    batch = pipeline.batch_shapes(images, 8, rows)
    rng = jax.eval_shape(lambda: jax.random.key(0))
    state = experiment.state_shapes
    after, _ = jax.eval_shape(experiment.train_step, state, None, batch, rng)
    assert jax.tree.map(np.shape, after) == jax.tree.map(np.shape, state)

    # Samples, of a checkpoint that says what it was trained on.
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.1, np.float32), state.params)
    architecture = experiment.model_config.to_json()
    assert architecture["grid"] == [2, 4]
    checkpoint.save_params(tmp_path / "params", params, {"model": architecture})
    config.sample.checkpoint = str(tmp_path / "params")
    sample.run(config, tmp_path / "run")
    with np.load(tmp_path / "run" / "samples.npz") as archive:
        assert archive["arr_0"].shape == (3, 8, 16, 3)
        assert json.loads(str(archive["protocol"]))["input_size"] == [8, 16]


def test_rectangular_images_make_rectangular_latents(folder, autoencoder, tmp_path):
    config = make_config(tmp_path, folder, autoencoder, image_size=(16, 24))
    run(config)
    latents = open_dataset("prepared", config.data.dir, "train")
    assert latents.image_shape == (16 // FACTOR, 24 // FACTOR, 4)
    with pytest.raises(ValueError, match=r"prepare.image_size = \(16, 25\) is not a multiple of"):
        run(make_config(tmp_path / "other", folder, autoencoder, image_size=(16, 25)))
