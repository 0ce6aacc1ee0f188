"""The paper's path on a quickstart: each stage adds one thing, and the table is of all seeds."""

import importlib.util
import json
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from configs import quickstart
from lit_jax.experiment import Experiment

ROOT = pathlib.Path(__file__).parent.parent
SPEC = importlib.util.spec_from_file_location("guidelines", ROOT / "launch" / "guidelines.py")
assert SPEC and SPEC.loader
guidelines = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(guidelines)


def test_each_stage_adds_one_thing_to_the_one_before():
    stages = guidelines.stages("quickstart")
    added = [{}]
    before = None
    for fields in stages.values():
        if before is not None:
            added.append(
                {name: value for name, value in fields.items() if before.get(name) != value}
            )
        before = fields
    teacher = quickstart.get_config().teacher.checkpoint
    assert added[1:] == [
        {"model.conv_size": 5},
        {"model.num_heads": 0},  # that of LiT-Ti: 2
        {"student.init": teacher, "inherit.load": ("auto",)},
        {
            "teacher.checkpoint": teacher,
            "distill.denoising_weight": 1.0,
            "distill.noise_weight": 8.0,
            "distill.variance_weight": 0.0,
            "distill.feature_weight": 0.0,
        },
        {"distill.variance_weight": 0.05},
    ]
    first = stages["linear attention from scratch"]
    assert first["student.init"] == "random" and first["model.conv_size"] == 0
    # The last stage is the quickstart with the paper's inheritance, its teacher named by its file.
    last = quickstart.get_config()
    last.update_from_flattened_dict(stages["+ variance distillation"])
    whole = quickstart.get_config()
    whole.student.init = teacher
    whole.inherit.load = ("auto",)
    assert last.to_dict() == whole.to_dict()


def test_cifar10_is_scored_against_its_own_images(tmp_path, monkeypatch):
    """Every run has the fields of the command line, after its own; there is no report to read."""
    commands = []

    def start(command, cwd):
        workdir = pathlib.Path(command[4].partition("=")[2])
        commands.append(command)
        write_run(workdir, 0, 0.01)
        (workdir / "report.json").unlink()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(guidelines.subprocess, "run", start)
    argv = ["guidelines.py", "--config=configs/cifar10_lit.py", "--seeds=1"]
    monkeypatch.setattr(
        sys, "argv", argv + [f"--workdir={tmp_path}/runs", "--config.data.dir=/data"]
    )
    guidelines.main()
    assert len(commands) == 6
    for command in commands:
        assert command[-1] == "--config.data.dir=/data"
        assert "--config.evaluate.reference=cifar10:train" in command
    assert "--config.teacher.checkpoint=workdir/cifar10_dit" in commands[-1]
    table = (tmp_path / "runs" / "table.md").read_text().splitlines()
    assert table[0] == "| stage | fd_efficientnet_lite0_500 | mse | vb |"

    # Other fields are other runs; the same data elsewhere is not.
    again = [*argv, f"--workdir={tmp_path}/more", f"--results={tmp_path}/runs/results.jsonl"]
    monkeypatch.setattr(sys, "argv", [*again, "--config.data.dir=/moved"])
    guidelines.main()
    assert len(commands) == 6
    monkeypatch.setattr(sys, "argv", [*again, "--config.train.batch_size=4"])
    guidelines.main()
    assert len(commands) == 12
    del commands[6:]

    for wrong in ("--config.data.dir", "--seds=2", "data"):
        monkeypatch.setattr(sys, "argv", [*argv, wrong])
        with pytest.raises(SystemExit, match="2"):
            guidelines.main()
    assert len(commands) == 6


@pytest.mark.parametrize("stage", guidelines.stages("quickstart"))
def test_every_stage_is_a_config_that_can_be_run(stage):
    config = quickstart.get_config()
    config.update_from_flattened_dict(guidelines.stages("quickstart")[stage])
    experiment = Experiment(config)
    experiment.check_inheritance()
    assert (experiment.teacher is not None) == ("distillation" in stage)


def write_run(folder, seed, mse):
    folder.mkdir(parents=True)
    report = {"labels_read": {"student": 0.5 + 0.1 * seed}}
    (folder / "report.json").write_text(json.dumps(report))
    scores = {"scores": {"fd_efficientnet_lite0_500": 10.0 * (1 + seed), "precision_x": 1.0}}
    (folder / "evaluation_0000300.json").write_text(json.dumps(scores))
    lines = [{"step": step, "train/mse": mse * step, "train/vb": 0.25} for step in (100, 250, 300)]
    lines.append({"step": 300, "eval/fd": 1.0})
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))


def test_the_table_has_means_and_deviations_of_the_seeds(tmp_path):
    for seed in range(3):
        write_run(tmp_path / str(seed), seed, 0.01)
    found = [guidelines.result(tmp_path / str(seed)) for seed in range(3)]
    # The last hundred steps: those after 200.
    assert found[2] == {
        "fd_efficientnet_lite0_500": 30.0,
        "labels read": pytest.approx(0.7),
        "mse": pytest.approx(2.75),
        "vb": 0.25,
    }
    text = guidelines.table({"one": found, "two": found[:1]})
    spread = np.std([10.0, 20.0, 30.0], ddof=1)
    assert text.splitlines()[0] == "| stage | fd_efficientnet_lite0_500 | labels read | mse | vb |"
    assert text.splitlines()[2].startswith(f"| one | 20 ± {spread:.2g} | 0.6 ± 0.1 | 2.75 ± 0 |")
    assert text.splitlines()[3].startswith("| two | 10 | 0.5 |")
    guidelines.draw({"one": found, "two": found}, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5000


def test_each_line_of_the_table_is_of_its_stage_and_seeds(tmp_path, monkeypatch):
    """GenEval is the student's, of scenes that are drawn in 20 steps."""

    def start(command, cwd):
        workdir = pathlib.Path(command[4].partition("=")[2])
        stage, seed = (int(number) for number in workdir.name.split("_")[1::2])
        assert f"--config.seed={seed}" in command and "--config.sample.steps=20" in command
        write_run(workdir, seed, 0.01)
        (workdir / "evaluation_0000300.json").unlink()
        scores = {"student": {"overall": 0.1 * stage + 0.01 * seed}, "teacher": {"overall": 0.9}}
        (workdir / "report.json").write_text(json.dumps({"geneval": scores}))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(guidelines.subprocess, "run", start)
    argv = ["guidelines.py", "--config=configs/quickstart_t2i.py", "--seeds=2"]
    monkeypatch.setattr(sys, "argv", [*argv, f"--workdir={tmp_path}/runs"])
    guidelines.main()
    table, by_seed = (tmp_path / "runs" / "table.md").read_text().split("\n\n")
    head, _, *lines = table.splitlines()
    assert head == "| stage | GenEval | mse | vb |"
    names = list(guidelines.stages("quickstart_t2i"))
    for stage, (name, line) in enumerate(zip(names, lines, strict=True)):
        mean = 0.1 * stage + 0.005
        assert line.startswith(f"| {name} | {mean:.4g} ± 0.0071 |")
    # The same tenth in both seeds: what the stages differ by does not vary as they do.
    head, _, *lines = by_seed.splitlines()
    assert head == "| against the stage before | GenEval | mse | vb |"
    for name, line in zip(names[1:], lines, strict=True):
        # Sums of tenths differ by their rounding.
        assert re.match(rf"\| {re.escape(name)} \| 0\.1 ± (0|\S+e-1\d) \| 0 ± 0 \|", line), line


def test_finished_runs_are_not_run_again_wherever_the_repository_lies(tmp_path, monkeypatch):
    started = []

    def run(config, fields, workdir, common):
        started.append(workdir.name)
        write_run(workdir, fields["seed"], 0.01)

    monkeypatch.setattr(guidelines, "run", run)
    argv = ["guidelines.py", "--config=configs/quickstart.py", "--seeds=1"]
    argv += [f"--results={tmp_path}/kept.jsonl", f"--workdir={tmp_path}/runs"]
    monkeypatch.setattr(sys, "argv", argv)
    guidelines.main()
    assert started == [f"stage_{number}_seed_0" for number in range(6)]
    assert str(ROOT) not in (tmp_path / "kept.jsonl").read_text()
    table = (tmp_path / "runs" / "table.md").read_text()
    assert table.count("| 10 | 0.5 |") == 6 and table.count("| 0 | 0 | 0 | 0 |") == 5

    started.clear()
    shutil.rmtree(tmp_path / "runs")
    guidelines.main()
    assert not started and (tmp_path / "runs" / "table.md").read_text() == table

    # A config whose file says something else since then is another run; where its data lies is not.
    file = guidelines.load

    def changed(**fields):
        def load(name):
            config = file(name)
            if name == "quickstart":
                config.update_from_flattened_dict(fields)
            return config

        return load

    monkeypatch.setattr(guidelines, "load", changed(**{"data.dir": "/moved"}))
    guidelines.main()
    assert not started
    monkeypatch.setattr(guidelines, "load", changed(**{"optimizer.b2": 0.98}))
    guidelines.main()
    assert len(started) == 6
