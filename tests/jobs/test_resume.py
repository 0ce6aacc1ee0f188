"""Exact resume: after any kill the run ends in the same bits as one that nobody disturbed."""

import random
import resource
import shutil
import signal
import socket
import time

import command
import jax
import jax.numpy as jnp
import lives
import numpy as np
import optax
import pytest
from restored import restore_params

from configs import debug
from lit_jax import checkpoint, sharding
from lit_jax.data import dataset
from lit_jax.experiment import Experiment
from lit_jax.jobs import train
from lit_jax.models.dit import DiT, DiTConfig
from lit_jax.porting.read import read_checkpoint
from lit_jax.runtime import exit_status
from lit_jax.train_step import state_shapes, with_sharding

# A checkpoint every 3 steps and a log line every 4: a resumed run has to finish a log line whose
# first steps another process ran.
STEPS = 24
ALONE = (*lives.WIDE, f"--config.train.steps={STEPS}", "--config.train.log_every=4")
RHYTHM = (*ALONE, "--config.checkpoint.every=3")
# To the end, without the checkpoints on the way, each of which takes as long as 30 steps.
TO_THE_END = (*ALONE, "--config.checkpoint.every=1000000")


@pytest.fixture(scope="module")
def server(forker, tmp_path_factory):
    return lives.Server(forker, tmp_path_factory.mktemp("lives"))


@pytest.fixture(scope="module")
def undisturbed(server):
    life = server.run(
        server.folder / "undisturbed",
        *ALONE,
        f"--config.checkpoint.every={STEPS // 3}",
        "--config.checkpoint.keep=3",
        f"--config.train.profile=({STEPS}, {2 * STEPS})",
    )
    return server.folder / "undisturbed", life.ids()


def check_same_end(workdir, undisturbed):
    expected, _ = undisturbed
    assert lives.losses(workdir) == lives.losses(expected)
    assert lives.fingerprints(workdir, STEPS) == lives.fingerprints(expected, STEPS)
    for ema in (False, True):
        trees = [restore_params(path, ema=ema)[0] for path in (workdir, expected)]
        jax.tree.map(np.testing.assert_array_equal, *trees)


def test_kills_at_random_moments_and_a_second_run_change_no_bit(server, undisturbed):
    draw, workdir, everything = random.Random(0), server.folder / "killed", []
    # The early one is killed in its start or its first steps. A moment passes before each kill.
    for kill in ("early", "in a save", "after a save", "in a save"):
        life = server.start(workdir, *RHYTHM, batches=5)
        complete = saves(workdir)[1]
        if kill == "early":
            life.wait_for_batches(draw.randint(0, 4))
        elif kill == "in a save":
            # A busy machine may not look here before the save is complete.
            life.wait_until(
                lambda life=life, complete=complete: (
                    (life.ids() and saves(workdir)[0]) or saves(workdir)[1] - complete
                )
            )
        else:
            life.wait_until(lambda complete=complete: saves(workdir)[1] - complete)
            check_second_is_refused(server, workdir, life)
        time.sleep(draw.uniform(0.0, 0.2))
        life.kill(signal.SIGKILL)  # its name stays in the file, its lock does not
        assert life.wait() == -signal.SIGKILL
        everything.append(life)
    everything.append(server.run(workdir, *TO_THE_END))
    assert everything[-1].first_step() >= 3  # after one of the kills a save was complete
    for life in everything:
        taken = life.ids()
        assert taken == undisturbed[1][life.first_step() :][: len(taken)]
    check_same_end(workdir, undisturbed)


def check_second_is_refused(server, workdir, first):
    """A second run in the workdir harms neither the first nor its restart."""
    second = server.start(workdir, *RHYTHM)
    assert second.wait() == 1
    message = second.text().splitlines()[-1]
    assert message.startswith(
        f"error: --workdir={workdir} is in use by process {first.pid} "
        f"on {socket.gethostname()} since 20"
    )
    assert not second.ids()


def saves(workdir):
    """Names of the incomplete saves (under way, or cut off by a kill) and of the complete ones."""
    names = {path.name for path in (workdir / "checkpoints").glob("*")}
    complete = {name for name in names if name.isdigit()}
    return names - complete, complete


ENDLESS = (
    "--config.train.preview_images=800000",
    "--config.sample.batch_size=8",
)  # a preview of hours, in short batches


def test_sigterm_and_then_sighup_inside_a_preview_save_at_once_and_exit_with_75(
    server, undisturbed
):
    workdir, previews = server.folder / "told", (*TO_THE_END, "--config.train.preview_every=7")
    life = server.start(workdir, *TO_THE_END, pause=0.2)
    life.wait_for_batches(2)
    life.kill(signal.SIGTERM)
    assert life.wait() == exit_status.EXIT_TRY_AGAIN
    saved = len(life.ids())
    assert f"step {saved} is saved" in life.text() and saved < 7

    life = server.start(workdir, *previews, *ENDLESS)
    life.wait_for_preview(7)
    told = time.monotonic()
    life.kill(signal.SIGHUP)
    assert life.wait() == exit_status.EXIT_TRY_AGAIN, life.text()
    assert (
        time.monotonic() - told < 30
    )  # a batch and a save take less than a second here, the rest is for a busy machine
    assert life.first_step() == saved
    assert len(life.ids()) == 7 - saved and "step 7 is saved" in life.text()

    # The preview is drawn on resume.
    assert server.run(workdir, *previews).first_step() == 7
    assert {path.name for path in (workdir / "previews").iterdir()} == {
        f"step_{n:07d}.png" for n in (*range(7, STEPS, 7), STEPS)
    }
    check_same_end(workdir, undisturbed)


def test_sigint_inside_the_last_preview_is_answered_and_the_rest_is_made_up_for(server):
    workdir, run = server.folder / "last", (*TO_THE_END, "--config.train.preview_every=100")
    life = server.start(workdir, *run, *ENDLESS)
    life.wait_for_preview(STEPS)
    life.kill(signal.SIGINT)
    assert life.wait() == exit_status.EXIT_TRY_AGAIN
    assert f"step {STEPS} is saved" in life.text()
    again = server.run(workdir, *run)
    assert again.first_step() == STEPS and again.ids() == []
    assert (workdir / "previews" / f"step_{STEPS:07d}.png").exists() and (
        workdir / "curves.png"
    ).exists()


def test_a_checkpoint_that_cannot_be_written_ends_the_run_at_once_with_its_folder_and_status_70(
    server,
):
    workdir = server.folder / "no_folder"
    life = server.start(workdir, *RHYTHM, pause=0.5)
    life.wait_until(lambda: saves(workdir)[1])
    (workdir / "checkpoints").rename(workdir / "elsewhere")
    (workdir / "checkpoints").write_text("in the way")
    broken = time.monotonic()
    assert life.wait() == exit_status.EXIT_CRASHED, life.text()
    assert time.monotonic() - broken < 30  # Orbax alone: 300
    message = life.text().splitlines()[-1]
    assert message.startswith("error: the checkpoint of step ") and message.endswith(
        "from the last checkpoint"
    )
    assert f"in {workdir}/checkpoints cannot be written: " in message
    (workdir / "checkpoints").unlink()
    (workdir / "elsewhere").rename(workdir / "checkpoints")
    _, metadata = restore_params(workdir)  # of the save before, from which a restart goes on
    assert metadata["path"].startswith(f"{workdir}/checkpoints/")


def test_a_flipped_bit_is_named_and_the_checkpoint_before_continues_the_run(server, undisturbed):
    workdir = server.folder / "damaged"
    shutil.copytree(undisturbed[0], workdir)
    first, newest, last = (STEPS // 3, 2 * STEPS // 3, STEPS)
    shutil.rmtree(workdir / "checkpoints" / str(last))
    damage_by_flip(workdir / "checkpoints" / str(newest))
    life = server.run(workdir, *TO_THE_END)
    assert f"checkpoint {workdir}/checkpoints/{newest} is damaged and skipped" in life.text()
    assert life.first_step() == first
    assert (workdir / "checkpoints" / f"{newest}.damaged").is_dir()
    check_same_end(workdir, undisturbed)


def test_a_change_that_would_change_the_run_is_refused_with_both_values(server, undisturbed):
    life = server.start(undisturbed[0], *RHYTHM, "--config.seed=1")
    assert life.wait() == 1
    message = life.text().splitlines()[-1]
    assert (
        message.startswith("error: ")
        and "seed was 0 and is now 1" in message
        and "force_config" in message
    )


def test_another_number_of_devices_sees_the_same_data_and_the_same_losses(server, undisturbed):
    workdir, ids = server.folder / "moving", undisturbed[1]
    # It begins with the first steps of the run that nobody disturbed.
    shutil.copytree(undisturbed[0], workdir)
    first, *others = (STEPS // 3, 2 * STEPS // 3, STEPS)
    for step in others:
        shutil.rmtree(workdir / "checkpoints" / str(step))
    parts = [
        server.run(
            workdir,
            *TO_THE_END,
            f"--config.train.steps={steps}",
            f"--config.mesh.cpu_devices={devices}",
            f"--config.mesh.fsdp={fsdp}",
        )
        for steps, devices, fsdp in ((first + 4, 4, 2), (first + 8, 1, 1))
    ]
    assert [life.first_step() for life in parts] == [first, first + 4]
    assert sum((life.ids() for life in parts), []) == ids[first : first + 8]
    expected, actual = lives.losses(undisturbed[0]), lives.losses(workdir)
    assert list(actual) == list(range(4, first + 9, 4))
    for now, metrics in actual.items():
        assert metrics.keys() == expected[now].keys()
        for name, value in metrics.items():
            assert value == pytest.approx(expected[now][name], rel=1e-4), (now, name)


# Below: the checkpoints alone, in this process.


def damage_by_flip(folder):
    """Flips one bit in the middle of the largest file, where only numbers are."""
    path = max(
        (p for p in (folder / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def tiny_state(value):
    items = {
        name: {"kernel": jnp.full((64, 32), value)}
        for name in ("params", "ema_params", "opt_state")
    }
    return items | {"train": {"step": jnp.int32(value)}}


def save_two(folder, fields=None):
    checkpoints = checkpoint.Checkpointer(folder, keep=3, keep_every=0)
    for now in (1, 2):
        checkpoints.save(
            now, tiny_state(now), data={"read": now}, metadata={"fields": fields or {}}
        )
    checkpoints.wait()
    checkpoints.close()
    return jax.eval_shape(lambda: tiny_state(0))


def with_device(shapes):
    return with_sharding(
        shapes, jax.tree.map(lambda _: sharding.replicated(sharding.make_mesh(fsdp=1)), shapes)
    )


def test_a_write_that_fails_in_the_background_is_told_by_the_next_check_and_by_wait(tmp_path):
    checkpoints = checkpoint.Checkpointer(tmp_path, keep=3, keep_every=0)
    items = tiny_state(0) | {
        "params": {"kernel": jnp.asarray(np.random.default_rng(0).random((512, 512)))}
    }  # 1 MB
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (2**18, hard)
    )  # as on a full disk: folders and small files still work
    try:
        checkpoints.save(1, items, data={}, metadata={})
        for tell in (
            checkpoints.wait,
            checkpoints.check,
            lambda: checkpoints.save(2, items, data={}, metadata={}),
        ):
            with pytest.raises(
                OSError,
                match=f"the checkpoint of step 1 in {tmp_path} cannot be written: .*too large",
            ):
                tell()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_flipped_bit_is_found_without_a_run(tmp_path):
    shapes = with_device(save_two(tmp_path))
    damage_by_flip(tmp_path / "2")
    checkpoints = checkpoint.Checkpointer(tmp_path, keep=3, keep_every=0)
    found, items, data, _ = checkpoints.restore(shapes)
    assert (found, int(items["train"]["step"]), data) == (1, 1, {"read": 1})
    assert (tmp_path / "2.damaged").is_dir()
    checkpoints.close()


def test_changed_fields_are_refused_unless_forced(tmp_path):
    shapes = with_device(save_two(tmp_path, {"model.width": 32, "model.grid": (7, 7)}))
    checkpoints = checkpoint.Checkpointer(tmp_path, keep=3, keep_every=0)
    assert checkpoints.restore(shapes, {"model.width": 32, "model.grid": (7, 7)})[0] == 2
    with pytest.raises(ValueError, match="model.width was 32 and is now 64"):
        checkpoints.restore(shapes, {"model.width": 64})
    assert checkpoints.restore(shapes, {"model.width": 64}, force=True)[0] == 2


def make_dataset(name="digits", split="train", count=20, invert=False):
    images = [np.full((28, 28, 1), 255 - i if invert else i, np.uint8) for i in range(count)]
    return dataset.ImageDataset(
        name, split, [{"image": image, "label": 3} for image in images], (28, 28, 1), 10
    )


def decisive_fields(config, data, teacher_checkpoint):
    """Those of a config whose data set and teacher are given, not opened."""
    experiment = Experiment(config)
    experiment.dataset = data
    experiment.teacher_checkpoint = teacher_checkpoint
    return experiment.decisive_fields()


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Two teachers of one architecture, and the checkpoint of a run with the first.

    Of the checkpoint: its folder, shapes and fields.
    """
    folder = tmp_path_factory.mktemp("fields")
    for seed in (0, 1):
        command.write_teacher(folder / f"{seed}.safetensors", seed)
    teachers = [read_checkpoint(folder / f"{seed}.safetensors", weights="ema") for seed in (0, 1)]
    fields = decisive_fields(debug.get_config(), make_dataset(), teachers[0])
    return teachers, folder / "run", with_device(save_two(folder / "run", fields)), fields


def go_on(started, *, data=None, teacher=0, **changes):
    """The fields after a change, and what comes of a restart with them."""
    teachers, folder, shapes, _ = started
    config = debug.get_config()
    config.update_from_flattened_dict(changes)
    fields = decisive_fields(config, data or make_dataset(), teachers[teacher])
    checkpoints = checkpoint.Checkpointer(folder, keep=3, keep_every=0)
    try:
        return fields, checkpoints.restore(shapes, fields)[0]
    except ValueError as error:
        return fields, str(error)
    finally:
        checkpoints.close()


@pytest.mark.parametrize(
    "field, change",
    [
        ("seed", {"seed": 1}),
        ("data.records", dict(data=make_dataset(name="letters"))),
        ("data.records", dict(data=make_dataset(split="test"))),
        ("data.content", dict(data=make_dataset(invert=True))),
        ("data.flip", {"data.flip": True}),
        ("train.batch_size", {"train.batch_size": 8}),
        ("train.label_dropout", {"train.label_dropout": 0.25}),
        ("train.min_snr_gamma", {"train.min_snr_gamma": 5.0}),
        ("train.vb_weight", {"train.vb_weight": 0.5}),
        ("train.steps", {"train.steps": 4}),  # the cosine's length
        ("model.conv_size", {"model.conv_size": 3}),
        ("model.dtype", {"model.dtype": "bfloat16"}),
        ("distill.noise_weight", {"distill.noise_weight": 0.25}),
        ("distill.teacher_sees_dropped_labels", {"distill.teacher_sees_dropped_labels": True}),
        ("optimizer.learning_rate", {"optimizer.learning_rate": 0.25}),
        ("optimizer.clip_norm", {"optimizer.clip_norm": 0.25}),
        ("ema.decay", {"ema.decay": 0.25}),
        ("teacher.checkpoint", dict(teacher=1)),
        ("teacher.num_heads", {"teacher.num_heads": 1}),
        ("teacher.dtype", {"teacher.dtype": "bfloat16"}),
    ],
)
def test_each_field_that_decides_the_result_must_be_as_it_was(started, field, change):
    fields, answer = go_on(started, **change)
    before = started[-1]
    assert before[field] != fields[field]
    assert (
        f"is of another run: {field} was {before[field]} and is now {fields[field]}. Use another"
        in answer
    )


@pytest.mark.parametrize(
    "change",
    [
        {"train.steps": 4, "optimizer.schedule": "constant"},
        {"train.accumulation": 2},
        {"train.remat": "none"},
        {"train.log_every": 2},
        {"train.preview_every": 1},
        {"mesh.fsdp": 2},
        {"data.num_threads": 1},
        {"data.dir": "elsewhere"},
        {"model.implementation": "xla"},
        {"checkpoint.every": 2},
        {"sample.steps": 2},
        {"teacher.checkpoint": "moved"},
    ],
)
def test_what_does_not_decide_the_result_may_change(started, change):
    fields, answer = go_on(started, **change)
    if (
        "optimizer.schedule" in change
    ):  # that is refused, but without a schedule the number of steps is free
        assert "optimizer.schedule was" in answer and "train.steps" not in answer
    else:
        assert (fields, answer) == (started[-1], 2)


def test_the_fingerprint_sees_every_bit_and_every_place_but_not_the_mesh():
    x = np.arange(64 * 32, dtype=np.float32).reshape(64, 32)
    original = checkpoint.fingerprints({"a": {"x": x}})["a"]
    flipped, swapped = x.copy(), x.copy()
    flipped.view(np.uint32)[13, 7] ^= 1
    swapped[[3, 4]] = swapped[[4, 3]]
    others = {
        checkpoint.fingerprints({"a": {"x": y}})["a"]
        for y in (flipped, swapped, x.astype(np.int32))
    }
    assert len(others | {original}) == 4
    split = jax.device_put(x, jax.NamedSharding(sharding.make_mesh(2, 4), jax.P("data", "fsdp")))
    assert checkpoint.fingerprints({"a": {"x": split}})["a"] == original


def test_the_sharding_rule_splits_parameters_ema_and_optimizer_alike():
    mesh = sharding.make_mesh(data=2, fsdp=4)
    model = DiT(DiTConfig.of_size("S", num_classes=10))
    shapes = state_shapes(model, optax.adamw(1e-4))
    specs = sharding.fsdp_sharding(shapes, mesh)
    for tree in (specs.params, specs.ema_params, specs.opt_state[0].mu, specs.opt_state[0].nu):
        assert tree["blocks"]["mlp"]["fc1"]["kernel"].spec == jax.P(None, None, "fsdp")
    held = sum(
        np.prod(h.shard_shape(s.shape))
        for s, h in zip(jax.tree.leaves(shapes), jax.tree.leaves(specs))
    )
    assert held < 1.02 * sum(np.prod(s.shape) for s in jax.tree.leaves(shapes)) / 4


@pytest.mark.parametrize(
    "first, last, chosen, traced",
    [
        (1, 9, (), []),
        (1, 9, (2, 3), [2, 3]),
        (2, 3, (1, 2), [2]),  # a run that goes on after the first of them
        (5, 5, (1, 4), []),  # and one that goes on after the last
        (1, 4, (3, 9), [3, 4]),
        (1, 1, (2, 9), []),
    ],
)
def test_a_trace_is_of_the_chosen_steps_of_a_run(
    monkeypatch, tmp_path, first, last, chosen, traced
):
    running, found = [], []
    monkeypatch.setattr(jax.profiler, "start_trace", running.append)
    monkeypatch.setattr(jax.profiler, "stop_trace", running.clear)
    trace = train.Trace(chosen, tmp_path)
    for step in range(first, last + 1):
        trace.before_step(step, [])
        found += [step] * len(running)
    trace.close()
    assert found == traced and not running


def test_a_trace_ends_with_the_run(undisturbed):
    """In a process of its own: JAX's profiler crashes in one that has loaded torch, too."""
    assert len(list((undisturbed[0] / "profile").rglob("*.xplane.pb"))) == 1
