"""Statistics of images, and of the references that images are scored against.

A reference is an npz file (ADM's, pytorch-fid's, images alone, or one that was
written here), a folder of images, or a split of a data set, whose statistics
are computed once and kept in the workdir.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from lit_jax.data import dataset
from lit_jax.evaluation import features, metrics, npz, protocol
from lit_jax.evaluation.images import FolderImages, NpzImages, naming_path
from lit_jax.runtime import storage

# The names of mean and covariance in an npz, by output of the network. They
# are ADM's, and pytorch-fid has the first pair.
MOMENT_NAMES = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """What the scores need to know of a set of images."""

    count: int  # of images behind the moments; 0 where a file does not say
    # {output of the network: (mean (D,), covariance (D, D))}, float64
    moments: dict[str, tuple[np.ndarray, np.ndarray]]
    # (n, D) float32 of the images that precision and recall use
    features: np.ndarray | None
    logits: np.ndarray | None  # (count, classes) float32
    identity: dict[str, Any]  # what the set is, for the protocol
    image_shape: tuple[int, ...] = ()  # (H, W, C); (): a file does not say


def collect(
    extractor: features.Extractor,
    batches: Iterable[np.ndarray],
    batch_size: int,
    *,
    keep: np.ndarray | None = None,
    identity: dict[str, Any] | None = None,
) -> Statistics:
    """Runs images through the network once and keeps what the scores need.

    Args:
      batches: (B, H, W, 1 or 3) uint8, 0 < B <= batch_size.
      keep: (n,) indices of the images whose features are kept. None keeps the
        features of all images, and their logits.
    Raises: ValueError for fewer than two images.
    """
    moments: dict[str, metrics.Moments] = {}
    kept: list[np.ndarray] = []
    logits: list[np.ndarray] = []
    count = 0
    start = time.monotonic()

    # One pass over the images, which are streamed. The features fit into
    # memory: 50,000 times 2048 float32 are 400 MB.
    for outputs in features.extract(extractor, batches, batch_size):
        end = count + len(outputs["pool"])

        for key in extractor.frechet:
            if key not in moments:
                moments[key] = metrics.Moments(outputs[key].shape[1])
            moments[key].update(outputs[key])

        if keep is None:
            kept.append(outputs["pool"])
            if extractor.scores_classes:
                logits.append(outputs["logits"])
        else:
            # A reference has no Inception score of its own, so its logits are
            # not kept.
            chosen = keep[(keep >= count) & (keep < end)]
            kept.append(outputs["pool"][chosen - count])

        # Inception takes hours for 50,000 images on a CPU; the log shows that
        # it goes on.
        if end // 1000 > count // 1000:
            speed = end / (time.monotonic() - start)
            logging.info("%d images, %.1f a second", end, speed)
        count = end

    if count < 2:
        raise ValueError(f"scores need at least 2 images, got {count}")
    return Statistics(
        count=count,
        moments={key: (m.mean, m.covariance) for key, m in moments.items()},
        features=np.concatenate(kept),
        logits=np.concatenate(logits) if logits else None,
        identity=identity or {},
    )


def spread(count: int, wanted: int) -> np.ndarray:
    """At most `wanted` of the indices 0 to count - 1, at equal distances."""
    # Not the first ones: a data set may be sorted by class.
    if count <= wanted:
        return np.arange(count)
    return np.floor(np.arange(wanted) * (count / wanted)).astype(np.int64)


def make_reference(
    reference: str,
    data_dir: epath.PathLike,
    workdir: epath.PathLike,
    extractor: features.Extractor,
    *,
    batch_size: int,
    num_neighbour_images: int,
) -> Statistics:
    """The statistics of a reference that a user names.

    Args:
      reference: an npz file, a folder of images, or "DATASET:SPLIT" of the
        data sets in `data_dir`.
      workdir: where the statistics of a data set are kept.
      num_neighbour_images: how many images precision and recall use at
        most.
    Raises: ValueError or FileNotFoundError that names the reference.
    """
    if not reference:
        raise ValueError(
            "reference = '' is empty: name an npz file, a folder of images, or a split, "
            "cifar10:train for instance"
        )
    if reference.endswith(".npz"):
        return load_reference(
            reference,
            extractor,
            batch_size=batch_size,
            num_neighbour_images=num_neighbour_images,
        )
    # The colon of gs:// is not that of a split.
    if storage.is_object_store(reference) or epath.Path(reference).is_dir():
        with naming_path("reference", reference):
            folder = epath.Path(reference)
            if not folder.is_dir():
                raise FileNotFoundError(f"{folder} not found")
            images = FolderImages(folder)
            return _with_images(images, {}, extractor, batch_size, num_neighbour_images)

    name, colon, split = reference.rpartition(":")
    if not colon:
        raise ValueError(
            f"reference = {reference!r} is neither an npz file, nor a folder, nor DATASET:SPLIT"
        )
    with naming_path("reference", reference):
        records = dataset.open_dataset(name, str(data_dir), split)
        if not isinstance(records, dataset.ImageDataset):
            raise ValueError(f"{reference} holds latents, images are needed")

        # The hash of the weights is part of the name, so that statistics of
        # several extractors can be in one workdir. The slash of a TFDS name,
        # imagenet_resized/64x64, is no folder.
        flat_name = name.replace("/", "_")
        weights = extractor.protocol["weights"]
        file_name = f"reference_{flat_name}_{split}_{extractor.name}_{weights}.npz"
        return dataset_reference(
            records,
            extractor,
            batch_size=batch_size,
            num_neighbour_images=num_neighbour_images,
            cache=epath.Path(workdir) / file_name,
        )


# ---- Statistics of a data set ----


def dataset_reference(
    images: dataset.ImageDataset,
    extractor: features.Extractor,
    *,
    batch_size: int,
    num_neighbour_images: int,
    cache: epath.Path,
) -> Statistics:
    """Statistics of a whole split of a data set; computed once, then read from `cache`.

    Args:
      cache: an npz file. It is used if it was written for the same images, by
        the same protocol.
    """
    count = len(images)
    keep = spread(count, num_neighbour_images)
    identity = _identify(images, keep)
    if cache.is_file():
        with npz.open_archive(cache) as archive:
            cached = _read_statistics(archive, extractor)
        # The data set may have been prepared again, with other images under
        # the same name.
        if cached.identity == identity:
            return cached

    logging.info(
        "computing %s statistics of the %d images of %s:%s",
        extractor.name,
        count,
        images.name,
        images.split,
    )
    statistics = collect(
        extractor,
        _dataset_batches(images, batch_size),
        batch_size,
        keep=keep,
        identity=identity,
    )
    statistics = dataclasses.replace(statistics, image_shape=images.image_shape)
    # In training every process computes them, for the processes may have no
    # folder in common.
    if jax.process_index() == 0:
        _write_statistics(cache, statistics, extractor)
    return statistics


def _identify(images: dataset.ImageDataset, keep: np.ndarray) -> dict[str, Any]:
    """What tells this data set from others, those of the same name included."""
    # The hash is over the images that precision and recall use: all of
    # them would take a second pass over the data.
    digest = hashlib.sha256()
    for index in keep:
        digest.update(images[int(index)]["image"].tobytes())
    return {
        "data": f"{images.name}:{images.split}",
        "count": len(images),
        "image_shape": list(images.image_shape),
        "sha256": digest.hexdigest()[:16],
        "neighbour_images": len(keep),
    }


def _dataset_batches(images: dataset.ImageDataset, batch_size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(images), batch_size):
        stop = min(start + batch_size, len(images))
        yield np.stack([images[i]["image"] for i in range(start, stop)])


def _write_statistics(
    path: epath.Path, statistics: Statistics, extractor: features.Extractor
) -> None:
    """Saves statistics under ADM's names, with the features that they are of."""
    origin = {
        "extractor": extractor.protocol,
        "identity": statistics.identity,
        "count": statistics.count,
    }
    arrays: dict[str, Any] = {
        "features": statistics.features,
        "protocol": json.dumps(origin),
    }
    for key, moments in statistics.moments.items():
        arrays |= zip(MOMENT_NAMES[key], moments)

    # The statistics may be the first file of a new workdir.
    path.parent.mkdir(parents=True, exist_ok=True)
    # A process that is killed here leaves no half-written reference under the
    # final name.
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        np.savez(file, **arrays)
    partial.replace(path)


def _read_statistics(archive: npz.Archive, extractor: features.Extractor) -> Statistics:
    """What `_write_statistics` wrote, if it is of this extractor."""
    origin = archive.read_json("protocol")
    missing = {"extractor", "identity", "count"} - origin.keys()
    if missing:
        raise ValueError(
            f"{archive.path}: its protocol lacks {', '.join(sorted(missing))}; "
            "it is not one of our references"
        )
    found = protocol.differences(origin["extractor"], extractor.protocol)
    if found:
        raise ValueError(f"{archive.path} holds statistics of another protocol: {'; '.join(found)}")

    dims = features.dims(extractor)
    # They were float32 when they were written: precision and recall take their
    # distances in it.
    kept = archive.read_floats("features", 2).astype(np.float32)
    if kept.shape[1] != dims["pool"]:
        raise ValueError(
            f"{archive.path}: features {kept.shape} are not of the network's {dims['pool']}"
        )
    return Statistics(
        count=origin["count"],
        moments=_read_moments(archive, dims),
        features=kept,
        logits=None,
        identity=origin["identity"],
        image_shape=_image_shape(origin["identity"]),
    )


def _image_shape(identity: Any) -> tuple[int, ...]:
    """That of the images behind statistics, whose file may say anything."""
    shape = identity.get("image_shape") if isinstance(identity, dict) else None
    if isinstance(shape, list) and all(isinstance(side, int) for side in shape):
        return tuple(shape)
    return ()


# ---- Reference files ----


def load_reference(
    reference: epath.PathLike,
    extractor: features.Extractor,
    *,
    batch_size: int,
    num_neighbour_images: int,
) -> Statistics:
    """Reads a reference npz.

    It is ADM's (mu, sigma, mu_s, sigma_s, arr_0), pytorch-fid's (mu, sigma),
    ours, or holds images alone. Statistics are used only if they are of this
    extractor: a file that was written here says whose they are, ADM's are of
    `inception_adm`, and pytorch-fid's of `inception_pytorch_fid`. Images in
    the file (ADM's has 10,000) go through the network, for precision and
    recall, and for all scores where the statistics are of other features.

    Args:
      num_neighbour_images: how many images precision and recall use at
        most.
    Raises: ValueError where the file holds neither images nor statistics of
      this extractor; FileNotFoundError.
    """
    path = epath.Path(reference)
    with naming_path("reference", path):
        with npz.open_archive(path) as archive:
            names = archive.names
            # Not by "protocol" alone: the sampling job writes its own under
            # that name.
            if {"features", "protocol"} <= names:
                return _read_statistics(archive, extractor)

            # The file does not say whose statistics it holds. Only ADM's have
            # those of sFID.
            owner = None
            if "mu" in names:
                owner = "inception_adm" if "mu_s" in names else "inception_pytorch_fid"
            moments = {}
            if owner == extractor.name:
                moments = _read_moments(archive, features.dims(extractor))

        if "arr_0" in names:
            images = NpzImages(path)
            return _with_images(images, moments, extractor, batch_size, num_neighbour_images)
        if moments:
            return Statistics(0, moments, None, None, {"file": npz.file_hash(path)})
        if owner:
            raise ValueError(
                f"{path} holds statistics of {owner} and no images; they do not compare with "
                f"features = {extractor.name}"
            )
        raise ValueError(f"{path} holds neither statistics nor images, but {sorted(names)}")


def _with_images(
    images: NpzImages | FolderImages,
    moments: dict[str, tuple[np.ndarray, np.ndarray]],
    extractor: features.Extractor,
    batch_size: int,
    num_neighbour_images: int,
) -> Statistics:
    """The given moments, or those of the images; with features of the images."""
    num_images = images.count
    if moments:
        # The images after these would serve no score.
        num_images = min(num_images, num_neighbour_images)
    keep = spread(num_images, num_neighbour_images)
    batches = images.batches(num_images, batch_size)
    computed = collect(extractor, batches, batch_size, keep=keep)

    identity = {"file": images.content_hash(), "neighbour_images": len(keep)}
    if moments:
        return Statistics(0, moments, computed.features, None, identity, images.shape)
    identity["count"] = num_images
    return dataclasses.replace(computed, identity=identity, image_shape=images.shape)


def _read_moments(
    archive: npz.Archive, dims: dict[str, int]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{output: (mean, covariance)} of those in the file, each of the size that the network has."""
    moments = {}
    for key, (mean_name, covariance_name) in MOMENT_NAMES.items():
        if mean_name not in archive.names:
            continue
        mean = archive.read_floats(mean_name, 1)
        covariance = archive.read_floats(covariance_name, 2)
        dim = dims[key]
        if mean.shape != (dim,) or covariance.shape != (dim, dim):
            raise ValueError(
                f"{archive.path}: {mean_name} {mean.shape} and {covariance_name} "
                f"{covariance.shape} are not of the network's {dim} features"
            )
        moments[key] = mean, covariance
    return moments
