"""--mode=evaluate: scores uint8 images against a reference.

    python -m lit_jax.main --config=configs/NAME.py --mode=evaluate \\
        --workdir=DIR \\
        --config.evaluate.samples=samples.npz \\
        --config.evaluate.reference=VIRTUAL_imagenet256_labeled.npz \\
        --config.evaluate.features=inception_adm \\
        --config.evaluate.weights=pt_inception-2015-12-05-6726825d.pth

The name of a score says what it measures, by which features and on how many
images (`fid_adm_50k`). The file that it is written to holds everything else
that it depends on, and scores of unequal protocols refuse to be compared. See
docs/evaluation.md.
"""

import json
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from lit_jax import pictures
from lit_jax.evaluation import geneval, npz, protocol, reports
from lit_jax.evaluation.evaluator import make_evaluator
from lit_jax.experiment import check_exists, evaluation_settings, naming
from lit_jax.runtime import storage

# What the published scores of ADM's samples were made by.
SELF_CHECK = ("inception_adm", 50_000)
GRID_IMAGES = 64


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Evaluates samples, or with evaluate.compare compares evaluations.

    Leaves evaluation_SAMPLES.json, .md and .png in the workdir, or
    comparison.json, .md and .png; with evaluate.geneval geneval.json.
    Raises: ValueError or FileNotFoundError, before anything is written, for a
      config that cannot be run; ValueError after all is written where the
      self-check fails.
    """
    # The devices of one host score all images; the other processes would
    # compute the same.
    if jax.process_index() != 0:
        return
    workdir = epath.Path(workdir)
    with naming("evaluate"):
        if config.evaluate.compare:
            compare(config.evaluate, workdir)
        elif config.evaluate.geneval:
            summarise_geneval(config.evaluate.geneval, workdir)
        else:
            evaluate(config, workdir)


def summarise_geneval(results: str, workdir: epath.Path) -> None:
    """The table of a result file of GenEval's scorer, in the log and in geneval.json."""
    scores = geneval.summarise(results)
    workdir.mkdir(parents=True, exist_ok=True)
    storage.replace_text(workdir / "geneval.json", json.dumps(scores._asdict(), indent=1) + "\n")
    logging.info("GenEval, %d images of %s:\n%s", scores.images, results, scores.table())


def evaluate(config: ConfigDict, workdir: epath.Path) -> None:
    """Scores evaluate.samples against evaluate.reference."""
    wanted = config.evaluate
    settings = evaluation_settings(config)

    # ---- Samples: the header alone, so that mistakes are found at once ----
    samples_file = epath.Path(wanted.samples or workdir / "samples.npz")
    check_exists("evaluate.samples", samples_file, "--mode=sample writes WORKDIR/samples.npz")
    if wanted.weights:
        check_exists("evaluate.weights", wanted.weights, "docs/evaluation.md says where it is from")
    available, *shape = npz.image_shape(samples_file)
    num_images = wanted.num_images or available
    if num_images > available:
        there = f"{samples_file} holds {available} images"
        raise ValueError(f"num_images = {num_images}, but {there}")
    if wanted.self_check and (settings.features, num_images) != SELF_CHECK:
        raise ValueError(
            "self_check = True compares 50,000 images with published scores of "
            f"inception_adm: evaluate.features is {settings.features}, and "
            f"there are {num_images} images"
        )
    # A file from elsewhere does not say how its images were drawn; it is known
    # by its bytes.
    sampling = npz.read_json(samples_file, "protocol")
    if not sampling:
        sampling = {"file": npz.file_hash(samples_file)}

    # ---- Network, reference and scores ----
    evaluator = make_evaluator(
        settings,
        num_images,
        config.data.dir,
        workdir,
    )
    batches = npz.image_batches(
        samples_file,
        num_images,
        settings.batch_size,
    )
    # The network's speed: neither reference nor scores are part of it.
    start = time.monotonic()
    samples = evaluator.collect(noting_equal(batches, samples_file))
    images_per_second = num_images / (time.monotonic() - start)
    scores = evaluator.score(samples)

    # ---- Report ----
    result = evaluator.make_result(scores, num_images, shape, sampling)
    # Not in the protocol: neither the path nor the speed decides a score.
    result["samples_file"] = str(samples_file)
    result["images_per_second"] = images_per_second
    if speed := read_speed(samples_file):
        result["sampling_speed"] = speed
    if wanted.self_check:
        result["self_check"] = protocol.self_check(scores)
    path = workdir / f"evaluation_{samples_file.stem}"
    reports.write_report(path, result)
    shown = min(GRID_IMAGES, num_images)
    (images,) = npz.image_batches(samples_file, shown, shown)
    grid = pictures.square_grid(images)
    pictures.save_picture(reports.with_ending(path, ".png"), grid)
    for name, value in scores.items():
        logging.info("eval/%s = %.4f", name, value)

    # After the report is written: it holds the table of both scores.
    check_passed(result.get("self_check", []))


def noting_equal(batches: Iterable[np.ndarray], file: epath.Path) -> Iterator[np.ndarray]:
    """Hands on the batches; a warning at their end says where all images are equal."""
    first = None
    count = 0
    equal = True
    for batch in batches:
        first = batch[:1] if first is None else first
        count += len(batch)
        equal = equal and bool((batch == first).all())
        yield batch
    if equal and count > 1:
        logging.warning("the %d images of %s are all equal: its model may be broken", count, file)


def read_speed(samples_file: epath.Path) -> dict[str, Any]:
    """How fast the sampling job drew the images.

    Returns: {} where the file does not say.
    """
    speed = npz.read_json(samples_file, "speed")
    # The report prints these three, and the file may be from elsewhere.
    if speed.keys() >= {"images_per_second", "devices", "device"}:
        if isinstance(speed["images_per_second"], int | float):
            return speed
    return {}


def check_passed(rows: list[dict[str, Any]]) -> None:
    """Raises ValueError for a score that is not the published one."""
    failed = []
    for row in rows:
        if not row["passed"]:
            here = f"{row['score']} is {row['here']:.4f}"
            there = f"{row['published']:.4f} +- {row['tolerance']}"
            failed.append(f"{here}, published {there}")
    if failed:
        raise ValueError(f"the self-check failed: {'; '.join(failed)}")


def compare(settings: ConfigDict, workdir: epath.Path) -> None:
    """Puts the evaluations of evaluate.compare side by side."""
    paths = [epath.Path(file) for file in settings.compare]
    # All of them before the first is read.
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"evaluate.compare: {path} not found")

    results = {}
    for name, path in zip(name_runs(paths), paths):
        try:
            results[name] = reports.read_result(path)
        except ValueError as error:
            raise ValueError(f"evaluate.compare: {error}") from error
    comparison = reports.compare(results, tuple(settings.compare_across))

    reports.write_comparison(workdir / "comparison", comparison)
    table = workdir / "comparison.md"
    logging.info("compared %d evaluations in %s", len(results), table)


def name_runs(paths: list[epath.Path]) -> list[str]:
    """Names of the runs, the shortest that tell them apart."""
    short = [path.stem for path in paths]
    longer = [f"{path.parent.name}/{path.stem}" for path in paths]
    for names in (short, longer):
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]
