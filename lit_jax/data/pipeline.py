"""Images and latents: TFDS data sources (ArrayRecord, no TensorFlow), the grain pipeline, and its split over processes.

The order of the records is a pure function of (seed, step, row): every process reads the rows of each global batch that
its devices hold, so neither the number of processes and devices nor a restart changes what the step sees.
"""

import time
from collections.abc import Iterator
from typing import Any

import grain
import jax
import numpy as np

from lit_jax.data import dataset


class _ProcessRows(grain.MapDataset):
    """The rows of each global batch that one process reads, as a data set of its own.

    Grain's own slicing by process would interleave, and so tie the order of a batch to the number of processes.
    """

    def __init__(self, parent: grain.MapDataset, batch_size: int, rows: np.ndarray):
        super().__init__(parent)
        self._batch_size, self._rows = batch_size, rows

    def __len__(self) -> int:
        return len(self._parent) // self._batch_size * len(self._rows)

    def __getitem__(self, index: int) -> Any:
        batch, row = divmod(index, len(self._rows))
        return self._parent[batch * self._batch_size + int(self._rows[row])]


def _choose_side(record: dict[str, np.ndarray], mirror: bool) -> dict[str, np.ndarray]:
    """The image or its mirror, or the latents of one of the two."""
    if "image" in record:
        return record | {"image": record["image"][:, ::-1]} if mirror else record
    return record | {name: record[name][int(mirror)] for name in ("mean", "log_variance")}


def _random_flip(record: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    return _choose_side(record, rng.random() < 0.5)


def _no_flip(record: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return _choose_side(record, False)


def make_batches(
    source: dataset.ImageDataset | dataset.LatentDataset,
    *,
    batch_size: int,
    seed: int,
    flip: bool,
    rows: np.ndarray | None = None,
    num_threads: int = 4,
    prefetch: int = 64,
) -> grain.IterDataset:
    """Endless shuffled batches of this process's rows: {"image" uint8 (B, h, w, C), "label" int32 (B,), "index" int64 (B,)}.

    Of latents there are "mean" and "log_variance" float16 (B, h, w, C), of the image or its mirror, for "image".

    Every epoch is another permutation. `batch_size` is global; the state of the iterator is the number of batches read,
    the same on every process and for any number of them.

    Args:
      rows: those of each global batch that this process reads (`sharding.process_rows`); None: all of them.
      num_threads, prefetch: reader threads, and batches read ahead (speed only).
    """
    if batch_size > len(source):
        raise ValueError(
            f"train.batch_size = {batch_size} exceeds the {len(source)} records of {source.name} {source.split}"
        )
    dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    dataset = dataset.random_map(_random_flip) if flip else dataset.map(_no_flip)
    rows = np.arange(batch_size) if rows is None else rows
    dataset = _ProcessRows(dataset, batch_size, rows).batch(len(rows))
    return dataset.to_iter_dataset(
        grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    )


def batch_shapes(
    source: dataset.ImageDataset | dataset.LatentDataset,
    batch_size: int,
    sharding: jax.sharding.Sharding,
) -> dict[str, jax.ShapeDtypeStruct]:
    """What `DeviceIterator` hands out of `make_batches`, as shapes, read off the first record."""
    return {
        name: jax.ShapeDtypeStruct(
            (batch_size, *np.shape(value)),
            jax.dtypes.canonicalize_dtype(value.dtype),
            sharding=sharding,
        )
        for name, value in _no_flip(source[0]).items()
    }


class DeviceIterator:
    """Puts batches on the mesh one ahead of the step; `state` is that of the last batch handed out, not the one ahead.

    `take_seconds_waiting` tells how long it stood still because the readers had no batch ready.
    """

    def __init__(
        self, batches: grain.IterDataset, sharding: jax.sharding.Sharding, state: dict | None = None
    ):
        self._iterator = iter(batches)
        if state is not None:
            self._iterator.set_state(state)
        self._sharding = sharding
        self._seconds_waiting = 0.0
        self.state = self._iterator.get_state()
        self._ahead = self._load()

    def _load(self) -> tuple[dict[str, jax.Array], dict]:
        asked = time.monotonic()
        host = next(self._iterator)
        self._seconds_waiting += time.monotonic() - asked
        batch = {
            name: jax.make_array_from_process_local_data(self._sharding, value)
            for name, value in host.items()
        }
        return batch, self._iterator.get_state()

    def take_seconds_waiting(self) -> float:
        """The wait since this was last asked."""
        seconds, self._seconds_waiting = self._seconds_waiting, 0.0
        return seconds

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        return self

    def __next__(self) -> dict[str, jax.Array]:
        batch, self.state = self._ahead
        self._ahead = self._load()
        return batch
