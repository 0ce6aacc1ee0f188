"""The paper's path, step by step, on a quickstart: what each guideline brings at a small budget.

    python launch/guidelines.py --config=configs/quickstart.py
    python launch/guidelines.py --config=configs/quickstart_t2i.py
    python launch/guidelines.py --config=configs/cifar10_lit.py --config.data.dir=DIRECTORY_OF_TFDS

Each stage adds one thing to the stage before it, and is trained from several seeds for the same
number of steps. Finished runs are lines of a file, --results, and are not run again: the same
command goes on, here or elsewhere. --at_once is for runs that keep few cores busy: two on a core
each take less time than one after the other, and several small ones share a GPU, where
XLA_PYTHON_CLIENT_PREALLOCATE=false keeps the first from taking its memory. The table is printed,
and written with its picture into the folder of the runs. Fields such as --config.data.dir are those
of every run.
"""

import argparse
import functools
import hashlib
import importlib
import itertools
import json
import pathlib
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(pathlib.Path(__file__).parent), str(ROOT)]
from finished import Finished, run_all  # noqa: E402  beside this file

# Of the loss: the mean over this many steps at the end.
LAST_STEPS = 100
SCENES_CONFIG = "quickstart_t2i"


def load(name: str) -> Any:
    """The config of that name."""
    return importlib.import_module(f"configs.{name}").get_config()


def parse(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the config's fields for every run, as they stand on the command line."""
    wanted, fields = parser.parse_known_args()
    unknown = [each for each in fields if not re.match(r"--config\.[\w.]+=", each)]
    if unknown:
        parser.error(f"unknown: {' '.join(unknown)}; a config's field is --config.FIELD=VALUE")
    return wanted, fields


def key_of(
    config: str, fields: dict[str, Any], common: Sequence[str], **about: Any
) -> dict[str, Any]:
    """What tells one run from all others; a run whose config's file has changed is another one.

    Args: fields: of the run. common: of every run. about: the run's name in the table, its seed.
    """
    said, default = (flatten_dict(load(name).to_dict(), sep=".") for name in (config, "default"))
    changed = {field for field in said if field not in default or said[field] != default[field]}
    of_all = {each.removeprefix("--config.").partition("=")[0]: each for each in common}
    changed -= {*fields, *of_all, "data.dir", "compilation_cache"}
    text = json.dumps({field: str(said[field]) for field in sorted(changed)})
    # Files of the repository by their names: its place differs from machine to machine.
    digest = hashlib.sha256(text.replace(f"{ROOT}/", "").encode()).hexdigest()[:8]
    key = {"config": config, "file": digest, "fields": fields, **about}
    # The same data elsewhere is the same run.
    of_all.pop("data.dir", None)
    return key | {"common": list(of_all.values())} if of_all else key


def stages(name: str) -> dict[str, dict[str, Any]]:
    """The fields of each stage, all of them, by the stage's name.

    Args: name: of a config whose teacher is on this machine, such as quickstart.
    """
    config = load(name)
    teacher = config.teacher.checkpoint
    scratch = {
        "teacher.checkpoint": "",
        "student.init": "random",
        "model.num_heads": 4,  # the teacher's
        "model.conv_size": 0,
    }
    convolution = scratch | {"model.conv_size": config.model.conv_size}
    few_heads = convolution | {"model.num_heads": config.model.num_heads}
    # All but attention, whatever the config's own recipe is; and its losses beside the teacher's.
    inherited = few_heads | {"student.init": teacher, "inherit.load": ("auto",)}
    noise = inherited | {
        "teacher.checkpoint": teacher,
        "distill.denoising_weight": 1.0,
        "distill.noise_weight": config.distill.noise_weight,
        "distill.variance_weight": 0.0,
        "distill.feature_weight": 0.0,
    }
    variance = noise | {"distill.variance_weight": config.distill.variance_weight}
    return {
        "linear attention from scratch": scratch,
        "+ convolution": convolution,
        "+ few heads": few_heads,
        "+ inherited": inherited,
        "+ noise distillation": noise,
        "+ variance distillation": variance,
    }


def command(
    config: str, fields: dict[str, Any], workdir: pathlib.Path, common: Sequence[str]
) -> list[str]:
    """The command line of one run."""
    arguments = [f"--config.{field}={value}" for field, value in fields.items()]
    main = [sys.executable, "-m", "lit_jax.main", f"--config={config}", f"--workdir={workdir}"]
    return main + arguments + list(common)


def run(
    config: str, fields: dict[str, Any], workdir: pathlib.Path, common: Sequence[str] = ()
) -> None:
    """Runs a config with its fields to its end; ends this program where that one fails.

    Args: common: what every run has on its command line besides.
    """
    # The statistics of the reference take longer than many a run, and are the same for all.
    known = next(workdir.parent.glob("*/reference_*.npz"), None)
    if known and not (workdir / known.name).exists():
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / known.name).hardlink_to(known)
    status = subprocess.run(command(config, fields, workdir, common), cwd=ROOT).returncode
    if status:
        sys.exit(status)


def metrics(workdir: pathlib.Path) -> list[dict[str, float]]:
    """The lines that a run wrote while it trained: of training and of its evaluations."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def mean_at_end(lines: list[dict[str, float]], name: str, steps: int) -> float:
    """The mean of a metric over so many steps before the last one that has it."""
    lines = [line for line in lines if name in line]
    return float(
        np.mean([line[name] for line in lines if line["step"] > lines[-1]["step"] - steps])
    )


def result(workdir: pathlib.Path) -> dict[str, float]:
    """The figures of a finished run, by their names in the table."""
    lines = metrics(workdir)
    path = workdir / "report.json"  # of CIFAR-10 there is none
    report = json.loads(path.read_text()) if path.exists() else {}
    found = {}
    for file in sorted(workdir.glob("evaluation_*.json")):
        scores = json.loads(file.read_text())["scores"]
        found |= {name: value for name, value in scores.items() if name.startswith("fd_")}
    if "labels_read" in report:
        found["labels read"] = report["labels_read"]["student"]
    if "geneval" in report:
        found["GenEval"] = report["geneval"]["student"]["overall"]
    for name in ("mse", "vb"):
        found[name] = mean_at_end(lines, f"train/{name}", LAST_STEPS)
    return found


def table(results: dict[str, list[dict[str, float]]], what: str = "stage") -> str:
    """Markdown: a line a stage, mean and standard deviation over its seeds.

    Args:
      results: of each stage, those of its seeds; infinite where a figure was not reached.
      what: the head of the stages' column.
    """
    names = list(next(iter(results.values()))[0])
    lines = [f"| {what} | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for stage, seeds in results.items():
        cells = []
        for name in names:
            values = [seed[name] for seed in seeds if np.isfinite(seed[name])]
            cell = f"{np.mean(values):.4g}" if values else "not reached"
            if len(values) > 1:
                cell += f" ± {np.std(values, ddof=1):.2g}"
            some = f" ({len(values)} of {len(seeds)})" if 0 < len(values) < len(seeds) else ""
            cells.append(cell + some)
        lines.append(f"| {stage} | {' | '.join(cells)} |")
    return "\n".join(lines)


def differences(
    results: dict[str, list[dict[str, float]]],
) -> dict[str, list[dict[str, float]]]:
    """What each stage adds to the one before it, by seed: seeds differ by more than stages do."""
    return {
        stage: [
            {name: value - less[name] for name, value in more.items()}
            for less, more in zip(before, after, strict=True)
        ]
        for (_, before), (stage, after) in itertools.pairwise(results.items())
    }


def draw(results: dict[str, list[dict[str, float]]], path: pathlib.Path) -> None:
    """A picture of the table: a dot a run, a line through the means."""
    from matplotlib.figure import Figure

    names = list(next(iter(results.values()))[0])
    figure = Figure(figsize=(3.2 * len(names), 3.4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        values = [[seed[name] for seed in seeds] for seeds in results.values()]
        places = range(len(values))
        axes.plot(places, [np.mean(each) for each in values], color="tab:blue")
        for place, each in zip(places, values, strict=True):
            axes.plot([place] * len(each), each, "o", color="tab:blue", alpha=0.5)
        axes.set_xticks(places, list(results), rotation=40, ha="right", fontsize=7)
        axes.set_title(name)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", default="configs/quickstart.py")
    parser.add_argument("--workdir", help="default: workdir/guidelines/NAME")
    parser.add_argument("--results", help="default: results.jsonl in the workdir")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--at_once", type=int, default=1, help="runs, each on its share of cores")
    parser.add_argument("--images", type=int, default=500, help="of each Frechet distance")
    wanted, common = parse(parser)
    name = pathlib.Path(wanted.config).stem
    folder = pathlib.Path(wanted.workdir or f"workdir/guidelines/{name}")
    finished = Finished(pathlib.Path(wanted.results or folder / "results.jsonl"))
    budget = {
        "train.steps": wanted.steps,
        "train.preview_every": 0,
        "checkpoint.every": wanted.steps,
    }
    # The scenes are composed as they are read: there is no data set to compare features with.
    if name == SCENES_CONFIG:
        budget["sample.steps"] = 20  # of the report, which draws with teacher and student
    else:
        budget |= {"evaluate.every": wanted.steps, "evaluate.every_images": wanted.images}
        budget["evaluate.reference"] = f"{load(name).data.name}:train"
    path = stages(name)

    def student(seed: int, stage: str) -> dict[str, float]:
        """The `result` of a run."""
        fields = path[stage]
        # Of the teacher its name: its place differs from machine to machine.
        named = {field: str(value).removeprefix(f"{ROOT}/") for field, value in fields.items()}
        key = key_of(name, named | budget, common, name=stage, seed=seed)
        workdir = folder / f"stage_{list(path).index(stage)}_seed_{seed}"

        def train() -> dict[str, float]:
            print(f"{stage}, seed {seed}: {workdir}", flush=True)
            run(wanted.config, fields | budget | {"seed": seed}, workdir, common)
            return result(workdir)

        return finished.get(key, train)

    # Seed by seed: a table of one seed is there after a third of the time.
    asked = list(itertools.product(range(wanted.seeds), path))
    found = run_all([functools.partial(student, *each) for each in asked], wanted.at_once)
    results: dict[str, list[dict[str, float]]] = {}
    for (_, stage), figures in zip(asked, found, strict=True):
        results.setdefault(stage, []).append(figures)
    text = f"{table(results)}\n\n{table(differences(results), 'against the stage before')}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(text + "\n")
    draw(results, folder / "guidelines.png")
    print(text)


if __name__ == "__main__":
    main()
