"""--mode=evaluate: scores uint8 images against a reference, and says by which protocol.

    python -m lit_jax.main --config=configs/NAME.py --mode=evaluate --workdir=DIR \\
        --config.evaluate.samples=samples.npz --config.evaluate.reference=VIRTUAL_imagenet256_labeled.npz \\
        --config.evaluate.features=inception_adm --config.evaluate.weights=pt_inception-2015-12-05-6726825d.pth

A score's name says what it measures, by which features and on how many images (`fid_adm_50k`); the file it is written to
holds everything else that it depends on, and scores of unequal protocols refuse to be compared. See docs/evaluation.md.
"""

import pathlib
import time
from collections.abc import Iterable

import jax
import ml_collections
from absl import logging

from lit_jax.evaluation import features, protocol, references, reports

# Files of images.


# References.


# Protocols: what makes two numbers comparable.


# Reports.


# The job.


def compare(files: Iterable[str], across: tuple[str, ...], workdir: pathlib.Path) -> None:
    """Puts earlier evaluations side by side, if their protocols allow it."""
    paths = [pathlib.Path(file) for file in files]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"evaluate.compare: {path} not found")
    # By the file's name, its folder's too, or the whole path: whatever tells them apart.
    namings = (
        [path.stem for path in paths],
        [f"{path.parent.name}/{path.stem}" for path in paths],
        [str(p) for p in paths],
    )
    names = next((names for names in namings if len(set(names)) == len(names)), namings[-1])
    results = {name: reports.read_result(path) for name, path in zip(names, paths)}
    protocol.check_comparable(results, across)
    reports.write_comparison(workdir / "comparison", results, across)
    logging.info("compared %d evaluations in %s", len(results), workdir / "comparison.md")


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Evaluates one file of samples, or with evaluate.compare sets earlier evaluations side by side."""
    if jax.process_index() != 0:
        return  # the devices of one host do; the others have nothing to add
    settings = config.evaluate
    workdir = pathlib.Path(workdir)
    if settings.compare:
        compare(settings.compare, tuple(settings.compare_across), workdir)
        return
    samples_file = pathlib.Path(settings.samples or workdir / "samples.npz")
    available, *shape = references.npz_shape(samples_file)
    num_images = settings.num_images or available
    if num_images > available:
        raise ValueError(
            f"evaluate.num_images = {num_images}, but {samples_file} holds {available} images"
        )
    protocol.check_settings(settings, num_images)
    if settings.self_check and (settings.features, num_images) != ("inception_adm", 50_000):
        raise ValueError(
            "evaluate.self_check holds 50,000 images against published scores of inception_adm: "
            f"evaluate.features is {settings.features}, and there are {num_images} images"
        )
    sampling = references.npz_json(samples_file, "protocol")
    extractor = features.make_extractor(settings.features, settings.weights)
    reference = references.make_reference(
        settings.reference,
        config.data.dir,
        workdir,
        extractor,
        batch_size=settings.batch_size,
        num_neighbour_images=settings.num_neighbour_images,
    )

    start = time.monotonic()
    batches = references.npz_batches(samples_file, num_images, settings.batch_size)
    samples = references.collect(extractor, batches, settings.batch_size)
    images_per_second = num_images / (time.monotonic() - start)
    scores = protocol.score(
        extractor,
        samples,
        reference,
        neighbours=settings.neighbours,
        split_size=settings.split_size,
    )

    result = protocol.make_result(
        extractor,
        scores,
        reference,
        num_images=num_images,
        image_shape=shape,
        neighbours=settings.neighbours,
        split_size=settings.split_size,
        sampling=sampling or {"file": references.file_hash(samples_file)},
    )
    result |= {"samples_file": str(samples_file), "images_per_second": images_per_second}
    speed = references.npz_json(samples_file, "speed")
    if speed.keys() >= {"images_per_second", "devices", "device"} and isinstance(
        speed["images_per_second"], int | float
    ):
        result["sampling_speed"] = speed
    if settings.self_check:
        result["self_check"] = protocol.self_check(scores)
    path = workdir / f"evaluation_{samples_file.stem}"
    reports.write_report(path, result)
    reports.write_grid(
        reports.beside(path, ".png"),
        next(references.npz_batches(samples_file, min(64, num_images), 64)),
    )
    for name, value in scores.items():
        logging.info("eval/%s = %.4f", name, value)
    failed = [row for row in result.get("self_check", []) if not row["passed"]]
    if failed:
        rows = (
            f"{row['score']} is {row['here']:.4f}, published {row['published']:.4f} +- {row['tolerance']}"
            for row in failed
        )
        raise ValueError(f"the self-check failed: {'; '.join(rows)}")
