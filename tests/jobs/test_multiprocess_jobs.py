"""Jobs by real processes: several give what one gives, and a killed one goes on."""

import json
import pathlib
import signal
import time

import jax
import lives
import numpy as np
import pytest
from etils import epath
from PIL import Image
from tiny_autoencoder import write_autoencoder
from tiny_captions import BUCKETS, make_config, write_folder, write_transformer
from tiny_text import write_text_encoder

import lit_jax
from configs import debug
from lit_jax import checkpoint, pictures
from lit_jax.experiment import Experiment
from lit_jax.jobs import sample
from lit_jax.models import param_shapes
from lit_jax.porting.read import read_checkpoint

IMAGES, SHARD = 120, 4


@pytest.fixture(scope="module")
def server(forker, tmp_path_factory):
    return lives.Server(forker, tmp_path_factory.mktemp("processes"))


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
    config.model.update(attention="softmax", depth=1)
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


# ---- Text-to-image, by the recipe that users start from ------------------------------------------


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """configs/pixart_sigma_512.py of a tiny model, whose teacher is a pipeline's folder."""
    folder = tmp_path_factory.mktemp("text_to_image")
    for name in ("images", "pipeline"):
        (folder / name).mkdir()
    pipeline = write_text_encoder(folder / "pipeline")
    autoencoder = write_autoencoder(folder / "autoencoder")
    write_transformer(make_config("", "", pipeline, autoencoder), pipeline)
    fields = {
        "model.depth": 2, "model.width": 32, "model.num_heads": 2, "model.cross_heads": 2,
        "model.input_size": 8, "model.position_base": 4, "model.caption_channels": 16,
        "model.caption_length": 20, "model.dtype": "float32", "model.attention": "linear",
        "teacher.checkpoint": pipeline, "teacher.size": "", "teacher.dtype": "float32",
        "student.init": "teacher", "data.name": "captioned", "data.num_threads": 1,
        "prepare.source": f"{write_folder(folder / 'images')}/", "prepare.image_size": 16,
        "prepare.buckets": BUCKETS[1:], "prepare.batch_size": 8, "prepare.shard_records": 2,
        "text.checkpoint": pipeline, "text.max_length": 20, "text.batch_size": 8,
        "text.dtype": "float32", "autoencoder.checkpoint": autoencoder,
    }  # fmt: skip
    overrides = [f"--config.{field}={value}" for field, value in fields.items()]
    return ("--config=configs/pixart_sigma_512.py", *overrides)


def captioned(out):
    """All that a preparation leaves, without the file that TFDS dates."""
    folder = out / "captioned" / "1.0.0"
    names = ("features.json", "prepared.json")
    paths = [*folder.glob("*.array_record-*"), *(folder / name for name in names)]
    return {path.name: path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def captions(server, recipe):
    out = server.folder / "captions"
    server.run(server.folder / "work", *recipe, "--mode=prepare", f"--config.data.dir={out}")
    return out


def test_three_processes_prepare_captions_byte_for_byte(server, recipe, captions, tmp_path):
    out = tmp_path / "out"
    overrides = (*recipe, "--mode=prepare", f"--config.data.dir={out}")
    three = server.run_together(tmp_path / "work", 3, *overrides)
    assert [life.wait() for life in three] == [0] * 3, "".join(life.text() for life in three)
    # Of 9 and 2 shards each process wrote some.
    assert all("this process wrote" in life.text() for life in three)
    assert captioned(out) == captioned(captions) and len(captioned(out)) == 13


def test_from_a_pipeline_to_genevals_folder(server, recipe, captions, tmp_path):
    """CAME on two buckets of stored features; killed, and resumed bit for bit; then sampled."""
    steps = 13
    overrides = (
        *recipe, f"--config.data.dir={captions}", f"--config.train.steps={steps}",
        "--config.train.log_every=1", "--config.optimizer.warmup=12",
        "--config.train.remat=none", "--config.train.preview_images=4",
        "--config.sample.steps=2", "--config.sample.batch_size=4",
        "--config.sample.images_per_prompt=2",
        f"--config.sample.prompt_file={tmp_path / 'prompts.jsonl'}",
    )  # fmt: skip
    lines = [json.dumps({"tag": "colors", "prompt": p}) for p in ("a red cat", "a blue dog")]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    previews = f"--config.train.preview_every={steps}"
    whole = server.run(tmp_path / "whole", *overrides, previews)
    assert "text.checkpoint = " in whole.text() and "makes it" in whole.text()
    assert whole.text().count("compiling the step for pictures of") == 2
    parts = server.start(tmp_path / "parts", *overrides, "--config.checkpoint.every=2", batches=3)
    saved = tmp_path / "parts" / "checkpoints" / "2"
    parts.wait_until(lambda: saved.is_dir() and len(parts.ids()) == 3)
    parts.kill(signal.SIGKILL)
    assert parts.wait() == -signal.SIGKILL
    again = server.run(tmp_path / "parts", *overrides)
    assert again.first_step() == 2 and parts.ids()[:2] + again.ids() == whole.ids()
    ends = [tmp_path / name for name in ("whole", "parts")]
    assert lives.fingerprints(ends[0], steps) == lives.fingerprints(ends[1], steps)
    losses = lives.losses(ends[0])
    assert losses == lives.losses(ends[1]) and len(losses) == steps
    assert all(line["train/kd_noise"] > 0 for line in losses.values())

    # Teacher and student, two prompts each.
    assert pictures.is_whole(epath.Path(ends[0]) / "previews" / f"step_{steps:07d}.png")

    server.run(ends[0], *overrides, "--mode=sample")
    folder = ends[0] / "samples"
    names = [f"{p}/{n}" for p in ("00000", "00001") for n in ("0000.png", "0001.png")]
    found = [f"{path.parts[-3]}/{path.name}" for path in sorted(folder.glob("0*/samples/*.png"))]
    assert found == names
    assert (folder / "00001" / "metadata.jsonl").read_text() == lines[1]
