"""The teacher's own samples as a data set."""

import json

import jax
import numpy as np
import pytest
from etils import epath
from tiny_autoencoder import write_autoencoder

from configs import debug
from lit_jax import checkpoint, pictures
from lit_jax.data.dataset import PREPARED, open_dataset
from lit_jax.data.shards import VERSION
from lit_jax.experiment import Experiment
from lit_jax.jobs import prepare
from lit_jax.models import param_shapes


def write_teacher(config, path, **about):
    """Random parameters of the config's own teacher, which they become."""
    config.teacher.checkpoint = ""
    architecture = Experiment(config).default_teacher().config
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: 0.1 * rng.standard_normal(leaf.shape, np.float32), param_shapes(architecture)
    )
    checkpoint.save_params(path, params, {"model": architecture.to_json()} | about)
    config.teacher.checkpoint = str(path)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Seven images of three classes, by a random teacher in pixels."""
    folder = tmp_path_factory.mktemp("teacher")
    config = debug.get_config()
    config.model.update(depth=1, num_classes=3, input_size=8)
    config.teacher.dtype = "float32"
    config.data.update(name="drawn", dir=str(folder / "data"))
    config.prepare.update(source="teacher", batch_size=8, shard_records=3)
    config.sample.update(num_images=7, labels="balanced", steps=2)
    write_teacher(config, folder / "params", class_names=["a", "b", "c"])
    return config


def test_a_data_set_is_what_the_teacher_draws_and_goes_on_where_it_stopped(config):
    prepare.run(config, epath.Path("unused"))
    images = open_dataset("drawn", config.data.dir, "train")
    experiment = Experiment(config)
    labels = np.arange(7) % 3
    sampler = experiment.sampler(experiment.teacher, 8)
    drawn = sampler(experiment.load_teacher(), range(7), {"label": labels})
    assert len(images) == 7 and images.class_names == ("a", "b", "c")
    for i in range(7):
        np.testing.assert_array_equal(images[i]["image"], pictures.to_uint8(drawn[i]))
        assert images[i]["label"] == labels[i]
    assert len(np.unique([images[i]["image"] for i in range(7)], axis=0)) == 7

    folder = epath.Path(config.data.dir) / "drawn" / VERSION
    about = json.loads((folder / PREPARED).read_text())
    assert about["protocol"]["steps"] == 2
    assert about["protocol"]["weights"] == experiment.teacher_checkpoint.report.checksum
    shards = {path: path.read_bytes() for path in folder.glob("*.array_record*")}
    assert len(shards) == 3
    lost = sorted(shards)[1]
    lost.unlink()
    prepare.run(config, epath.Path("unused"))
    assert lost.read_bytes() == shards[lost]

    other = config.copy_and_resolve_references()
    other.sample.cfg_scale = 3.0
    with pytest.raises(ValueError, match="was begun with .*'cfg_scale': 2.0.* this run has"):
        prepare.run(other, epath.Path("unused"))


def test_a_velocity_teacher_of_latents_gives_posteriors_of_its_images_and_their_mirrors(
    config, tmp_path
):
    """Each drawn latent is decoded, rounded to bytes, and encoded again, itself and its mirror."""
    config = config.copy_and_resolve_references()
    config.autoencoder.checkpoint = str(write_autoencoder(tmp_path / "vae"))
    config.model.update(prediction="velocity", in_channels=4, patch_size=2, input_size=4)
    config.sample.update(sampler="euler", num_images=3, cfg_channels="all")
    config.prepare.batch_size = 8
    config.data.dir = str(tmp_path / "data")
    write_teacher(config, tmp_path / "params")
    prepare.run(config, epath.Path("unused"))

    latents = open_dataset("drawn", config.data.dir, "train")
    experiment = Experiment(config)
    labels = np.arange(3)
    images = experiment.sampler(experiment.teacher, 8).draw(
        experiment.load_teacher(), range(3), {"label": labels}
    )
    pixels = pictures.to_uint8(np.asarray(images))[:3]
    assert pixels.shape == (3, 8, 8, 3) and len(latents) == 3
    found = [latents[i] for i in range(3)]
    assert [record["label"] for record in found] == list(labels)
    for side, seen in enumerate((pixels, pixels[:, :, ::-1])):
        mean, log_variance = experiment.autoencoder.encode(np.float32(seen) / 127.5 - 1)
        # Stored in float16.
        for name, wanted in (("mean", mean), ("log_variance", log_variance)):
            stored = np.stack([record[name][side] for record in found])
            np.testing.assert_allclose(stored, wanted, rtol=2e-3, atol=1e-3)
    assert not np.allclose(found[0]["mean"][0], found[0]["mean"][1], atol=0.01)


def test_a_teacher_has_to_be_named(config):
    nobody = config.copy_and_resolve_references()
    nobody.teacher.checkpoint = ""
    with pytest.raises(ValueError, match="^prepare.source = teacher, but teacher.checkpoint is em"):
        prepare.run(nobody, epath.Path("unused"))
