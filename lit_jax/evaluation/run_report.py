"""The end of a training run in a few lines and pictures."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from PIL import Image

from lit_jax import checkpoint, pictures
from lit_jax.evaluation import geneval, in_training
from lit_jax.evaluation.in_training import DrawImages, Drawn, draw_images
from lit_jax.runtime import metric_writer, storage

# Images of samples.png where they have captions: 5 for each of GenEval's tasks.
CAPTIONED = 30


def report(
    samplers: Mapping[str, DrawImages],
    params: Mapping[str, Any],
    condition: Mapping[str, np.ndarray],
    workdir: epath.PathLike,
    *,
    asked: Mapping[str, Any],
    captions: Sequence[str] = (),
    read_labels: Callable[[np.ndarray], float] | None = None,
    score_prompts: Callable[[np.ndarray], geneval.Scores] | None = None,
    on_batch: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Draws images with every model and says what the run came to.

    Leaves report.json and samples.png in the workdir, and logs the summary.

    Args:
      samplers: by the name of the model, the student last.
      params: the parameters of each sampler's model; of the student its EMA.
      condition: arrays (n, ...) for n images of each model.
      asked: JSON values that the report depends on, its "step" among them; report.json
        repeats them.
      captions: of the n images, where they have any.
      read_labels: how often a classifier finds in images (n, h, w, C) uint8
        the label that they were asked to have. None: no classifier.
      score_prompts: how often they show what their prompts ask for. None:
        nobody looks.
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
    result: dict[str, Any] = {"asked": asked, "num_images": len(student)}
    not_finite = {name: drawn.not_finite for name, drawn in images.items() if drawn.not_finite}
    if not_finite:
        result["images_not_finite"] = not_finite

    # The metrics of a finished run may have been removed or damaged; its report
    # is drawn all the same.
    lines = metric_writer.read_training(workdir) or [{"step": asked["step"]}]
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

    if read_labels:
        # Of small images it says more to a person than a distance does.
        result["labels_read"] = {name: read_labels(drawn.images) for name, drawn in images.items()}
    if score_prompts:
        result["geneval"] = {
            name: score_prompts(drawn.images)._asdict() for name, drawn in images.items()
        }

    # All processes draw together, one writes.
    if jax.process_index() == 0:
        grid = captioned_grid(images, captions) if captions else pictures.square_grid(student)
        pictures.save_picture(workdir / "samples.png", grid)
        storage.replace_text(workdir / "report.json", json.dumps(result, indent=1) + "\n")
        text = summary(result, int(first["step"]), int(last["step"]), workdir)
        logging.info("%s", text)
    return result


def captioned_grid(images: Mapping[str, Drawn], captions: Sequence[str]) -> Image.Image:
    """Some images of all models with their captions, those of one caption side by side."""
    chosen = np.linspace(0, len(captions) - 1, min(CAPTIONED, len(captions))).astype(int)
    rows = [drawn.images[chosen] for drawn in images.values()]
    # White between them, or two black pictures would look like one.
    n, h, _, C = rows[0].shape
    gap = np.full((n, h, 1, C), 255, np.uint8)
    parts = [part for row in rows for part in (row, gap)][:-1]
    return pictures.square_grid(np.concatenate(parts, axis=2), [captions[i] for i in chosen])


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


def _row(name: str, shares: Sequence[float]) -> str:
    return f"  {name:<15}" + "  ".join(f"{share:.3f}" for share in shares)


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

    if "geneval" in result:
        scores = result["geneval"]
        lines.append(
            f"prompts        {' and '.join(scores)}, share of {result['num_images']} images each "
            "that show what their prompt asks for"
        )
        for task in geneval.TASKS:
            lines.append(_row(task, [each["tasks"][task] for each in scores.values()]))
            # Pairs of colour and digit that training never showed, apart from the others.
            for part in ("seen", "unseen"):
                if apart := [each[part][task] for each in scores.values() if task in each[part]]:
                    lines.append(_row(f"  {part}", apart))
        lines.append(_row("overall", [each["overall"] for each in scores.values()]))

    if "images_not_finite" in result:
        counts = [f"{name} {count}" for name, count in result["images_not_finite"].items()]
        lines.append(f"not finite     images of {result['num_images']} each: {', '.join(counts)}")

    preview = in_training.preview_path(epath.Path(workdir) / "previews", last)
    paths = [str(preview)] if preview.exists() else []
    paths += [f"{workdir}/{name}" for name in ("samples.png", "curves.png")]
    lines.append(f"pictures       {', '.join(paths)}")
    return "\n".join(lines)
