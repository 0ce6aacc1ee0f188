"""The workbench's script: every design and every recipe is a run that can start."""

import functools
import importlib.util
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from configs import cifar10_dit, cifar10_lit, quickstart, quickstart_t2i
from lit_jax import checkpoint
from lit_jax.experiment import Experiment
from lit_jax.models import param_shapes

ROOT = pathlib.Path(__file__).parent.parent
SPEC = importlib.util.spec_from_file_location("workbench", ROOT / "launch" / "workbench.py")
assert SPEC and SPEC.loader
workbench = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(workbench)

CONFIGS = {
    "quickstart": quickstart,
    "quickstart_t2i": quickstart_t2i,
    "cifar10_lit": cifar10_lit,
}
CASES = [("LiT", recipe) for recipe in workbench.ALL_RECIPES]
CASES += [(design, "q, k, v, o, two rates") for design in workbench.DESIGNS if design != "LiT"]


@pytest.fixture(scope="module")
def cifar10_teacher(tmp_path_factory):
    """A checkpoint of the shapes of configs/cifar10_dit.py, which no one ships."""
    architecture = Experiment(cifar10_dit.get_config()).model_config
    shapes = param_shapes(architecture)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    folder = tmp_path_factory.mktemp("cifar10") / "teacher"
    checkpoint.save_params(folder, params, {"model": architecture.to_json()})
    return str(folder)


@pytest.mark.parametrize("design, recipe", CASES)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_run_can_start(name, design, recipe, cifar10_teacher, tmp_path):
    steps = workbench.STEPS[name]
    for run_fields, workdir in workbench.runs(name, design, recipe, steps, tmp_path / "a"):
        config = CONFIGS[name].get_config()
        if name == "cifar10_lit":
            config.teacher.checkpoint = cifar10_teacher
        config.update_from_flattened_dict(run_fields)
        experiment = Experiment(config)
        if config.student.init == "teacher":
            experiment.check_inheritance()
            assert (len(experiment.inherited_paths) > 0) == ("two rates" in recipe)
        # A first stage is of the layers alone, whatever the config's own losses are.
        is_first = workdir.name.endswith("_layers")
        assert experiment.unscaled_step_settings.runs_student != is_first
        # The recipes say it themselves, whatever the config's own one is. A second stage goes on
        # with all of the first.
        from_teacher = config.student.init == "teacher"
        whole = "q, k" in recipe and from_teacher
        assert config.inherit.load == (("q", "k", "v", "o") if whole else ("auto",))
        assert from_teacher != (recipe.startswith("layers") and not is_first)
        assert workdir.parent == tmp_path


def test_the_run_that_draws_with_the_teacher_can_start():
    config = quickstart.get_config()
    config.update_from_flattened_dict(workbench.TEACHER)
    Experiment(config)


def test_the_steps_of_all_stages_are_those_of_one(tmp_path):
    """A first stage regresses layers alone, and the second starts from its workdir."""
    asked = ("quickstart", "LiT")
    first, last = workbench.runs(*asked, "layers first", 100, tmp_path / "a")
    assert first[0]["train.steps"] + last[0]["train.steps"] == 100
    assert last[0]["student.init"] == str(first[1]) != str(last[1])
    assert first[0]["distill.attention_weight"] == 1.0
    assert "distill.attention_weight" not in last[0]
    ((only, workdir),) = workbench.runs(*asked, "q, k, v, o", 100, tmp_path / "a")
    assert only["train.steps"] == 100 and workdir == tmp_path / "a"


def write_run(workdir, read, kd_noise=0.5):
    """A run that is scored at the steps that `read` names, and logs 100 and 150 besides."""
    lines = [{"step": step, "train/kd_noise": kd_noise * step} for step in (100, 125, 150)]
    for step, value in read.items():
        lines.append({"step": step, "eval/labels_read": value, "eval/fd_x_100": float(step)})
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_steps_to_the_teacher_are_those_of_the_first_score_within_five_points(tmp_path):
    """Steps of a stage before count; without such a score there is no number."""
    write_run(tmp_path, {30: 0.80, 60: 0.92, 90: 0.93, 120: 0.91, 150: 0.9})
    found = workbench.result(tmp_path, 100)
    assert found["curve"] == [(130, 0.80), (160, 0.92), (190, 0.93), (220, 0.91), (250, 0.9)]
    # Scores of the last step; the error's mean over its last fifty.
    last = {"fd_x_100": 150.0, "labels read": 0.9, "kd_noise": 0.5 * (125 + 150) / 2}
    for teacher, steps in ((0.98, 190.0), (0.97, 160.0), (1.02, math.inf)):
        assert workbench.figures(found, teacher) == last | {"steps to the teacher": steps}


def test_scenes_are_scored_once_beside_the_teacher(tmp_path, monkeypatch, capsys):
    def run(config, fields, workdir, common):
        write_run(workdir, {}, kd_noise=0.5 + fields["seed"])
        scores = {"student": {"overall": 0.3}, "teacher": {"overall": 0.75 + 0.1 * fields["seed"]}}
        (workdir / "report.json").write_text(json.dumps({"geneval": scores}))

    monkeypatch.setattr(workbench.guidelines, "run", run)
    argv = ["workbench.py", "--config=configs/quickstart_t2i.py", "--designs", "LiT", "MHLA"]
    monkeypatch.setattr(sys, "argv", argv + ["--seeds=2", f"--workdir={tmp_path}"])
    workbench.main()
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[0] == "| design: recipe | student | teacher | kd_noise |" and len(lines) == 2 + 8
    assert lines[2] == "| LiT: all but attention | 0.3 ± 0 | 0.8 ± 0.071 | 137.5 ± 97 |"
    assert (tmp_path / "workbench.png").stat().st_size > 5000
    monkeypatch.setattr(sys, "argv", ["workbench.py", "--config=configs/debug.py"])
    with pytest.raises(SystemExit, match="2"):
        workbench.main()
    known = "quickstart, quickstart_t2i, cifar10_lit"
    assert f"configs/debug.py is none of {known}" in capsys.readouterr().err


def test_cifar10_is_scored_at_its_end_and_no_labels_are_read(tmp_path, monkeypatch):
    """And every run has the fields of the command line, after its own."""
    commands = []

    def start(command, cwd):
        workdir = pathlib.Path(command[4].partition("=")[2])
        commands.append(command)
        write_run(workdir, {}, kd_noise=0.5)
        with (workdir / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 300, "eval/fd_x_500": 20.0 * len(commands)}) + "\n")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(workbench.guidelines.subprocess, "run", start)
    argv = ["workbench.py", "--config=configs/cifar10_lit.py", "--designs", "LiT", "--seeds=1"]
    argv += [f"--workdir={tmp_path}/runs", "--config.data.dir=/data"]
    monkeypatch.setattr(sys, "argv", argv)
    workbench.main()
    assert len(commands) == 5  # the last recipe has two stages
    assert all(command[-1] == "--config.data.dir=/data" for command in commands)
    assert all("--config.evaluate.every=300" in command for command in commands[:3])
    lines = (tmp_path / "runs" / "table.md").read_text().splitlines()
    assert lines[0] == "| design: recipe | fd_x_500 | kd_noise |" and len(lines) == 2 + 4
    assert lines[2] == "| LiT: all but attention | 20 | 68.75 |"  # of steps 125 and 150
    assert (tmp_path / "runs" / "workbench.png").stat().st_size > 5000

    monkeypatch.setattr(sys, "argv", [*argv, "--sed=4"])
    with pytest.raises(SystemExit, match="2"):
        workbench.main()
    assert len(commands) == 5
    # What other fields give is not what stands there; where the data lies does not count.
    for field, count in (("data.dir=/moved", 5), ("train.batch_size=4", 10)):
        monkeypatch.setattr(sys, "argv", [*argv[:-1], f"--config.{field}"])
        workbench.main()
        assert len(commands) == count


def test_the_table_and_the_picture_come_from_the_file_of_finished_runs(tmp_path, monkeypatch):
    """Nothing is run that stands there; what stands there under other fields is run."""
    started = []

    def run(config, fields, workdir, common):
        started.append((workdir.name, fields["seed"]))
        read = 0.5 + 0.1 * fields["seed"]
        write_run(workdir, {fields["train.steps"]: read})
        report = {"labels_read": {"teacher": 0.5, "student": 0.0}}
        (workdir / "report.json").write_text(json.dumps(report))

    def main(*arguments):
        started.clear()
        argv = ["workbench.py", "--seeds=2", f"--workdir={tmp_path}/runs", *arguments]
        monkeypatch.setattr(sys, "argv", argv)
        workbench.main()

    monkeypatch.setattr(workbench.guidelines, "run", run)
    main()
    # The teacher of each seed; two stages of each design's last recipe; one seed after the other.
    assert started[:2] == [("teacher_seed_0", 0), ("teacher_seed_1", 1)]
    runs = len(workbench.DESIGNS) * 5
    assert [seed for _, seed in started[2:]] == [0] * runs + [1] * runs
    table = (tmp_path / "runs" / "table.md").read_text()
    assert "| LiT: q, k, v, o | 150 ± 0 | 0.55 ± 0.071 | 68.75 ± 0 | 150 ± 0 |" in table
    assert (tmp_path / "runs" / "workbench.png").stat().st_size > 5000
    (tmp_path / "runs" / "results.jsonl").rename(tmp_path / "kept.jsonl")

    main(f"--results={tmp_path}/kept.jsonl")
    assert not started and (tmp_path / "runs" / "table.md").read_text() == table

    shutil.rmtree(tmp_path / "runs")
    monkeypatch.setitem(workbench.DESIGNS, "MALA", {"model.attention": "mala", "model.depth": 4})
    main(f"--results={tmp_path}/kept.jsonl", "--at_once=2")
    assert len(started) == 10 and all(name.startswith("mala") for name, _ in started)

    # Chosen recipes, and a variant, which no one runs who does not ask for it.
    variant = "layers first, q, k, v, o"
    main(f"--results={tmp_path}/kept.jsonl", "--designs=LiT", "--recipes", "q, k, v, o", variant)
    stages = ("lit_layers_first_q_k_v_o_seed_{}_layers", "lit_layers_first_q_k_v_o_seed_{}")
    assert started == [(stage.format(seed), seed) for seed in range(2) for stage in stages]
    table = (tmp_path / "runs" / "table.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == [
        "| LiT: q, k, v, o", f"| LiT: {variant}"
    ]  # fmt: skip


def test_several_runs_at_once_have_each_its_share_of_the_cores():
    """And give what they found in the order in which they were asked for."""
    cores = os.sched_getaffinity(0)
    both_run = threading.Barrier(2, timeout=60)

    def run(number):
        both_run.wait()
        return number, os.sched_getaffinity(0)

    found = workbench.run_all([functools.partial(run, number) for number in range(4)], 2)
    assert [number for number, _ in found] == [0, 1, 2, 3]
    shares = {frozenset(share) for _, share in found}
    # A machine of one core has no two shares.
    assert frozenset.union(*shares) == cores and len(shares) == min(2, len(cores))
    assert sum(len(share) for share in shares) == len(cores)
    assert os.sched_getaffinity(0) == cores


def test_a_run_that_fails_cancels_those_after_it():
    started = []

    def fail():
        raise SystemExit(3)

    def run():
        started.append(1)
        time.sleep(0.001)  # ten seconds in all, of which a cancelled list takes few

    with pytest.raises(SystemExit, match="3"):
        workbench.run_all([run, fail] + [run] * 10_000, 2)
    assert len(started) < 10_000


def test_runs_share_the_statistics_of_their_reference(tmp_path, monkeypatch):
    """They are computed by the first run alone, whose file the others' workdirs have."""
    started = []

    def start(command, cwd):
        workdir = pathlib.Path(command[4].partition("=")[2])
        started.append((workdir / "reference_a.npz").exists())
        workdir.mkdir(exist_ok=True)
        (workdir / "reference_a.npz").touch()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(workbench.guidelines.subprocess, "run", start)
    for name in ("one", "two", "two"):
        workbench.guidelines.run("configs/quickstart.py", {}, tmp_path / name)
    assert started == [False, True, True]


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
