"""--mode=evaluate: scores uint8 images against a reference, and says by which protocol.

    python -m lit_jax.main --config=configs/NAME.py --mode=evaluate --workdir=DIR \\
        --config.evaluate.samples=samples.npz --config.evaluate.reference=VIRTUAL_imagenet256_labeled.npz \\
        --config.evaluate.features=inception_adm --config.evaluate.weights=pt_inception-2015-12-05-6726825d.pth

A score's name says what it measures, by which features and on how many images (`fid_adm_50k`); the file it is written to
holds everything else that it depends on, and scores of unequal protocols refuse to be compared. See docs/evaluation.md.
"""
import dataclasses
import hashlib
import json
import pathlib
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging
from matplotlib.figure import Figure
from PIL import Image

from lit_jax import data, features, metrics

# README of openai/guided-diffusion's evaluations folder: admnet_guided_upsampled_imagenet256.npz against
# VIRTUAL_imagenet256_labeled.npz. The tolerances allow for float32 in another order, and for the float16 distances
# that precision and recall were published with.
PUBLISHED = {
    "is_adm_50k": (215.8370361328125, 0.3),
    "fid_adm_50k": (3.9425574129223264, 0.01),
    "sfid_adm_50k": (6.140433703346162, 0.02),
    "precision_adm_50k": (0.8265, 0.002),
    "recall_adm_50k": (0.5309, 0.002),
}


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


def collect(extractor: features.Extractor, batches: Iterable[np.ndarray], batch_size: int, *, keep: np.ndarray | None = None,
            identity: dict[str, Any] | None = None) -> Statistics:
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
            kept.append(outputs["pool"][keep[(keep >= count) & (keep < count + num_images)] - count])
        if (count + num_images) // 1000 > count // 1000:
            logging.info("%d images, %.1f a second", count + num_images, (count + num_images) / (time.monotonic() - start))
        count += num_images
    if count < 2:
        raise ValueError(f"scores need at least 2 images, got {count}")
    return Statistics(count, {key: (m.mean, m.covariance) for key, m in moments.items()}, np.concatenate(kept),
                      np.concatenate(logits) if logits else None, identity or {})


def count_name(count: int) -> str:
    """50000 -> "50k"; a count that is no multiple of a thousand is written out."""
    return f"{count // 1000}k" if count % 1000 == 0 else str(count)


def score(extractor: features.Extractor, samples: Statistics, reference: Statistics, *, neighbours: int = 3,
          split_size: int = 5000) -> dict[str, float]:
    """All scores that the two sides allow, by name; a reference without its own features gives no precision and recall."""
    suffix = f"{extractor.suffix}_{count_name(samples.count)}"
    scores = {f"{name}_{suffix}": metrics.frechet_distance(*samples.moments[key], *reference.moments[key])
              for key, name in extractor.frechet.items() if key in reference.moments}
    if samples.logits is not None:
        scores[f"is_{suffix}"] = metrics.inception_score(samples.logits, split_size)
    if reference.features is not None and samples.features is not None:
        precision, recall = metrics.precision_recall(reference.features, samples.features, neighbours)
        scores |= {f"precision_{suffix}": precision, f"recall_{suffix}": recall}
    return scores


def score_images(extractor: features.Extractor, images: np.ndarray, reference: Statistics, *, batch_size: int = 64,
                 neighbours: int = 3, split_size: int = 5000,
                 on_batch: Callable[[int], None] = lambda done: None) -> dict[str, float]:
    """Scores images (N, H, W, C) uint8 held in memory: what training calls every few thousand steps.

    `on_batch` is told, before each batch goes through the network, how many images went before it.
    """
    def batches():
        for start in range(0, len(images), batch_size):
            on_batch(start)
            yield images[start:start + batch_size]

    samples = collect(extractor, batches(), batch_size)
    return score(extractor, samples, reference, neighbours=neighbours, split_size=split_size)


# Files of images.

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
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read(member)
    except (ValueError, *DAMAGE) as error:
        raise ValueError(f"{path}: the header of arr_0 cannot be read: {error}") from error
    if dtype != np.uint8 or len(shape) != 4 or fortran_order or shape[-1] not in (1, 3) or 0 in shape[1:]:
        raise ValueError(f"{path}: arr_0 is {dtype} {shape}{' in Fortran order' if fortran_order else ''}, "
                         "expected uint8 (N, H, W, 1 or 3)")
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
                raise ValueError(f"{path}: arr_0 is damaged after {start} images: {error}") from error
            if len(chunk) != bytes_wanted:
                raise ValueError(f"{path} is truncated: its header promises more than the {start} images it holds")
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


# References.

_ARRAYS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}      # ADM's names


def _read_floats(path, archive, name, ndim):
    """An array of finite numbers, float64; whatever else a file may hold under that name is refused."""
    try:
        array = archive[name]
    except (ValueError, KeyError, *DAMAGE) as error:
        raise ValueError(f"{path}: {name} cannot be read: {error}") from error
    if array.dtype.kind != "f" or array.ndim != ndim or not np.isfinite(array).all():
        raise ValueError(f"{path}: {name} is {array.dtype} {array.shape}, expected {ndim} axes of finite floats")
    return array.astype(np.float64)


def _read_moments(path, archive, dims):
    """{output: (mean, covariance)} of the arrays that are there, each of the size that the network gives."""
    moments = {}
    for key, (mean_name, covariance_name) in _ARRAYS.items():
        if mean_name in archive.files:
            mean, covariance = (_read_floats(path, archive, name, ndim)
                                for name, ndim in ((mean_name, 1), (covariance_name, 2)))
            if mean.shape != (dims[key],) or covariance.shape != (dims[key],) * 2:
                raise ValueError(f"{path}: {mean_name} {mean.shape} and {covariance_name} {covariance.shape} are not of the "
                                 f"network's {dims[key]} features")
            moments[key] = mean, covariance
    return moments


def load_reference(path: str | pathlib.Path, extractor: features.Extractor, *, batch_size: int,
                   num_neighbour_images: int) -> Statistics:
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
        owner = None if "mu" not in keys else "inception_adm" if "mu_s" in keys else "inception_pytorch_fid"
        moments = _read_moments(path, archive, features.dims(extractor)) if owner == extractor.name else {}
        if not moments and "arr_0" not in keys:
            raise ValueError(f"evaluate.reference {path} holds statistics of {owner} and no images; they do not compare "
                             f"with evaluate.features = {extractor.name}" if owner else
                             f"evaluate.reference {path} holds neither statistics nor images, but {sorted(keys)}")
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
    return np.arange(count) if count <= wanted else np.floor(np.arange(wanted) * (count / wanted)).astype(np.int64)


def dataset_reference(name: str, split: str, directory: str, extractor: features.Extractor, *, batch_size: int,
                      num_neighbour_images: int, cache: pathlib.Path) -> Statistics:
    """Statistics of a whole split of a data set; computed once, then read from `cache`."""
    source = data.open_source(name, directory, split)
    if not isinstance(source, data.ImageSource):
        raise ValueError(f"evaluate.reference {name}:{split} holds latents, images are needed")
    count = len(source)
    keep = spread(count, num_neighbour_images)
    read = hashlib.sha256()     # of the images that precision and recall look at: another data set may bear the same name
    for i in keep:
        read.update(source[int(i)]["image"].tobytes())
    identity = {"data": f"{name}:{split}", "count": count, "image_shape": list(source.image_shape),
                "sha256": read.hexdigest()[:16], "neighbour_images": len(keep)}
    if cache.is_file():
        with _open_archive(cache) as archive:
            reference = _read_own_statistics(cache, archive, extractor)
        if reference.identity == identity:
            return reference
    logging.info("computing %s statistics of the %d images of %s:%s", extractor.name, count, name, split)
    batches = (np.stack([source[i]["image"] for i in range(start, min(start + batch_size, count))])
               for start in range(0, count, batch_size))
    reference = collect(extractor, batches, batch_size, keep=keep, identity=identity)
    if jax.process_index() == 0:        # in training every process computes them: they may have no folder in common
        write_statistics(cache, reference, extractor)
    return reference


def write_statistics(path: pathlib.Path, statistics: Statistics, extractor: features.Extractor) -> None:
    """Saves statistics under ADM's names, with the features of precision and recall and whose they are."""
    arrays = {name: array for key, moments in statistics.moments.items() for name, array in zip(_ARRAYS[key], moments)}
    protocol = {"extractor": extractor.protocol, "identity": statistics.identity, "count": statistics.count}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = beside(path, ".partial")      # a killed run leaves no half-written reference behind
    with partial.open("wb") as file:
        np.savez(file, features=statistics.features, protocol=json.dumps(protocol), **arrays)
    partial.replace(path)


def _read_own_statistics(path, archive, extractor):
    protocol = _read_json(path, archive, "protocol")
    missing = {"extractor", "identity", "count"} - protocol.keys()
    if missing:
        raise ValueError(f"{path}: its protocol lacks {', '.join(sorted(missing))}; it is not one of our references")
    differences = _differences(protocol["extractor"], extractor.protocol)
    if differences:
        raise ValueError(f"{path} holds statistics of another protocol: {'; '.join(differences)}")
    dims = features.dims(extractor)
    kept = _read_floats(path, archive, "features", 2).astype(np.float32)
    if kept.shape[1] != dims["pool"]:
        raise ValueError(f"{path}: features {kept.shape} are not of the network's {dims['pool']}")
    return Statistics(protocol["count"], _read_moments(path, archive, dims), kept, None, protocol["identity"])


# Protocols: what makes two numbers comparable.


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"samples": {"steps": 250}} -> {"samples.steps": 250}"""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _differences(a, b, across=()):
    a, b = flatten(a), flatten(b)
    return [f"{key} is {a.get(key)!r} and {b.get(key)!r}" for key in sorted(a.keys() | b.keys())
            if a.get(key) != b.get(key) and not any(key == c or key.startswith(f"{c}.") for c in across)]


def check_comparable(results: dict[str, dict[str, Any]], across: tuple[str, ...] = ()) -> None:
    """Raises ValueError unless all results were made by one protocol.

    Args:
        results: what `run` writes, by the name of the run.
        across: fields of the protocol that may differ, "samples.cfg_scale" or a whole branch, "samples".
    """
    (first, expected), *others = results.items()
    for name, result in others:
        differences = _differences(expected["protocol"], result["protocol"], across)
        if differences:
            raise ValueError(f"{first} and {name} were not made by the same protocol: {'; '.join(differences)}. What may "
                             "differ is named in evaluate.compare_across")
        if expected["scores"].keys() != result["scores"].keys():
            raise ValueError(f"{first} and {name} have different scores: {sorted(expected['scores'])} and "
                             f"{sorted(result['scores'])}")


# Reports.


def write_report(path: pathlib.Path, result: dict[str, Any]) -> None:
    """Writes path.json and path.md."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside(path, ".json").write_text(json.dumps(result, indent=2) + "\n")
    lines = ["# Evaluation", "", "| score | value |", "|---|---|"]
    lines += [f"| {name} | {value:.4f} |" for name, value in result["scores"].items()]
    if "self_check" in result:
        lines += ["", "## Self-check against the published figures", "", "| score | here | published | tolerance | |",
                  "|---|---|---|---|---|"]
        lines += [f"| {row['score']} | {row['here']:.4f} | {row['published']:.4f} | {row['tolerance']} | "
                  f"{'equal' if row['passed'] else 'DIFFERENT'} |" for row in result["self_check"]]
    lines += ["", "## Protocol", "", "| field | value |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in flatten(result["protocol"]).items()]
    if "samples_file" in result:
        lines += ["", f"{result['samples_file']}, {result['images_per_second']:.1f} images/s through the feature network on "
                  f"{result['device']}."]
    if speed := result.get("sampling_speed"):
        lines += ["", f"Drawn at {speed['images_per_second']:.1f} images/s on {speed['devices']} x {speed['device']}."]
    lines.append("")
    beside(path, ".md").write_text("\n".join(lines))


def beside(path: pathlib.Path, ending: str) -> pathlib.Path:
    """path + ending; `with_suffix` would take the 5 of samples_cfg1.5 for a suffix."""
    return path.with_name(path.name + ending)


def write_grid(path: pathlib.Path, images: np.ndarray, columns: int = 8) -> None:
    """Writes images (N, H, W, C) uint8 as one PNG, row by row."""
    N, H, W, C = images.shape
    rows = -(-N // columns)
    images = np.concatenate([images, np.zeros((rows * columns - N, H, W, C), np.uint8)])
    grid = images.reshape(rows, columns, H, W, C).transpose(0, 2, 1, 3, 4).reshape(rows * H, columns * W, C)
    Image.fromarray(grid[..., 0] if C == 1 else grid).save(path)


def write_comparison(path: pathlib.Path, results: dict[str, dict[str, Any]], across: tuple[str, ...]) -> None:
    """Writes path.json, path.md, and path.png: Frechet distance against what differs, and precision against recall.

    The first field that differs and is a number, those of `across` first, is the abscissa: the guidance scale, or the
    step. Runs that differ in other fields too, two models say, are curves of their own.
    """
    protocols = {run: flatten(result["protocol"]) for run, result in results.items()}
    varied = [key for key in dict.fromkeys(key for protocol in protocols.values() for key in protocol)
              if len({str(protocol.get(key)) for protocol in protocols.values()}) > 1]
    x_name = next((key for key in (*across, *varied) if key in varied and all(
        isinstance(protocol.get(key), int | float) for protocol in protocols.values())), None)
    if x_name:
        results = dict(sorted(results.items(), key=lambda item: protocols[item[0]][x_name]))
    names = list(next(iter(results.values()))["scores"])
    lines = ["# Comparison", "", f"| {' | '.join(['run', *varied, *names, 'images/s drawn'])} |",
             "|---" * (2 + len(varied) + len(names)) + "|"]
    for run, result in results.items():
        speed = result.get("sampling_speed", {}).get("images_per_second")
        cells = [run, *(str(protocols[run].get(key)) for key in varied)]
        cells += [*(f"{value:.4f}" for value in result["scores"].values()), f"{speed:.1f}" if speed else ""]
        lines.append(f"| {' | '.join(cells)} |")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside(path, ".md").write_text("\n".join([*lines, ""]))
    beside(path, ".json").write_text(json.dumps({"across": list(across), "runs": results}, indent=2) + "\n")

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    precision, recall = (next((n for n in names if n.startswith(prefix)), None) for prefix in ("precision_", "recall_"))
    curves = {}
    for run in results:
        others = "\n".join(f"{key} {str(protocols[run].get(key))[:12]}" for key in varied if key != x_name)
        curves.setdefault(others if x_name else run, []).append(run)
    for label, runs in curves.items():
        x = [protocols[run][x_name] if x_name else run for run in runs]
        left.plot(x, [results[run]["scores"][names[0]] for run in runs], "o-", label=label)
        if precision:
            rows = [(results[run]["scores"][recall], results[run]["scores"][precision]) for run in runs]
            right.plot(*zip(*rows), "o-", label=label)
            for text, at in zip(x, rows):
                right.annotate(str(text), at)
    if len(curves) > 1 and x_name:
        left.legend(fontsize="small")
    left.set(xlabel=x_name or "", ylabel=names[0])
    left.tick_params(axis="x", rotation=0 if x_name else 30)
    if precision:
        right.set(xlabel=recall, ylabel=precision)
    figure.savefig(beside(path, ".png"), dpi=120)


def self_check(scores: dict[str, float]) -> list[dict[str, Any]]:
    """Holds scores against the published figures of ADM's own samples; a row for each figure."""
    missing = sorted(PUBLISHED.keys() - scores.keys())
    if missing:
        raise ValueError(f"the self-check needs {missing}, there are {sorted(scores)}: the reference is not ADM's "
                         "VIRTUAL_imagenet256_labeled.npz")
    return [{"score": name, "here": scores[name], "published": published, "tolerance": tolerance,
             "passed": abs(scores[name] - published) <= tolerance} for name, (published, tolerance) in PUBLISHED.items()]


# The job.


def make_reference(reference: str, data_dir: str, workdir: pathlib.Path, extractor: features.Extractor, *, batch_size: int,
                   num_neighbour_images: int) -> Statistics:
    """The reference that evaluate.reference names: an npz file, or "DATASET:SPLIT" of the data sets in data.dir."""
    kwargs = dict(batch_size=batch_size, num_neighbour_images=num_neighbour_images)
    if not reference:
        raise ValueError("evaluate.reference is empty: name an npz file or a split, cifar10:train for instance")
    if reference.endswith(".npz"):
        return load_reference(reference, extractor, **kwargs)
    name, colon, split = reference.rpartition(":")
    if not colon:
        raise ValueError(f"evaluate.reference = {reference!r} is neither an npz file nor DATASET:SPLIT")
    cache = workdir / (f"reference_{name.replace('/', '_')}_{split}_{extractor.name}_"
                       f"{extractor.protocol['weights']}.npz")
    return dataset_reference(name, split, data_dir, extractor, cache=cache, **kwargs)


def compare(files: Iterable[str], across: tuple[str, ...], workdir: pathlib.Path) -> None:
    """Puts earlier evaluations side by side, if their protocols allow it."""
    paths = [pathlib.Path(file) for file in files]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"evaluate.compare: {path} not found")
    # By the file's name, its folder's too, or the whole path: whatever tells them apart.
    namings = ([path.stem for path in paths], [f"{path.parent.name}/{path.stem}" for path in paths], [str(p) for p in paths])
    names = next((names for names in namings if len(set(names)) == len(names)), namings[-1])
    results = {name: read_result(path) for name, path in zip(names, paths)}
    check_comparable(results, across)
    write_comparison(workdir / "comparison", results, across)
    logging.info("compared %d evaluations in %s", len(results), workdir / "comparison.md")


def read_result(path: pathlib.Path) -> dict[str, Any]:
    """An evaluation_*.json; raises ValueError for any other file."""
    try:
        result = json.loads(path.read_text())
    except ValueError as error:         # not text, or not JSON
        raise ValueError(f"evaluate.compare: {path} is no evaluation_*.json: {error}") from error
    if not isinstance(result, dict) or not all(isinstance(result.get(key), dict) for key in ("scores", "protocol")):
        raise ValueError(f"evaluate.compare: {path} is no evaluation_*.json: it has no scores and protocol")
    return result


def check_settings(settings: ml_collections.ConfigDict, num_images: int) -> None:
    """Raises ValueError for too few images for their neighbours, before anything is computed."""
    for name, count in (("num_neighbour_images", settings.num_neighbour_images), ("number of images", num_images)):
        if count <= settings.neighbours:
            raise ValueError(f"evaluate.neighbours = {settings.neighbours} needs more images than that, but the "
                             f"{name} is {count}")


def make_result(extractor: features.Extractor, scores: dict[str, float], reference: Statistics, *, num_images: int,
                image_shape: Sequence[int], neighbours: int, split_size: int, sampling: dict[str, Any]) -> dict[str, Any]:
    """Scores with the protocol that they were made by; `sampling` says how the images were drawn."""
    protocol = extractor.protocol | {"num_images": num_images, "image_shape": list(image_shape),
                                     "reference": reference.identity, "neighbours": neighbours, "samples": sampling}
    if extractor.scores_classes:
        protocol["inception_score_split_size"] = split_size
    return {"scores": scores, "protocol": protocol, "device": jax.local_devices()[0].device_kind}


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Evaluates one file of samples, or with evaluate.compare sets earlier evaluations side by side."""
    if jax.process_index() != 0:
        return                  # the devices of one host do; the others have nothing to add
    settings = config.evaluate
    workdir = pathlib.Path(workdir)
    if settings.compare:
        compare(settings.compare, tuple(settings.compare_across), workdir)
        return
    samples_file = pathlib.Path(settings.samples or workdir / "samples.npz")
    available, *shape = npz_shape(samples_file)
    num_images = settings.num_images or available
    if num_images > available:
        raise ValueError(f"evaluate.num_images = {num_images}, but {samples_file} holds {available} images")
    check_settings(settings, num_images)
    if settings.self_check and (settings.features, num_images) != ("inception_adm", 50_000):
        raise ValueError("evaluate.self_check holds 50,000 images against published scores of inception_adm: "
                         f"evaluate.features is {settings.features}, and there are {num_images} images")
    sampling = npz_json(samples_file, "protocol")
    extractor = features.make_extractor(settings.features, settings.weights)
    reference = make_reference(settings.reference, config.data.dir, workdir, extractor, batch_size=settings.batch_size,
                               num_neighbour_images=settings.num_neighbour_images)

    start = time.monotonic()
    batches = npz_batches(samples_file, num_images, settings.batch_size)
    samples = collect(extractor, batches, settings.batch_size)
    images_per_second = num_images / (time.monotonic() - start)
    scores = score(extractor, samples, reference, neighbours=settings.neighbours, split_size=settings.split_size)

    result = make_result(extractor, scores, reference, num_images=num_images, image_shape=shape,
                         neighbours=settings.neighbours, split_size=settings.split_size,
                         sampling=sampling or {"file": file_hash(samples_file)})
    result |= {"samples_file": str(samples_file), "images_per_second": images_per_second}
    speed = npz_json(samples_file, "speed")
    if speed.keys() >= {"images_per_second", "devices", "device"} and isinstance(speed["images_per_second"], int | float):
        result["sampling_speed"] = speed
    if settings.self_check:
        result["self_check"] = self_check(scores)
    path = workdir / f"evaluation_{samples_file.stem}"
    write_report(path, result)
    write_grid(beside(path, ".png"), next(npz_batches(samples_file, min(64, num_images), 64)))
    for name, value in scores.items():
        logging.info("eval/%s = %.4f", name, value)
    failed = [row for row in result.get("self_check", []) if not row["passed"]]
    if failed:
        rows = (f"{row['score']} is {row['here']:.4f}, published {row['published']:.4f} +- {row['tolerance']}"
                for row in failed)
        raise ValueError(f"the self-check failed: {'; '.join(rows)}")
