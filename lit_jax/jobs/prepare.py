"""Writes the data set that training reads: images cropped as ADM crops them and, with an autoencoder, encoded once.

Any TFDS image data set or a folder of class folders becomes a TFDS data set of ArrayRecord shards, without TensorFlow:
posterior mean and log-variance of each image and of its mirror, float16 and unscaled, or the cropped pixels when no
autoencoder is configured. Records keep the source's order. An interrupted run goes on where it stopped.
"""

import dataclasses
import hashlib
import io
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from lit_jax import experiment, sharding
from lit_jax.data import dataset
from lit_jax.models.autoencoder import Autoencoder
from lit_jax.runtime.progress import progress

VERSION = "1.0.0"
IMAGE_FILES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# One record a chunk, for random access; latents compress by a seventh only, and reading them is then half as fast.
WRITER_OPTIONS = "group_size:1,uncompressed"


def run(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Prepares split data.split of data.name in data.dir from prepare.source; the workdir is not used.

    Processes share the folder: shard s is written by process s modulo their number, process 0 writes the metadata.
    Raises: ValueError or FileNotFoundError for a source that cannot be read, for a folder that holds another
        preparation, and when a finished shard is not what was written.
    """
    prepare = config.prepare
    target = config.data
    mesh = sharding.make_mesh(devices=jax.local_devices())  # each process works for itself
    if prepare.shard_records < 1:
        raise ValueError(f"prepare.shard_records must be at least 1, got {prepare.shard_records}")
    sharding.check_batch(prepare.batch_size, sharding.make_mesh(), "prepare.batch_size")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", target.name) or not re.fullmatch(
        r"[a-z]\w*", target.split
    ):
        raise ValueError(
            f"data.name = {target.name!r} and data.split = {target.split!r} name what is written: letters, "
            f"digits and _ only, a lower-case letter first"
        )
    if prepare.source == target.name and same_path(prepare.dir or target.dir, target.dir):
        raise ValueError(
            f"data.name = {target.name} is what is written, and also prepare.source; give it another name"
        )
    check_name(target.name, pathlib.Path(target.dir))
    if "/" in prepare.source and prepare.split:
        raise ValueError(
            f"prepare.split = {prepare.split} is of TFDS data sets; prepare.source = {prepare.source} is an image "
            f"folder, all of which becomes data.split = {target.split}"
        )
    autoencoder, identity = experiment.autoencoder(config, mesh)
    images = open_images(
        prepare.source,
        prepare.dir or target.dir,
        prepare.split or target.split,
        prepare.image_size,
        channels=autoencoder.module.in_channels if autoencoder else 0,
    )
    if autoencoder and prepare.image_size % autoencoder.module.factor:
        raise ValueError(
            f"prepare.image_size = {prepare.image_size} is not a multiple of the {autoencoder.module.factor} "
            f"pixels of a latent of {identity['name']}"
        )

    folder = pathlib.Path(target.dir) / target.name / VERSION
    about = {
        "source": images.name,
        "crop": "adm",
        "image_size": prepare.image_size,
        "num_classes": images.num_classes,
        "class_names": hash_of(images.class_names),
        "autoencoder": identity,
    }
    split = {
        "source_split": images.split,
        "source_list": images.listing,
        "records": len(images),
        "shard_records": prepare.shard_records,
    }
    claim(folder, about, target.split, split)
    shards = Shards(folder, target.name, target.split, len(images), prepare.shard_records)
    features = make_features(images, autoencoder)
    write_shards(
        shards,
        images,
        features,
        make_encoder(autoencoder, mesh),
        num_threads=target.num_threads,
        batch_size=prepare.batch_size // jax.process_count(),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    verify(shards, jax.process_index(), jax.process_count())
    multihost_utils.sync_global_devices("shards verified")
    if jax.process_index() == 0:
        finish(shards, features, about)
        logging.info(
            "%s: %d records of %s in %d verified shards; train on it with data.name=%s",
            folder,
            len(images),
            images.name,
            shards.count,
            target.name,
        )
    multihost_utils.sync_global_devices("prepared")


def same_path(a: str, b: str) -> bool:
    return pathlib.Path(a).resolve() == pathlib.Path(b).resolve()


def hash_of(value: Any) -> str:
    """Of JSON values."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def check_name(name: str, directory: pathlib.Path) -> None:
    """Raises ValueError where TFDS would open another data set by the name that is to be written."""
    try:
        tfds.builder_cls(name)
    except tfds.core.registered.DatasetNotFoundError:
        pass
    else:
        raise ValueError(
            f"data.name = {name} is the name of a data set of TFDS itself, which training would look for instead; "
            f"give it another name, {name}_prepared for instance"
        )
    others = sorted(
        path.name for path in (directory / name).glob("*") if path.is_dir() and path.name != VERSION
    )
    if others:
        raise ValueError(
            f"data.name = {name}: {directory / name} holds {', '.join(others[:3])} beside the version {VERSION} "
            f"that is written, and training could open another; use another data.name"
        )


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The square in the middle, `size` pixels a side, as ADM and DiT cut it; exact, for scores depend on it.

    Halves by box filter as long as the shorter side is at least twice the size, then scales that side to the size by
    bicubic interpolation, then cuts the middle out. Smaller images are enlarged.
    """
    while min(image.size) >= 2 * size:
        image = _resize(image, image.width // 2, image.height // 2, Image.Resampling.BOX)
    scale = size / min(image.size)
    image = _resize(
        image, round(image.width * scale), round(image.height * scale), Image.Resampling.BICUBIC
    )
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _resize(image: Image.Image, width: int, height: int, resample: Image.Resampling) -> Image.Image:
    """Width first, then height, with pixels rounded between: what Pillow did in one call before version 13.

    Since then it takes the height first where that is less work, and pixels differ by a grey level or more.
    """
    return image.resize((width, image.height), resample).resize((width, height), resample)


@dataclasses.dataclass(frozen=True)
class Images:
    """Labelled images of any size, cropped: {"image" uint8 (size, size, channels), "label", "id"} by number."""

    name: str
    split: str
    size: int
    channels: int
    class_names: tuple[str, ...] | None
    num_classes: int
    count: int
    listing: str  # tells this source from another of its name
    read: Callable[[int], tuple[Image.Image, int, str]]
    file_of: Callable[[int], str] = lambda index: ""

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            image, label, name = self.read(int(index))
            image = center_crop(image.convert("L" if self.channels == 1 else "RGB"), self.size)
        except (
            OSError,
            SyntaxError,
            ValueError,
            Image.DecompressionBombError,
        ) as error:  # what Pillow raises for bad files
            raise ValueError(
                f"prepare.source {self.name}: image {index} of {self.split} cannot be read: "
                f"{self.file_of(index)}{error}"
            ) from error
        if not 0 <= label < self.num_classes:
            raise ValueError(
                f"prepare.source {self.name}: image {index} of {self.split} has label {label}, there are "
                f"{self.num_classes} classes"
            )
        return {
            "image": np.asarray(image).reshape(self.size, self.size, self.channels),
            "label": label,
            "id": name,
        }


def open_images(source: str, directory: str, split: str, size: int, channels: int = 0) -> Images:
    """A TFDS image data set or, if `source` has a slash, a folder of class folders, whose sorted names are the classes.

    Args: channels: that are asked for; 0: the source's own.
    Raises: FileNotFoundError when neither is there; ValueError for a data set without labelled images.
    """
    if "/" in source:
        return _open_folder(pathlib.Path(source), split, size, channels or 3)
    builder = dataset.find_builder(source, directory, "prepare.source")
    features = builder.info.features
    image = features["image"] if "image" in features else None
    if (
        not image
        or "label" not in features
        or image.np_dtype != np.uint8
        or (image.shape or [0])[-1] not in (1, 3)
    ):
        raise ValueError(
            f"prepare.source {source}: needs a uint8 image of 1 or 3 channels and a label, it has "
            f"{dict(features)}"
        )
    encoded = isinstance(image, tfds.features.Image)
    try:
        # Files are decoded here, always by Pillow: TFDS takes OpenCV where there is one, and its JPEGs differ.
        records = builder.as_data_source(
            split=split, decoders={"image": tfds.decode.SkipDecoding()} if encoded else None
        )
    except NotImplementedError as error:
        raise ValueError(
            f"prepare.source {source} is stored as {builder.info.file_format}, which has no random "
            f"access; `tfds convert_format` makes ArrayRecord of it"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"prepare.split {split!r} is not of {source}: {str(error).splitlines()[0]}"
        ) from error
    identifier = next((name for name in ("file_name", "id") if name in features), None)

    def read(index):
        record = records[index]
        image = (
            Image.open(io.BytesIO(record["image"]))
            if encoded
            else Image.fromarray(_without_grey_axis(record["image"]))
        )
        name = record[identifier] if identifier else str(index)
        return image, int(record["label"]), name.decode() if isinstance(name, bytes) else str(name)

    label = features["label"]
    return Images(
        source,
        split,
        size,
        channels or image.shape[-1],
        tuple(label.names) if label.names else None,
        label.num_classes,
        len(records),
        builder.info.full_name,
        read,
    )


def _without_grey_axis(image: np.ndarray) -> np.ndarray:
    return image[..., 0] if image.shape[-1] == 1 else image


def _open_folder(folder: pathlib.Path, split: str, size: int, channels: int) -> Images:
    if not folder.is_dir():
        raise FileNotFoundError(f"prepare.source: there is no folder {folder}")
    classes = sorted(
        path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )
    files = [
        (name, label)
        for label, class_name in enumerate(classes)
        for name in sorted(
            f"{class_name}/{path.name}"
            for path in (folder / class_name).iterdir()
            if path.suffix.lower() in IMAGE_FILES
        )
    ]
    skipped = sum(
        1
        for name in classes
        for path in (folder / name).iterdir()
        if path.suffix.lower() not in IMAGE_FILES
    )
    if skipped:
        logging.warning(
            "prepare.source %s: %d files are skipped, for they do not end in %s",
            folder,
            skipped,
            ", ".join(IMAGE_FILES),
        )
    if not files:
        raise ValueError(
            f"prepare.source {folder} holds no class folders of images ({', '.join(IMAGE_FILES)})"
        )

    def read(index):
        name, label = files[index]
        return Image.open(folder / name), label, name

    return Images(
        folder.name,
        split,
        size,
        channels,
        tuple(classes),
        len(classes),
        len(files),
        hash_of([(name, label, (folder / name).stat().st_size) for name, label in files]),
        read,
        lambda index: f"{files[index][0]}: ",
    )


def make_features(images: Images, autoencoder: Autoencoder | None) -> tfds.features.FeaturesDict:
    """What a record holds. Tensors as bytes: TFDS reads them fastest so, and needs no TensorFlow to write them."""
    if autoencoder:
        side = images.size // autoencoder.module.factor
        both = (2, side, side, autoencoder.module.latent_channels)
        arrays = {"mean": (both, np.float16), "log_variance": (both, np.float16)}
    else:
        arrays = {"image": ((images.size, images.size, images.channels), np.uint8)}
    classes = (
        {"names": images.class_names} if images.class_names else {"num_classes": images.num_classes}
    )
    label = tfds.features.ClassLabel(**classes)
    tensors = {
        name: tfds.features.Tensor(shape=shape, dtype=dtype, encoding="bytes")
        for name, (shape, dtype) in arrays.items()
    }
    return tfds.features.FeaturesDict(tensors | {"label": label, "id": tfds.features.Text()})


def make_encoder(
    autoencoder: Autoencoder | None, mesh: jax.sharding.Mesh
) -> Callable[[np.ndarray], dict[str, Any]]:
    """The function from a batch of images (B, S, S, C) uint8 to the arrays of their records, (B, ...) each.

    Latents are "mean" and "log_variance" (B, 2, h, w, Z) float16, of each image and its mirror, each device encoding its
    own rows; the call returns before they are computed.
    """
    if autoencoder is None:
        return lambda images: {"image": images}

    def moments(params, images):
        x = images.astype(jnp.float32) / 127.5 - 1.0
        both = jnp.stack([x, x[:, :, ::-1]], axis=1).reshape(
            -1, *x.shape[1:]
        )  # (b, S, S, C) -> (2b, S, S, C)
        encoded = dataclasses.replace(autoencoder, params=params).encode(both)
        return [part.reshape(len(x), 2, *part.shape[1:]).astype(jnp.float16) for part in encoded]

    run = sharding.map_rows(moments, mesh)
    rows = sharding.batch_sharding(mesh)

    def encode(images):
        fill = -len(images) % mesh.size
        padded = np.pad(images, ((0, fill), (0, 0), (0, 0), (0, 0)), mode="edge")
        mean, log_variance = run(autoencoder.params, jax.device_put(padded, rows))
        return {"mean": mean[: len(images)], "log_variance": log_variance[: len(images)]}

    return encode


@dataclasses.dataclass(frozen=True)
class Shards:
    """The files of a split: shard s holds records s * size to (s + 1) * size - 1 of the source, the last one what is left.

    A shard counts as finished when its file has its final name and a line of a journal, written after that, gives its
    count and hash. Journals (one a process) are merged into prepared.json at the end.
    """

    folder: pathlib.Path
    name: str
    split: str
    records: int
    size: int

    @property
    def count(self) -> int:
        return -(-self.records // self.size)

    def rows(self, shard: int) -> range:
        return range(shard * self.size, min((shard + 1) * self.size, self.records))

    def path(self, shard: int) -> pathlib.Path:
        return (
            self.folder / f"{self.name}-{self.split}.array_record-{shard:05d}-of-{self.count:05d}"
        )

    def journals(self) -> list[pathlib.Path]:
        return sorted(self.folder.glob(f"journal-{self.split}-*.jsonl"))

    def finished(self) -> dict[int, dict[str, Any]]:
        """{"count", "sha256"} of each finished shard."""
        entries = read_about(self.folder).get("splits", {}).get(self.split, {}).get("shards", [])
        known = {
            shard: {"count": count, "sha256": sha256}
            for shard, (count, sha256) in enumerate(entries)
        }
        for journal in self.journals():
            for line in journal.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue  # the line that was being written when the run was killed
                known[entry.pop("shard")] = entry
        return {shard: entry for shard, entry in known.items() if self.path(shard).exists()}

    def write(self, shard: int, records: Iterator[bytes], process_index: int) -> None:
        """Writes a whole shard, then gives it its name, then notes it in the journal."""
        part = self.path(shard).with_name(f"part-{self.path(shard).name}")
        writer = ArrayRecordWriter(str(part), WRITER_OPTIONS)
        try:
            count = 0
            for record in records:
                writer.write(record)
                count += 1
        finally:
            writer.close()
        with part.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        os.replace(part, self.path(shard))
        with (self.folder / f"journal-{self.split}-{process_index:05d}.jsonl").open("a") as journal:
            journal.write(f"\n{json.dumps({'shard': shard, 'count': count, 'sha256': sha256})}\n")


def write_shards(
    shards: Shards,
    images: Images,
    features: tfds.features.FeaturesDict,
    encode: Callable,
    *,
    num_threads: int,
    batch_size: int,
    process_index: int,
    process_count: int,
) -> None:
    """Writes what is missing of this process's shards: s, s + process_count, ..., from s = process_index on."""
    finished = shards.finished()
    own = range(process_index, shards.count, process_count)
    todo = [shard for shard in own if shard not in finished]
    if len(todo) < len(own):
        logging.info("%d of %d shards are there already", len(own) - len(todo), len(own))
    order = [row for shard in todo for row in shards.rows(shard)]
    reader = iter(
        grain.MapDataset.source(order)
        .map(images.__getitem__)
        .to_iter_dataset(
            grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=4 * batch_size)
        )
    )
    sizes = [
        len(shards.rows(shard)[start : start + batch_size])
        for shard in todo
        for start in range(0, len(shards.rows(shard)), batch_size)
    ]
    batches = encode_batches(reader, sizes, encode)
    rows = sum(len(shards.rows(shard)) for shard in own)
    with progress("preparing", rows, rows - len(order)) as advance:

        def serialized(count):
            while count:
                batch = next(batches)
                for record in batch:
                    # Once more with its fields in order, which TFDS leaves open: the same records make the same bytes.
                    example = tf_example_pb2.Example.FromString(features.serialize_example(record))
                    yield example.SerializeToString(deterministic=True)
                count -= len(batch)
                advance(len(batch))

        for shard in todo:
            shards.write(shard, serialized(len(shards.rows(shard))), process_index)


def encode_batches(
    reader: Iterator[dict[str, Any]], sizes: list[int], encode: Callable
) -> Iterator[list[dict[str, Any]]]:
    """Lists of `sizes` finished records; a batch is being encoded while the one before it is handed out."""
    ahead = None
    for size in sizes:
        records = [next(reader) for _ in range(size)]
        arrays = encode(np.stack([record.pop("image") for record in records]))
        if ahead:
            yield _join(*ahead)
        ahead = records, arrays
    if ahead:
        yield _join(*ahead)


def _join(records: list[dict[str, Any]], arrays: dict[str, Any]) -> list[dict[str, Any]]:
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    for name, array in arrays.items():
        for row, record in enumerate(records):
            if array.dtype == np.float16 and not np.isfinite(array[row]).all():
                raise ValueError(
                    f"the {name} of the latents of {record['id']} is not finite in float16; is the "
                    f"autoencoder right?"
                )
            record[name] = array[row]
    return records


def read_about(folder: pathlib.Path) -> dict[str, Any]:
    """prepared.json, or {}."""
    path = folder / dataset.PREPARED
    return json.loads(path.read_text()) if path.exists() else {}


def write_about(folder: pathlib.Path, about: dict[str, Any]) -> None:
    part = folder / f"part-{dataset.PREPARED}"
    part.write_text(json.dumps(about, indent=1) + "\n")
    os.replace(part, folder / dataset.PREPARED)


def claim(folder: pathlib.Path, about: dict[str, Any], split: str, plan: dict[str, Any]) -> None:
    """Notes in the folder what is being prepared, or checks that it is what an earlier run began there.

    Raises: ValueError naming the first difference.
    """
    there, used = read_about(folder), folder.exists() and any(folder.iterdir())
    multihost_utils.sync_global_devices("folder read")  # before process 0 may write there
    if there:
        old, new = {**there, **there["splits"].get(split, plan)}, about | plan
        for name, value in json.loads(json.dumps(new)).items():
            if old.get(name) != value:
                raise ValueError(
                    f"{folder} was begun with {name} = {old.get(name)}, this run has {value}; use another "
                    f"data.name or remove the folder"
                )
    elif used:
        raise ValueError(f"{folder} holds files but no {dataset.PREPARED}; use another data.name")
    if jax.process_index() == 0 and split not in there.get("splits", {}):
        folder.mkdir(parents=True, exist_ok=True)
        write_about(folder, about | {"splits": there.get("splits", {}) | {split: plan}})
    multihost_utils.sync_global_devices("folder claimed")


def verify(shards: Shards, process_index: int, process_count: int) -> None:
    """Reads this process's shards back: each must be there, with the count and the bytes that were written."""
    finished = shards.finished()
    for shard in range(process_index, shards.count, process_count):
        path, wanted = shards.path(shard), len(shards.rows(shard))
        if shard not in finished:
            raise ValueError(
                f"{path} is missing or was not finished; do all processes see the same data.dir?"
            )
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if sha256 != finished[shard]["sha256"]:
            raise ValueError(
                f"{path} has sha256 {sha256}, {finished[shard]['sha256']} was written; remove it and run again"
            )
        reader = ArrayRecordReader(str(path))
        count = reader.num_records()
        reader.close()
        if count != wanted:
            raise ValueError(
                f"{path} has {count} records, it should have {wanted}; remove it and run again"
            )


def finish(shards: Shards, features: tfds.features.FeaturesDict, about: dict[str, Any]) -> None:
    """Writes TFDS's metadata of all finished splits, then the counts and hashes of this one; removes its journals."""
    finished = shards.finished()
    missing = [shard for shard in range(shards.count) if shard not in finished]
    if missing:
        raise ValueError(
            f"{shards.folder}: {len(missing)} shards of {shards.split} are missing, the first is "
            f"{shards.path(missing[0]).name}; do all processes see the same data.dir?"
        )
    splits = read_about(shards.folder)["splits"]
    splits[shards.split]["shards"] = [
        [finished[s]["count"], finished[s]["sha256"]] for s in range(shards.count)
    ]
    infos = []
    for name, split in splits.items():
        if "shards" in split:
            lengths = [count for count, _ in split["shards"]]
            files = dataclasses.replace(
                shards, split=name, records=split["records"], size=split["shard_records"]
            )
            size = sum(files.path(s).stat().st_size for s in range(files.count))
            infos.append(tfds.core.SplitInfo(name=name, shard_lengths=lengths, num_bytes=size))
    encoder = about["autoencoder"]
    tfds.folder_dataset.write_metadata(
        data_dir=str(shards.folder),
        features=features,
        split_infos=infos,
        check_data=False,
        version=VERSION,
        supervised_keys=("mean" if encoder else "image", "label"),
        description=f"{about['source']}, ADM centre crop to {about['image_size']} pixels"
        + (
            f", encoded by {encoder['name']}: posterior mean and log-variance, unscaled, of image and mirror."
            if encoder
            else "."
        ),
    )
    write_about(shards.folder, about | {"splits": splits})
    for journal in shards.journals():
        journal.unlink()
