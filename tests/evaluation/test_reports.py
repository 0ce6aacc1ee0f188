"""Comparisons of several evaluations: their curves, and the files."""

import json

import pytest
from PIL import Image

from lit_jax.evaluation import reports


@pytest.fixture
def results():
    """Two models over guidance scales; the seed differs between them too, and comes first."""
    results = {}
    for name, seed, distances in (
        ("a", 0, {4.0: 9.0, 1.0: 7.0, 1.5: 5.0}),
        ("b", 1, {1.5: 6.0, 1.0: 8.0}),
    ):
        for scale, distance in distances.items():
            samples = {"seed": seed, "weights": name * 64, "cfg_scale": scale}
            scores = {
                "fid_adm_50k": distance,
                "precision_adm_50k": distance / 10,
                "recall_adm_50k": scale / 10,
            }
            results[f"{name}{scale}"] = {"protocol": {"samples": samples}, "scores": scores}
    return results


ACROSS = ("samples.cfg_scale", "samples.weights", "samples.seed")


def test_the_curve_over_guidance_scales_has_a_line_for_each_model(results):
    """And its abscissa is the field that was asked for first."""
    left, right = reports.draw_curves(reports.compare(results, ACROSS)).axes
    assert left.get_xlabel() == "samples.cfg_scale" and left.get_ylabel() == "fid_adm_50k"
    lines = {line.get_label(): line.get_xydata().tolist() for line in left.lines}
    assert list(lines.values()) == [
        [[1.0, 7.0], [1.5, 5.0], [4.0, 9.0]],
        [[1.0, 8.0], [1.5, 6.0]],
    ]
    assert all(f"samples.weights {name * 12}" in label for name, label in zip("ab", lines))
    assert right.lines[1].get_xydata().tolist() == [[0.1, 0.8], [0.15, 0.6]]


def test_a_comparison_is_a_table_a_json_and_a_picture(results, tmp_path):
    comparison = reports.compare(results, ACROSS)
    reports.write_comparison(tmp_path / "comparison.1", comparison)
    written = json.loads((tmp_path / "comparison.1.json").read_text())
    assert written == {"across": list(ACROSS), "runs": results}
    table = (tmp_path / "comparison.1.md").read_text().splitlines()[2:]
    assert table[0].startswith("| run | samples.seed | samples.weights | samples.cfg_scale | fid")
    assert [row.split("|")[1].strip() for row in table[2:]] == [
        "a1.0",
        "b1.0",
        "a1.5",
        "b1.5",
        "a4.0",
    ]
    assert Image.open(tmp_path / "comparison.1.png").width > 500


def test_runs_that_differ_in_no_number_are_points_above_their_names(results):
    chosen = {run: results[run] for run in ("a1.0", "b1.0")}
    for result in chosen.values():
        del result["protocol"]["samples"]["seed"]
    left, _ = reports.draw_curves(reports.compare(chosen, ("samples",))).axes
    assert [line.get_label() for line in left.lines] == ["a1.0", "b1.0"]


def test_what_may_not_differ_is_refused(results):
    with pytest.raises(ValueError, match="samples.seed is 0 and 1"):
        reports.compare(results, ACROSS[:2])
