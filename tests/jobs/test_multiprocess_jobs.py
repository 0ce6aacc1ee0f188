"""Preparing and sampling by real processes: two give what one gives, and a killed one goes on."""

import json
import pathlib
import signal
import time

import jax
import lives
import numpy as np
import pytest
from PIL import Image

import lit_jax
from configs import debug
from lit_jax import checkpoint
from lit_jax.experiment import Experiment
from lit_jax.jobs import sample
from lit_jax.models import param_shapes
from lit_jax.porting.read import read_checkpoint

IMAGES, SHARD = 120, 4


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = lives.Server(tmp_path_factory.mktemp("processes"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        path = folder / f"class_{i % 3}" / f"{i:03d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (24, 20, 3)).astype(np.uint8)).save(
            path, compress_level=0
        )
    return folder


def overrides(folder, out):
    return (
        "--mode=prepare",
        f"--config.prepare.source={folder}",
        "--config.data.name=small",
        f"--config.data.dir={out}",
        "--config.prepare.image_size=16",
        "--config.prepare.batch_size=2",
        f"--config.prepare.shard_records={SHARD}",
        "--config.data.num_threads=1",
    )


def files(out):
    return {path.name: path.read_bytes() for path in (out / "small" / "1.0.0").iterdir()}


@pytest.fixture(scope="module")
def prepared(server, folder):
    out = server.folder / "prepared"
    server.run(server.folder / "work", *overrides(folder, out))
    assert len([name for name in files(out) if "array_record" in name]) == IMAGES // SHARD
    return files(out)


def test_two_processes_prepare_the_same_folder_byte_for_byte(server, folder, prepared, tmp_path):
    pair = server.run_together(tmp_path / "work", 2, *overrides(folder, tmp_path / "out"))
    assert [life.wait() for life in pair] == [0, 0], "".join(life.text() for life in pair)
    assert files(tmp_path / "out") == prepared


def test_a_killed_preparation_goes_on_without_loss_or_duplicate(server, folder, prepared, tmp_path):
    out = tmp_path / "out" / "small" / "1.0.0"

    def shards():
        return {path.name: path.stat().st_mtime_ns for path in out.glob("small-*")}

    life = server.start(tmp_path / "work", *overrides(folder, tmp_path / "out"))
    deadline = time.monotonic() + 300
    while len(shards()) < 3:
        assert time.monotonic() < deadline, life.text()
        time.sleep(0.001)
    life.kill(signal.SIGKILL)
    assert life.wait() == -signal.SIGKILL
    before = shards()
    assert 3 <= len(before) < IMAGES // SHARD and not (out / "dataset_info.json").exists()
    server.run(tmp_path / "work", *overrides(folder, tmp_path / "out"))
    assert files(tmp_path / "out") == prepared
    again = [name for name, then in before.items() if shards()[name] != then]
    assert len(again) <= 1  # a shard that had its name, but not yet its line in the journal


def test_two_processes_sample_what_one_samples(server, tmp_path):
    """Each writes the images that its device holds."""
    config = debug.get_config()
    config.model.attention = "softmax"
    config.sample.num_images = 11
    architecture = Experiment(config).model_config
    shapes = param_shapes(architecture)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: (0.1 * rng.standard_normal(leaf.shape)).astype(np.float32), shapes
    )
    checkpoint.save_params(tmp_path / "weights", params, {"model": architecture.to_json()})
    config.sample.checkpoint = str(tmp_path / "weights")
    sample.run(config, tmp_path / "one")
    pair = server.run_together(
        tmp_path / "two",
        2,
        "--mode=sample",
        f"--config.sample.checkpoint={tmp_path / 'weights'}",
        "--config.sample.num_images=11",
    )
    assert [life.wait() for life in pair] == [0, 0], "".join(life.text() for life in pair)
    results = []
    for name in ("one", "two"):
        assert len(list((tmp_path / name / "samples").glob("*.png"))) == 11
        with np.load(tmp_path / name / "samples.npz") as archive:
            results.append({key: archive[key] for key in archive})
    np.testing.assert_array_equal(results[0]["label"], results[1]["label"])
    assert str(results[0]["protocol"]) == str(results[1]["protocol"])
    assert np.abs(results[0]["arr_0"].astype(int) - results[1]["arr_0"]).max() <= 1


def test_two_processes_port_together(server, tmp_path):
    """Into an Orbax folder, each its shards; into a file, process 0 alone; one report."""
    source = pathlib.Path(lit_jax.__file__).parent / "assets" / "quickstart_teacher.safetensors"
    expected = read_checkpoint(source).report.checksum
    for name, origin in (("orbax", source), ("b.safetensors", tmp_path / "orbax")):
        work = tmp_path / f"work_{name}"
        pair = server.run_together(
            work,
            2,
            "--mode=port",
            f"--config.port.source={origin}",
            f"--config.port.target={tmp_path / name}",
            "--config.port.check_model=False",
            "--config.mesh.data=1",
            "--config.mesh.fsdp=2",
        )
        assert [life.wait() for life in pair] == [0, 0], "".join(life.text() for life in pair)
        assert json.loads((work / "port_report.json").read_text())["checksum"] == expected
        assert sum("ported to" in life.text() for life in pair) == 1
        assert read_checkpoint(tmp_path / name).report.checksum == expected
