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

from lit_jax import sharding
from lit_jax.models import autoencoder
from lit_jax.porting.read import load_params, read_autoencoder

# Latents of half the side.
SMALL = dict(block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1)
LATENTS = (2, 6, 8, 4)  # one shape in many tests: they share a compiled program
VARIANTS = {
    "sd": dict(latent_channels=4, scaling_factor=0.18215),
    "sdxl": dict(latent_channels=4, scaling_factor=0.13025, layers_per_block=2),
    "sd3": dict(
        latent_channels=16,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ),
    "no_attention": dict(mid_block_add_attention=False),
}


def make_torch(sample_size=32, **fields):
    fields = SMALL | fields
    blocks = len(fields["block_out_channels"])
    with torch.device("meta"):  # its weights are drawn once, below
        model = TorchAutoencoder(
            down_block_types=("DownEncoderBlock2D",) * blocks,
            sample_size=sample_size,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            **fields,
        )
    randomise_(model.to_empty(device="cpu"), 3)
    with torch.no_grad():  # norms near one, as trained ones are, or deep activations vanish
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
    checkpoint = read_autoencoder(folder)
    return autoencoder.make_autoencoder(
        load_params(checkpoint.params),
        checkpoint.architecture,
        autoencoder.AutoencoderSettings(**kwargs),
    )


def to_torch(array):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(array), -1, 1)))


def to_numpy(tensor):
    return np.moveaxis(tensor.detach().numpy(), 1, -1)


def rel(actual, expected):
    return np.max(np.abs(actual - expected)) / np.max(np.abs(expected))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The small model with Stable Diffusion's fields, as diffusers saves it."""
    folder = tmp_path_factory.mktemp("small")
    make_torch().save_pretrained(folder)
    return folder


def random_images(rng, *shape):
    return rng.uniform(-1, 1, shape).astype(np.float32)


def test_encoder_and_decoder_equal_diffusers(pair):
    model, ours = pair
    rng = np.random.default_rng(0)
    images = random_images(rng, 2, 16, 24, 3)
    z = rng.normal(size=(*LATENTS[:3], model.config.latent_channels)).astype(np.float32)
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
    """Module by module on the way of one image: no error can hide behind a later norm."""
    model = make_torch()
    model.save_pretrained(tmp_path)
    ours = port(tmp_path)
    rng = np.random.default_rng(1)
    images = random_images(rng, 1, 16, 16, 3)

    @jax.jit
    def intermediates(params, images):
        _, state = ours.module.apply({"params": params}, images, capture_intermediates=True)
        return state["intermediates"]

    captured = {}
    handles = [
        child.register_forward_hook(lambda _, __, out, name=name: captured.update({name: out}))
        for name, child in model.named_modules()
    ]
    with torch.no_grad():
        model.decode(model.encode(to_torch(images)).latent_dist.mean)
    for handle in handles:
        handle.remove()
    compared = []
    for path, (value,) in flatten_dict(intermediates(ours.params, images)).items():
        name = re.sub(r"_(\d)", r".\1", ".".join(path[:-1]))
        # Ours applies SiLU in the norms, and diffusers sees tokens within the attention.
        if name in captured and "norm" not in name and captured[name].ndim == 4:
            assert rel(value, to_numpy(captured[name])) < 2e-5, name
            compared.append(name)
    assert len(compared) == 52
    assert {
        "encoder.mid_block.attentions.0",
        "encoder.down_blocks.0.downsamplers.0",
        "quant_conv",
        "decoder.up_blocks.0.upsamplers.0.conv",
        "decoder.up_blocks.1.resnets.0.conv_shortcut",
    } <= set(compared)


def test_downsampling_pads_below_and_right_only():
    """Output (i, j) is the 3 x 3 window whose upper left corner is pixel (2i, 2j)."""
    rng = np.random.default_rng(1)
    x, kernel = (
        rng.normal(size=(6, 4)).astype(np.float32),
        rng.normal(size=(3, 3)).astype(np.float32),
    )
    params = {"conv": {"kernel": kernel[:, :, None, None], "bias": np.zeros(1, np.float32)}}
    out = autoencoder.Downsample(jnp.float32).apply({"params": params}, x[None, :, :, None])[
        0, :, :, 0
    ]

    def windows(before, after):
        padded = np.pad(x.astype(np.float64), (before, after))
        return np.array(
            [
                [np.sum(padded[2 * i : 2 * i + 3, 2 * j : 2 * j + 3] * kernel) for j in range(2)]
                for i in range(3)
            ]
        )

    assert_close(out, windows(0, 1), reduction=9)
    assert np.abs(out - windows(1, 1)).max() > 1  # what SAME in torch, padding=1, would give


def test_log_variance_is_clipped():
    moments = jnp.asarray([[-100.0, 5.0, -100.0, 100.0]])[None, None]
    mean, logvar = autoencoder.split_moments(moments)
    np.testing.assert_array_equal(mean[0, 0, 0], [-100, 5])
    np.testing.assert_array_equal(logvar[0, 0, 0], [-30, 20])
    draw = autoencoder.sample_posterior(mean, jnp.full_like(logvar, -30.0), jax.random.key(0))
    np.testing.assert_allclose(draw, mean, atol=2e-6)


def test_tiling_computes_what_diffusers_tiles(tmp_path):
    """Three by two tiles to decode, the last ones narrower: tiles are blended with blended ones.

    They are on both sides. One column of three tiles to encode: each further shape of a tile is
    a network to compile.
    """
    model = make_torch(sample_size=16)
    model.save_pretrained(tmp_path)
    ours = port(tmp_path, tile_size=8)
    model.enable_tiling()
    rng = np.random.default_rng(2)
    images = random_images(rng, 1, 28, 12, 3)
    z = rng.normal(size=(1, 14, 10, 4)).astype(np.float32)
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
    assert rel(to_numpy(untiled), to_numpy(decoded)) > 1e-3  # and not the untiled result


def attend(T):
    """The attention of a square of T tokens, jitted, with random parameters and an input."""
    rng = np.random.default_rng(7)
    module = autoencoder.Attention(4, jnp.float32)
    x = rng.normal(size=(2, T // 64, 64, 8)).astype(np.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    return jax.jit(lambda x: module.apply({"params": params}, x)), x


def test_attention_in_blocks_of_queries_is_the_same_in_less_memory(monkeypatch):
    run, x = attend(1152)  # a block of 1024 and one of 128
    blocks = run(x)
    monkeypatch.setattr(autoencoder, "QUERIES_AT_ONCE", 10**9)
    assert_close(blocks, attend(1152)[0](x), reduction=1152)

    def megabytes(T):
        run, x = attend(T)
        return run.lower(x).compile().memory_analysis().temp_size_in_bytes / 2**20

    whole = megabytes(8192)
    monkeypatch.setattr(autoencoder, "QUERIES_AT_ONCE", 1024)
    assert whole > 500 and megabytes(8192) < whole / 4  # 2 x 8192^2 products are 512 MiB


def test_tiles_take_the_memory_of_a_tile(tmp_path):
    make_torch(mid_block_add_attention=False).save_pretrained(tmp_path)
    z = jax.ShapeDtypeStruct((1, 128, 128, 4), jnp.float32)

    def program(tile_size):
        ours = port(tmp_path, tile_size=tile_size)
        return jax.jit(ours.decode).lower(z).compile()

    whole, tiles = program(0), program(32)
    image = 256 * 256 * 3 * 4  # the tiles' outputs are there at once, overlaps included
    assert (
        tiles.memory_analysis().temp_size_in_bytes
        < whole.memory_analysis().temp_size_in_bytes / 8 + 6 * image
    )
    assert tiles.as_text().count(" convolution(") <= 4 * whole.as_text().count(
        " convolution("
    )  # 25 tiles of 4 shapes


@pytest.mark.parametrize("dtype, precision", [("float32", "HIGHEST"), ("bfloat16", "DEFAULT")])
def test_float32_means_float32_on_every_device(folder, dtype, precision):
    ours = port(folder, dtype=dtype)
    for run, shape in ((ours.decode, (1, 8, 8, 4)), (ours.encode, (1, 16, 16, 3))):
        text = jax.jit(run).lower(np.zeros(shape, np.float32)).as_text()
        products = re.findall(r"stablehlo.(?:convolution|dot_general).*", text)
        assert len(products) > 12 and all(
            f"precision {precision}" in p or f"precision = [{precision}, {precision}]" in p
            for p in products
        ), products[0]


def test_slices_and_shards_do_not_change_the_result(folder):
    ours = port(folder)
    z = np.random.default_rng(3).normal(size=(8, 4, 4, 4)).astype(np.float32)
    whole = ours.decode(z)
    assert_close(
        dataclasses.replace(ours, slice_size=3).decode(z), whole, reduction=300
    )  # 3 + 3 + 2
    mesh = sharding.make_mesh()
    sharded = ours.decode(jax.device_put(z, sharding.batch_sharding(mesh)))
    assert sharded.sharding.is_equivalent_to(sharding.batch_sharding(mesh), 4)
    assert_close(sharded, whole, reduction=300)


def test_group_norm_rounds_once():
    """In bfloat16 too. Activations have means far from zero, which cost bits."""
    values = 8 + np.random.default_rng(0).standard_normal((2, 4, 4, 8))
    x = jnp.asarray(values, jnp.bfloat16)
    grouped = np.asarray(x, np.float64).reshape(2, 16, 2, 4)
    centred = grouped - grouped.mean(axis=(1, 3), keepdims=True)
    variance = (centred**2).mean(axis=(1, 3), keepdims=True)
    expected = (centred / np.sqrt(variance + 1e-6)).reshape(x.shape)
    params = {"scale": np.ones(8, np.float32), "bias": np.zeros(8, np.float32)}
    actual = autoencoder.GroupNorm(2, silu=False).apply({"params": params}, x)
    assert actual.dtype == jnp.bfloat16
    # Half a unit of eight bits. float32 has the difference to a mean of 8 to 1e-6.
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=2**-8, atol=2e-6)


def test_bfloat16_decode_is_close_to_float32(folder):
    z = np.random.default_rng(4).normal(size=LATENTS).astype(np.float32)
    exact = port(folder).decode(z)
    rounded = port(folder, dtype="bfloat16").decode(z)
    assert rounded.dtype == jnp.float32
    error = np.sqrt(np.mean(np.square(rounded - exact)) / np.mean(np.square(exact)))
    assert 1e-4 < error < 0.03  # 8 bits of mantissa through some 20 layers


def test_latents_are_shifted_and_scaled(tmp_path):
    make_torch(**VARIANTS["sd3"]).save_pretrained(tmp_path)
    ours = port(tmp_path)
    assert (ours.scaling_factor, ours.shift_factor) == (1.5305, 0.0609)
    rng = np.random.default_rng(5)
    mean = rng.normal(size=(*LATENTS[:3], 16)).astype(np.float32)
    assert_close(
        ours.from_latents((mean - ours.shift_factor) * ours.scaling_factor),
        ours.decode(mean),
        reduction=300,
    )


def test_wrong_shapes_are_named(folder):
    ours = port(folder)
    with pytest.raises(ValueError, match=r"latents must be \(B, h, w, 4\); got \(1, 4, 4, 3\)"):
        ours.decode(np.zeros((1, 4, 4, 3)))
    with pytest.raises(ValueError, match="sides that 2 divides"):
        ours.encode(np.zeros((1, 31, 32, 3)))
    for wrong in (6, -4):
        with pytest.raises(
            ValueError, match=f"^tile_size must be a multiple of 4, or 0; got {wrong}"
        ):
            port(folder, tile_size=wrong)
    with pytest.raises(ValueError, match="^slice_size must be at least 0; got -1"):
        port(folder, slice_size=-1)
    with pytest.raises(ValueError, match="^dtype must be one of float32, bfloat16; got 'float16'"):
        port(folder, dtype="float16")


def test_full_size_has_the_published_parameters_and_equals_diffusers(tmp_path):
    """Stable Diffusion's 83,653,863 parameters, on one 32 x 32 image."""
    fields = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, norm_num_groups=32)
    model = make_torch(**fields)
    model.save_pretrained(tmp_path)
    checkpoint = read_autoencoder(tmp_path)
    assert checkpoint.report.parameters == 83_653_863
    assert len(checkpoint.report.keys) == 248
    ours = autoencoder.make_autoencoder(load_params(checkpoint.params), checkpoint.architecture)
    images = random_images(np.random.default_rng(6), 1, 32, 32, 3)
    with torch.no_grad():
        posterior = model.encode(to_torch(images)).latent_dist
        decoded = model.decode(posterior.mean).sample
    mean, _ = ours.encode(images)
    assert rel(mean, to_numpy(posterior.mean)) < 1e-4
    assert rel(ours.decode(mean), to_numpy(decoded)) < 1e-4
