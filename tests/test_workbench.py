"""The workbench's script: every design and every recipe is a run that can start."""

import importlib.util
import json
import math
import pathlib
import shutil
import sys

import pytest

from configs import quickstart
from lit_jax.experiment import Experiment

ROOT = pathlib.Path(__file__).parent.parent
SPEC = importlib.util.spec_from_file_location("workbench", ROOT / "launch" / "workbench.py")
assert SPEC and SPEC.loader
workbench = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(workbench)

CASES = [(design, "q, k, v, o, two rates") for design in workbench.DESIGNS]
CASES += [("LiT", recipe) for recipe in ("all but attention", "q, k, v, o", "layers first")]


@pytest.mark.parametrize("design, recipe", CASES)
def test_every_run_can_start(design, recipe, tmp_path):
    fields = workbench.DESIGNS[design]
    for run_fields, workdir in workbench.runs(fields, recipe, 200, tmp_path / "a"):
        config = quickstart.get_config()
        config.update_from_flattened_dict(run_fields)
        experiment = Experiment(config)
        if config.student.init == "teacher":
            experiment.check_inheritance()
            assert (len(experiment.inherited_paths) > 0) == ("two rates" in recipe)
        assert workdir.parent == tmp_path


def test_the_steps_of_all_stages_are_those_of_one(tmp_path):
    """A first stage regresses layers alone, and the second starts from its workdir."""
    first, last = workbench.runs({}, "layers first", 100, tmp_path / "a")
    assert first[0]["train.steps"] + last[0]["train.steps"] == 100
    assert last[0]["student.init"] == str(first[1]) != str(last[1])
    assert first[0]["distill.attention_weight"] == 1.0
    assert "distill.attention_weight" not in last[0]
    ((only, workdir),) = workbench.runs({}, "q, k, v, o", 100, tmp_path / "a")
    assert only["train.steps"] == 100 and workdir == tmp_path / "a"


def test_steps_to_the_teacher_are_those_of_the_first_score_within_five_points(tmp_path):
    """Steps of a stage before count; without such a score there is no number."""
    read = {60: 0.80, 120: 0.92, 180: 0.93, 240: 0.91, 300: 0.96}
    lines = [{"step": 60, "train/mse": 0.1, "train/vb": 0.1}]
    lines += [{"step": step, "eval/labels_read": value} for step, value in read.items()]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for teacher, expected in ((0.98, 180 + 100), (0.97, 120 + 100), (1.02, math.inf)):
        report = {"labels_read": {"teacher": teacher, "student": 0.9}}
        (tmp_path / "report.json").write_text(json.dumps(report))
        found = workbench.result(tmp_path, 100)
        assert workbench.figures(found) == {"labels read": 0.9, "steps to the teacher": expected}
    assert [step for step, _ in found["curve"]] == [160, 220, 280, 340, 400]


def test_the_table_and_the_picture_come_from_the_file_of_finished_runs(tmp_path, monkeypatch):
    """Nothing is run that stands there; what stands there under other fields is run."""
    started = []

    def run(config, fields, workdir):
        started.append((workdir.name, fields["seed"]))
        workdir.mkdir(parents=True)
        read = 0.5 + 0.1 * fields["seed"]
        line = {"step": fields["train.steps"], "train/mse": 0.1, "train/vb": 0.1}
        line["eval/labels_read"] = read
        (workdir / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        report = {"labels_read": {"teacher": 0.5, "student": read}}
        (workdir / "report.json").write_text(json.dumps(report))

    def main(*arguments):
        started.clear()
        argv = ["workbench.py", "--seeds=2", f"--workdir={tmp_path}/runs", *arguments]
        monkeypatch.setattr(sys, "argv", argv)
        workbench.main()

    monkeypatch.setattr(workbench.guidelines, "run", run)
    main()
    # Two stages of each design's last recipe; one seed after the other.
    assert len(started) == len(workbench.DESIGNS) * 5 * 2
    assert [seed for _, seed in started] == [0] * 30 + [1] * 30
    table = (tmp_path / "runs" / "table.md").read_text()
    assert "| LiT: q, k, v, o | 0.55 ± 0.071 | 300 ± 0 |" in table
    assert (tmp_path / "runs" / "workbench.png").stat().st_size > 5000
    (tmp_path / "runs" / "results.jsonl").rename(tmp_path / "kept.jsonl")

    main(f"--results={tmp_path}/kept.jsonl")
    assert not started and (tmp_path / "runs" / "table.md").read_text() == table

    shutil.rmtree(tmp_path / "runs")
    monkeypatch.setitem(workbench.DESIGNS, "MALA", {"model.attention": "mala", "model.depth": 4})
    main(f"--results={tmp_path}/kept.jsonl")
    assert len(started) == 10 and all(name.startswith("mala") for name, _ in started)


def test_the_table_says_how_many_seeds_reached_the_teacher():
    reached = [{"steps": 120.0}, {"steps": math.inf}, {"steps": 180.0}]
    never = [{"steps": math.inf}] * 2
    text = workbench.guidelines.table({"a": reached, "b": never})
    assert text.splitlines()[2:] == ["| a | 150 ± 42 (2 of 3) |", "| b | not reached |"]


def test_costs_are_a_line_for_each_design():
    """LiT saves what its few wide heads cost less than all pairs of tokens: most at 2048 px."""
    lines = workbench.costs().splitlines()
    assert len(lines) == 2 + len(workbench.XL_DESIGNS)
    rows = {line.split(" | ")[0][2:]: line for line in lines[2:]}
    at_2048 = {name: float(row.rstrip(" |").split(" | ")[-1]) for name, row in rows.items()}
    assert at_2048["LiT"] < at_2048["LiT, softmax every 4"] < at_2048["softmax"]
    assert rows["softmax"].split(" | ")[1] == "674.8"
