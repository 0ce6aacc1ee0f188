"""Text-to-image pipelines as folders, loaded by diffusers: they draw what our sampler draws."""

import importlib
import json

import diffusers
import jax
import numpy as np
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict
from tiny_autoencoder import write_autoencoder
from tiny_text import CONFIG, random_params, write_text_encoder
from torch_dit import randomise_

from configs import debug
from lit_jax import checkpoint, samplers
from lit_jax.experiment import Experiment
from lit_jax.jobs import port, sample
from lit_jax.models import param_shapes
from lit_jax.porting import write
from lit_jax.porting.read import load_params, read_autoencoder, read_checkpoint
from lit_jax.porting.t5 import export_text_encoder, read_text_encoder

PROMPTS = ("a Red cat", "a blue dog, on a hat")
NULL = "y_embedder/y_embedding"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A config with a text encoder and an autoencoder, in the folders of other pipelines."""
    folder = tmp_path_factory.mktemp("parts")
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    randomise_(vae, 0)
    vae.register_to_config(scaling_factor=0.5)
    vae.save_pretrained(folder / "vae")
    config = debug.get_config()
    with config.model.unlocked():
        config.model.update(
            family="pixart", num_classes=None, timestep_freq_shift=None, mlp_norm_epsilon=None,
            input_size=8, patch_size=2, in_channels=4, caption_channels=16, caption_length=20,
            position_base=4, num_heads=2, cross_heads=2, dtype="float32",
        )  # fmt: skip
    config.text.update(
        checkpoint=str(write_text_encoder(folder)), dtype="float32", max_length=20, batch_size=8
    )
    config.autoencoder.checkpoint = str(folder)
    config.sample.update(
        sampler="dpm++", spacing="linspace", steps=3, cfg_scale=4.5, cfg_channels="all",
        batch_size=8, prompts=PROMPTS, null_mask="own", clip_denoised=False,
    )  # fmt: skip
    return config


def with_weights(config, path, **model):
    """The config of a random PixArt, which is saved as an Orbax folder, and is its source."""
    config = config.copy_and_resolve_references()
    config.model.update(model)
    architecture = Experiment(config).model_config
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: 0.1 * rng.standard_normal(leaf.shape, np.float32), param_shapes(architecture)
    )
    params["y_embedder"]["y_embedding"] = Experiment(config).null_caption  # as in training
    checkpoint.save_params(path / "params", params, {"model": architecture.to_json()})
    config.port.update(
        source=str(path / "params"), target=str(path / "pipeline"), layout="diffusers"
    )
    return config


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """diffusers copies the code of a folder into its cache: into this one."""
    dynamic = importlib.import_module("diffusers.utils.dynamic_modules_utils")
    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def ours(config):
    """Noise, latents and images that our sampler makes of the written folder, channels first."""
    config = config.copy_and_resolve_references()
    folder = config.port.target
    config.text.checkpoint = folder
    config.autoencoder.checkpoint = folder
    experiment = Experiment(config)
    # The text encoder's null caption, as in diffusers.
    params = experiment.read_checkpoint("sample.checkpoint", folder).params
    index = np.arange(len(PROMPTS))
    asked = sample.what_is_asked(experiment, ())
    told, _ = sample.tell(experiment, asked, params, index)
    condition = {}
    for _, rows in told.batches(8):
        for name, value in told.condition(rows).items():
            edges = ((0, 0), (0, 20 - value.shape[1])) + ((0, 0),) * (value.ndim - 2)
            condition.setdefault(name, []).append(np.pad(value, edges))
    condition = {name: np.concatenate(parts) for name, parts in condition.items()}
    latents = experiment.sampler(decodes=False).draw_latents(load_params(params), index, condition)
    latents = latents[: len(index)]
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(config.seed), i))(index)
    noise = samplers.step_noise(keys, 0, latents.shape[1:])
    images = experiment.autoencoder.from_latents(latents)
    return [np.asarray(x).transpose(0, 3, 1, 2) for x in (noise, latents, images)]


def assert_draws_alike(pipeline, config, **call):
    """Latents at 3e-5 of their largest value, as those of classes (test_lit_pipeline.py)."""
    pipeline.set_progress_bar_config(disable=True)
    noise, latents, images = ours(config)
    call = dict(latents=torch.from_numpy(noise.copy())) | call
    found = pipeline(list(PROMPTS), output_type="latent", **call).images.numpy()
    np.testing.assert_allclose(found, latents, rtol=0, atol=3e-5 * np.abs(latents).max())
    found = pipeline(list(PROMPTS), output_type="pt", **call).images.numpy()
    np.testing.assert_allclose(found, np.clip(images / 2 + 0.5, 0, 1), atol=1e-4)


def assert_parts_are_the_sources(config):
    """Bit for bit: the checksum is over names, shapes and float32 values."""
    for field, read in (
        (config.text.checkpoint, read_text_encoder),
        (config.autoencoder.checkpoint, read_autoencoder),
    ):
        assert read(config.port.target).report.checksum == read(field).report.checksum
    spiece = "tokenizer/spiece.model"
    folders = (config.port.target, config.text.checkpoint)
    there, source = ((sample.epath.Path(each) / spiece).read_bytes() for each in folders)
    assert there == source


def test_a_pixart_with_its_parts_is_a_pipeline_of_diffusers(base, tmp_path):
    config = with_weights(base, tmp_path, attention="softmax")
    config.text.cleaning = "lower"  # what diffusers does where it does not clean
    config.sample.spacing = "time_uniform"  # no scheduler of diffusers
    report = port.run(config, tmp_path / "work")
    assert any("scheduler/ has timestep_spacing = linspace" in note for note in report.notes)
    assert_parts_are_the_sources(config)
    # And our own tree again, but for the null caption, for which diffusers has no place.
    asked = dict(family="pixart", overrides=Experiment(config).port_overrides)
    with pytest.raises(ValueError, match="null_caption must be named"):
        read_checkpoint(config.port.target, **asked)
    again = Experiment(config).read_checkpoint("port.source", config.port.target)
    before, after = (
        flatten_dict(found.params, sep="/")
        for found in (read_checkpoint(config.port.source), again)
    )
    assert before.keys() == after.keys()
    for name in before.keys() - {NULL}:
        np.testing.assert_array_equal(np.asarray(before[name]), np.asarray(after[name]))

    pipeline = diffusers.PixArtSigmaPipeline.from_pretrained(config.port.target)
    kinds = {name: type(part).__name__ for name, part in pipeline.components.items()}
    assert kinds == {
        "tokenizer": "T5Tokenizer",
        "text_encoder": "T5EncoderModel",
        "vae": "AutoencoderKL",
        "transformer": "PixArtTransformer2DModel",
        "scheduler": "DPMSolverMultistepScheduler",
    }
    config.sample.spacing = "linspace"
    assert_draws_alike(
        pipeline,
        config,
        num_inference_steps=3,
        clean_caption=False,
        use_resolution_binning=False,
        max_sequence_length=20,
    )


def test_a_lit_with_its_parts_is_a_pipeline_with_its_own_code(base, modules, tmp_path):
    """Steps, guidance and cleaning are the folder's: a call names the prompts alone."""
    config = with_weights(base, tmp_path, attention="linear")
    report = port.run(config, tmp_path / "work")
    assert_parts_are_the_sources(config)
    again = read_checkpoint(config.port.target)
    assert again.report.checksum == report.checksum
    assert again.config == read_checkpoint(config.port.source).config
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        config.port.target, trust_remote_code=True
    )
    assert_draws_alike(pipeline, config)
    card = (tmp_path / "pipeline" / "README.md").read_text()
    for text in ("pipeline_tag: text-to-image\n", "images of prompts", "lit_text_pipeline.py"):
        assert text in card
    bare = diffusers.DiffusionPipeline.from_pretrained(
        config.port.target, trust_remote_code=True, vae=None
    )
    with pytest.raises(ValueError, match="latents of 4 channels and the pipeline has no vae"):
        bare(PROMPTS[0])


def test_a_lit_of_pixels_needs_no_autoencoder(base, modules, tmp_path):
    config = with_weights(base, tmp_path, attention="linear", in_channels=3)
    config.autoencoder.checkpoint = ""
    report = port.run(config, tmp_path / "work")
    assert not any("vae" in note for note in report.notes)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        config.port.target, trust_remote_code=True
    )
    pipeline.set_progress_bar_config(disable=True)
    call = dict(latents=torch.randn(1, 3, 8, 16), height=8, width=16)
    drawn = pipeline(PROMPTS[0], output_type="latent", **call).images.numpy()
    images = pipeline(PROMPTS[0], output_type="np", **call).images
    expected = np.clip(drawn / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(images, expected, atol=1e-6)
    assert pipeline(PROMPTS[0]).images[0].size == (8, 8)


def test_a_pixart_without_parts_is_its_transformers_folder(base, tmp_path):
    config = with_weights(base, tmp_path, attention="softmax")
    config.text.checkpoint = config.autoencoder.checkpoint = ""
    port.run(config, tmp_path / "work")
    diffusers.PixArtTransformer2DModel.from_pretrained(config.port.target)
    # One part makes it a pipeline, and what is left out is told.
    config.text.checkpoint = base.text.checkpoint
    config.port.target = str(tmp_path / "second")
    report = port.run(config, tmp_path / "work")
    index = json.loads((tmp_path / "second" / "model_index.json").read_text())
    assert index["vae"] == [None, None] and index["text_encoder"][1] == "T5EncoderModel"
    assert "no vae/ was written: autoencoder.checkpoint is empty" in report.notes


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sample.sampler": "ddpm", "sample.spacing": ""}, "^sample.sampler = ddpm is none of Pix"),
        ({"sample.cfg_channels": "3"}, "^sample.cfg_channels = 3, but PixArtSigmaPipeline guides"),
        ({"sample.cfg_interval": (0.0, 500.0)}, r"^sample.cfg_interval = \(0.0, 500.0\), but Pix"),
        ({"text.checkpoint": "nowhere"}, "^text.checkpoint = nowhere: no such file or folder"),
        ({"autoencoder.checkpoint": "shifts"}, "shifts its latents by 0.1, which PixArtSigma"),
        ({"text.checkpoint": "wide"}, "features have 24 channels, the transformer takes 16"),
    ],
)
def test_what_is_no_pipeline_leaves_nothing(base, tmp_path, monkeypatch, change, message):
    config = with_weights(base, tmp_path, attention="linear")
    monkeypatch.chdir(tmp_path)
    if "shifts" in change.values():
        write_autoencoder(tmp_path / "shifts")
    if "wide" in change.values():
        wide = CONFIG.from_json(CONFIG.to_json() | {"width": 24})
        export_text_encoder(random_params(wide), tmp_path / "wide" / "text_encoder", wide)
        config.text.tokenizer = base.text.checkpoint
    config.update_from_flattened_dict(change)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        port.run(config, tmp_path / "work")
    assert not list(tmp_path.glob("*pipeline*")) and not (tmp_path / "work").exists()


def test_large_weights_are_several_files_with_an_index(tmp_path, monkeypatch):
    """A T5-XXL has 19 GB: two files."""
    params = random_params()
    export_text_encoder(params, tmp_path / "one", CONFIG)
    monkeypatch.setattr(write, "SHARD_BYTES", 5000)
    export_text_encoder(params, tmp_path / "some", CONFIG)
    files = sorted(path.name for path in (tmp_path / "some").glob("*.safetensors"))
    count = len(files)
    assert count > 2 and files[0] == f"model-00001-of-{count:05d}.safetensors"
    index = json.loads((tmp_path / "some" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(x.size for x in jax.tree.leaves(params))
    one, some = (read_text_encoder(tmp_path / name) for name in ("one", "some"))
    assert one.report.checksum == some.report.checksum
    one, some = (
        transformers.T5EncoderModel.from_pretrained(tmp_path / name).state_dict()
        for name in ("one", "some")
    )
    assert one.keys() == some.keys()
    assert all(torch.equal(one[key], some[key]) for key in one)


def test_an_autoencoder_is_ported_to_a_folder_of_diffusers(base, tmp_path):
    config = base.copy_and_resolve_references()
    source = write_autoencoder(tmp_path / "ours")
    config.port.update(source=str(source), target=str(tmp_path / "vae"), layout="diffusers")
    report = port.run(config, tmp_path / "work")
    again = read_autoencoder(tmp_path / "vae")
    assert again.report.checksum == report.checksum
    assert again.architecture == read_autoencoder(source).architecture
    loaded = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae", low_cpu_mem_usage=False)
    assert loaded.config.scaling_factor == 0.5 and loaded.config.shift_factor == 0.1
    # What was ported from diffusers goes back as it was.
    config.port.update(source=base.autoencoder.checkpoint, target=str(tmp_path / "back"))
    port.run(config, tmp_path / "work")
    folders = (f"{base.autoencoder.checkpoint}/vae", tmp_path / "back")
    one, other = (diffusers.AutoencoderKL.from_pretrained(path).state_dict() for path in folders)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
