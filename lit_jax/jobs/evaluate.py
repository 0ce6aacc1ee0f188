"""--mode=evaluate: scores uint8 images against a reference.

    python -m lit_jax.main --config=configs/NAME.py --mode=evaluate \\
        --workdir=DIR \\
        --config.evaluate.samples=samples.npz \\
        --config.evaluate.reference=VIRTUAL_imagenet256_labeled.npz \\
        --config.evaluate.features=inception_adm \\
        --config.evaluate.weights=pt_inception-2015-12-05-6726825d.pth

Both may be folders of images too.

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
from lit_jax.evaluation import geneval, protocol, reports
from lit_jax.evaluation.digit_detector import DigitDetector
from lit_jax.evaluation.evaluator import make_evaluator
from lit_jax.evaluation.images import (
    FolderImages,
    NpzImages,
    naming_path,
    open_images,
)
from lit_jax.runtime import storage
from lit_jax.settings import check_exists, evaluation_settings, naming

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
    with naming("evaluate", directory="data.dir"):
        if config.evaluate.compare:
            compare(config, workdir)
        elif config.evaluate.geneval:
            summarise_geneval(config.evaluate.geneval, workdir)
        else:
            evaluate(config, workdir)


def summarise_geneval(results: str, workdir: epath.Path) -> None:
    """The table of a result file of GenEval's scorer, in the log and in geneval.json.

    A folder of digit scenes is scored here; its results are written as results.jsonl.
    """
    path = epath.Path(results)
    judged: list[dict[str, Any]] = []
    if path.is_dir():
        judged = geneval.judge(path, DigitDetector())
        scores = geneval.score(judged)
    else:
        scores = geneval.summarise(path)
    workdir.mkdir(parents=True, exist_ok=True)
    if judged:
        lines = "".join(json.dumps(result) + "\n" for result in judged)
        storage.replace_text(workdir / "results.jsonl", lines)
    storage.replace_text(
        workdir / "geneval.json",
        json.dumps(scores._asdict(), indent=1) + "\n",
    )
    logging.info(
        "GenEval, %d images of %s:\n%s",
        scores.images,
        results,
        scores.table(),
    )


def evaluate(config: ConfigDict, workdir: epath.Path) -> None:
    """Scores evaluate.samples against evaluate.reference."""
    wanted = config.evaluate
    settings = evaluation_settings(config)

    # ---- Samples: their headers alone, so that mistakes are found at once ----
    path = epath.Path(wanted.samples or workdir / "samples.npz")
    if not wanted.samples and not path.exists():
        raise FileNotFoundError(
            f"evaluate.samples is empty, and {path} is not there yet: draw the samples first, by "
            f"the same command with --mode=sample, or name an npz or a folder"
        )
    check_exists("evaluate.samples", path, "--mode=sample writes WORKDIR/samples.npz")
    if wanted.weights:
        check_exists(
            "evaluate.weights",
            wanted.weights,
            "docs/evaluation.md says where it is from",
        )
    with naming_path("samples", path):
        images = open_images(path)
    num_images = wanted.num_images or images.count
    if num_images > images.count:
        there = f"{path} holds {images.count} images"
        raise ValueError(f"num_images = {num_images}, but {there}")
    if wanted.self_check and (settings.features, num_images) != SELF_CHECK:
        raise ValueError(
            "self_check = True compares 50,000 images with published scores of "
            f"inception_adm: evaluate.features is {settings.features}, and "
            f"there are {num_images} images"
        )
    # Images from elsewhere do not say how they were drawn; they are known by
    # their bytes.
    with naming_path("samples", path):
        sampling = images.about("protocol") or {"file": images.content_hash()}
        speed = read_speed(images)

    # ---- Network, reference and scores ----
    evaluator = make_evaluator(
        settings,
        num_images,
        config.data.dir,
        workdir,
    )
    seen = Seen(images.batches(num_images, settings.batch_size))
    # The network's speed: neither reference nor scores are part of it.
    start = time.monotonic()
    with naming_path("samples", path):
        samples = evaluator.collect(seen)
    images_per_second = num_images / (time.monotonic() - start)
    scores = evaluator.score(samples)

    # ---- Report ----
    result = evaluator.make_result(scores, num_images, images.shape, sampling)
    if seen.are_equal:
        equal = f"the {num_images} images of {path} are all equal: their model may be broken"
        result["notes"].append(equal)
    # Not in the protocol: neither the path nor the speed decides a score.
    result["samples_file"] = str(path)
    result["images_per_second"] = images_per_second
    if speed:
        result["sampling_speed"] = speed
    if wanted.self_check:
        result["self_check"] = protocol.self_check(scores)
    report = workdir / f"evaluation_{images.name}"
    reports.write_report(report, result)
    grid = pictures.square_grid(np.stack(seen.first))
    pictures.save_picture(reports.with_ending(report, ".png"), grid)
    for name, value in scores.items():
        logging.info("eval/%s = %.4f", name, value)
    for note in result["notes"]:
        logging.warning("%s", note)

    # After the report is written: it holds the table of both scores.
    check_passed(result.get("self_check", []))


class Seen:
    """Hands on batches, and notes what the report says of their images.

    Attributes:
      first: the first images, (H, W, C) each, for the grid.
      are_equal: whether all images are the same one.
    """

    def __init__(self, batches: Iterable[np.ndarray]):
        self._batches = batches
        self.first: list[np.ndarray] = []
        self.are_equal = True

    def __iter__(self) -> Iterator[np.ndarray]:
        for batch in self._batches:
            self.first.extend(batch[: GRID_IMAGES - len(self.first)])
            self.are_equal = self.are_equal and bool((batch == self.first[0]).all())
            yield batch


def read_speed(images: NpzImages | FolderImages) -> dict[str, Any]:
    """How fast the sampling job drew the images.

    Returns: {} where the file does not say.
    """
    speed = images.about("speed")
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


def compare(config: ConfigDict, workdir: epath.Path) -> None:
    """Puts the evaluations of evaluate.compare side by side."""
    settings = config.evaluate
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
