"""Evaluations written for people.

JSON, Markdown, and comparisons with curves.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from lit_jax import pictures
from lit_jax.evaluation import protocol
from lit_jax.runtime import storage

# ---- One evaluation ----


def write_report(path: epath.PathLike, result: Mapping[str, Any]) -> None:
    """Writes path.json and path.md.

    Args:
      result: what `Evaluator.make_result` returns. The evaluation job adds
        samples_file and images_per_second, and where there are any,
        sampling_speed and self_check.
    """
    lines = ["# Evaluation", ""]
    scores = result["scores"].items()
    rows = [[name, f"{value:.4f}"] for name, value in scores]
    lines += table(["score", "value"], rows)
    for note in result.get("notes", []):
        lines += ["", f"Note: {note}."]

    if "self_check" in result:
        lines += ["", "## Self-check against the published figures", ""]
        lines += _self_check_table(result["self_check"])

    lines += ["", "## Protocol", ""]
    fields = protocol.flatten(result["protocol"])
    lines += table(["field", "value"], fields.items())

    # Neither is there in training, where the images come from memory.
    if "samples_file" in result:
        file = result["samples_file"]
        speed = f"{result['images_per_second']:.1f} images/s"
        where = f"the feature network on {result['device']}"
        lines.append("")
        lines.append(f"{file}, {speed} through {where}.")
    if "sampling_speed" in result:
        drawn = result["sampling_speed"]
        speed = f"{drawn['images_per_second']:.1f} images/s"
        devices = f"{drawn['devices']} x {drawn['device']}"
        lines.append("")
        lines.append(f"Drawn at {speed} on {devices}.")
    path = epath.Path(path)
    write_texts(path, lines, result)


def with_ending(path: epath.Path, ending: str) -> epath.Path:
    """samples, .json -> samples.json"""
    # `with_suffix` would replace the 5 of samples_cfg1.5.
    return path.with_name(path.name + ending)


def read_result(path: epath.PathLike) -> dict[str, Any]:
    """Reads the JSON that `write_report` wrote.

    Raises: ValueError for any other file.
    """
    refusal = f"{path} is no evaluation_*.json"
    # ValueError covers bytes that are no text, and text that is no JSON.
    try:
        result = json.loads(epath.Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{refusal}: {error}") from error

    if isinstance(result, dict):
        scores = result.get("scores")
        made_by = result.get("protocol")
        if isinstance(scores, dict) and isinstance(made_by, dict):
            return result
    raise ValueError(f"{refusal}: it has no scores and protocol")


def _self_check_table(rows: list[dict[str, Any]]) -> list[str]:
    cells = [
        [
            row["score"],
            f"{row['here']:.4f}",
            f"{row['published']:.4f}",
            row["tolerance"],
            # In capitals: it must not be overlooked among five rows.
            "equal" if row["passed"] else "DIFFERENT",
        ]
        for row in rows
    ]
    return table(["score", "here", "published", "tolerance", ""], cells)


def write_texts(path: epath.Path, lines: list[str], content: Any) -> None:
    """Writes path.md of lines, and path.json of JSON values."""
    # They may be the first files of a new workdir.
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.replace_text(with_ending(path, ".md"), "\n".join(lines) + "\n")
    # The JSON last: a training run that finds it does not score the step again.
    text = json.dumps(content, indent=2)
    storage.replace_text(with_ending(path, ".json"), text + "\n")


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """The lines of a table in Markdown."""
    lines = [_row(header), "|---" * len(header) + "|"]
    lines += [_row(cells) for cells in rows]
    return lines


def _row(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


# ---- Several evaluations ----


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Evaluations side by side, by the name of the run; see `compare`."""

    results: dict[str, dict[str, Any]]  # what Evaluator.make_result returned
    across: tuple[str, ...]  # fields of the protocol that may differ
    protocols: dict[str, dict[str, Any]]  # flattened: {field: value}
    varied: list[str]  # the fields that differ
    x_name: str | None  # the field below the curves

    @property
    def score_names(self) -> list[str]:
        """The names of the scores, which all runs share."""
        return list(next(iter(self.results.values()))["scores"])


def compare(
    results: dict[str, dict[str, Any]],
    compare_across: tuple[str, ...],
) -> Comparison:
    """Puts evaluations side by side, sorted by what they are drawn over.

    The abscissa is the first field that differs and is a number: the guidance
    scale, or the step. Those of `compare_across` come before the others.

    Args:
      results: what `Evaluator.make_result` returned, by the name of the run.
      compare_across: fields of the protocol that may differ.
    Raises: ValueError where the protocols differ in other fields.
    """
    protocol.check_comparable(results, compare_across)
    protocols = {}
    for run, result in results.items():
        protocols[run] = protocol.flatten(result["protocol"])

    # A dict and not a set: it keeps the order of the fields.
    fields = dict.fromkeys(key for flat in protocols.values() for key in flat)
    varied = []
    numbers = set()
    for key in fields:
        values = [flat.get(key) for flat in protocols.values()]
        # As text, because a value may be a list, which no set can hold.
        if len(set(map(str, values))) > 1:
            varied.append(key)
            if all(isinstance(value, int | float) for value in values):
                numbers.add(key)

    candidates = [key for key in (*compare_across, *varied) if key in numbers]
    x_name = candidates[0] if candidates else None
    # A curve must not go back and forth.
    if x_name:
        runs = sorted(results, key=lambda run: protocols[run][x_name])
        results = {run: results[run] for run in runs}
    return Comparison(results, compare_across, protocols, varied, x_name)


def write_comparison(path: epath.PathLike, comparison: Comparison) -> None:
    """Writes path.json, path.md with a table, and path.png with curves."""
    path = epath.Path(path)
    varied = comparison.varied
    header = ["run", *varied, *comparison.score_names, "images/s drawn"]
    rows = []
    for run, result in comparison.results.items():
        flat = comparison.protocols[run]
        values = [flat.get(key) for key in varied]
        scores = [f"{value:.4f}" for value in result["scores"].values()]
        # Samples from elsewhere do not say how fast they were drawn.
        drawn = result.get("sampling_speed", {})
        speed = drawn.get("images_per_second")
        shown = f"{speed:.1f}" if speed else ""
        rows.append([run, *values, *scores, shown])
    lines = ["# Comparison", "", *table(header, rows)]

    across = list(comparison.across)
    write_texts(path, lines, {"across": across, "runs": comparison.results})
    figure = draw_curves(comparison)
    pictures.save_png(with_ending(path, ".png"), figure.savefig, dpi=120)


def draw_curves(comparison: Comparison) -> Any:
    """Draws the first score over what differs, and precision over recall.

    Runs that differ in other fields than the abscissa, two models say, are
    curves of their own.

    Returns: a matplotlib Figure.
    """
    # Imported here because it takes a second, and training needs no curves.
    # No pyplot, which would look for a display.
    from matplotlib.figure import Figure

    x_name = comparison.x_name
    names = comparison.score_names
    distance = names[0]
    precision = _first(names, "precision_")
    recall = _first(names, "recall_")

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    # A reference without neighbours leaves the right side empty.
    curves = _group(comparison)
    for label, runs in curves.items():
        scores = [comparison.results[run]["scores"] for run in runs]
        # Without a number that differs, each run is a point above its name.
        x: list[Any] = list(runs)
        if x_name:
            x = [comparison.protocols[run][x_name] for run in runs]
        left.plot(x, [s[distance] for s in scores], "o-", label=label)
        if precision:
            points = [(s[recall], s[precision]) for s in scores]
            right.plot(*zip(*points), "o-", label=label)
            for text, point in zip(x, points):
                right.annotate(str(text), point)

    if len(curves) > 1 and x_name:
        left.legend(fontsize="small")
    left.set(xlabel=x_name or "", ylabel=distance)
    # Names of runs are long and would cover each other.
    left.tick_params(axis="x", rotation=0 if x_name else 30)
    if precision:
        right.set(xlabel=recall, ylabel=precision)
    return figure


def _group(comparison: Comparison) -> dict[str, list[str]]:
    """The runs of each curve, by its label."""
    if not comparison.x_name:
        return {run: [run] for run in comparison.results}

    curves: dict[str, list[str]] = {}
    others = [key for key in comparison.varied if key != comparison.x_name]
    for run in comparison.results:
        flat = comparison.protocols[run]
        # Twelve characters tell hashes apart and leave room for the curves.
        parts = [f"{key} {str(flat.get(key))[:12]}" for key in others]
        label = "\n".join(parts)
        curves.setdefault(label, []).append(run)
    return curves


def _first(names: list[str], prefix: str) -> str | None:
    return next((name for name in names if name.startswith(prefix)), None)
