"""The end of a training run in a few lines and pictures: report.json, samples.png, a summary."""

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
from lit_jax.runtime import metric_writer

LOSS_TERMS = ("loss", "mse", "vb", "kd_noise", "kd_variance")


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
    """Draws images with every model, writes the report into the workdir, and logs its summary.

    Args:
      samplers: by the name of the model, the student last.
      params: the parameters of each sampler's model; of the student its EMA.
      condition: arrays (n, ...) for n images of each model.
      steps: how many the run has made.
      real_images: images (N, h, w, C) uint8 and labels (N,). A classifier fitted on them says how
        often it finds the label that a drawn image was asked to have. None: no classifier.
      on_batch: see `in_training.draw_images`.
    Returns: what report.json holds.
    """
    workdir = epath.Path(workdir)
    images = {
        name: draw_images(sampler, params[name], condition, on_batch)
        for name, sampler in samplers.items()
    }
    result: dict[str, Any] = {"num_images": len(next(iter(images.values())))}

    # The metrics of a finished run may have been removed; its report is drawn all the same.
    lines = metric_writer.read_training(workdir) or [{"step": steps}]
    first = lines[0]
    last = lines[-1]
    result["loss"] = {
        name: {"start": first[f"train/{name}"], "end": last[f"train/{name}"]}
        for name in LOSS_TERMS
        if f"train/{name}" in last
    }
    result["parameters"] = {name: checkpoint.parameter_count(tree) for name, tree in params.items()}

    inheritance = workdir / "inheritance.json"
    if inheritance.exists():
        parts = json.loads(inheritance.read_text())
        result["inheritance"] = {name: sum(leaves.values()) for name, leaves in parts.items()}

    if real_images is not None:
        classifier = LabelClassifier(*real_images)
        result["labels_read"] = {
            name: classifier.accuracy(drawn, condition["label"]) for name, drawn in images.items()
        }

    # All processes draw together, one writes.
    if jax.process_index() == 0:
        student = list(images.values())[-1]
        with (workdir / "samples.png").open("wb") as file:
            pictures.square_grid(student).save(file, format="png")
        (workdir / "report.json").write_text(json.dumps(result, indent=1) + "\n")
        text = summary(result, int(first["step"]), int(last["step"]), workdir)
        logging.info("%s", text)
    return result


def summary(result: Mapping[str, Any], first: int, last: int, workdir: epath.PathLike) -> str:
    """The report as the few lines that a person reads.

    Args:
      result: what `report` returns.
      first: the step of the first line of metrics, whose means are those of steps 1 to `first`.
      last: the step of the last one.
    """
    counts = [f"{name} {count:,}" for name, count in result["parameters"].items()]
    lines = ["", f"parameters     {', '.join(counts)}"]

    if "inheritance" in result:
        parts = result["inheritance"]
        lines.append(
            f"inheritance    {parts['inherited']:,} inherited, {parts['at_init']:,} new, "
            f"{parts['left_behind']:,} of the source left behind"
        )

    lines.append(f"loss terms     mean of steps 1 to {first:,} -> of the last ones, up to {last:,}")
    for name, values in result["loss"].items():
        lines.append(f"  {name:<13}{values['start']:.4f} -> {values['end']:.4f}")

    if "labels_read" in result:
        shares = [f"{name} {share:.1%}" for name, share in result["labels_read"].items()]
        lines.append(
            "labels read    by a classifier of the real images, on "
            f"{result['num_images']} images each: {', '.join(shares)}"
        )

    names = (f"previews/step_{last:07d}.png", "samples.png", "curves.png")
    lines.append(f"pictures       {', '.join(f'{workdir}/{name}' for name in names)}")
    return "\n".join(lines)
