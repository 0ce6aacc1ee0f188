"""Every design of linear attention by every recipe on a quickstart, at equal steps.

    python launch/workbench.py --config=configs/quickstart.py
    python launch/workbench.py --config=configs/quickstart_t2i.py --designs LiT
    python launch/workbench.py --config=configs/cifar10_lit.py --config.data.dir=DIRECTORY_OF_TFDS
    python launch/workbench.py --costs

All runs have the same teacher, data, batch and number of steps; the steps of a first stage of
layer-wise regression count, though each of them costs less. Finished runs are lines of a file,
--results, and are not run again: the same command goes on, here or elsewhere. --at_once and fields
such as --config.data.dir are as in guidelines.py. --designs and --recipes choose among them; three
variants of recipes are run where they are asked for by name. The table is printed, and written with
its picture into the folder of the runs. --costs prints what each design costs in XL/2, and runs
nothing.
"""

import argparse
import functools
import itertools
import json
import math
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

sys.path[:0] = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parent.parent)]
import guidelines  # noqa: E402  beside this file
from finished import Finished, run_all  # noqa: E402

# With what `SIZED` adds for a config.
DESIGNS: dict[str, dict[str, Any]] = {
    "LiT": {},
    "Sana": {"model.conv_size": 0},
    "MHLA": {"model.attention": "mhla", "model.conv_size": 3},
    "MALA": {"model.attention": "mala"},
    "DiT5": {"model.attention": "dit5", "model.conv_size": 3},
    "LiT, one softmax": {},
}
ALL_BUT_ATTENTION = {"inherit.load": ("auto",)}  # LiT's guideline 4
WHOLE = {"inherit.load": ("q", "k", "v", "o")}
RECIPES: dict[str, dict[str, Any]] = {
    "all but attention": ALL_BUT_ATTENTION,
    "q, k, v, o": WHOLE,
    "q, k, v, o, two rates": WHOLE | {"optimizer.inherited_rate": 0.1},
    "layers first": ALL_BUT_ATTENTION,
}
# What two of the recipes leave open, asked for by name: other rates, and other layers first.
VARIANTS: dict[str, dict[str, Any]] = {
    "q, k, v, o, two rates, 0.3": WHOLE | {"optimizer.inherited_rate": 0.3},
    "q, k, v, o, two rates, 0.01": WHOLE | {"optimizer.inherited_rate": 0.01},
    "layers first, q, k, v, o": WHOLE,
}
ALL_RECIPES = RECIPES | VARIANTS
LAYERS_FIRST = "layers first"  # the beginning of a recipe's name
# Of the steps, the first ones of such a recipe.
LAYERS_SHARE = 0.25
# Of digits: the scores of a run, and the images of each.
SCORES = 3
IMAGES = 100
# Of scenes there is one, of all prompts: its images are the report's, with the teacher's.
SCENES_CONFIG = guidelines.SCENES_CONFIG
DIGITS_CONFIG = "quickstart"
STEPS = {DIGITS_CONFIG: 150, SCENES_CONFIG: 400, "cifar10_lit": 300}
# What depends on the size: Sana's heads of 32 columns, MHLA's blocks of one token, of 2 x 2 and of
# 4 x 4, and the depth, so that the last layer alone keeps softmax.
SIZED: dict[str, dict[str, dict[str, Any]]] = {
    name: {
        "Sana": {"model.num_heads": width // 32},
        "MHLA": {"model.num_blocks": num_blocks},
        "LiT, one softmax": {"model.softmax_every": depth},
    }
    for name, width, depth, num_blocks in (
        (DIGITS_CONFIG, 160, 5, 49),
        (SCENES_CONFIG, 160, 5, 16),
        ("cifar10_lit", 256, 8, 16),
    )
}
# Of the distillation's error: the mean over this many steps at the end.
LAST_STEPS = 50
# A student has reached its teacher where it reads so much less of the labels.
WITHIN = 0.05
REGRESSION: dict[str, Any] = {
    "distill.attention_weight": 1.0,
    "distill.feature_weight": 0.0,
    "distill.denoising_weight": 0.0,
    "distill.noise_weight": 0.0,
    "distill.variance_weight": 0.0,
    "report.num_images": 0,
    "report.read_labels": False,
    "report.read_scenes": False,
    "train.preview_every": 0,
}
# Teacher and students draw digits alike.
DRAWN: dict[str, Any] = {"sample.steps": 10, "sample.batch_size": IMAGES // 2}
# The teacher draws as many images, beside those of a student of one step.
TEACHER: dict[str, Any] = DRAWN | {
    "train.steps": 1,
    "optimizer.warmup": 0,
    "train.preview_every": 0,
    "checkpoint.every": 1,
    "report.num_images": IMAGES,
}
# The same designs in the size that their papers measure, for --costs.
XL_DESIGNS: dict[str, dict[str, Any]] = {
    "softmax": dict(attention="softmax"),
    "LiT": dict(attention="linear"),
    "Sana": dict(attention="linear", num_heads=36, conv_size=0),
    "MHLA": dict(attention="mhla", conv_size=3, num_blocks=16),
    "MALA": dict(attention="mala"),
    "DiT5": dict(attention="dit5", conv_size=3),
    "LiT, softmax every 4": dict(attention="linear", softmax_every=4),
}
PIXELS = (256, 512, 1024, 2048)


def first_steps(recipe: str, steps: int) -> int:
    """The steps of the stage before the one that is scored."""
    return round(LAYERS_SHARE * steps) if recipe.startswith(LAYERS_FIRST) else 0


def designs(name: str) -> dict[str, dict[str, Any]]:
    """The fields of each design in a config's model, by the design's name."""
    return {design: fields | SIZED[name].get(design, {}) for design, fields in DESIGNS.items()}


def fields_of(name: str, design: str, recipe: str) -> dict[str, Any]:
    """The fields of a design and a recipe. Args: name: of the config, a key of `STEPS`."""
    return designs(name)[design] | ALL_RECIPES[recipe]


def runs(
    name: str, design: str, recipe: str, steps: int, workdir: pathlib.Path
) -> list[tuple[dict[str, Any], pathlib.Path]]:
    """The runs of a recipe, one after the other: the fields and the workdir of each.

    Args: name: of the config, a key of `STEPS`.
    """
    fields = fields_of(name, design, recipe)
    first = first_steps(recipe, steps)
    last = fields | budget(name, steps - first)
    if not first:
        return [(last, workdir)]
    layers = workdir.with_name(f"{workdir.name}_layers")
    regression = fields | {"train.steps": first, "checkpoint.every": first} | REGRESSION
    # Of one architecture, "auto" is everything: the regressed attentions too.
    last |= ALL_BUT_ATTENTION | {"student.init": str(layers)}
    return [(regression, layers), (last, workdir)]


def budget(name: str, steps: int) -> dict[str, Any]:
    """The fields of the run that is scored: digits on its way and at its end, others at its end."""
    common = {"train.steps": steps, "train.preview_every": 0, "checkpoint.every": steps}
    if name == SCENES_CONFIG:
        return common | {"sample.steps": 20}
    if name != DIGITS_CONFIG:
        return common | {"evaluate.every": steps, "evaluate.every_images": 500}
    scores = {
        "evaluate.every": -(-steps // SCORES),
        "evaluate.every_images": IMAGES,
        "evaluate.reference": "mnist_digits:train",
        "evaluate.batch_size": IMAGES // 2,
        "report.num_images": 0,
    }
    return DRAWN | common | scores


def result(workdir: pathlib.Path, first: int) -> dict[str, Any]:
    """The figures of a finished run; of digits the share of labels read at each scored step too.

    Args: first: the steps of the stage before, which count.
    """
    lines = guidelines.metrics(workdir)
    kd_noise = {"kd_noise": guidelines.mean_at_end(lines, "train/kd_noise", LAST_STEPS)}
    scores = [line for line in lines if any(name.startswith("eval/fd_") for name in line)]
    if not scores:
        report = json.loads((workdir / "report.json").read_text())["geneval"]
        scene_scores = {who: report[who]["overall"] for who in ("student", "teacher")}
        return {"figures": scene_scores | kd_noise}
    found = {
        name.removeprefix("eval/"): value
        for name, value in scores[-1].items()
        if name.startswith("eval/fd_")
    }
    if "eval/labels_read" not in scores[-1]:
        return {"figures": found | kd_noise}
    found["labels read"] = scores[-1]["eval/labels_read"]
    curve = [(first + line["step"], line["eval/labels_read"]) for line in scores]
    return {"figures": found | kd_noise, "curve": curve}


def figures(found: dict[str, Any], teacher: float | None) -> dict[str, float]:
    """A run's cells of the table; steps to the teacher are infinite where it is not reached.

    Args:
      found: the run's `result`.
      teacher: the share of labels that are read in the teacher's images; None where none are read.
    """
    if teacher is None:
        return found["figures"]
    reached = [step for step, read in found["curve"] if read >= teacher - WITHIN]
    return found["figures"] | {"steps to the teacher": float(min(reached, default=math.inf))}


def draw(
    results: dict[str, list[dict[str, Any]]],
    names: Sequence[str],
    recipes: Sequence[str],
    path: pathlib.Path,
) -> None:
    """A panel for each design: labels read over the steps, a line for each recipe's mean.

    Args:
      results: of each design and recipe, by its name in the table, the `result` of each seed.
      names: of the designs.
    """
    from matplotlib.figure import Figure

    columns = min(len(names), 3)
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(3.7 * columns, 3.1 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, design in zip(panels, names):
        for recipe in recipes:
            curves = np.array([found["curve"] for found in results[f"{design}: {recipe}"]])
            steps, values = curves[0, :, 0], curves[:, :, 1]
            (line,) = axes.plot(steps, values.mean(0), "o-", markersize=3, label=recipe)
            axes.fill_between(
                steps, values.min(0), values.max(0), color=line.get_color(), alpha=0.15
            )
        axes.set_title(design)
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.supxlabel("steps")
    figure.supylabel("labels read")
    figure.savefig(path, dpi=110)


def costs() -> str:
    """Markdown: parameters of XL/2 and FLOPs of a forward pass, by design and image size."""
    import jax

    from lit_jax import models
    from lit_jax.models.dit import DiTConfig

    lines = [f"| design | parameters, M | {' | '.join(f'{p} px' for p in PIXELS)} |"]
    lines.append("|---" * (2 + len(PIXELS)) + "|")
    for name, fields in XL_DESIGNS.items():
        config = DiTConfig.of_size("XL", **fields)
        leaves = models.param_shapes(config)
        count = sum(leaf.size for leaf in jax.tree.leaves(leaves))
        flops = [config.forward_flops((pixels // 8, pixels // 8)) / 1e12 for pixels in PIXELS]
        cells = " | ".join(f"{each:.3f}" for each in flops)
        lines.append(f"| {name} | {count / 1e6:.1f} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", default="configs/quickstart.py", help=f"of {', '.join(STEPS)}")
    parser.add_argument("--workdir", help="default: workdir/workbench/NAME")
    parser.add_argument("--results", help="default: results.jsonl in the workdir")
    parser.add_argument("--designs", nargs="+", choices=DESIGNS, default=list(DESIGNS))
    parser.add_argument("--recipes", nargs="+", choices=ALL_RECIPES, default=list(RECIPES))
    parser.add_argument("--steps", type=int, help="default: by the config")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--at_once", type=int, default=1, help="runs, each on its share of cores")
    parser.add_argument("--costs", action="store_true")
    wanted, common = guidelines.parse(parser)
    if wanted.costs:
        print(costs())
        return
    config = pathlib.Path(wanted.config).stem
    if config not in STEPS:
        parser.error(f"--config={wanted.config} is none of {', '.join(STEPS)}")
    steps = wanted.steps or STEPS[config]
    folder = pathlib.Path(wanted.workdir or f"workdir/workbench/{config}")
    finished = Finished(pathlib.Path(wanted.results or folder / "results.jsonl"))

    def teacher(seed: int) -> float | None:
        """The share of labels that are read in the teacher's images."""
        if config != DIGITS_CONFIG:
            return None  # each report of a student on scenes has the teacher's score
        workdir = folder / f"teacher_seed_{seed}"

        def train() -> dict[str, Any]:
            guidelines.run(wanted.config, TEACHER | {"seed": seed}, workdir, common)
            report = json.loads((workdir / "report.json").read_text())
            return {"labels read": report["labels_read"]["teacher"]}

        key = guidelines.key_of(config, TEACHER, common, name="teacher", seed=seed)
        return finished.get(key, train)["labels read"]

    def student(seed: int, design: str, recipe: str) -> dict[str, Any]:
        """The `result` of a run."""
        name = f"{design}: {recipe}"
        place = "_".join(name.lower().replace(":", "").replace(",", "").split())
        workdir = folder / f"{place}_seed_{seed}"

        def train() -> dict[str, Any]:
            for fields, run_workdir in runs(config, design, recipe, steps, workdir):
                print(f"{name}, seed {seed}: {run_workdir}", flush=True)
                guidelines.run(wanted.config, fields | {"seed": seed}, run_workdir, common)
            return result(workdir, first_steps(recipe, steps))

        fields = fields_of(config, design, recipe) | budget(config, steps)
        key = guidelines.key_of(config, fields, common, name=name, seed=seed)
        return finished.get(key, train)

    # Seed by seed: a table of one seed is there after a third of the time.
    seeds = range(wanted.seeds)
    asked = list(itertools.product(seeds, wanted.designs, wanted.recipes))
    read = run_all([functools.partial(teacher, seed) for seed in seeds], wanted.at_once)
    found = run_all([functools.partial(student, *run) for run in asked], wanted.at_once)
    results: dict[str, list[dict[str, Any]]] = {}
    rows: dict[str, list[dict[str, float]]] = {}
    for (seed, design, recipe), run in zip(asked, found, strict=True):
        results.setdefault(f"{design}: {recipe}", []).append(run)
        rows.setdefault(f"{design}: {recipe}", []).append(figures(run, read[seed]))
    text = guidelines.table(rows, "design: recipe")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(text + "\n")
    if config == DIGITS_CONFIG:
        draw(results, wanted.designs, wanted.recipes, folder / "workbench.png")
    else:
        guidelines.draw(rows, folder / "workbench.png")
    print(text)


if __name__ == "__main__":
    main()
