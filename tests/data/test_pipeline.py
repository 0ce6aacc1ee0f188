"""The order of the records and its independence of the processes, and their way to the devices."""

import dataclasses
import itertools

import grain
import jax
import numpy as np
import pytest
from tiny_dataset import make_numbers

from lit_jax import sharding
from lit_jax.data import pipeline
from lit_jax.data.dataset import Dataset, array_reader


def make_batches(dataset, **settings):
    return pipeline.make_batches(dataset, **{"batch_size": 8, "seed": 0, "flip": False} | settings)


def take(batches, count):
    return list(itertools.islice(iter(batches), count))


def indices(count, **settings):
    """The numbers of the records of the first batches."""
    return np.concatenate(
        [b["index"] for b in take(make_batches(make_numbers(), **settings), count)]
    )


def rows_of(process, count, batch_size=8):
    """The rows that one of several processes reads: neighbours."""
    return np.arange(batch_size).reshape(count, -1)[process]


# Order.


def test_every_epoch_is_another_permutation():
    first, second, third = indices(15).reshape(3, 40)
    for epoch in (first, second, third):
        assert sorted(epoch.tolist()) == list(range(40))
    assert (first != np.arange(40)).any()
    assert (first != second).any() and (second != third).any()


def test_batches_run_over_the_end_of_an_epoch_without_losing_records():
    ids = indices(5, batch_size=16)
    assert sorted(ids[:40].tolist()) == sorted(ids[40:].tolist()) == list(range(40))


def test_a_batch_of_one_is_a_batch():
    assert indices(40, batch_size=1).tolist() == indices(5, batch_size=8).tolist()


def test_images_labels_and_indices_belong_together():
    for batch in take(make_batches(make_numbers(), seed=3), 5):
        assert {name: (value.shape, value.dtype) for name, value in batch.items()} == {
            "image": ((8, 4, 6, 1), np.uint8),
            "label": ((8,), np.int32),
            "index": ((8,), np.int64),
        }
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["index"])
        np.testing.assert_array_equal(batch["label"], batch["index"] % 10)


def test_the_order_is_a_function_of_the_seed():
    first = indices(5, num_threads=1)
    np.testing.assert_array_equal(first, indices(5, num_threads=8))
    assert (first != indices(5, seed=1)).any()


@pytest.mark.parametrize("processes", [2, 4])
def test_any_number_of_processes_reads_the_same_global_batches(processes):
    numbers = make_numbers()
    whole = take(make_batches(numbers, flip=True), 12)
    parts = [
        take(make_batches(numbers, flip=True, rows=rows_of(p, processes)), 12)
        for p in range(processes)
    ]
    for step, batch in enumerate(whole):
        for name in batch:  # the flips too
            joined = np.concatenate([part[step][name] for part in parts])
            np.testing.assert_array_equal(joined, batch[name], err_msg=f"{name}, batch {step}")


def test_rows_need_not_be_neighbours():
    rows = np.array([1, 4, 6])
    whole = take(make_batches(make_numbers(), flip=True), 7)
    part = take(make_batches(make_numbers(), flip=True, rows=rows), 7)
    for ours, batch in zip(part, whole):
        np.testing.assert_array_equal(ours["image"], batch["image"][rows])


def test_a_process_has_its_rows_of_every_whole_batch():
    """Of an epoch that ends, unlike those that are repeated."""
    numbers = grain.MapDataset.source(range(40))
    part = pipeline.ProcessRows(numbers, 16, np.array([1, 4, 6]))
    assert len(part) == 6 and [part[i] for i in range(6)] == [1, 4, 6, 17, 20, 22]


@pytest.mark.parametrize("before, after", [(1, 4), (4, 2)])
def test_a_run_may_resume_with_another_number_of_processes(before, after):
    numbers = make_numbers()

    def open_batches(process, count):
        return iter(make_batches(numbers, flip=True, rows=rows_of(process, count)))

    whole = take(open_batches(0, 1), 9)
    iterator = open_batches(0, before)
    for _ in range(5):
        next(iterator)
    state = iterator.get_state()
    parts = []
    for process in range(after):
        iterator = open_batches(process, after)
        iterator.set_state(state)
        parts.append(take(iterator, 4))
    for step in range(4):
        joined = np.concatenate([part[step]["image"] for part in parts])
        np.testing.assert_array_equal(joined, whole[5 + step]["image"])


def test_flips_mirror_about_half_of_the_images_and_nothing_else():
    mirrored = 0
    for batch in take(make_batches(make_numbers(), batch_size=40, flip=True), 25):
        for image, index in zip(batch["image"], batch["index"]):
            left = image[:, :3] == index
            assert left.all() == (image[:, 3:] == 0).all()
            if index:
                mirrored += not left.all()
                assert left.all() or ((image[:, 3:] == index).all() and (image[:, :3] == 0).all())
    # Five standard deviations.
    assert abs(mirrored / (25 * 39) - 0.5) < 5 * 0.5 / (25 * 39) ** 0.5


def test_a_record_is_not_always_flipped_alike():
    flips = {}
    for batch in take(make_batches(make_numbers(), batch_size=40, flip=True), 12):
        for image, index in zip(batch["image"], batch["index"]):
            flips.setdefault(int(index), set()).add(int(image[0, 0, 0]))
    assert sum(len(seen) == 2 for seen in flips.values()) > 35


# To the devices.


def test_batches_arrive_sharded_and_the_state_is_that_of_the_batch_in_hand():
    rows = sharding.batch_sharding(sharding.make_mesh(2, 4))
    expected = take(make_batches(make_numbers(), flip=True), 7)

    def open_batches(state=None):
        return pipeline.DeviceIterator(make_batches(make_numbers(), flip=True), rows, state)

    promised = {
        name: (shape.shape, shape.dtype, shape.sharding)
        for name, shape in pipeline.batch_shapes(make_numbers(), 8, rows).items()
    }
    iterator = open_batches()
    states = [iterator.state]
    for wanted in expected[:4]:
        batch = next(iterator)
        assert batch["image"].sharding == rows
        given = {name: (value.shape, value.dtype, value.sharding) for name, value in batch.items()}
        assert given == promised
        for name in wanted:
            np.testing.assert_array_equal(batch[name], wanted[name])
        states.append(iterator.state)
    # After `read` batches, what comes next is batch number `read`.
    for read, state in enumerate(states):
        resumed = open_batches(state)
        for wanted in expected[read : read + 2]:
            np.testing.assert_array_equal(next(resumed)["image"], wanted["image"])


@dataclasses.dataclass(frozen=True, repr=False)
class Captioned(Dataset):
    """Images of which the model is told embedded words and which of them are there."""

    condition_fields = ("caption", "caption_mask")
    kind = "Captioned"

    def readers(self):
        return {
            "image": array_reader(np.uint8, self.image_shape),
            "caption": array_reader(np.float32, (3, 2)),
            "caption_mask": array_reader(np.bool_, (3,)),
        }


def test_a_data_set_without_labels_goes_the_same_way():
    records = [
        {
            "image": np.full((4, 6, 1), i, np.uint8),
            "caption": np.full((3, 2), i, np.float32),
            "caption_mask": np.arange(3) <= i % 3,
        }
        for i in range(40)
    ]
    captioned = Captioned("captioned", "train", records, (4, 6, 1))
    rows = sharding.batch_sharding(sharding.make_mesh())
    shapes = pipeline.batch_shapes(captioned, 8, rows)
    batch = next(pipeline.DeviceIterator(make_batches(captioned, flip=True), rows))
    assert set(batch) == {"image", "index", *captioned.condition_fields}
    assert jax.tree.map(np.shape, batch) == {name: shape.shape for name, shape in shapes.items()}
    np.testing.assert_array_equal(batch["caption"][:, 0, 0], batch["index"])
    np.testing.assert_array_equal(batch["caption_mask"].sum(axis=1), batch["index"] % 3 + 1)
    assert len(captioned.content()) == 16


# Refusals.


def test_a_batch_larger_than_the_data_is_named():
    message = "^batch_size = 41 exceeds the 40 records of numbers, split train"
    with pytest.raises(ValueError, match=message):
        make_batches(make_numbers(), batch_size=41)
