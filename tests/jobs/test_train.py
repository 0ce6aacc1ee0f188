"""The whole command, end to end, with configs/debug.py: inherit, distil, resume, report, sample."""

import dataclasses
import json
import logging
import os
import shutil
import signal
import threading
import types
from concurrent import futures

import command
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax.traverse_util import flatten_dict
from PIL import Image
from restored import restore_params
from tiny_dataset import put_digits

import lit_jax
from configs import debug
from lit_jax import checkpoint, conditions, pictures, sharding
from lit_jax.experiment import Experiment
from lit_jax.jobs import sample as sample_job
from lit_jax.jobs import train
from lit_jax.models import init_params, param_shapes
from lit_jax.runtime import exit_status
from lit_jax.train_step import TrainState

# The later runs want neither pictures nor a report, and compute nothing twice.
QUIET = [
    "--config.train.preview_every=0",
    "--config.train.remat=none",
    "--config.report.num_images=0",
    "--config.optimizer.schedule=constant",
]
# One step without a teacher, which compiles soonest; all that add no more than steps share it.
PLAIN = [
    *QUIET,
    "--config.student.init=random",
    "--config.model.attention=softmax",
    "--config.teacher.checkpoint=",
    "--config.train.steps=1",
    "--config.optimizer.warmup=0",
    "--config.ema.warmup=False",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a random teacher, and the digits in data/."""
    folder = tmp_path_factory.mktemp("debug")
    put_digits(folder / "data")
    command.write_teacher(folder / "teacher.safetensors")
    return folder


def run_debug(folder, *overrides, workdir="run"):
    with pytest.MonkeyPatch.context() as monkeypatch:
        arguments = command.debug_arguments(folder, folder / "teacher.safetensors", *overrides)
        # The report fits a classifier to all of them.
        few = "--config.data.split=train[:500]"
        return command.run(monkeypatch, *arguments, few, f"--workdir={folder / workdir}")


def read_lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def final_params(workdir):
    return {ema: restore_params(workdir, ema=ema)[0] for ema in (True, False)}


PEAK = 1e9  # FLOP/s that the CPU's devices are said to have


@pytest.fixture(scope="module")
def first_run(folder):
    """The workdir of three steps, and what was logged."""
    logged, handler = [], logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())
    logger = logging.getLogger("absl")
    logger.addHandler(handler)
    try:
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(train.chips, "peak_flops", lambda device_kind: PEAK)
            assert run_debug(folder) is None
    finally:
        logger.removeHandler(handler)
    return folder / "run", "\n".join(logged)


def test_a_run_leaves_everything_a_person_wants(first_run):
    workdir, _ = first_run
    names = {path.name for path in workdir.iterdir()}
    assert names == {
        "config.json",
        "checkpoints",
        "metrics.jsonl",
        "tensorboard",
        "previews",
        "samples.png",
        "report.json",
        "inheritance.json",
        "curves.png",
        "lock",
        "crashes_0.json",
    }
    assert json.loads((workdir / "config.json").read_text())["train"]["batch_size"] == 16
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["3"]
    lines = read_lines(workdir)
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        weighted = (
            line["train/mse"]
            + line["train/vb"]
            + 0.5 * line["train/kd_noise"]
            + 0.05 * line["train/kd_variance"]
        )
        assert line["train/loss"] == pytest.approx(weighted, rel=1e-5) and np.isfinite(weighted)
        assert line["train/skipped"] == 0
    assert lines[2]["train/images_per_second"] > 0


def test_mfu_counts_the_students_step_and_the_teachers_pass(first_run):
    workdir, _ = first_run
    size = debug.get_config().model.input_size
    _, _, student = lit_jax.load(str(workdir))
    teacher = dataclasses.replace(student, attention="softmax", num_heads=2, conv_size=0)
    flops = 3 * student.forward_flops((size, size)) + teacher.forward_flops((size, size))
    line = read_lines(workdir)[2]
    of_all = PEAK * jax.device_count()
    assert line["train/mfu"] == pytest.approx(flops * line["train/images_per_second"] / of_all)


def test_pictures_show_teacher_over_student(first_run):
    workdir, _ = first_run
    preview = np.asarray(Image.open(workdir / "previews" / "step_0000003.png").convert("L"))
    assert preview.shape[0] == 2 * 58 + 2 and preview.shape[1] > 8 * 58
    left = preview.shape[1] - (8 * 58 + 2)
    rows = preview[2:58, left:], preview[60:116, left:]
    assert all(row.std() > 20 for row in rows)  # random weights draw noise, not a blank
    assert (rows[0] != rows[1]).any()
    assert Image.open(workdir / "samples.png").size == (3 * 58 + 2, 3 * 58 + 2)
    assert Image.open(workdir / "curves.png").size[0] > 1000


def test_an_ema_that_is_mostly_the_start_is_warned_of(first_run):
    _, logged = first_run
    assert "of the first parameters" not in logged  # it has a warm-up
    settings = Experiment(debug.get_config()).unscaled_step_settings
    usual = dataclasses.replace(settings, ema_decay=0.9999, ema_warmup=False)
    assert usual.ema_of_start(1000) == pytest.approx(0.905, abs=1e-3)
    assert usual.ema_of_start(400_000) < 1e-9
    assert dataclasses.replace(usual, ema_warmup=True).ema_of_start(1000) == 0


def test_the_report_adds_up(first_run):
    workdir, logged = first_run
    report = json.loads((workdir / "report.json").read_text())
    assert set(report["loss"]) == {"loss", "mse", "vb", "kd_noise", "kd_variance"}
    student = report["parameters"]["student"]
    assert (
        student - report["parameters"]["teacher"] == 2 * 26 * 16
    )  # the convolutions: 26 H a layer
    assert report["inheritance"]["inherited"] + report["inheritance"]["at_init"] == student
    assert set(report["labels_read"]) == {"teacher", "student"}
    assert all(0 <= share <= 1 for share in report["labels_read"].values())
    for text in (
        f"student {student:,}",
        "inherited",
        "kd_noise",
        "labels read",
        "step_0000003.png",
    ):
        assert text in logged


def test_everything_but_attention_came_from_the_teacher(first_run):
    """The ends of the student are the teacher's, but for three steps of training at 1e-3."""
    workdir, _ = first_run
    inherited = json.loads((workdir / "inheritance.json").read_text())
    assert {path.split("/")[2] for path in inherited["at_init"]} == {"q", "kv", "proj", "dwc"}
    teacher = command.write_teacher(workdir.parent / "again.safetensors")
    params, metadata = restore_params(workdir, ema=False)
    difference = params["final_layer"]["linear"]["kernel"] - teacher["final_layer.linear.weight"].T
    assert 0 < np.abs(difference).max() < 4e-3
    assert metadata["model"]["attention"] == "linear" and metadata["model"]["num_heads"] == 2


def test_a_line_comes_before_every_long_silence_and_the_last_one_says_where_the_result_is(
    first_run,
):
    workdir, logged = first_run
    lines = (
        "--mode=train of ",
        "compiling the step for pictures of 28 x 28",
        "loading the teacher ",
        "making the first state",
        "first step after ",
        "drawing the preview of step 3",
        "drawing the report: 8 images with teacher and student",
        f"done: the result is {workdir}/checkpoints/3",
    )
    places = [logged.index(line) for line in lines]
    assert places == sorted(places)
    assert "--mode=sample" in logged.splitlines()[-1]


def must_not_compile(*_):
    raise AssertionError("a program was compiled")


def test_the_same_command_again_has_nothing_to_do_and_compiles_nothing(
    first_run, folder, caplog, monkeypatch
):
    workdir, _ = first_run
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    monkeypatch.setattr(train.StepPrograms, "compile", must_not_compile)
    monkeypatch.setattr(logging.getLogger("absl"), "propagate", True)
    with caplog.at_level("INFO"):
        assert run_debug(folder) is None
    assert "nothing to do: step 3 of train.steps = 3 is saved" in caplog.text
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before


def test_only_what_a_finished_run_lacks_is_drawn_and_no_parameter_changes(first_run, folder):
    workdir, _ = first_run
    before, lines = final_params(workdir), read_lines(workdir)
    report = json.loads((workdir / "report.json").read_text())
    (workdir / "curves.png").unlink()
    # Another seed of the run would be refused, other guidance draws another report.
    assert run_debug(folder, "--config.sample.cfg_scale=1.5") is None
    assert (workdir / "curves.png").exists() and read_lines(workdir) == lines
    jax.tree.map(np.testing.assert_array_equal, final_params(workdir), before)
    again = json.loads((workdir / "report.json").read_text())
    assert (report["asked"]["sample"]["cfg_scale"], again["asked"]["sample"]["cfg_scale"]) == (
        2,
        1.5,
    )
    assert again["asked"]["step"] == 3


def test_resuming_equals_the_run_that_was_not_interrupted(folder):
    """Five steps, and the same from the second one's checkpoint on.

    Parameters, EMA and every metric are the same.
    """
    run = (*QUIET, "--config.train.steps=5", "--config.checkpoint.every=2")
    assert run_debug(folder, *run, "--config.checkpoint.keep=3", workdir="whole") is None
    shutil.copytree(folder / "whole", folder / "parts")
    for step in (4, 5):
        shutil.rmtree(folder / "parts" / "checkpoints" / str(step))
    assert run_debug(folder, *run, workdir="parts") is None
    jax.tree.map(
        np.testing.assert_array_equal,
        final_params(folder / "parts"),
        final_params(folder / "whole"),
    )

    def losses(name):
        terms = ("loss", "mse", "vb", "kd_noise", "kd_variance", "grad_norm")
        return [
            [line["step"], *(line[f"train/{term}"] for term in terms)]
            for line in read_lines(folder / name)
        ]

    assert [line[0] for line in losses("parts")] == [1, 2, 3, 4, 5]
    assert losses("parts") == losses("whole")


def test_another_model_in_the_same_workdir_is_refused_and_changes_nothing(
    first_run, folder, monkeypatch
):
    workdir, _ = first_run
    monkeypatch.setattr(train.StepPrograms, "compile", must_not_compile)
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    error = run_debug(folder, "--config.model.conv_size=3")
    assert error.startswith("error: ") and "\n" not in error
    for part in ("model.conv_size was 5 and is now 3", str(workdir / "checkpoints" / "3")):
        assert part in error
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before


def test_a_run_that_diverges_stops_and_keeps_what_came_before(folder):
    """At a learning rate of 1e30 no loss is finite, from the second step on.

    A checkpoint is due at each step and only one is kept, yet it is still that of step 1. No log
    line is due. The third bad step in a row is step 4. The loop notices it two steps later, since
    it is two steps ahead of the device.
    """
    error = run_debug(
        folder,
        *PLAIN,
        "--config.optimizer.learning_rate=1e30",
        "--config.optimizer.clip_norm=0.0",
        "--config.train.steps=99",
        "--config.train.stop_after_bad_steps=3",
        "--config.checkpoint.every=1",
        "--config.checkpoint.keep=1",
        "--config.train.log_every=50",
        workdir="diverged",
    )
    assert error.startswith("error: ") and "\n" not in error
    assert (
        "not finite in 5 steps" in error
        and "up to step 6" in error
        and "train.stop_after_bad_steps = 3" in error
    )
    assert error.endswith("The last checkpoint: 1")
    (line,) = read_lines(folder / "diverged")
    assert line["step"] == 6 and line["train/skipped_in_a_row"] == 5
    assert np.isfinite(line["train/loss"])  # of the good one
    assert [path.name for path in (folder / "diverged" / "checkpoints").iterdir()] == ["1"]
    params, _ = restore_params(
        folder / "diverged", ema=False
    )  # what is not finite reached no parameter
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_a_skipped_step_does_not_spoil_the_means_of_its_log_line(folder):
    window = [
        {"loss": np.float32(loss), "grad_norm": np.float32(norm)}
        for loss, norm in ((1.0, 2.0), (np.nan, np.nan), (4.0, np.inf), (3.0, 4.0))
    ]
    state = TrainState(
        step=4,
        skipped=np.int32(2),
        skipped_in_a_row=np.int32(0),
        params=None,
        ema_params=None,
        opt_state=None,
    )
    assert train.read_metrics(window, state) == {
        "train/loss": 2.0,
        "train/grad_norm": 3.0,
        "train/skipped": 2.0,
        "train/skipped_in_a_row": 0.0,
    }


def test_the_teacher_is_split_over_the_devices_and_kept_in_its_dtype(tmp_path):
    """The rule of lit_jax/sharding.py splits arrays of 65,536 elements or more.

    It splits the largest axis, but never the layers' axis.
    """
    written = command.write_teacher(tmp_path / "teacher.safetensors", width=128)
    config = debug.get_config()
    config.teacher.update(checkpoint=str(tmp_path / "teacher.safetensors"), dtype="bfloat16")
    experiment = Experiment(config)
    experiment.mesh = sharding.make_mesh(data=2, fsdp=4)
    params = experiment.load_teacher()
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    mlp, attention = params["blocks"]["mlp"], params["blocks"]["attn"]
    shapes = {
        name: leaf.addressable_shards[0].data.shape
        for name, leaf in (
            ("fc1", mlp["fc1"]["kernel"]),
            ("fc2", mlp["fc2"]["kernel"]),
            ("bias", attention["qkv"]["bias"]),
        )
    }
    assert shapes == {
        "fc1": (2, 128, 128),
        "fc2": (2, 128, 128),
        "bias": (2, 384),
    }  # of 512 a quarter; 768 stay whole
    assert len(mlp["fc1"]["kernel"].sharding.device_set) == 8
    expected = written["blocks.1.mlp.fc1.weight"].T
    np.testing.assert_array_equal(mlp["fc1"]["kernel"][1], expected.astype("bfloat16"))


def test_plain_training_needs_no_teacher(folder, caplog):
    assert run_debug(folder, *PLAIN, "--config.train.steps=2", workdir="plain") is None
    assert not (folder / "plain" / "inheritance.json").exists()
    # 0.98 ** 2 is 0.96.
    assert "ema.decay = 0.98 leaves 96 % of the first parameters in the EMA" in caplog.text
    assert not any("kd_noise" in name for line in read_lines(folder / "plain") for name in line)


def sample(folder, *overrides, workdir="run", into="drawn"):
    with pytest.MonkeyPatch.context() as monkeypatch:
        return command.run(
            monkeypatch,
            "--mode=sample",
            "--config=configs/debug.py",
            f"--workdir={folder / into}",
            f"--config.sample.checkpoint={folder / workdir}",
            *overrides,
        )


@pytest.fixture(scope="module")
def drawn(first_run, folder):
    """The workdir of ten images from the trained student."""
    assert sample(folder) is None
    return folder / "drawn"


def pixels(path):
    return np.asarray(Image.open(path))


def test_sampling_writes_pngs_a_grid_and_an_npz(drawn):
    paths = sorted((drawn / "samples").glob("*.png"))
    assert [path.name for path in paths] == [f"{i:06d}.png" for i in range(10)]
    with np.load(drawn / "samples.npz") as archive:
        images, labels = archive["arr_0"], archive["label"]
        protocol = json.loads(str(archive["protocol"]))
    assert images.shape == (10, 28, 28, 1) and images.dtype == np.uint8 and labels.shape == (10,)
    np.testing.assert_array_equal(images[..., 0], [pixels(path) for path in paths])
    assert protocol["steps"] == 4 and protocol["seed"] == 0 and len(protocol["weights"]) == 64
    assert Image.open(drawn / "samples.png").size == (4 * 58 + 2, 3 * 58 + 2)
    assert images.std() > 20 and len(np.unique(images.reshape(10, -1), axis=0)) == 10


def test_sampling_goes_on_where_it_stopped(drawn, folder):
    shutil.copytree(drawn, folder / "resumed")
    for i in (2, 7, 9):
        (folder / "resumed" / "samples" / f"{i:06d}.png").unlink()
    kept = (folder / "resumed" / "samples" / "000003.png").stat().st_mtime_ns
    assert sample(folder, into="resumed") is None
    for i in range(10):
        np.testing.assert_array_equal(
            pixels(folder / "resumed" / "samples" / f"{i:06d}.png"),
            pixels(drawn / "samples" / f"{i:06d}.png"),
        )
    assert (folder / "resumed" / "samples" / "000003.png").stat().st_mtime_ns == kept


def test_images_of_another_protocol_are_not_mixed_in(drawn, folder):
    error = sample(folder, "--config.sample.cfg_scale=3.0")
    assert (
        error.startswith("error: ") and "cfg_scale" in error and "3.0" in error and "2.0" in error
    )
    error = sample(folder, workdir="teacher.safetensors")
    assert "model.attention" in error


@pytest.mark.parametrize("seed", [0, 7])
def test_a_new_student_draws_from_no_key_of_the_steps(seed, tmp_path):
    """Its stream is the second half of the seed's key, from which no step draws itself."""
    config = debug.get_config()
    config.seed = seed
    config.student.init = "random"
    experiment = Experiment(config)
    experiment.mesh = sharding.make_mesh(1, 1, devices=jax.devices()[:1])
    state, _ = train.new_student(experiment)
    root = jax.random.key(seed)
    own = jax.random.split(root, 2)[1]

    @jax.jit
    def kernel(rng):
        return init_params(experiment.model, rng)["blocks"]["mlp"]["fc1"]["kernel"]

    np.testing.assert_array_equal(state.params["blocks"]["mlp"]["fc1"]["kernel"], kernel(own))
    # split(key, 2)[1] is fold_in(key, 1) in JAX, but a step draws only from the parts of its key.
    steps = [jax.random.fold_in(root, step) for step in range(3)]
    drawn_from = [root, *(part for step in steps for part in jax.random.split(step, 4))]
    keys = {tuple(jax.random.key_data(key).tolist()) for key in drawn_from}
    assert tuple(jax.random.key_data(own).tolist()) not in keys
    jax.tree.map(np.testing.assert_array_equal, state.params, state.ema_params)


def test_what_is_new_is_drawn_as_if_nothing_were_inherited(folder):
    """What is inherited is not drawn at all, and changes no other leaf."""
    config = debug.get_config()
    config.teacher.update(checkpoint=str(folder / "teacher.safetensors"), num_heads=2)
    config.student.init = "teacher"
    experiment = Experiment(config)
    experiment.mesh = sharding.make_mesh(1, 1, devices=jax.devices()[:1])
    state, merged = train.new_student(experiment)
    drawn = train.draw_params(experiment, merged.at_init)
    fresh = flatten_dict(state.params, sep="/")
    for path, leaf in flatten_dict(drawn, sep="/").items():
        assert isinstance(leaf, jax.Array) == (path in merged.at_init), path
    everything = flatten_dict(train.draw_params(experiment, fresh), sep="/")
    assert {"blocks/attn/q/kernel", "blocks/attn/dwc/kernel"} <= merged.at_init.keys()
    for path, leaf in fresh.items():
        assert np.array_equal(leaf, everything[path]) == (path in merged.at_init), path


def test_the_steps_draw_from_the_key_of_the_seed(folder, monkeypatch):
    class Compiled(Exception):
        """The step would be compiled now."""

    def programs(train_step, arguments, rng):
        raise Compiled(jax.random.key_data(rng))

    monkeypatch.setattr(train, "StepPrograms", programs)
    config = debug.get_config()
    config.seed = 7
    config.student.init = "random"
    config.data.dir = str(folder / "data")
    with pytest.raises(Compiled) as seen:
        train.run(config, epath.Path(folder / "seed"))
    np.testing.assert_array_equal(seen.value.args[0], jax.random.key_data(jax.random.key(7)))


def test_data_labels_and_images_are_drawn_from_the_configs_seed(folder, monkeypatch):
    """Each is a function of a seed that is given, and other tests hold it: 7 must come there."""
    config = debug.get_config()
    config.seed = 7
    config.data.dir = str(folder / "data")
    experiment = Experiment(config)
    index = np.arange(64)
    own = {"seed": 7, "labels": "random"}
    labels = conditions.for_images(experiment.model_config, index, **own)["label"]
    np.testing.assert_array_equal(experiment.conditions(index, "random")["label"], labels)
    assert sample_job.protocol_of(experiment, "weights")["seed"] == 7

    seeds = []

    def record(*_, seed, **fields):
        seeds.append(seed)

    monkeypatch.setattr("lit_jax.experiment.Sampler", record)
    monkeypatch.setattr("lit_jax.experiment.pipeline.make_batches", record)
    experiment.sampler()
    experiment.batches()
    assert seeds == [7, 7]


def ema_state():
    """A state whose raw parameters no picture may be drawn from."""
    return TrainState(0, 0, 0, params=None, ema_params={"w": np.ones(3)}, opt_state=None)


def test_previews_and_scores_are_of_the_ema(tmp_path):
    drawn_from = {}

    class Recorder(types.SimpleNamespace):
        def path(self, step):
            return epath.Path(tmp_path) / f"{step}.png"

        def draw(self, params, step, on_batch):
            drawn_from["preview"] = params["student"]

        def score(self, params, step, on_batch):
            drawn_from["scores"] = params

        def no_log(self, *_):
            pass

        add_picture = write_scores = start = no_log

    config = debug.get_config()
    config.train.preview_every = config.evaluate.every = 1
    experiment = types.SimpleNamespace(config=config)
    state = ema_state()
    pictures_due = train.Pictures(experiment, None, Recorder(), Recorder())
    pictures_due.draw(state, 1, Recorder(), types.SimpleNamespace(check=None))
    assert drawn_from == {"preview": state.ema_params, "scores": state.ema_params}


def test_the_report_is_of_the_ema(tmp_path):
    drawn_from = []

    def draw(params, index, condition, on_batch):
        drawn_from.append(params)
        return np.zeros((len(index), 4, 4, 1), np.float32)

    config = debug.get_config()
    config.report.read_labels = False
    experiment = types.SimpleNamespace(
        config=config,
        teacher=None,
        is_told_captions=False,
        sampler=lambda: draw,
        conditions=lambda index, labels: {"label": index},
    )
    state = ema_state()
    stop = types.SimpleNamespace(check=None)
    train.write_report(experiment, state, None, epath.Path(tmp_path), 3, stop)
    assert drawn_from == [state.ema_params]


def fine_tuned(source, tmp_path, **model):
    """The first parameters of a student that goes on from `source`, by path."""
    config = debug.get_config()
    config.model.update(model)
    config.student.init = str(source)
    experiment = Experiment(config)
    experiment.mesh = sharding.make_mesh(1, 1, devices=jax.devices()[:1])
    experiment.check_inheritance()
    return flatten_dict(train.new_student(experiment)[0].params, sep="/")


def test_fine_tuning_inherits_attention_and_the_classes_that_both_have(tmp_path):
    """The source has three classes, the student ten: the null class is the last row of each."""
    written = command.write_teacher(tmp_path / "source.safetensors", num_classes=3)
    params = fine_tuned(tmp_path / "source.safetensors", tmp_path, attention="softmax")
    for layer in range(2):
        for module in ("attn.qkv", "attn.proj", "mlp.fc1"):
            kernel = params[f"blocks/{module.replace('.', '/')}/kernel"][layer]
            np.testing.assert_array_equal(kernel, written[f"blocks.{layer}.{module}.weight"].T)
    table = params["y_embedder/embedding_table/embedding"]
    theirs = written["y_embedder.embedding_table.weight"]
    assert table.shape == (11, 32)
    np.testing.assert_array_equal(table[jnp.array([0, 1, 2, 10])], theirs)
    assert 0.01 < float(table[3:10].std()) < 0.03


def test_a_student_goes_on_from_the_whole_of_a_linear_model(tmp_path):
    architecture = Experiment(debug.get_config()).model_config
    rng = np.random.default_rng(0)
    source = jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), param_shapes(architecture)
    )
    path = tmp_path / "source"
    checkpoint.save_params(path, source, {"model": architecture.to_json()})
    params = fine_tuned(path, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, params, flatten_dict(source, sep="/"))
    # Weights of one attention that compute with other numbers are another function.
    for field, value, theirs in (("num_heads", 4, 2), ("kernel_function", "gelu", "relu")):
        message = f"model.{field} = {value}, but .* has {theirs}; set model.{field}={theirs}"
        with pytest.raises(ValueError, match=message):
            fine_tuned(path, tmp_path, **{field: value})


def too_much(*_):
    raise jax.errors.JaxRuntimeError(
        "RESOURCE_EXHAUSTED: Out of memory allocating 8589934592 bytes."
    )


def compiled_by(compiler):
    """In place of StepPrograms.compile: what a compiler gives or raises, in its own time."""

    def compile_step(self, batch):
        future = futures.Future()
        try:
            future.set_result(compiler())
        except jax.errors.JaxRuntimeError as error:
            future.set_exception(error)
        return future

    return compile_step


@pytest.mark.parametrize(
    "place, name, fails",
    [(train, "new_state", too_much), (train.StepPrograms, "compile", compiled_by(too_much))],
    ids=["state", "program"],
)
def test_a_model_that_memory_cannot_hold_leaves_no_workdir(place, name, fails, folder, monkeypatch):
    monkeypatch.setattr(place, name, fails)
    error = run_debug(folder, *PLAIN, workdir="too_large")
    assert error.startswith("error: out of memory: 8.00 GiB (8589934592 bytes)")
    for part in ("batch_size", "accumulation", "fsdp", "remat", "--mode=plan"):
        assert part in error
    assert not (folder / "too_large").exists()


@pytest.fixture(scope="module")
def after_too_little_memory(folder):
    """What a first step without memory says, and the workdir after a smaller batch in it."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(train.StepPrograms, "compile", compiled_by(lambda: too_much))
        larger = [*PLAIN, "--config.train.batch_size=32"]
        error = run_debug(folder, *larger, workdir="smaller")
    return error, run_debug(folder, *PLAIN, workdir="smaller")


def test_a_first_step_without_memory_is_one_line_and_its_workdir_can_be_used_again(
    folder, after_too_little_memory
):
    error, status = after_too_little_memory
    assert error.startswith("error: out of memory: 8.00 GiB (8589934592 bytes)")
    assert error.endswith("a workdir that holds no checkpoint yet can be used again")
    assert status is None and [line["step"] for line in read_lines(folder / "smaller")] == [1]


def test_a_signal_while_the_report_is_drawn_is_answered(
    folder, after_too_little_memory, monkeypatch
):
    """The run is done, and the same command draws the report again, with another seed by force."""
    arguments = [*PLAIN, "--config.report.num_images=8"]
    arguments += ["--config.report.read_labels=False", "--config.seed=1"]
    error = run_debug(folder, *arguments, workdir="smaller")
    assert "seed was 0 and is now 1" in error
    arguments.append("--config.checkpoint.force_config=True")
    plot = pictures.plot_curves

    def plot_and_be_told(workdir):
        plot(workdir)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as told:
        told.setattr(pictures, "plot_curves", plot_and_be_told)
        assert run_debug(folder, *arguments, workdir="smaller") == exit_status.EXIT_TRY_AGAIN
    assert not (folder / "smaller" / "report.json").exists()


def test_the_weights_are_loaded_while_the_step_is_compiled(folder, monkeypatch):
    """The compiler gets no further until the teacher is there, or the run would wait for good."""
    teacher_is_there = threading.Event()
    load_teacher, compile_step = Experiment.load_teacher, train.StepPrograms.compile

    def load_and_tell(self):
        params = load_teacher(self)
        teacher_is_there.set()
        return params

    class Slow:
        """The lowered step, whose compiler is slow."""

        def __init__(self, lowered):
            self._lowered = lowered

        def compile(self):
            assert teacher_is_there.wait(60), "the teacher is loaded after the compilation"
            return self._lowered.compile()

    def compile_slowly(self, batch):
        step = self._train_step
        self._train_step = types.SimpleNamespace(lower=lambda *args: Slow(step.lower(*args)))
        return compile_step(self, batch)

    monkeypatch.setattr(Experiment, "load_teacher", load_and_tell)
    monkeypatch.setattr(train.StepPrograms, "compile", compile_slowly)
    assert run_debug(folder, *PLAIN, workdir="while_loading") is None
    assert [line["step"] for line in read_lines(folder / "while_loading")] == [1]


def test_a_preview_that_is_not_whole_counts_as_missing(tmp_path):
    """As a full disk or a power failure left it; it is drawn again on resume."""
    path = epath.Path(tmp_path) / "step_0000001.png"
    assert train.is_missing(path)
    pictures.save_picture(path, Image.new("RGB", (8, 8)))
    assert not train.is_missing(path)
    whole = path.read_bytes()
    for content in (b"", whole[:-1], whole[1:]):
        path.write_bytes(content)
        assert train.is_missing(path)
    scores = epath.Path(tmp_path) / "evaluation_0000001.json"
    assert train.is_missing(scores)
    scores.write_text("{}")
    assert not train.is_missing(scores)
