"""From a data set to batches on the devices: order, rows of each process, batches ahead.

The order of the records is a pure function of (seed, step, row). Every process reads the
rows of each global batch that its devices hold. So neither the number of processes and
devices nor a restart changes what the step sees.
"""

import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np

from lit_jax.data.buckets import BucketOrder, stream_seeds
from lit_jax.data.caption_records import BucketedDataset, ReadCaption, choose_caption
from lit_jax.data.dataset import Dataset

Record = dict[str, Any]


# The length of what is repeated without an end. Grain's own is the largest that Python takes, and
# in batches of one it would be rounded up, past that.
ENDLESS = 2**62


class ProcessRows(grain.MapDataset):
    """The rows of each global batch that one process reads, as a data set of their own."""

    # Grain's slicing by process interleaves: which records meet in a batch would depend on
    # the number of processes.

    def __init__(self, parent: grain.MapDataset, batch_size: int, rows: np.ndarray):
        super().__init__(parent)
        self._batch_size = batch_size
        self._rows = rows

    def __len__(self) -> int:
        return min(len(self._parent), ENDLESS) // self._batch_size * len(self._rows)

    def __getitem__(self, index):
        batch, row = divmod(index, len(self._rows))
        return self._parent[batch * self._batch_size + int(self._rows[row])]


def _choose_side(record: Record, mirror: bool) -> Record:
    """The image or its mirror, or the latents of one of the two."""
    # Here, not in the step: an image is mirrored on the host, where its bytes are, and of the
    # latents only one side goes to the devices.
    if "image" in record:
        return record | {"image": record["image"][:, ::-1]} if mirror else record
    return record | {name: record[name][int(mirror)] for name in ("mean", "log_variance")}


def _random_flip(record: Record, rng: np.random.Generator) -> Record:
    return _choose_side(record, rng.random() < 0.5)


def _no_flip(record: Record) -> Record:
    return _choose_side(record, False)


def make_batches(
    dataset: Dataset,
    *,
    batch_size: int,
    seed: int,
    flip: bool,
    rows: np.ndarray | None = None,
    num_threads: int = 4,
    prefetch: int = 64,
) -> grain.IterDataset:
    """Endless shuffled batches of this process's rows: its records, stacked.

    The picture is "image" uint8 (B, h, w, C), or "mean" and "log_variance" float16
    (B, h, w, C); "index" is int64 (B,); the fields of the condition are stacked as they are.

    Every epoch is another permutation. The state of the iterator is the number of batches
    read: it is the same on every process, and for any number of them.

    Args:
      batch_size: of the global batch.
      flip: takes the mirror of a picture with probability 1/2.
      rows: those of each global batch that this process reads, see
        `sharding.process_rows`; None is all of them.
      num_threads: reader threads (speed only).
      prefetch: batches read ahead (speed only).
    Raises: ValueError when there are fewer records than a batch needs.
    """
    _check_size(dataset, batch_size)
    rows = np.arange(batch_size) if rows is None else rows
    records = grain.MapDataset.source(dataset).seed(seed).shuffle().repeat()
    records = records.random_map(_random_flip) if flip else records.map(_no_flip)
    # After the shuffle: every process draws the whole permutation, and flips by the number of
    # the record in it.
    batches = ProcessRows(records, batch_size, rows).batch(len(rows))
    return _read_ahead(batches, num_threads, prefetch)


def _check_size(dataset: Dataset | BucketedDataset, batch_size: int) -> None:
    if batch_size > len(dataset):
        raise ValueError(
            f"batch_size = {batch_size} exceeds the {len(dataset)} records of {dataset.name}, "
            f"split {dataset.split}"
        )


def _read_ahead(batches: grain.MapDataset, num_threads: int, prefetch: int) -> grain.IterDataset:
    # After the batching, so that `prefetch` counts batches: grain reads ahead at the end of
    # its chain.
    reading = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    return batches.to_iter_dataset(reading)


def batch_shapes(
    dataset: Dataset, batch_size: int, sharding: jax.sharding.Sharding
) -> dict[str, jax.ShapeDtypeStruct]:
    """What `DeviceIterator` hands out of `make_batches`, as shapes, read off the first record."""
    return _shapes_of(_no_flip(dataset[0]), batch_size, sharding)


def _shapes_of(
    record: Record, batch_size: int, sharding: jax.sharding.Sharding
) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        name: jax.ShapeDtypeStruct(
            (batch_size, *np.shape(value)),
            jax.dtypes.canonicalize_dtype(value.dtype),
            sharding=sharding,
        )
        for name, value in record.items()
    }


# ---- Buckets: a batch has one shape --------------------------------------------------------------


class _BucketRows(grain.MapDataset):
    """The rows of each global batch that one process reads, of a stream of records a bucket."""

    def __init__(self, streams: Sequence[grain.MapDataset], order: BucketOrder, rows: np.ndarray):
        super().__init__(streams)
        self._order = order
        self._rows = rows

    def __len__(self) -> int:
        # The streams are repeated without an end.
        records = min(ENDLESS, *map(len, self._parents))
        return records // self._order.batch_size * len(self._rows)

    def __getitem__(self, index):
        step, row = divmod(index, len(self._rows))
        bucket, number = self._order.batch(step)
        return self._parents[bucket][number * self._order.batch_size + int(self._rows[row])]


def make_bucket_batches(
    dataset: BucketedDataset,
    *,
    batch_size: int,
    seed: int,
    caption_ratio: float,
    read_caption: ReadCaption,
    rows: np.ndarray | None = None,
    num_threads: int = 4,
    prefetch: int = 64,
) -> grain.IterDataset:
    """Endless batches of this process's rows, each of one bucket: see `buckets.BucketOrder`.

    As `make_batches`, with what `read_caption` gives of one caption of each image. Which one it
    is depends on the seed and the record's place in the order alone.

    Args:
      caption_ratio: the probability of an image's first caption.
      read_caption: see `choose_caption`.
    Raises: ValueError when there are fewer records than a batch needs.
    """
    _check_size(dataset, batch_size)
    rows = np.arange(batch_size) if rows is None else rows
    choose = functools.partial(choose_caption, ratio=caption_ratio, read=read_caption)
    seeds = stream_seeds(seed, len(dataset.buckets))
    streams = [
        # After the shuffle: the draw is by the place in the order.
        grain.MapDataset.source(bucket).seed(seed).shuffle().repeat().random_map(choose)
        for bucket, seed in zip(dataset.buckets, seeds, strict=True)
    ]
    order = BucketOrder(tuple(map(len, dataset.buckets)), batch_size, seed)
    batches = _BucketRows(streams, order, rows).batch(len(rows))
    return _read_ahead(batches, num_threads, prefetch)


def bucket_shapes(
    dataset: BucketedDataset,
    batch_size: int,
    sharding: jax.sharding.Sharding,
    read_caption: ReadCaption,
) -> list[dict[str, jax.ShapeDtypeStruct]]:
    """As `batch_shapes`, for each bucket."""
    rng = np.random.default_rng(0)
    records = [
        choose_caption(bucket[0], rng, ratio=1.0, read=read_caption) for bucket in dataset.buckets
    ]
    return [_shapes_of(record, batch_size, sharding) for record in records]


# ---- On the devices ------------------------------------------------------------------------------


class DeviceIterator:
    """Puts batches on the mesh, one ahead of the step.

    `state` is that of the last batch handed out, not of the one ahead: a checkpoint saves it, and
    a run that resumes from it gets the batch after.
    """

    def __init__(
        self,
        batches: grain.IterDataset,
        sharding: jax.sharding.Sharding,
        state: dict[str, Any] | None = None,
    ):
        """Args: state: to go on from; None: from the first batch."""
        self._iterator = iter(batches)
        if state is not None:
            self._iterator.set_state(state)
        self._sharding = sharding
        self._seconds_waiting = 0.0
        # Before the first load: until a batch is handed out, a run resumes at the first.
        self.state = self._iterator.get_state()
        self._ahead = self._load()

    def _load(self) -> tuple[dict[str, jax.Array], dict]:
        # Until the readers have a batch. What follows only starts a copy to the devices.
        before = time.monotonic()
        host = next(self._iterator)
        self._seconds_waiting += time.monotonic() - before

        batch = {
            name: jax.make_array_from_process_local_data(self._sharding, value)
            for name, value in host.items()
        }
        return batch, self._iterator.get_state()

    def take_seconds_waiting(self) -> float:
        """Seconds since the last call in which the readers had no batch ready."""
        seconds = self._seconds_waiting
        self._seconds_waiting = 0.0
        return seconds

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        return self

    def __next__(self) -> dict[str, jax.Array]:
        batch, self.state = self._ahead
        self._ahead = self._load()
        return batch
