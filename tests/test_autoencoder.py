"""Our AutoencoderKL against diffusers' at random weights; tiling, slicing, sharding, bfloat16."""
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as TorchAutoencoder
from flax.traverse_util import flatten_dict
from oracles import assert_close
from torch_dit import randomise_

from lit_jax import porting, sharding
from lit_jax.models import autoencoder

SMALL = dict(block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1)     # half the resolution
VARIANTS = {
    "sd": dict(latent_channels=4, scaling_factor=0.18215),
    "sdxl": dict(latent_channels=4, scaling_factor=0.13025, layers_per_block=2),
    "sd3": dict(latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False,
                use_post_quant_conv=False),
    "no_attention": dict(mid_block_add_attention=False),
}


def make_torch(sample_size=32, **fields):
    fields = SMALL | fields
    blocks = len(fields["block_out_channels"])
    model = TorchAutoencoder(down_block_types=("DownEncoderBlock2D",) * blocks, sample_size=sample_size,
                             up_block_types=("UpDecoderBlock2D",) * blocks, **fields)
    randomise_(model, 3)
    with torch.no_grad():   # norms near one, as trained ones are, or deep activations vanish
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter += 1.0
    return model.eval()


@pytest.fixture(scope="module", params=list(VARIANTS))
def pair(request, tmp_path_factory):
    """(diffusers model, ours) with the same random weights, carried over by the porter."""
    folder = tmp_path_factory.mktemp("autoencoder")
    model = make_torch(**VARIANTS[request.param])
    model.save_pretrained(folder)
    return model, port(folder)


def port(folder, **kwargs):
    checkpoint = porting.read_autoencoder(folder)
    return autoencoder.make_autoencoder(porting.load_params(checkpoint.params), checkpoint.architecture, **kwargs)


def to_torch(array):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(array), -1, 1)))


def to_numpy(tensor):
    return np.moveaxis(tensor.detach().numpy(), 1, -1)


def rel(actual, expected):
    return np.max(np.abs(actual - expected)) / np.max(np.abs(expected))


def random_images(rng, *shape):
    return rng.uniform(-1, 1, shape).astype(np.float32)


def test_encoder_and_decoder_equal_diffusers(pair):
    model, ours = pair
    rng = np.random.default_rng(0)
    images = random_images(rng, 2, 16, 24, 3)
    z = rng.normal(size=(2, 6, 8, model.config.latent_channels)).astype(np.float32)
    with torch.no_grad():
        posterior = model.encode(to_torch(images)).latent_dist
        decoded = model.decode(to_torch(z)).sample
    mean, logvar = ours.encode(images)
    assert rel(mean, to_numpy(posterior.mean)) < 1e-5
    assert rel(logvar, to_numpy(posterior.logvar)) < 1e-5
    assert rel(ours.decode(z), to_numpy(decoded)) < 1e-5
    assert ours.scaling_factor == model.config.scaling_factor
    assert ours.shift_factor == (model.config.shift_factor or 0.0)


def test_every_module_equals_diffusers(tmp_path):
    """Module by module on the way of one image, so that an error cannot hide behind a later norm."""
    model = make_torch()
    model.save_pretrained(tmp_path)
    ours = port(tmp_path)
    rng = np.random.default_rng(1)
    images = random_images(rng, 1, 16, 16, 3)
    captured = {}
    handles = [child.register_forward_hook(lambda _, __, out, name=name: captured.update({name: out}))
               for name, child in model.named_modules()]
    with torch.no_grad():
        model.decode(model.encode(to_torch(images)).latent_dist.mean)
    for handle in handles:
        handle.remove()
    _, state = ours.module.apply({"params": ours.params}, images, capture_intermediates=True)
    compared = []
    for path, (value,) in flatten_dict(state["intermediates"]).items():
        name = re.sub(r"_(\d)", r".\1", ".".join(path[:-1]))
        # Ours applies SiLU in the norms, and diffusers sees tokens, not images, within the attention.
        if name in captured and "norm" not in name and captured[name].ndim == 4:
            assert rel(value, to_numpy(captured[name])) < 2e-5, name
            compared.append(name)
    assert len(compared) == 52
    assert {"encoder.mid_block.attentions.0", "encoder.down_blocks.0.downsamplers.0", "quant_conv",
            "decoder.up_blocks.0.upsamplers.0.conv", "decoder.up_blocks.1.resnets.0.conv_shortcut"} <= set(compared)


def test_downsampling_pads_below_and_right_only():
    module = autoencoder.Downsample(jnp.float32)
    x = np.zeros((1, 4, 4, 1), np.float32)
    x[0, 0, 0] = 1
    params = {"conv": {"kernel": np.ones((3, 3, 1, 1), np.float32), "bias": np.zeros(1, np.float32)}}
    out = module.apply({"params": params}, x)[0, :, :, 0]
    np.testing.assert_array_equal(out, [[1, 0], [0, 0]])
    x = np.roll(x, (3, 3), (1, 2))      # the last pixel is in the last window only
    np.testing.assert_array_equal(module.apply({"params": params}, x)[0, :, :, 0], [[0, 0], [0, 1]])


def test_log_variance_is_clipped():
    moments = jnp.asarray([[-100.0, 5.0, -100.0, 100.0]])[None, None]
    mean, logvar = autoencoder.split_moments(moments)
    np.testing.assert_array_equal(mean[0, 0, 0], [-100, 5])
    np.testing.assert_array_equal(logvar[0, 0, 0], [-30, 20])
    draw = autoencoder.sample_posterior(mean, jnp.full_like(logvar, -30.0), jax.random.key(0))
    np.testing.assert_allclose(draw, mean, atol=2e-6)


def test_tiling_computes_what_diffusers_tiles(tmp_path):
    """Three by two tiles, the last ones narrower, so that tiles are blended with blended ones on both sides."""
    size = (28, 20)
    model = make_torch(sample_size=16)
    model.save_pretrained(tmp_path)
    ours = port(tmp_path, tile_size=8)
    model.enable_tiling()
    rng = np.random.default_rng(2)
    images = random_images(rng, 1, *size, 3)
    z = rng.normal(size=(1, size[0] // 2, size[1] // 2, 4)).astype(np.float32)
    with torch.no_grad():
        posterior = model.encode(to_torch(images)).latent_dist
        decoded = model.decode(to_torch(z)).sample
    mean, logvar = ours.encode(images)
    assert rel(mean, to_numpy(posterior.mean)) < 1e-5
    assert rel(logvar, to_numpy(posterior.logvar)) < 1e-5
    assert rel(ours.decode(z), to_numpy(decoded)) < 1e-5
    model.disable_tiling()
    with torch.no_grad():
        untiled = model.decode(to_torch(z)).sample
    assert rel(to_numpy(untiled), to_numpy(decoded)) > 1e-3     # and not the untiled result


def test_slices_and_shards_do_not_change_the_result(tmp_path):
    make_torch().save_pretrained(tmp_path)
    ours = port(tmp_path)
    z = np.random.default_rng(3).normal(size=(8, 4, 4, 4)).astype(np.float32)
    whole = ours.decode(z)
    assert_close(dataclasses.replace(ours, slice_size=3).decode(z), whole, reduction=300)   # 3 + 3 + 2
    mesh = sharding.make_mesh()
    sharded = ours.decode(jax.device_put(z, sharding.batch_sharding(mesh)))
    assert sharded.sharding.is_equivalent_to(sharding.batch_sharding(mesh), 4)
    assert_close(sharded, whole, reduction=300)


def test_bfloat16_decode_is_close_to_float32(tmp_path):
    make_torch().save_pretrained(tmp_path)
    z = np.random.default_rng(4).normal(size=(1, 8, 8, 4)).astype(np.float32)
    exact, rounded = port(tmp_path).decode(z), port(tmp_path, dtype="bfloat16").decode(z)
    assert rounded.dtype == jnp.float32
    error = np.sqrt(np.mean(np.square(rounded - exact)) / np.mean(np.square(exact)))
    assert 1e-4 < error < 0.03      # 8 bits of mantissa through some 20 layers


def test_latents_are_shifted_and_scaled(tmp_path):
    make_torch(**VARIANTS["sd3"]).save_pretrained(tmp_path)
    ours = port(tmp_path)
    assert (ours.scaling_factor, ours.shift_factor) == (1.5305, 0.0609)
    rng = np.random.default_rng(5)
    mean = rng.normal(size=(1, 4, 4, ours.module.latent_channels)).astype(np.float32)
    latents = ours.to_latents(mean, jnp.full(mean.shape, -30.0), jax.random.key(0))
    np.testing.assert_allclose(latents, (mean - ours.shift_factor) * ours.scaling_factor, rtol=1e-5, atol=1e-5)
    assert_close(ours.from_latents((mean - ours.shift_factor) * ours.scaling_factor), ours.decode(mean),
                 reduction=300)


def test_wrong_shapes_are_named(tmp_path):
    make_torch().save_pretrained(tmp_path)
    ours = port(tmp_path)
    with pytest.raises(ValueError, match=r"latents must be \(B, h, w, 4\); got \(1, 4, 4, 3\)"):
        ours.decode(np.zeros((1, 4, 4, 3)))
    with pytest.raises(ValueError, match="sides that 2 divides"):
        ours.encode(np.zeros((1, 31, 32, 3)))
    with pytest.raises(ValueError, match="tile_size must be a multiple of 4"):
        port(tmp_path, tile_size=6)


def test_full_size_has_the_published_parameters_and_equals_diffusers(tmp_path):
    """Stable Diffusion's 83,653,863 parameters, on one 32 x 32 image."""
    fields = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, norm_num_groups=32)
    model = make_torch(**fields)
    model.save_pretrained(tmp_path)
    checkpoint = porting.read_autoencoder(tmp_path)
    assert checkpoint.report.parameters == 83_653_863
    assert len(checkpoint.report.keys) == 248
    ours = autoencoder.make_autoencoder(porting.load_params(checkpoint.params), checkpoint.architecture)
    images = random_images(np.random.default_rng(6), 1, 32, 32, 3)
    with torch.no_grad():
        posterior = model.encode(to_torch(images)).latent_dist
        decoded = model.decode(posterior.mean).sample
    mean, _ = ours.encode(images)
    assert rel(mean, to_numpy(posterior.mean)) < 1e-4
    assert rel(ours.decode(mean), to_numpy(decoded)) < 1e-4
