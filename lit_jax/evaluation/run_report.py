"""report"""

import json, pathlib
from collections.abc import Callable
from typing import Any
import jax, numpy as np
from absl import logging
from lit_jax import checkpoint, pictures
from lit_jax.data import dataset
from lit_jax.evaluation import label_classifier
from lit_jax.runtime import metric_writer


def report(samplers, params, index, condition, workdir, *, steps, real, on_batch):
    images, result = {}, {"num_images": len(index)}
    for name, sampler in samplers.items():
        images[name] = pictures.to_uint8(sampler(params[name], index, condition, on_batch))
    lines = metric_writer.read_training(workdir) or [
        {"step": steps}
    ]  # a finished run whose metrics are gone
    first, last = lines[0], lines[-1]
    terms = [
        name for name in ("loss", "mse", "vb", "kd_noise", "kd_variance") if f"train/{name}" in last
    ]
    result["loss"] = {
        name: {"start": first[f"train/{name}"], "end": last[f"train/{name}"]} for name in terms
    }
    result["parameters"] = {name: checkpoint.parameter_count(tree) for name, tree in params.items()}
    if (workdir / "inheritance.json").exists():
        parts = json.loads((workdir / "inheritance.json").read_text())
        result["inheritance"] = {name: sum(leaves.values()) for name, leaves in parts.items()}
    if real is not None:
        reader = label_classifier.LabelClassifier(*dataset.read_all(real))
        result["labels_read"] = {
            name: reader.accuracy(picture, condition["label"]) for name, picture in images.items()
        }
    if jax.process_index() == 0:
        pictures.square_grid(list(images.values())[-1]).save(workdir / "samples.png")
        (workdir / "report.json").write_text(json.dumps(result, indent=1) + "\n")
        logging.info("%s", summary(result, first["step"], last["step"], workdir))


def summary(result: dict[str, Any], first: int, last: int, workdir: pathlib.Path) -> str:
    """The report as the few lines that a person reads."""
    lines = [
        "",
        f"parameters     {', '.join(f'{name} {count:,}' for name, count in result['parameters'].items())}",
    ]
    if "inheritance" in result:
        parts = result["inheritance"]
        lines.append(
            f"inheritance    {parts['inherited']:,} inherited, {parts['at_init']:,} new, "
            f"{parts['left_behind']:,} of the source left behind"
        )
    lines.append(f"loss terms     mean of steps 1 to {first:,} -> of the last ones, up to {last:,}")
    lines += [
        f"  {name:<13}{values['start']:.4f} -> {values['end']:.4f}"
        for name, values in result["loss"].items()
    ]
    if "labels_read" in result:
        lines.append(
            f"labels read    by a classifier of the real images, on {result['num_images']} images each: "
            + ", ".join(f"{name} {share:.1%}" for name, share in result["labels_read"].items())
        )
    lines.append(
        f"pictures       {workdir}/previews/step_{last:07d}.png, {workdir}/samples.png, {workdir}/curves.png"
    )
    return "\n".join(lines)
