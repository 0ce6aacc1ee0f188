"""A LiT's folder for diffusers, loaded by diffusers: it draws what our sampler draws."""

import dataclasses
import functools
import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, DPMSolverMultistepScheduler
from torch_checkpoints import make_torch, port_config, save
from torch_dit import randomise_

from lit_jax import checkpoint, samplers
from lit_jax.diffusion import GaussianDiffusion
from lit_jax.experiment import Experiment
from lit_jax.jobs import port
from lit_jax.models.dit import DiT
from lit_jax.porting.read import load_params, read_checkpoint

MODEL = dict(attention="linear", num_heads=3)
LABELS = [1, 8, 1]
PROCESS = GaussianDiffusion()

NAMES = [f"class {number}" for number in range(10)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A random LiT as our export, and its checkpoint."""
    path = tmp_path_factory.mktemp("source") / "lit.safetensors"
    return save(make_torch(attention="linear"), path, kernel_function="relu", num_heads=3)


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """diffusers copies the code of a folder into its cache: into this one."""
    dynamic = importlib.import_module("diffusers.utils.dynamic_modules_utils")
    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def export(source, target, **sample):
    config = port_config(MODEL, source=source, target=target, layout="diffusers")
    config.sample.update(dict(steps=8, cfg_scale=2.0) | sample)
    report = port.run(config, target.parent / "work")
    return report, config


def ours(source, config):
    """Images (B, h, w, C) of the config's sampler."""
    saved = read_checkpoint(source)
    settings = Experiment(config).sampler_settings
    variance = PROCESS.choose_variance(settings.variance, 4, 8)
    settings = dataclasses.replace(settings, variance=variance)
    model = DiT(saved.config, dtype=jnp.float32)
    params = load_params(saved.params)
    grid = samplers.make_grid(PROCESS, settings)

    @jax.jit
    def draw(keys):
        def model_fn(*args):
            return model.apply({"params": params}, *args)

        condition = {"label": jnp.array(LABELS)}
        return samplers.sample(model_fn, keys, condition, (8, 8, 4), grid, settings)

    return np.asarray(draw(keys()))


def keys():
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(jnp.arange(len(LABELS)))


def torch_noise(step):
    noise = samplers.step_noise(keys(), step, (8, 8, 4))
    return torch.from_numpy(np.array(noise).transpose(0, 3, 1, 2).copy())


def load(folder):
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(
    "sample",
    [
        # 21 steps have timesteps that are halves before they are rounded.
        dict(sampler="ddpm", steps=21),
        dict(
            sampler="ddpm",
            spacing="leading",
            variance="fixed_large",
            cfg_channels="all",
            cfg_interval=(200.0, 800.0),
        ),
        dict(sampler="dpm++", order=3, clip_denoised=True),
        dict(sampler="ddim", spacing="leading", clip_denoised=True, cfg_scale=1.0),
    ],
)
def test_diffusers_draws_what_our_sampler_draws(source, modules, monkeypatch, tmp_path, sample):
    """The same noise, float32: 2e-5 of the largest value apart.

    Most of that is diffusers' table of signal powers, a product of 1000 factors in float32.
    """
    _, config = export(source, tmp_path / "lit", **sample)
    pipeline = load(tmp_path / "lit")
    fresh = iter(range(1, 100))
    ddpm = importlib.import_module("diffusers.schedulers.scheduling_ddpm")
    monkeypatch.setattr(ddpm, "randn_tensor", lambda *_, **__: torch_noise(next(fresh)))

    # Nothing but the labels: the steps and the guidance are the folder's own.
    found = pipeline(LABELS, latents=torch_noise(0), output_type="latent").images
    expected = ours(source, config)
    found = found.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-5 * np.abs(expected).max())


def test_a_decoder_is_copied_and_decodes(source, modules, tmp_path):
    vae = randomise_(
        AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4), 0
    )
    vae.register_to_config(scaling_factor=0.5)
    vae.save_pretrained(tmp_path / "sd" / "vae")
    config = port_config(MODEL, source=source, target=tmp_path / "lit", layout="diffusers")
    config.autoencoder.update(checkpoint=str(tmp_path / "sd"), scaling_factor=0.25)
    config.sample.update(sampler="dpm++", steps=2, clip_denoised=True)
    port.run(config, tmp_path / "work")

    pipeline = load(tmp_path / "lit")
    assert (tmp_path / "lit" / "vae" / "diffusion_pytorch_model.safetensors").read_bytes() == (
        tmp_path / "sd" / "vae" / "diffusion_pytorch_model.safetensors"
    ).read_bytes()
    call = functools.partial(pipeline, LABELS, latents=torch_noise(0))
    latents = call(output_type="latent").images
    found = call(output_type="np").images
    decoded = Experiment(config).autoencoder.from_latents(latents.numpy().transpose(0, 2, 3, 1))
    np.testing.assert_allclose(found, np.clip(decoded / 2 + 0.5, 0, 1), atol=2e-5)
    assert [image.size for image in call().images] == [(8, 8)] * 3


def test_what_the_pipeline_cannot_draw_is_said(source, modules, tmp_path):
    report, _ = export(source, tmp_path / "lit", steps=2)
    assert any("no vae/ was written: autoencoder.checkpoint names none" in n for n in report.notes)
    pipeline = load(tmp_path / "lit")
    with pytest.raises(
        ValueError, match=r"class_labels: \[10, -1\] are none of the classes 0 to 9"
    ):
        pipeline([0, 10, -1], output_type="latent")
    with pytest.raises(ValueError, match="latents of 4 channels and the pipeline has no vae"):
        pipeline([0])
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(tmp_path / "lit")


def test_the_folder_is_a_checkpoint_for_us_and_takes_other_schedulers(source, modules, tmp_path):
    report, _ = export(source, tmp_path / "lit")
    again = read_checkpoint(tmp_path / "lit")
    assert again.config == read_checkpoint(source).config
    assert again.report.checksum == report.checksum
    pipeline = load(tmp_path / "lit")
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    images = pipeline([3], num_inference_steps=3, guidance_scale=1, output_type="latent").images
    assert images.shape == (1, 4, 8, 8) and len(pipeline.scheduler.timesteps) == 3


@pytest.mark.parametrize(
    "sample, message",
    [
        (dict(sampler="ddim"), "sample.spacing = respaced with ddim .* offers leading or trailing"),
        (dict(sampler="ddim", spacing="trailing", steps=7), "trailing with ddim and 7 steps"),
        (dict(sampler="dpm++", spacing="time_uniform"), "sample.spacing = time_uniform with dpm"),
        (dict(sampler="ddpm", spacing="trailing"), "sample.spacing = trailing with ddpm"),
    ],
)
def test_a_sampler_that_diffusers_has_not_is_refused(source, tmp_path, sample, message):
    with pytest.raises(ValueError, match=message):
        export(source, tmp_path / "lit", **sample)
    assert not list(tmp_path.iterdir())


# ---- The model card ----


@pytest.fixture
def workdir(source, tmp_path):
    """What a run leaves, as far as a card reads it."""
    saved = read_checkpoint(source)
    folder = tmp_path / "run"
    about = {"model": saved.config.to_json(), "class_names": NAMES}
    checkpoint.save_params(folder / "checkpoints" / "700", saved.params, about)
    config = {
        "teacher": {"checkpoint": "in/DiT-XL-2-256x256.pt"},
        "student": {"init": "teacher"},
        "train": {"steps": 800, "batch_size": 32},
        "data": {"name": "evil | [x](http://a)\n# H"},
    }
    result = {"scores": {"fid_50k": 2.5}, "protocol": {"samples": {"cfg_scale": 1.5}}}
    report = {"num_images": 200, "labels_read": {"student": 0.96}}
    report["loss"] = {"mse": {"start": 1.5, "end": 0.25}}
    for name, content in (
        ("config.json", config),
        ("report.json", report),
        ("evaluation_700.json", result),
    ):
        (folder / name).write_text(json.dumps(content))
    (folder / "evaluation_900.json").write_text("{torn")
    return folder


def test_the_names_of_classes_go_with_the_folder(workdir, modules, tmp_path):
    export(workdir, tmp_path / "lit")
    assert read_checkpoint(tmp_path / "lit").class_names == tuple(NAMES)
    assert load(tmp_path / "lit").config.id2label == {str(i): n for i, n in enumerate(NAMES)}


def test_the_card_is_filled_from_the_run(workdir, tmp_path):
    report, _ = export(workdir, tmp_path / "lit")
    card = (tmp_path / "lit" / "README.md").read_text()
    for text in (
        "license: cc-by-nc-4.0\n",
        '\npipeline = DiffusionPipeline.from_pretrained("lit", trust_remote_code=True)\n',
        "| step of these weights | 700 |",
        "| teacher.checkpoint | DiT-XL-2-256x256.pt |",
        "| train.batch_size | 32 |",
        "| loss mse, start to end | 1.5 to 0.25 |",
        "reads 96.0% of 200 images of `student` as the class",
        "| fid_50k | 2.5 |",
        '"cfg_scale": 1.5',
        "| cfg_scale | 2 |",
        f"| SHA-256 of the weights | {report.checksum} |",
        "2501.12976",
    ):
        assert text in card
    # A name cannot end its table or become a heading.
    assert "| data.name | evil x (http://a) # H |" in card
    assert "evaluation_900" not in card


def test_a_card_says_what_nobody_knows(source, tmp_path):
    export(source, tmp_path / "lit")
    card = (tmp_path / "lit" / "README.md").read_text()
    assert "license: unknown\n" in card
    assert "`lit.safetensors`, which has no record of a run" in card
    assert "None: the run was not evaluated." in card
