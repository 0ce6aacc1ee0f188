"""Latents in training: what the host hands over, what the step draws, and what is refused.

And CIFAR-10 through every job.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest
from tiny_autoencoder import write_autoencoder
from tiny_dataset import put_digits, write_cifar10

from configs import debug
from lit_jax import conditions, sharding
from lit_jax.data import pipeline
from lit_jax.data.dataset import ImageDataset, LatentDataset, read_all
from lit_jax.experiment import Experiment
from lit_jax.jobs import prepare, sample, train
from lit_jax.models import param_shapes
from lit_jax.sampling import Sampler
from lit_jax.train_step import images_to_model

H = 4
AUTOENCODER = {
    "name": "vae",
    "sha256": "a",
    "encoder_sha256": "b",
    "scaling_factor": 0.5,
    "shift_factor": 0.1,
}


@pytest.fixture(scope="module")
def latents():
    """64 latents whose mean says which record and which side they are of."""
    rng = np.random.default_rng(0)
    records = [
        {
            "mean": np.stack([np.full((H, H, 4), i), np.full((H, H, 4), -i)]).astype(np.float16),
            "log_variance": np.full((2, H, H, 4), -4 + i % 3, np.float16),
            "label": int(rng.integers(10)),
        }
        for i in range(64)
    ]
    return LatentDataset("latents", "train", records, (H, H, 4), 10, AUTOENCODER)


def first_batch(latents, flip):
    settings = dict(batch_size=16, seed=0, num_threads=1, prefetch=1)
    return next(iter(pipeline.make_batches(latents, flip=flip, **settings)))


def test_the_host_picks_image_or_mirror(latents):
    batch = first_batch(latents, flip=True)
    assert batch["mean"].shape == batch["log_variance"].shape == (16, H, H, 4)
    assert batch["mean"].dtype == np.float16
    side = batch["mean"][:, 0, 0, 0] / np.where(batch["index"], batch["index"], 1)
    assert set(side[batch["index"] > 0].tolist()) == {1.0, -1.0}
    np.testing.assert_array_equal(batch["log_variance"][:, 0, 0, 0], -4 + batch["index"] % 3)


def test_mean_and_log_variance_are_of_one_side(latents):
    records = [
        record | {"log_variance": np.float16(np.sign(record["mean"]))} for record in latents.records
    ]
    batch = first_batch(dataclasses.replace(latents, records=records), flip=True)
    np.testing.assert_array_equal(batch["log_variance"], np.sign(batch["mean"]))
    assert (batch["mean"] < 0).any() and (batch["mean"] > 0).any()


def test_without_flips_it_is_always_the_image(latents):
    batch = first_batch(latents, flip=False)
    np.testing.assert_array_equal(batch["mean"][:, 0, 0, 0], batch["index"])


def test_the_step_draws_from_the_posterior_and_scales():
    mean = np.full((4, 64, 64, 4), 3.0, np.float16)
    log_variance = np.full_like(mean, np.log(0.25))
    batch = {"mean": mean, "log_variance": log_variance}
    x = np.asarray(images_to_model(batch, jax.random.key(0), 0.5, 0.1), np.float64)
    n = x.size
    # The standard deviation is 0.5, scaled by 0.5.
    assert abs(x.mean() - (3.0 - 0.1) * 0.5) < 5 * 0.25 / np.sqrt(n)
    assert abs(x.std() - 0.25) < 5 * 0.25 / np.sqrt(2 * n)
    z = (x / 0.5 + 0.1 - 3.0) / 0.5
    assert abs((z**3).mean()) < 5 * np.sqrt(15 / n) and abs((z**4).mean() - 3) < 5 * np.sqrt(96 / n)
    assert not np.array_equal(x, images_to_model(batch, jax.random.key(1), 0.5, 0.1))
    certain = {"mean": mean, "log_variance": np.full_like(mean, -30)}
    np.testing.assert_allclose(
        images_to_model(certain, jax.random.key(0), 0.5, 0.1), 1.45, atol=1e-5
    )


def test_the_draw_does_not_depend_on_the_devices(latents):
    batch = first_batch(latents, flip=True)
    drawn = []
    for count in (1, 8):
        mesh = sharding.make_mesh(devices=jax.devices()[:count])
        rows = jax.device_put(batch, sharding.batch_sharding(mesh))
        drawn.append(np.asarray(jax.jit(images_to_model)(rows, jax.random.key(0), 0.5, 0.1)))
    np.testing.assert_allclose(drawn[0], drawn[1], rtol=1e-6, atol=1e-6)


def test_deviation_is_that_of_scaled_draws(latents):
    records = [latents[i] for i in range(64)]
    batch = {name: np.stack([r[name][0] for r in records]) for name in ("mean", "log_variance")}
    draw = jax.jit(images_to_model)
    draws = np.stack([draw(batch, jax.random.key(i), 0.5, 0.1) for i in range(8)])
    np.testing.assert_allclose(latents.deviation(), draws.std(axis=(0, 1, 2, 3)), rtol=0.01)


def test_the_input_pipeline_can_be_timed_alone(tmp_path):
    from lit_jax.jobs import benchmark

    config = debug.get_config()
    config.benchmark.update(what=("data",), repeats=1)
    config.data.update(dir=str(put_digits(tmp_path)), num_threads=1, prefetch=1)
    config.train.batch_size = 24
    benchmark.run(config, tmp_path / "workdir")
    (row,) = json.loads((tmp_path / "workdir" / "benchmark.json").read_text())["rows"]
    assert (row["what"], row["batch"], row["threads"]) == ("data mnist_digits", 24, 1)
    assert row["images/s"] == pytest.approx(24e3 / row["ms"]) and row["images/core second"] > 0


def test_deviation_counts_the_variance_of_the_posterior(latents):
    """The means are alike here, so all of it is the posterior's own."""
    record = latents.records[0] | {"mean": np.ones((2, H, H, 4), np.float16)}
    channels = np.log([0.25, 1, 4, 16])
    record["log_variance"] = np.broadcast_to(channels, (2, H, H, 4)).astype(np.float16)
    alike = dataclasses.replace(latents, records=[record] * 4)
    expected = np.array([0.5, 1, 2, 4]) * 0.5  # times the scaling factor
    # float16 rounds the log-variance to 2e-3.
    np.testing.assert_allclose(alike.deviation(), expected, rtol=2e-3)


# What is refused.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_autoencoder(tmp_path_factory.mktemp("autoencoder") / "vae")


def latent_config(checkpoint="", **autoencoder):
    config = debug.get_config()
    config.model.update(in_channels=4, input_size=H, num_classes=10, attention="softmax")
    config.report.read_labels = False
    config.autoencoder.update({"checkpoint": str(checkpoint)} | autoencoder)
    return config


def nothing_decoded(config):
    config.train.preview_every = config.report.num_images = 0
    return config


def check(config, dataset):
    experiment = Experiment(config)
    experiment.dataset = dataset  # in place of what data.name names
    experiment.check_data()


def test_matching_latents_pass(latents, checkpoint):
    config = latent_config(checkpoint)
    identity = Experiment(config).autoencoder_identity
    check(config, dataclasses.replace(latents, autoencoder=identity))
    check(nothing_decoded(latent_config(scaling_factor=0.5)), latents)


@pytest.mark.parametrize(
    "name, stored, message",
    [
        ("encoder_sha256", "c", "latents of vae with encoder_sha256 c, but the autoencoder of .*"),
        ("scaling_factor", 0.13, "with scaling_factor 0.13, but .* has 0.5"),
        ("shift_factor", 0.0, "with shift_factor 0.0, but .* has 0.1"),
    ],
)
def test_latents_of_another_autoencoder_are_refused(latents, checkpoint, name, stored, message):
    config = latent_config(checkpoint)
    identity = Experiment(config).autoencoder_identity
    with pytest.raises(
        ValueError, match=f"{message}{identity[name]}" if stored == "c" else message
    ):
        check(config, dataclasses.replace(latents, autoencoder=identity | {name: stored}))


def test_latents_need_a_decoder_to_be_looked_at(latents):
    with pytest.raises(ValueError, match="set train.preview_every and report.num_images to 0"):
        check(latent_config(), latents)


def test_a_scale_that_is_set_beside_the_data_is_checked_without_an_autoencoder(latents):
    with pytest.raises(ValueError, match="with scaling_factor 0.5, but .* has 0.2"):
        check(nothing_decoded(latent_config(scaling_factor=0.2)), latents)


def test_labels_cannot_be_read_off_latents(latents):
    config = nothing_decoded(latent_config())
    config.report.read_labels = True
    with pytest.raises(
        ValueError, match="report.read_labels needs images, but data.name = latents holds latents"
    ):
        check(config, latents)
    with pytest.raises(ValueError, match="latents holds latents, images are needed"):
        read_all(latents)


def test_images_and_an_autoencoder_do_not_go_together(checkpoint):
    images = ImageDataset("pixels", "train", [], (H, H, 4), 10)
    with pytest.raises(
        ValueError,
        match="data.name = pixels holds images, not latents; --mode=prepare encodes them",
    ):
        check(latent_config(checkpoint), images)


def test_a_fine_tuned_decoder_keeps_its_latents_and_another_encoder_does_not(tmp_path):
    def identity(name, **seeds):
        checkpoint = write_autoencoder(tmp_path / name, **seeds)
        return Experiment(latent_config(checkpoint)).autoencoder_identity

    first = identity("first")
    tuned = identity("tuned", decoder_seed=1)
    other = identity("other", seed=1)
    assert first["encoder_sha256"] == tuned["encoder_sha256"] != other["encoder_sha256"]
    assert len({first["sha256"], tuned["sha256"], other["sha256"]}) == 3


# From end to end.


def test_cifar10_from_images_to_latents_to_a_model_to_images(tmp_path):
    config = debug.get_config()
    config.model.update(
        attention="softmax", input_size=16, in_channels=4, num_classes=10, patch_size=4
    )
    config.student.init = "random"
    config.autoencoder.checkpoint = str(write_autoencoder(tmp_path / "tiny-vae"))
    config.prepare.update(
        source="cifar10",
        dir=str(write_cifar10(tmp_path / "tfds")),
        split="train[:64]",
        image_size=32,
        batch_size=16,
        shard_records=32,
    )
    config.data.update(
        name="cifar10_latents", dir=str(tmp_path / "data"), flip=True, num_threads=1, prefetch=2
    )
    config.train.update(steps=2, remat="none", preview_every=2)
    config.report.update(num_images=0, read_labels=False)
    config.sample.update(steps=2, num_images=10, batch_size=8, clip_denoised=False)
    workdir = tmp_path / "run"
    prepare.run(config, workdir)
    train.run(config, workdir)
    sample.run(config, workdir)
    assert (workdir / "previews" / "step_0000002.png").exists()
    metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2] and all(
        np.isfinite(line["train/loss"]) for line in metrics
    )
    with np.load(workdir / "samples.npz") as archive:
        assert archive["arr_0"].shape == (10, 32, 32, 3) and archive["arr_0"].std() > 1
        protocol = json.loads(str(archive["protocol"]))
    prepared = json.loads(
        (tmp_path / "data" / "cifar10_latents" / "1.0.0" / "prepared.json").read_text()
    )
    assert protocol["autoencoder"] == prepared["autoencoder"]
    assert (
        protocol["autoencoder"]["name"] == "tiny-vae"
        and len(protocol["autoencoder"]["sha256"]) == 64
    )


def test_a_sampler_decodes_what_it_draws(checkpoint):
    """Its images are the autoencoder's of the latents that it draws without one."""
    config = latent_config(checkpoint)
    config.model.update(input_size=8, depth=1)
    config.sample.update(steps=1, cfg_scale=1.0)
    experiment = Experiment(config)
    model = experiment.model
    shapes = param_shapes(model.config)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: 0.1 * rng.standard_normal(x.shape, np.float32), shapes)
    index = np.arange(5)
    condition = conditions.for_images(model.config, index, seed=0, labels="balanced")
    autoencoder = experiment.autoencoder
    drawn = {}
    for name, used in (("latents", None), ("images", autoencoder)):
        sampler = Sampler(
            model,
            experiment.sampler_settings,
            batch_size=8,
            mesh=experiment.mesh,
            autoencoder=used,
        )
        drawn[name] = sampler(params, index, condition)
    assert drawn["latents"].shape == (5, 8, 8, 4) and drawn["images"].shape == (5, 16, 16, 3)
    decoded = autoencoder.decode(drawn["latents"] / 0.5 + 0.1)
    np.testing.assert_allclose(drawn["images"], np.asarray(decoded), rtol=1e-4, atol=1e-5)
