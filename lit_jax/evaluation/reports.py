"""Evaluations written for people: JSON, Markdown, grids and comparisons."""

import json
import pathlib
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from lit_jax.evaluation import protocol


def write_report(path: pathlib.Path, result: dict[str, Any]) -> None:
    """Writes path.json and path.md."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside(path, ".json").write_text(json.dumps(result, indent=2) + "\n")
    lines = ["# Evaluation", "", "| score | value |", "|---|---|"]
    lines += [f"| {name} | {value:.4f} |" for name, value in result["scores"].items()]
    if "self_check" in result:
        lines += [
            "",
            "## Self-check against the published figures",
            "",
            "| score | here | published | tolerance | |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {row['score']} | {row['here']:.4f} | {row['published']:.4f} | {row['tolerance']} | "
            f"{'equal' if row['passed'] else 'DIFFERENT'} |"
            for row in result["self_check"]
        ]
    lines += ["", "## Protocol", "", "| field | value |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in protocol.flatten(result["protocol"]).items()]
    if "samples_file" in result:
        lines += [
            "",
            f"{result['samples_file']}, {result['images_per_second']:.1f} images/s through the feature network on "
            f"{result['device']}.",
        ]
    if speed := result.get("sampling_speed"):
        lines += [
            "",
            f"Drawn at {speed['images_per_second']:.1f} images/s on {speed['devices']} x {speed['device']}.",
        ]
    lines.append("")
    beside(path, ".md").write_text("\n".join(lines))


def beside(path: pathlib.Path, ending: str) -> pathlib.Path:
    """path + ending; `with_suffix` would take the 5 of samples_cfg1.5 for a suffix."""
    return path.with_name(path.name + ending)


def write_grid(path: pathlib.Path, images: np.ndarray, columns: int = 8) -> None:
    """Writes images (N, H, W, C) uint8 as one PNG, row by row."""
    N, H, W, C = images.shape
    rows = -(-N // columns)
    images = np.concatenate([images, np.zeros((rows * columns - N, H, W, C), np.uint8)])
    grid = (
        images.reshape(rows, columns, H, W, C)
        .transpose(0, 2, 1, 3, 4)
        .reshape(rows * H, columns * W, C)
    )
    Image.fromarray(grid[..., 0] if C == 1 else grid).save(path)


def write_comparison(
    path: pathlib.Path, results: dict[str, dict[str, Any]], across: tuple[str, ...]
) -> None:
    """Writes path.json, path.md, and path.png: Frechet distance against what differs, and precision against recall.

    The first field that differs and is a number, those of `across` first, is the abscissa: the guidance scale, or the
    step. Runs that differ in other fields too, two models say, are curves of their own.
    """
    protocols = {run: protocol.flatten(result["protocol"]) for run, result in results.items()}
    varied = [
        key
        for key in dict.fromkeys(key for protocol in protocols.values() for key in protocol)
        if len({str(protocol.get(key)) for protocol in protocols.values()}) > 1
    ]
    x_name = next(
        (
            key
            for key in (*across, *varied)
            if key in varied
            and all(isinstance(protocol.get(key), int | float) for protocol in protocols.values())
        ),
        None,
    )
    if x_name:
        results = dict(sorted(results.items(), key=lambda item: protocols[item[0]][x_name]))
    names = list(next(iter(results.values()))["scores"])
    lines = [
        "# Comparison",
        "",
        f"| {' | '.join(['run', *varied, *names, 'images/s drawn'])} |",
        "|---" * (2 + len(varied) + len(names)) + "|",
    ]
    for run, result in results.items():
        speed = result.get("sampling_speed", {}).get("images_per_second")
        cells = [run, *(str(protocols[run].get(key)) for key in varied)]
        cells += [
            *(f"{value:.4f}" for value in result["scores"].values()),
            f"{speed:.1f}" if speed else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside(path, ".md").write_text("\n".join([*lines, ""]))
    beside(path, ".json").write_text(
        json.dumps({"across": list(across), "runs": results}, indent=2) + "\n"
    )

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    precision, recall = (
        next((n for n in names if n.startswith(prefix)), None)
        for prefix in ("precision_", "recall_")
    )
    curves = {}
    for run in results:
        others = "\n".join(
            f"{key} {str(protocols[run].get(key))[:12]}" for key in varied if key != x_name
        )
        curves.setdefault(others if x_name else run, []).append(run)
    for label, runs in curves.items():
        x = [protocols[run][x_name] if x_name else run for run in runs]
        left.plot(x, [results[run]["scores"][names[0]] for run in runs], "o-", label=label)
        if precision:
            rows = [
                (results[run]["scores"][recall], results[run]["scores"][precision]) for run in runs
            ]
            right.plot(*zip(*rows), "o-", label=label)
            for text, at in zip(x, rows):
                right.annotate(str(text), at)
    if len(curves) > 1 and x_name:
        left.legend(fontsize="small")
    left.set(xlabel=x_name or "", ylabel=names[0])
    left.tick_params(axis="x", rotation=0 if x_name else 30)
    if precision:
        right.set(xlabel=recall, ylabel=precision)
    figure.savefig(beside(path, ".png"), dpi=120)


def read_result(path: pathlib.Path) -> dict[str, Any]:
    """An evaluation_*.json; raises ValueError for any other file."""
    try:
        result = json.loads(path.read_text())
    except ValueError as error:  # not text, or not JSON
        raise ValueError(f"evaluate.compare: {path} is no evaluation_*.json: {error}") from error
    if not isinstance(result, dict) or not all(
        isinstance(result.get(key), dict) for key in ("scores", "protocol")
    ):
        raise ValueError(
            f"evaluate.compare: {path} is no evaluation_*.json: it has no scores and protocol"
        )
    return result
