"""Folders and object stores: a run whose workdir is gs://bucket/run leaves its files there."""

import json
import logging
import os
import pathlib

import command
import full_disk
import jax
import numpy as np
import object_store
import pytest
from etils import epath
from PIL import Image
from restored import restore_params

from lit_jax import checkpoint, pictures
from lit_jax.jobs import train  # noqa: F401  its imports define flags, which a run would take back
from lit_jax.runtime import exit_status, metric_writer, storage, workdir_lock


@pytest.fixture
def bucket(monkeypatch):
    with object_store.serve(monkeypatch) as bucket:
        yield bucket
    assert not list(pathlib.Path.cwd().glob("gs*"))
    assert not list(command.ROOT.glob("gs*"))


def names(folder=""):
    """The objects below a folder of the bucket, by their paths in it."""
    prefix = f"bucket/{folder}"
    return sorted(n.removeprefix(prefix) for n in object_store.OBJECTS if n.startswith(prefix))


def test_places_that_cannot_be_opened_are_named(bucket, monkeypatch):
    assert storage.user_path("a/b", "--workdir") == epath.Path("a/b")
    assert str(storage.user_path("gs://bucket/run", "--workdir")) == "gs://bucket/run"
    for name in ("gcs://bucket/run", "file:///run", "http://host/run"):
        with pytest.raises(ValueError, match=f"--workdir={name} is neither a .* gs://, s3://"):
            storage.user_path(name, "--workdir")
    with pytest.raises(ValueError, match="--workdir=s3://bucket/run needs .* s3fs"):
        storage.user_path("s3://bucket/run", "--workdir")

    def refuse(self, path, **_):
        raise PermissionError("401:\nno credentials")

    monkeypatch.setattr(object_store.Bucket, "exists", refuse)
    with pytest.raises(ValueError, match="data.dir=gs://b cannot be reached: 401: no credentials$"):
        storage.user_path("gs://b", "data.dir")


def test_only_urls_are_objects_and_stay_as_they_are():
    assert storage.is_object_store("gs://b/x") and storage.is_object_store(epath.Path("s3://b/x"))
    assert not storage.is_object_store("gs:/b") and not storage.is_object_store(epath.Path("/a"))
    assert str(storage.absolute("gs://b/x")) == "gs://b/x"
    assert storage.absolute("x") == epath.Path(pathlib.Path.cwd() / "x")


def test_a_file_is_replaced_as_a_whole(bucket, tmp_path):
    for folder in (bucket, epath.Path(tmp_path)):
        storage.replace_text(folder / "file.json", "old")
        storage.replace_text(folder / "file.json", "new")
        assert [path.name for path in folder.iterdir()] == ["file.json"]
        assert (folder / "file.json").read_text() == "new"


def test_a_power_failure_leaves_the_old_file_or_the_new_one(tmp_path, monkeypatch):
    """The new one is on the disk before it takes the name; it is not written over the old one."""
    path = epath.Path(tmp_path) / "file.json"
    storage.replace_text(path, "old")
    synced = []
    sync = os.fsync

    def record(descriptor):
        synced.append((path.with_name("file.json.part").read_text(), path.read_text()))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    with path.open() as reader:
        with storage.replacing(path) as file:
            file.write(b"new")
        assert reader.read() == "old"
    assert synced == [("new", "old")] and path.read_text() == "new"


def test_appending_to_an_object_keeps_what_is_there_and_goes_on_in_further_ones(bucket):
    path = bucket / "run" / "lines"
    path.write_text("before\n")
    with_limit = storage.open_to_append(path, limit=10)
    with_limit.write(b"1\n")
    assert path.read_text() == "before\n"  # not yet
    with_limit.flush()
    assert path.read_text() == "before\n1\n"
    for text in (b"2\n", b"3\n", b"4\n5\n6\n7\n8\n", b"9\n"):
        with_limit.write(text)
        with_limit.flush()
    with_limit.flush()
    with_limit.close()
    content = [(bucket / "run" / name).read_text() for name in names("run/")]
    assert names("run/") == ["lines", "lines.0001", "lines.0002"]
    assert content == ["before\n1\n2\n", "3\n4\n5\n6\n7\n8\n", "9\n"]

    whole = storage.open_to_append(bucket / "whole")
    for _ in range(3):
        whole.write(b"x" * 10)
        whole.flush()
    whole.close()
    assert (bucket / "whole").read_bytes() == b"x" * 30


def test_metrics_of_a_resumed_run_are_one_file_and_events_several(bucket, monkeypatch):
    monkeypatch.setattr(metric_writer, "EVENT_FILE_BYTES", 500)
    fixed = dict(total_steps=9, images_per_step=8, flops_per_step=1.0, peak_flops=None)
    for first_step in (0, 2):
        log = metric_writer.MetricWriter(bucket / "run", **fixed, first_step=first_step)
        for step in range(first_step + 1, first_step + 4):
            log.write(step, {"train/loss": float(first_step)})
        log.add_picture("preview", step, Image.new("L", (4, 4)))
        log.close()
    lines = metric_writer.read_training(bucket / "run")
    assert [(line["step"], line["train/loss"]) for line in lines] == [
        (1, 0.0),
        (2, 0.0),
        (3, 2.0),
        (4, 2.0),
        (5, 2.0),
    ]
    events = names("run/tensorboard/")
    assert len(events) > 2 and all(name.startswith("events.out.tfevents.") for name in events)
    assert "metrics.jsonl" in names("run/")
    pictures.plot_curves(bucket / "run")
    with (bucket / "run" / "curves.png").open("rb") as file:
        assert Image.open(file).format == "PNG"


def test_a_workdir_without_locks_is_used_with_a_note(bucket, caplog):
    with caplog.at_level(logging.INFO, logger="absl"):
        with workdir_lock.lock_workdir(bucket / "run"):
            pass
    assert "gs://bucket/run cannot be locked (an object store has no locks)" in caplog.text
    assert not names()


def test_crashes_are_counted(bucket):
    counts = []
    for _ in range(2):
        with pytest.raises(exit_status.CrashError) as error:
            with exit_status.Crashes(bucket / "run" / "crashes_0.json", 3) as crashes:
                crashes.begun = True
                raise OSError("a disk")
        counts.append(error.value.count())
    assert counts == [1, 2] and names("run/") == ["crashes_0.json"]


def test_checkpoints_are_saved_restored_and_set_aside(bucket):
    items = {name: {"w": jax.numpy.arange(4.0)} for name in checkpoint.ARRAY_ITEMS}
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), items
    )
    folder = bucket / "run" / "checkpoints"
    run = checkpoint.Checkpointer(folder, keep=2, keep_every=0)
    for step in (1, 2, 3):
        run.save(step, items, data={"read": step}, metadata={})
    run.wait()
    run.close()
    params, metadata = restore_params(bucket / "run")
    np.testing.assert_array_equal(params["w"], np.arange(4.0))
    assert metadata["path"] == "gs://bucket/run/checkpoints/3"

    for name in names():
        if name.startswith("run/checkpoints/3/opt_state/"):
            del object_store.OBJECTS[f"bucket/{name}"]
    run = checkpoint.Checkpointer(folder, keep=2, keep_every=0)
    step, restored, data, _ = run.restore(shapes)
    run.close()
    assert (step, data) == (2, {"read": 2})
    np.testing.assert_array_equal(restored["params"]["w"], np.arange(4.0))
    assert {path.name for path in folder.iterdir()} == {"2", "3.damaged"}


HttpError = type("HttpError", (Exception,), {"__module__": "gcsfs.retry"})


@pytest.mark.parametrize("reader", ["TensorStore", "epath"])
def test_a_store_that_refuses_says_nothing_about_the_checkpoint(bucket, monkeypatch, reader):
    """Credentials that have run out, for one: the run stops and leaves the checkpoint alone."""
    items = {name: {"w": jax.numpy.arange(4.0)} for name in checkpoint.ARRAY_ITEMS}
    run = checkpoint.Checkpointer(bucket / "checkpoints", keep=2, keep_every=0)
    run.save(1, items, data={}, metadata={})
    run.wait()

    if reader == "TensorStore":
        monkeypatch.setattr(object_store, "FORBIDDEN", "/opt_state/d/")
    else:

        def refuse(self, path, mode="rb", **_):
            raise HttpError("Anonymous caller, 401")

        monkeypatch.setattr(object_store.Bucket, "_open", refuse)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), items
    )
    with pytest.raises(
        OSError, match="checkpoints/1 cannot be read and is left as it is: .*40[13]"
    ):
        run.restore(shapes)
    run.close()
    assert [path.name for path in (bucket / "checkpoints").iterdir()] == ["1"]


def test_lines_that_the_store_does_not_take_are_named(bucket, monkeypatch):
    fixed = dict(total_steps=9, images_per_step=8, flops_per_step=1.0, peak_flops=None)
    log = metric_writer.MetricWriter(bucket / "run", **fixed)

    def refuse(self, path, mode="rb", **_):
        raise HttpError("Too many requests, 429")

    monkeypatch.setattr(object_store.Bucket, "_open", refuse)
    with pytest.raises(OSError, match="gs://bucket/run/metrics.jsonl cannot be written: Too many"):
        log.write(1, {"train/loss": 1.0})
    log.close()


def test_a_checkpoint_whose_save_was_killed_does_not_count(bucket):
    """It has its name, for an object store renames nothing, but no mark that it is complete."""
    for name in ("first", "second"):
        checkpoint.save_params(bucket / "checkpoints" / name, {"w": np.ones(2)}, {})
    (bucket / "checkpoints" / "first").rename(bucket / "checkpoints" / "1")
    (bucket / "checkpoints" / "second").rename(bucket / "checkpoints" / "2")
    (bucket / "checkpoints" / "2" / "commit_success.txt").unlink()
    _, metadata = restore_params(bucket)
    assert metadata["path"] == "gs://bucket/checkpoints/1"


def test_orbax_refuses_other_stores():
    for call in (
        lambda: checkpoint.Checkpointer("s3://bucket/run", keep=1, keep_every=0),
        lambda: checkpoint.save_params("s3://bucket/run", {}, {}),
        lambda: restore_params("s3://bucket/run"),
    ):
        with pytest.raises(ValueError, match="s3://bucket/run: Orbax .* in gs:// only"):
            call()


def test_a_run_leaves_its_files_there_and_goes_on_from_them(bucket, monkeypatch, tmp_path):
    arguments = [
        "--config=configs/debug.py",
        "--workdir=gs://bucket/run",
        f"--config.data.dir={tmp_path}",
        "--config.student.init=random",
        "--config.model.attention=softmax",
        "--config.model.depth=1",
        "--config.train.remat=none",
        "--config.sample.steps=2",
        "--config.sample.cfg_scale=1.0",
        "--config.report.read_labels=False",
        "--config.optimizer.schedule=constant",
    ]
    no_pictures = ["--config.train.preview_every=0", "--config.report.num_images=0"]
    assert command.run(monkeypatch, *arguments, "--config.train.steps=3") is None
    resumed = [*arguments, *no_pictures, "--config.train.steps=4"]
    assert command.run(monkeypatch, *resumed) is None
    lines = [line["step"] for line in metric_writer.read_training(bucket / "run")]
    assert lines == [1, 2, 3, 4]
    there = {name.split("/")[0] for name in names("run/")}
    assert there == {
        "checkpoints",
        "config.json",
        "crashes_0.json",
        "curves.png",
        "metrics.jsonl",
        "previews",
        "report.json",
        "samples.png",
        "tensorboard",
    }
    assert [path.name for path in (bucket / "run" / "checkpoints").iterdir()] == ["4"]
    assert json.loads((bucket / "run" / "config.json").read_text())["train"]["steps"] == 4


# Files are replaced as a whole.


def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path):
    path = epath.Path(tmp_path) / "file.json"
    storage.replace_text(path, "old")
    with full_disk.full_disk(), pytest.raises(OSError, match=f"^{path} {full_disk.MESSAGE}"):
        storage.replace_text(path, "new" * 1000)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [tmp_path / "file.json"]


def test_a_block_that_fails_leaves_the_old_file(tmp_path):
    path = epath.Path(tmp_path) / "file"
    path.write_text("old")
    with pytest.raises(KeyError), storage.replacing(path) as file:
        file.write(b"half of it")
        file.flush()
        assert path.read_text() == "old"
        raise KeyError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [tmp_path / "file"]
    with storage.replacing(path) as file:
        file.write(b"new")
    assert path.read_text() == "new"
