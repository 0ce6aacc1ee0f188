"""The end of a training run in a few lines and pictures."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from lit_jax import checkpoint, pictures
from lit_jax.evaluation.in_training import DrawImages, draw_images
from lit_jax.evaluation.label_classifier import LabelClassifier
from lit_jax.runtime import metric_writer, storage


def report(
    samplers: Mapping[str, DrawImages],
    params: Mapping[str, Any],
    condition: Mapping[str, np.ndarray],
    workdir: epath.PathLike,
    *,
    steps: int,
    real_images: tuple[np.ndarray, np.ndarray] | None = None,
    on_batch: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Draws images with every model and says what the run came to.

    Leaves report.json and samples.png in the workdir, and logs the summary.

    Args:
      samplers: by the name of the model, the student last.
      params: the parameters of each sampler's model; of the student its EMA.
      condition: arrays (n, ...) for n images of each model.
      steps: how many the run has made.
      real_images: images (N, h, w, C) uint8 and labels (N,). A classifier
        fitted on them says how often it finds the label that a drawn image was
        asked to have. None: no classifier.
      on_batch: see `in_training.draw_images`.
    Returns: what report.json holds.
    """
    workdir = epath.Path(workdir)
    images = {
        name: draw_images(name, sampler, params[name], condition, on_batch)
        for name, sampler in samplers.items()
    }
    # The last one is what the run has made; the teacher is there to compare.
    student = list(images.values())[-1].images
    result: dict[str, Any] = {"num_images": len(student)}
    not_finite = {name: drawn.not_finite for name, drawn in images.items() if drawn.not_finite}
    if not_finite:
        result["images_not_finite"] = not_finite

    # The metrics of a finished run may have been removed or damaged; its report
    # is drawn all the same.
    lines = metric_writer.read_training(workdir) or [{"step": steps}]
    first = lines[0]
    last = lines[-1]
    result["loss"] = {}
    for name in pictures.loss_terms(last):
        key = f"train/{name}"
        # A term may have come later, with another config.
        if key in first:
            result["loss"][name] = {"start": first[key], "end": last[key]}
    result["parameters"] = {}
    for name, tree in params.items():
        result["parameters"][name] = checkpoint.parameter_count(tree)

    # A run from random weights has none.
    inheritance = workdir / "inheritance.json"
    if inheritance.exists():
        counts = read_inheritance(inheritance)
        if counts:
            result["inheritance"] = counts
        else:
            logging.warning("%s is damaged, and no part of the report", inheritance)

    if real_images is not None:
        # Of small images it says more to a person than a distance does.
        classifier = LabelClassifier(*real_images)
        labels = condition["label"]
        result["labels_read"] = {}
        for name, drawn in images.items():
            share = classifier.accuracy(drawn.images, labels)
            result["labels_read"][name] = share

    # All processes draw together, one writes.
    if jax.process_index() == 0:
        grid = pictures.square_grid(student)
        pictures.save_picture(workdir / "samples.png", grid)
        storage.replace_text(workdir / "report.json", json.dumps(result, indent=1) + "\n")
        text = summary(result, int(first["step"]), int(last["step"]), workdir)
        logging.info("%s", text)
    return result


def read_inheritance(path: epath.Path) -> dict[str, int]:
    """The number of parameters that were inherited, at init, left behind; {}: damaged."""
    parts = storage.read_object(path) or {}
    counts = {}
    for name in ("inherited", "at_init", "left_behind"):
        # {leaf: number of its parameters}
        leaves = parts.get(name)
        if not isinstance(leaves, dict) or {type(n) for n in leaves.values()} - {int}:
            return {}
        counts[name] = sum(leaves.values())
    return counts


def summary(
    result: Mapping[str, Any],
    first: int,
    last: int,
    workdir: epath.PathLike,
) -> str:
    """The report as the few lines that a person reads.

    Args:
      result: what `report` returns.
      first: the step of the first line of metrics, whose means are those of
        steps 1 to `first`.
      last: the step of the last one.
    """
    counts = [f"{name} {count:,}" for name, count in result["parameters"].items()]
    # An empty line first: the log line begins with time and file.
    lines = ["", f"parameters     {', '.join(counts)}"]

    if "inheritance" in result:
        parts = result["inheritance"]
        lines.append(
            f"inheritance    {parts['inherited']:,} inherited, "
            f"{parts['at_init']:,} new, "
            f"{parts['left_behind']:,} of the source left behind"
        )

    lines.append(f"loss terms     mean of steps 1 to {first:,} -> of the last ones, up to {last:,}")
    for name, values in result["loss"].items():
        start = values["start"]
        end = values["end"]
        lines.append(f"  {name:<13}{start:.4f} -> {end:.4f}")

    if "labels_read" in result:
        shares = [f"{name} {share:.1%}" for name, share in result["labels_read"].items()]
        lines.append(
            "labels read    by a classifier of the real images, on "
            f"{result['num_images']} images each: {', '.join(shares)}"
        )

    if "images_not_finite" in result:
        counts = [f"{name} {count}" for name, count in result["images_not_finite"].items()]
        lines.append(f"not finite     images of {result['num_images']} each: {', '.join(counts)}")

    names = (
        f"previews/step_{last:07d}.png",
        "samples.png",
        "curves.png",
    )
    paths = [f"{workdir}/{name}" for name in names]
    lines.append(f"pictures       {', '.join(paths)}")
    return "\n".join(lines)
