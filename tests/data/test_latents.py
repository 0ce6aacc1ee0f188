"""Latents in training: what the host hands over, what the step draws, and what is refused; CIFAR-10 through every job."""

import json
import pathlib

import jax
import numpy as np
import pytest
from tiny_autoencoder import write_autoencoder

from configs import debug
from lit_jax import experiment, sharding
from lit_jax.data import dataset, pipeline
from lit_jax.diffusion import make_diffusion
from lit_jax.jobs import benchmark, prepare, sample, train
from lit_jax.train_step import images_to_model, init_params

SHARED_TFDS = pathlib.Path(__file__).parents[3] / "shared" / "data" / "tfds"
H = 4


@pytest.fixture(scope="module")
def source():
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
    autoencoder = {
        "name": "vae",
        "sha256": "a",
        "encoder_sha256": "b",
        "scaling_factor": 0.5,
        "shift_factor": 0.1,
    }
    return dataset.LatentDataset("latents", "train", records, (H, H, 4), 10, 0.5, 0.1, autoencoder)


def first_batch(source, **kwargs):
    return next(
        iter(
            pipeline.make_batches(
                source, batch_size=16, seed=0, num_threads=1, prefetch=1, **kwargs
            )
        )
    )


def test_the_host_picks_image_or_mirror(source):
    batch = first_batch(source, flip=True)
    assert (
        batch["mean"].shape == batch["log_variance"].shape == (16, H, H, 4)
        and batch["mean"].dtype == np.float16
    )
    side = batch["mean"][:, 0, 0, 0] / np.where(batch["index"], batch["index"], 1)
    assert set(side[batch["index"] > 0].tolist()) == {1.0, -1.0}
    np.testing.assert_array_equal(batch["log_variance"][:, 0, 0, 0], -4 + batch["index"] % 3)


def test_without_flips_it_is_always_the_image(source):
    batch = first_batch(source, flip=False)
    np.testing.assert_array_equal(batch["mean"][:, 0, 0, 0], batch["index"])


def test_the_step_draws_from_the_posterior_and_scales():
    mean, log_variance = (
        np.full((4, 64, 64, 4), 3.0, np.float16),
        np.full((4, 64, 64, 4), np.log(0.25), np.float16),
    )
    batch = {"mean": mean, "log_variance": log_variance}
    x = np.asarray(images_to_model(batch, jax.random.key(0), 0.5, 0.1), np.float64)
    n = x.size
    assert abs(x.mean() - (3.0 - 0.1) * 0.5) < 5 * 0.25 / np.sqrt(
        n
    )  # standard deviation 0.5, scaled by 0.5
    assert abs(x.std() - 0.25) < 5 * 0.25 / np.sqrt(2 * n)
    z = (x / 0.5 + 0.1 - 3.0) / 0.5
    assert abs((z**3).mean()) < 5 * np.sqrt(15 / n) and abs((z**4).mean() - 3) < 5 * np.sqrt(96 / n)
    assert not np.array_equal(x, images_to_model(batch, jax.random.key(1), 0.5, 0.1))
    certain = {"mean": mean, "log_variance": np.full_like(mean, -30)}
    np.testing.assert_allclose(
        images_to_model(certain, jax.random.key(0), 0.5, 0.1), 1.45, atol=1e-5
    )


def test_the_draw_does_not_depend_on_the_devices(source):
    batch = first_batch(source, flip=True)
    drawn = []
    for count in (1, 8):
        mesh = sharding.make_mesh(devices=jax.devices()[:count])
        rows = jax.device_put(batch, sharding.batch_sharding(mesh))
        drawn.append(np.asarray(jax.jit(images_to_model)(rows, jax.random.key(0), 0.5, 0.1)))
    np.testing.assert_allclose(drawn[0], drawn[1], rtol=1e-6, atol=1e-6)


def test_deviation_is_that_of_scaled_draws(source):
    records = [source[i] for i in range(64)]
    batch = {name: np.stack([r[name][0] for r in records]) for name in ("mean", "log_variance")}
    draws = np.stack([images_to_model(batch, jax.random.key(i), 0.5, 0.1) for i in range(8)])
    np.testing.assert_allclose(source.deviation(), draws.std(axis=(0, 1, 2, 3)), rtol=0.01)


def test_the_input_pipeline_can_be_timed_alone(tmp_path):
    config = debug.get_config()
    config.benchmark.update(what=("data",), repeats=1)
    config.data.update(dir=str(tmp_path), num_threads=1, prefetch=1)
    config.train.batch_size = 24
    benchmark.run(config, tmp_path / "workdir")
    (row,) = json.loads((tmp_path / "workdir" / "benchmark.json").read_text())["rows"]
    assert (row["what"], row["batch"], row["threads"]) == ("data mnist_digits", 24, 1)
    assert row["images/s"] == pytest.approx(24e3 / row["ms"]) and row["images/core second"] > 0


# What is refused.

IDENTITY = {
    "name": "vae",
    "sha256": "x",
    "encoder_sha256": "b",
    "scaling_factor": 0.5,
    "shift_factor": 0.1,
}


def latent_config(**autoencoder):
    config = debug.get_config()
    config.model.update(in_channels=4, input_size=H, num_classes=10)
    config.report.read_labels = False
    config.autoencoder.update({"checkpoint": "vae"} | autoencoder)
    return config


def test_matching_latents_pass(source):
    experiment.check_data(latent_config(), source, IDENTITY)
    config = latent_config(checkpoint="", scaling_factor=0.5)
    config.train.preview_every = config.report.num_images = 0
    experiment.check_data(config, source, None)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"encoder_sha256": "c"},
            "latents of vae with encoder_sha256 b, but the autoencoder of the config .* has c",
        ),
        ({"scaling_factor": 0.13}, "with scaling_factor 0.5, but .* has 0.13"),
        ({"shift_factor": 0.0}, "with shift_factor 0.1, but .* has 0.0"),
    ],
)
def test_latents_of_another_autoencoder_are_refused(source, change, message):
    with pytest.raises(ValueError, match=message):
        experiment.check_data(latent_config(), source, IDENTITY | change)


def test_latents_need_a_decoder_to_be_looked_at(source):
    with pytest.raises(ValueError, match="set train.preview_every and report.num_images to 0"):
        experiment.check_data(latent_config(checkpoint=""), source, None)


def test_a_scale_that_is_set_beside_the_data_is_checked_without_an_autoencoder(source):
    config = latent_config(checkpoint="", scaling_factor=0.2)
    config.train.preview_every = config.report.num_images = 0
    with pytest.raises(ValueError, match="with scaling_factor 0.5, but .* has 0.2"):
        experiment.check_data(config, source, None)


def test_labels_cannot_be_read_off_latents(source):
    config = latent_config()
    config.report.read_labels = True
    with pytest.raises(
        ValueError, match="report.read_labels needs images, but data.name = latents holds latents"
    ):
        experiment.check_data(config, source, IDENTITY)
    with pytest.raises(ValueError, match="latents holds latents, images are needed"):
        dataset.read_all(source)


def test_images_and_an_autoencoder_do_not_go_together():
    images = dataset.ImageDataset("pixels", "train", [], (H, H, 4), 10)
    with pytest.raises(
        ValueError,
        match="data.name = pixels holds images, not latents; --mode=prepare encodes them",
    ):
        experiment.check_data(latent_config(), images, IDENTITY)


def test_a_fine_tuned_decoder_keeps_its_latents_and_another_encoder_does_not(tmp_path):
    mesh = sharding.make_mesh()

    def identity(name, **kwargs):
        config = latent_config(checkpoint=str(write_autoencoder(tmp_path / name, **kwargs)))
        return experiment.autoencoder(config, mesh)[1]

    first, tuned, other = (
        identity("first"),
        identity("tuned", decoder_seed=1),
        identity("other", seed=1),
    )
    assert first["encoder_sha256"] == tuned["encoder_sha256"] != other["encoder_sha256"]
    assert len({first["sha256"], tuned["sha256"], other["sha256"]}) == 3


# From end to end.


@pytest.mark.skipif(
    not (SHARED_TFDS / "cifar10").is_dir(), reason="no CIFAR-10 beside the repository"
)
def test_cifar10_from_images_to_latents_to_a_model_to_images(tmp_path):
    config = debug.get_config()
    config.model.update(
        attention="softmax", input_size=16, in_channels=4, num_classes=10, patch_size=4
    )
    config.student.init = "random"
    config.autoencoder.checkpoint = str(write_autoencoder(tmp_path / "tiny-vae"))
    config.prepare.update(
        source="cifar10",
        dir=str(SHARED_TFDS),
        split="train[:64]",
        image_size=32,
        batch_size=16,
        shard_records=32,
    )
    config.data.update(
        name="cifar10_latents", dir=str(tmp_path / "data"), flip=True, num_threads=1, prefetch=2
    )
    config.train.update(steps=2, preview_every=2)
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


def test_a_generator_decodes_what_it_draws(tmp_path):
    """Its images are the autoencoder's of the latents that it draws without one."""
    config = latent_config(checkpoint=str(write_autoencoder(tmp_path / "vae")))
    config.model.update(attention="softmax", input_size=8, patch_size=4)
    config.sample.steps = 2
    mesh = sharding.make_mesh()
    model = experiment.student(config)
    params = jax.jit(lambda rng: init_params(model, rng, 8))(jax.random.key(0))
    autoencoder, _ = experiment.autoencoder(config, mesh)
    index, images = np.arange(5), {}
    for name, used in (("latents", None), ("images", autoencoder)):
        generator = experiment.generators(
            config, {"model": model}, make_diffusion(), mesh, 8, used
        )["model"]
        images[name] = generator(params, index, generator.labels(index, "balanced"))
    assert images["latents"].shape == (5, 8, 8, 4) and images["images"].shape == (5, 16, 16, 3)
    decoded = autoencoder.module.apply(
        {"params": autoencoder.params}, images["latents"] / 0.5 + 0.1, method="decode"
    )
    np.testing.assert_allclose(images["images"], np.asarray(decoded), rtol=1e-4, atol=1e-5)
