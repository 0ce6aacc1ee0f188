"""Statistics of images and of references: from npz files, data sets and saved moments."""

import dataclasses
import hashlib
import json
import pathlib
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging

from lit_jax.data import dataset
from lit_jax.evaluation import features, metrics, reports


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """What the scores need of a set of images.

    Attributes:
        count: how many images the moments are of; 0 where a file does not say.
        moments: (mean (D,), covariance (D, D)) float64, by output of the network.
        features: (n, D) float32 of the images that precision and recall look at, or None.
        logits: (count, classes) float32, or None.
        identity: what the set is, for the protocol.
    """

    count: int
    moments: dict[str, tuple[np.ndarray, np.ndarray]]
    features: np.ndarray | None
    logits: np.ndarray | None
    identity: dict[str, Any]


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
        keep: indices of the images whose features are kept; None keeps all, and the logits too.
    """
    moments, kept, logits, count = {}, [], [], 0
    start = time.monotonic()
    for outputs in features.extract(extractor, batches, batch_size):
        num_images = len(outputs["pool"])
        for key in extractor.frechet:
            moments.setdefault(key, metrics.Moments(outputs[key].shape[1])).update(outputs[key])
        if keep is None:
            kept.append(outputs["pool"])
            if extractor.scores_classes:
                logits.append(outputs["logits"])
        else:
            kept.append(
                outputs["pool"][keep[(keep >= count) & (keep < count + num_images)] - count]
            )
        if (count + num_images) // 1000 > count // 1000:
            logging.info(
                "%d images, %.1f a second",
                count + num_images,
                (count + num_images) / (time.monotonic() - start),
            )
        count += num_images
    if count < 2:
        raise ValueError(f"scores need at least 2 images, got {count}")
    return Statistics(
        count,
        {key: (m.mean, m.covariance) for key, m in moments.items()},
        np.concatenate(kept),
        np.concatenate(logits) if logits else None,
        identity or {},
    )


# What the bytes of a broken archive provoke; the last two: a member flagged as encrypted or compressed in an unknown way.
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError)


def npz_shape(path: pathlib.Path) -> tuple[int, ...]:
    """Shape of the images `arr_0` of an npz, from its header; raises ValueError unless they are (N, H, W, C) uint8."""
    with _open_member(path, "arr_0") as member:
        return _read_npy_header(member, path)


def _open_member(path, name):
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found")
    try:
        return zipfile.ZipFile(path).open(f"{name}.npy")
    except (KeyError, *DAMAGE) as error:
        raise ValueError(f"{path} is not an npz with an array {name!r}: {error}") from error


def _read_npy_header(member, path):
    try:
        version = np.lib.format.read_magic(member)
        read = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, fortran_order, dtype = read(member)
    except (ValueError, *DAMAGE) as error:
        raise ValueError(f"{path}: the header of arr_0 cannot be read: {error}") from error
    if (
        dtype != np.uint8
        or len(shape) != 4
        or fortran_order
        or shape[-1] not in (1, 3)
        or 0 in shape[1:]
    ):
        raise ValueError(
            f"{path}: arr_0 is {dtype} {shape}{' in Fortran order' if fortran_order else ''}, "
            "expected uint8 (N, H, W, 1 or 3)"
        )
    return shape


def npz_batches(path: pathlib.Path, num_images: int, batch_size: int) -> Iterator[np.ndarray]:
    """The first `num_images` images of an npz in file order, streamed: 50,000 of them never lie in memory at once."""
    with _open_member(path, "arr_0") as member:
        _, *shape = _read_npy_header(member, path)
        for start in range(0, num_images, batch_size):
            size = min(batch_size, num_images - start)
            bytes_wanted = size * int(np.prod(shape))
            try:
                chunk = member.read(bytes_wanted)
            except DAMAGE as error:
                raise ValueError(
                    f"{path}: arr_0 is damaged after {start} images: {error}"
                ) from error
            if len(chunk) != bytes_wanted:
                raise ValueError(
                    f"{path} is truncated: its header promises more than the {start} images it holds"
                )
            yield np.frombuffer(chunk, np.uint8).reshape(size, *shape)


def npz_json(path: pathlib.Path, name: str) -> dict[str, Any]:
    """What the sampling job wrote as `name` beside the images, or {} for a file from elsewhere."""
    with _open_archive(path) as archive:
        return _read_json(path, archive, name) if name in archive else {}


def _open_archive(path):
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, *DAMAGE) as error:
        raise ValueError(f"{path} is not an npz file: {error}") from error


def _read_json(path, archive, name):
    try:
        value = json.loads(str(archive[name]))
    except (ValueError, *DAMAGE) as error:
        raise ValueError(f"{path}: {name} cannot be read as JSON text: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {name} is a JSON {type(value).__name__}, expected an object")
    return value


_ARRAYS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # ADM's names


def _read_floats(path, archive, name, ndim):
    """An array of finite numbers, float64; whatever else a file may hold under that name is refused."""
    try:
        array = archive[name]
    except (ValueError, KeyError, *DAMAGE) as error:
        raise ValueError(f"{path}: {name} cannot be read: {error}") from error
    if array.dtype.kind != "f" or array.ndim != ndim or not np.isfinite(array).all():
        raise ValueError(
            f"{path}: {name} is {array.dtype} {array.shape}, expected {ndim} axes of finite floats"
        )
    return array.astype(np.float64)


def _read_moments(path, archive, dims):
    """{output: (mean, covariance)} of the arrays that are there, each of the size that the network gives."""
    moments = {}
    for key, (mean_name, covariance_name) in _ARRAYS.items():
        if mean_name in archive.files:
            mean, covariance = (
                _read_floats(path, archive, name, ndim)
                for name, ndim in ((mean_name, 1), (covariance_name, 2))
            )
            if mean.shape != (dims[key],) or covariance.shape != (dims[key],) * 2:
                raise ValueError(
                    f"{path}: {mean_name} {mean.shape} and {covariance_name} {covariance.shape} are not of the "
                    f"network's {dims[key]} features"
                )
            moments[key] = mean, covariance
    return moments


def load_reference(
    path: str | pathlib.Path,
    extractor: features.Extractor,
    *,
    batch_size: int,
    num_neighbour_images: int,
) -> Statistics:
    """Reads a reference npz: ADM's (mu, sigma, mu_s, sigma_s, arr_0), pytorch-fid's (mu, sigma), ours, or images alone.

    Statistics are taken only if they are the extractor's own: ours say whose they are; ADM's are of `inception_adm`,
    pytorch-fid's of `inception_pytorch_fid`. Images in the file (ADM keeps 10,000) go through the network, for precision
    and recall, and for everything else too where the statistics are of other features.

    Args: num_neighbour_images: how many images precision and recall look at, at most.
    Raises: ValueError when the file holds neither images nor statistics of this extractor.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"evaluate.reference {path} not found")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"evaluate.reference {path} is not an npz file")
    with _open_archive(path) as archive:
        keys = set(archive.files)
        if "features" in keys and "protocol" in keys:
            return _read_own_statistics(path, archive, extractor)
        owner = (
            None
            if "mu" not in keys
            else "inception_adm"
            if "mu_s" in keys
            else "inception_pytorch_fid"
        )
        moments = (
            _read_moments(path, archive, features.dims(extractor))
            if owner == extractor.name
            else {}
        )
        if not moments and "arr_0" not in keys:
            raise ValueError(
                f"evaluate.reference {path} holds statistics of {owner} and no images; they do not compare "
                f"with evaluate.features = {extractor.name}"
                if owner
                else f"evaluate.reference {path} holds neither statistics nor images, but {sorted(keys)}"
            )
    identity = {"file": file_hash(path)}
    if "arr_0" not in keys:
        return Statistics(0, moments, None, None, identity)
    num_images = npz_shape(path)[0]
    if moments:
        num_images = min(num_images, num_neighbour_images)
    keep = spread(num_images, num_neighbour_images)
    computed = collect(extractor, npz_batches(path, num_images, batch_size), batch_size, keep=keep)
    identity |= {"neighbour_images": len(keep)}
    if not moments:
        return dataclasses.replace(computed, identity=identity | {"count": num_images})
    return Statistics(0, moments, computed.features, None, identity)


def file_hash(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def spread(count: int, wanted: int) -> np.ndarray:
    """At most `wanted` indices spread evenly over `count`: data sets may be sorted."""
    return (
        np.arange(count)
        if count <= wanted
        else np.floor(np.arange(wanted) * (count / wanted)).astype(np.int64)
    )


def dataset_reference(
    name: str,
    split: str,
    directory: str,
    extractor: features.Extractor,
    *,
    batch_size: int,
    num_neighbour_images: int,
    cache: pathlib.Path,
) -> Statistics:
    """Statistics of a whole split of a data set; computed once, then read from `cache`."""
    source = dataset.open_dataset(name, directory, split)
    if not isinstance(source, dataset.ImageDataset):
        raise ValueError(f"evaluate.reference {name}:{split} holds latents, images are needed")
    count = len(source)
    keep = spread(count, num_neighbour_images)
    read = (
        hashlib.sha256()
    )  # of the images that precision and recall look at: another data set may bear the same name
    for i in keep:
        read.update(source[int(i)]["image"].tobytes())
    identity = {
        "data": f"{name}:{split}",
        "count": count,
        "image_shape": list(source.image_shape),
        "sha256": read.hexdigest()[:16],
        "neighbour_images": len(keep),
    }
    if cache.is_file():
        with _open_archive(cache) as archive:
            reference = _read_own_statistics(cache, archive, extractor)
        if reference.identity == identity:
            return reference
    logging.info(
        "computing %s statistics of the %d images of %s:%s", extractor.name, count, name, split
    )
    batches = (
        np.stack([source[i]["image"] for i in range(start, min(start + batch_size, count))])
        for start in range(0, count, batch_size)
    )
    reference = collect(extractor, batches, batch_size, keep=keep, identity=identity)
    if (
        jax.process_index() == 0
    ):  # in training every process computes them: they may have no folder in common
        write_statistics(cache, reference, extractor)
    return reference


def write_statistics(
    path: pathlib.Path, statistics: Statistics, extractor: features.Extractor
) -> None:
    """Saves statistics under ADM's names, with the features of precision and recall and whose they are."""
    arrays = {
        name: array
        for key, moments in statistics.moments.items()
        for name, array in zip(_ARRAYS[key], moments)
    }
    protocol = {
        "extractor": extractor.protocol,
        "identity": statistics.identity,
        "count": statistics.count,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = reports.beside(
        path, ".partial"
    )  # a killed run leaves no half-written reference behind
    with partial.open("wb") as file:
        np.savez(file, features=statistics.features, protocol=json.dumps(protocol), **arrays)
    partial.replace(path)


def _read_own_statistics(path, archive, extractor):
    protocol = _read_json(path, archive, "protocol")
    missing = {"extractor", "identity", "count"} - protocol.keys()
    if missing:
        raise ValueError(
            f"{path}: its protocol lacks {', '.join(sorted(missing))}; it is not one of our references"
        )
    differences = protocol._differences(protocol["extractor"], extractor.protocol)
    if differences:
        raise ValueError(f"{path} holds statistics of another protocol: {'; '.join(differences)}")
    dims = features.dims(extractor)
    kept = _read_floats(path, archive, "features", 2).astype(np.float32)
    if kept.shape[1] != dims["pool"]:
        raise ValueError(f"{path}: features {kept.shape} are not of the network's {dims['pool']}")
    return Statistics(
        protocol["count"], _read_moments(path, archive, dims), kept, None, protocol["identity"]
    )


def make_reference(
    reference: str,
    data_dir: str,
    workdir: pathlib.Path,
    extractor: features.Extractor,
    *,
    batch_size: int,
    num_neighbour_images: int,
) -> Statistics:
    """The reference that evaluate.reference names: an npz file, or "DATASET:SPLIT" of the data sets in data.dir."""
    kwargs = dict(batch_size=batch_size, num_neighbour_images=num_neighbour_images)
    if not reference:
        raise ValueError(
            "evaluate.reference is empty: name an npz file or a split, cifar10:train for instance"
        )
    if reference.endswith(".npz"):
        return load_reference(reference, extractor, **kwargs)
    name, colon, split = reference.rpartition(":")
    if not colon:
        raise ValueError(
            f"evaluate.reference = {reference!r} is neither an npz file nor DATASET:SPLIT"
        )
    cache = workdir / (
        f"reference_{name.replace('/', '_')}_{split}_{extractor.name}_"
        f"{extractor.protocol['weights']}.npz"
    )
    return dataset_reference(name, split, data_dir, extractor, cache=cache, **kwargs)
