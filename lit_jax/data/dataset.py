"""TFDS data sets (ArrayRecord, no TensorFlow) as random-access records: images, or latents."""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from lit_jax.data import mnist_digits
from lit_jax.runtime import cluster

PREPARED = "prepared.json"  # beside the shards that --mode=prepare writes: how they were made


@dataclasses.dataclass(frozen=True, repr=False)
class Dataset:
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

    def _read(
        self, index: int, features: dict[str, tuple[type, tuple[int, ...]]]
    ) -> dict[str, np.ndarray]:
        """The record's `features`, checked against the dtypes and shapes given, with its label and index."""
        try:
            record = self.records[int(index)]
            arrays, label = (
                {name: np.asarray(record[name]) for name in features},
                int(record["label"]),
            )
        except Exception as error:
            raise ValueError(
                f"data.name {self.name}: record {index} of split {self.split} ({len(self)} records) "
                f"cannot be read: {str(error).splitlines()[0]}"
            ) from error
        for name, (dtype, shape) in features.items():
            array = arrays[name]
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(
                    f"data.name {self.name}: record {index} of split {self.split} is {array.dtype} "
                    f"{array.shape}, the data set says {np.dtype(dtype)} {shape}"
                )
        if not 0 <= label < self.num_classes:
            raise ValueError(
                f"data.name {self.name}: record {index} of split {self.split} has label {label}, "
                f"the data set has {self.num_classes} classes"
            )
        return arrays | {"label": np.int32(label), "index": np.int64(index)}

    def __repr__(self) -> str:  # a resumed run must have the same (train.decisive_fields)
        return f"{type(self).__name__}({self.name}, {self.split}, {len(self)} records of {self.image_shape})"

    def fingerprint(self) -> str:
        return (
            repr(self)
            .replace("ImageDataset(", "ImageSource(")
            .replace("LatentDataset(", "LatentSource(")
        )

    def content(self, sample: int = 16) -> str:
        """A checksum of `sample` decoded records from the first to the last: the same wherever the data set lies."""
        digest = hashlib.sha256()
        for index in np.unique(np.linspace(0, len(self) - 1, sample).astype(int)):
            for name, value in sorted(self[index].items()):
                digest.update(f"{name} {value.dtype} {value.shape}".encode() + value.tobytes())
        return digest.hexdigest()[:16]


class ImageDataset(Dataset):
    """Records {"image" uint8 (h, w, C), "label", "index"}."""

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self._read(index, {"image": (np.uint8, self.image_shape)})


@dataclasses.dataclass(frozen=True, repr=False)
class LatentDataset(Dataset):
    """Records {"mean", "log_variance" float16 (2, h, w, C), "label", "index"}: of an image and of its mirror, unscaled."""

    autoencoder: dict[str, Any] = dataclasses.field(
        default_factory=dict
    )  # name, sha256, encoder_sha256

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        both = (np.float16, (2, *self.image_shape))
        return self._read(index, {"mean": both, "log_variance": both})

    def __repr__(self) -> str:
        encoder = self.autoencoder["encoder_sha256"][:12]
        return f"{super().__repr__()[:-1]} by encoder {encoder}, times {self.scaling_factor})"

    def deviation(self, limit: int = 1024) -> np.ndarray:
        """Standard deviation of each channel of the first `limit` scaled latents, (C,): about 1 if the scale is right."""
        records = [self[i] for i in range(min(limit, len(self)))]
        mean = np.stack([r["mean"][0] for r in records]).astype(np.float64)  # (n, h, w, C)
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
        with cluster.process_zero_first("mnist_digits"):
            builder = mnist_digits.MnistDigits(data_dir=directory, file_format="array_record")
            builder.download_and_prepare()  # does nothing when the files are there
        return builder
    try:
        builder = tfds.builder(name, data_dir=directory)
        prepared = builder.is_prepared()
    except (tfds.core.registered.DatasetNotFoundError, FileNotFoundError):
        prepared = False
    except Exception as error:  # a name TFDS cannot parse, another version, damaged metadata: each its own exception
        raise ValueError(
            f"{field}: the TFDS data set {name!r} in data.dir {directory!r} cannot be opened: "
            f"{(str(error).splitlines() or [repr(error)])[0]}"
        ) from error
    if not prepared:
        if any(pathlib.Path(directory).glob(f"{name}/*/{PREPARED}")):
            raise FileNotFoundError(
                f"{field}: {name!r} in data.dir {directory!r} is not finished; run the --mode=prepare "
                f"that writes it again, it goes on where it stopped"
            )
        there = sorted(p.name for p in pathlib.Path(directory).glob("*") if p.is_dir())
        raise FileNotFoundError(
            f"{field}: no prepared TFDS data set {name!r} in data.dir {directory!r}, which holds: "
            f"{', '.join(there) or 'nothing'}"
        )
    return builder


def open_dataset(name: str, directory: str, split: str) -> ImageDataset | LatentDataset:
    """Opens a split of the TFDS data set `name` under `directory`: images, or the latents that --mode=prepare wrote.

    Raises: FileNotFoundError when the data set is not prepared there, ValueError when it has no such split, was not
    prepared to its end, or has no single uint8 image shape and label.
    """
    builder = find_builder(name, directory, "data.name")
    if split not in builder.info.splits:
        raise ValueError(
            f"data.split {split!r} is not one of the splits of {name}: {', '.join(builder.info.splits)}"
        )
    features = builder.info.features
    about = pathlib.Path(builder.data_dir) / PREPARED
    if not {"mean", "log_variance"} <= set(features):
        if not {"image", "label"} <= set(features) or None in features["image"].shape:
            raise ValueError(
                f"data.name {name}: needs an image of one shape and a label, it has {dict(features)}; "
                f"--mode=prepare makes such a data set of it"
            )
        return ImageDataset(
            name,
            split,
            _records(builder, split),
            tuple(features["image"].shape),
            features["label"].num_classes,
        )
    if not about.exists():
        raise ValueError(
            f"data.name {name}: its latents say nothing of their autoencoder, for {about} is missing"
        )
    autoencoder = json.loads(about.read_text())["autoencoder"]
    return LatentDataset(
        name,
        split,
        _records(builder, split),
        tuple(features["mean"].shape[1:]),
        features["label"].num_classes,
        autoencoder["scaling_factor"],
        autoencoder["shift_factor"],
        autoencoder,
    )


def _records(builder: tfds.core.DatasetBuilder, split: str) -> Any:
    """The records of a split by number. Raises: ValueError for a data set in a format without random access."""
    try:
        return builder.as_data_source(split=split)
    except NotImplementedError as error:
        raise ValueError(
            f"data.name {builder.info.full_name} is stored as {builder.info.file_format.value}, which has no "
            f"random access; build it with --file_format=array_record, or `tfds convert_format` it"
        ) from error


def read_all(source: ImageDataset, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The first `limit` images (N, h, w, C) uint8 and labels (N,) of a split, in its order.

    Raises: ValueError for a data set of latents.
    """
    if not isinstance(source, ImageDataset):
        raise ValueError(f"data.name {source.name} holds latents, images are needed")
    records = [source[i] for i in range(min(limit or len(source), len(source)))]
    return np.stack([r["image"] for r in records]), np.stack([r["label"] for r in records])
