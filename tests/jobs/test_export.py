"""The exported sampler draws, without lit_jax, what --mode=sample draws."""

import json
import pathlib
import runpy
import sys

import jax
import jax.export
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from tiny_autoencoder import write_autoencoder

from configs import debug
from lit_jax import checkpoint, pictures, sharding
from lit_jax.experiment import Experiment
from lit_jax.jobs import export, sample
from lit_jax.models import param_shapes
from lit_jax.porting.read import load_params

SCRIPT = str(pathlib.Path(__file__).parents[2] / "examples" / "draw_with_jax.py")
COUNT = 20  # what the script draws


def make_config(folder, **model):
    """A config with a checkpoint of random weights: at init a LiT draws zeros."""
    config = debug.get_config()
    config.seed = 5
    config.model.update(dict(input_size=8, patch_size=4, in_channels=3) | model)
    config.sample.update(
        sampler="ddpm", steps=3, labels="balanced", num_images=COUNT, batch_size=40, cfg_scale=2.0
    )
    architecture = Experiment(config).model_config
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: (0.1 * rng.standard_normal(leaf.shape)).astype(np.float32),
        param_shapes(architecture),
    )
    path = folder / "params"
    checkpoint.save_params(path, params, {"model": architecture.to_json()})
    config.sample.checkpoint = str(path)
    return config


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return make_config(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def one_device(config):
    """The config's images as uint8, by the sampler of --mode=sample on one device."""
    experiment = Experiment(config)
    experiment.mesh = sharding.make_mesh(1, 1, devices=jax.devices()[:1])
    params = load_params(experiment.read_checkpoint("", config.sample.checkpoint).params)
    told = {"label": np.arange(COUNT) % 10}
    sampler = experiment.sampler(batch_size=COUNT)
    return pictures.to_uint8(sampler(params, np.arange(COUNT), told))


def draw(folder, picture, monkeypatch):
    """The images of the example script, (COUNT, h, w, C) uint8."""
    monkeypatch.setattr(sys, "argv", [SCRIPT, str(folder), str(picture)])
    names = runpy.run_path(SCRIPT)
    row = np.asarray(Image.open(picture))
    np.testing.assert_array_equal(row, names["row"])
    return names["pixels"]


@pytest.mark.parametrize("inside", [False, True])
def test_the_pixels_are_those_of_the_sampler(config, one_device, tmp_path, monkeypatch, inside):
    config = config.copy_and_resolve_references()
    config.export.weights_inside = inside
    export.run(config, tmp_path)
    folder = tmp_path / "export"
    files = ["about.json", "sampler.jax_export", "weights.safetensors"]
    names = sorted(path.name for path in folder.iterdir())
    assert names == (files[:2] if inside else files)
    pixels = draw(folder, tmp_path / "row.ppm", monkeypatch)
    np.testing.assert_array_equal(pixels, one_device)


def test_weights_in_int8_go_into_the_file_and_draw_nearly_the_same(
    config, one_device, tmp_path, monkeypatch
):
    config = config.copy_and_resolve_references()
    config.sample.quantize = "int8_weights"
    export.run(config, tmp_path)
    folder = tmp_path / "export"
    assert json.loads((folder / "about.json").read_text())["quantize"] == "int8_weights"
    weights = load_file(folder / "weights.safetensors")
    assert weights["model/blocks/mlp/fc1/kernel/qvalue"].dtype == np.int8
    pixels = draw(folder, tmp_path / "row.ppm", monkeypatch)
    distance = np.abs(pixels.astype(np.float32) - one_device).mean()
    assert 0 < distance < 8  # of 255


def test_the_pixels_are_those_of_the_job_and_about_says_what_it_is(
    config, one_device, tmp_path, monkeypatch
):
    sample.run(config, tmp_path)
    paths = sorted((tmp_path / "samples").glob("*.png"))
    drawn = np.stack([sample.read_image(path) for path in paths]).astype(int)
    # Eight devices with other shapes sum in another order than one.
    assert np.abs(drawn - one_device).max() <= 1 and (drawn != one_device).mean() < 0.01

    export.run(config, tmp_path)
    about = json.loads((tmp_path / "export" / "about.json").read_text())
    assert about["platforms"] == ["cpu", "tpu", "cuda"] and about["batch"] == "any"
    assert about["inputs"]["label"]["shape"] == ["batch"]
    assert about["output"]["shape"] == ["batch", 8, 8, 3]
    assert about["jax"] == jax.__version__ and "6 months" in about["readable"]
    protocol = json.loads((tmp_path / "samples" / "protocol.json").read_text())
    assert about["protocol"] == protocol | {"labels": "an input"}
    program = (tmp_path / "export" / "sampler.jax_export").read_bytes()
    exported = jax.export.deserialize(bytearray(program))
    assert exported.fun_name == "lit_jax_sampler" and exported.nr_devices == 1
    with pytest.raises(ValueError, match="export.target = .*export exists; an export never over"):
        export.run(config, tmp_path)


def test_the_decoder_goes_along(tmp_path):
    config = make_config(tmp_path, in_channels=4, patch_size=2)
    write_autoencoder(tmp_path / "vae")
    config.autoencoder.checkpoint = str(tmp_path / "vae")
    config.sample.cfg_scale = 1.0
    config.export.update(target=str(tmp_path / "out"), batch_size=3, platforms=("cpu",))
    config.export.weights_inside = True
    export.run(config, tmp_path / "work")
    assert not (tmp_path / "work").exists()
    program = (tmp_path / "out" / "sampler.jax_export").read_bytes()
    exported = jax.export.deserialize(bytearray(program))
    index = np.arange(3, dtype=np.int32)
    # Without guidance there is no scale of it.
    told = {"seed": np.uint32(5), "index": index, "label": index}
    found = np.asarray(exported.call({}, told))

    experiment = Experiment(config)
    experiment.mesh = sharding.make_mesh(1, 1, devices=jax.devices()[:1])
    params = load_params(experiment.read_checkpoint("", config.sample.checkpoint).params)
    expected = experiment.sampler(batch_size=3)(params, index, {"label": index})
    assert found.shape == (3, 16, 16, 3)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"platforms": ()}, "export.platforms must be some of cpu, tpu, cuda; got ()"),
        ({"platforms": ("cpu", "gpu")}, r"cpu, tpu, cuda; got \('cpu', 'gpu'\)"),
        ({"batch_size": -1}, "export.batch_size must be"),
    ],
)
def test_what_cannot_be_exported_is_refused(config, tmp_path, change, message):
    config = config.copy_and_resolve_references()
    config.export.update(change)
    with pytest.raises(ValueError, match=message):
        export.run(config, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_attention_goes_where_it_runs(config, tmp_path, monkeypatch):
    config = config.copy_and_resolve_references()
    config.model.implementation = "pallas_tpu"
    with pytest.raises(ValueError, match="model.implementation = pallas_tpu runs on tpu alone"):
        export.run(config, tmp_path)
    config.export.platforms = ("tpu",)
    with pytest.raises(ValueError, match="export.batch_size = 0, any number, but model.impl"):
        export.run(config, tmp_path)
    monkeypatch.setattr(export, "MOST_INSIDE", 1000)
    config.model.implementation = "xla"
    config.export.weights_inside = True
    with pytest.raises(ValueError, match="export.weights_inside = True, but the weights are .* b"):
        export.run(config, tmp_path)
    assert not list(tmp_path.iterdir())
