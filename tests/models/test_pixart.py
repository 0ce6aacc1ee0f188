"""PixArt's architecture: counts, costs, remat, and what may be trained."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jaxprs import equations
from oracles import assert_close
from test_samplers import ddpm_oracle
from tiny_sampler import PROCESS, SHAPE, make_keys

from lit_jax import models, samplers, sharding
from lit_jax.costs import tpu_schedule
from lit_jax.data.buckets import Buckets
from lit_jax.models import pixart
from lit_jax.models.attention import make_attention
from lit_jax.models.dit import position_embedding

NULL = "y_embedder/y_embedding"


def count(config):
    """Trained parameters: the null caption is none."""
    leaves = flatten_dict(models.param_shapes(config), sep="/")
    return sum(leaf.size for path, leaf in leaves.items() if path != NULL)


def test_counts_are_the_published_ones():
    assert count(pixart.PixArtConfig.of_size("XL")) == 610_856_096
    assert count(pixart.PixArtConfig.of_size("XL", attention="linear")) == 611_065_760
    sixteen = pixart.PixArtConfig.of_size("XL", attention="linear", num_heads=16)
    assert count(sixteen) == 610_908_512
    assert sixteen.cross_heads == 16


@pytest.mark.parametrize(
    "latent, softmax, linear",
    [(32, 166, 167), (64, 644, 597), (128, 3317, 2314), (256, 26183, 9183)],
)
def test_multiply_adds_are_those_of_the_tables(latent, softmax, linear):
    for attention, expected in (("softmax", softmax), ("linear", linear)):
        config = pixart.PixArtConfig.of_size("XL", attention=attention)
        assert round(config.forward_flops((latent, latent)) / 2e9) == expected


def test_the_linear_attentions_caption_heads_stay_the_teachers():
    for size in ("S", "XL"):
        teacher = pixart.PixArtConfig.of_size(size)
        student = pixart.PixArtConfig.of_size(size, attention="linear")
        assert student.cross_heads == teacher.cross_heads == teacher.num_heads
        assert student.num_heads < teacher.num_heads


@pytest.mark.parametrize(
    "field, value",
    [
        ("cross_heads", 5),
        ("caption_length", 0),
        ("caption_channels", 2.5),
        ("position_base", True),
        ("position_scale", float("nan")),
        ("position_scale", "2"),
    ],
)
def test_a_field_that_cannot_be_is_named(field, value):
    with pytest.raises(ValueError, match=f"^{field} "):
        pixart.PixArtConfig.of_size("S", **{field: value})


def test_ddpm_with_guidance_of_three_channels_is_the_respaced_chain():
    """PixArt's IDDPM path: the noise of three channels is guided; the fourth, and the variance that
    is drawn with, are the prompt's.
    """
    fields = dict(depth=1, width=16, num_heads=2, caption_channels=6, caption_length=3)
    config = pixart.PixArtConfig(cross_heads=2, grid=(2, 2), position_base=2, **fields)
    model = pixart.PixArt(config, dtype=jnp.float32)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), models.param_shapes(config)
    )
    condition = {
        "caption": rng.standard_normal((3, 3, 6), np.float32),
        "caption_mask": np.arange(3) <= np.arange(3)[:, None],
    }

    @jax.jit
    def apply(x, t, condition, drop):
        return model.apply({"params": params}, x, t, condition, drop)

    def guided(x, t, _, drop):
        told = apply(x, t, condition, drop)
        untold = apply(x, t, condition, ~drop)
        three = untold[..., :3] + 4.5 * (told - untold)[..., :3]
        return jnp.concatenate([three, told[..., 3:]], axis=-1)

    settings = samplers.SamplerSettings(
        sampler="ddpm", steps=3, variance="learned_range", cfg_scale=4.5, cfg_channels="3"
    )
    grid = samplers.make_grid(PROCESS, settings)
    keys = make_keys(3)
    drawn = jax.jit(lambda: samplers.sample(apply, keys, condition, SHAPE, grid, settings))()
    noises = np.stack([samplers.step_noise(keys, step, SHAPE) for step in range(4)])
    expected = ddpm_oracle(3, noises, None, model_fn=guided)
    # As for the class-conditional chain.
    np.testing.assert_allclose(drawn, expected, atol=2e-5 * np.abs(expected).max())


def test_any_grid_spans_the_same_positions():
    """The far end of either axis lies as far as that of the nominal square's."""
    table = position_embedding((4, 10), 8, base=16, scale=0.5).reshape(4, 10, 8)
    # Frequency 1 of the column is feature 0 (sine) and 2 (cosine); of the row 4 and 6.
    columns = np.arctan2(table[0, :, 0], table[0, :, 2]) % (2 * np.pi)
    np.testing.assert_allclose(columns, np.arange(10) * 3.2 % (2 * np.pi), atol=1e-5)
    rows = np.arctan2(table[:, 0, 4], table[:, 0, 6]) % (2 * np.pi)
    np.testing.assert_allclose(rows, np.arange(4) * 8.0 % (2 * np.pi), atol=1e-5)


@pytest.mark.parametrize("pixels", [512, 1024, 2048])
def test_every_aspect_takes_the_fused_kernel_of_a_tpu(pixels):
    """The one that is chosen by platform: a refusal would be a fall-back to XLA, in one line."""
    config = pixart.PixArtConfig.of_size("XL", attention="linear")
    attention = make_attention(config, parent=None)
    buckets = Buckets(pixels)
    assert len(buckets.shapes) == 40
    with tpu_schedule.on_chip("v5e:2x2"):
        for bucket in range(40):
            h, w = buckets.sides(bucket)
            assert not attention.refusal("pallas_tpu", config.width, (h // 16, w // 16))


# ---- A small one ---------------------------------------------------------------------------------


CONFIG = pixart.PixArtConfig(
    depth=2,
    width=32,
    num_heads=2,
    attention="linear",
    cross_heads=4,
    caption_channels=12,
    caption_length=5,
    position_base=4,
)


@pytest.fixture(scope="module")
def params():
    shapes = models.param_shapes(CONFIG)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: 0.2 * rng.standard_normal(leaf.shape, np.float32), shapes)


def inputs(B=8):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((B, 4, 6, 4), np.float32)
    t = rng.uniform(0, 999, B).astype(np.float32)
    condition = {
        "caption": rng.standard_normal((B, 5, 12), np.float32),
        "caption_mask": np.arange(5) <= np.arange(B)[:, None] % 5,
    }
    return x, t, condition, np.arange(B) % 3 == 0


def loss(model, params, *arguments):
    return jnp.square(model.apply({"params": params}, *arguments)).mean()


@functools.cache
def gradient(remat):
    model = pixart.PixArt(CONFIG, dtype=jnp.float32, remat=remat)
    return jax.jit(jax.grad(functools.partial(loss, model)))


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_no_gradient(params, remat):
    expected = flatten_dict(gradient("none")(params, *inputs()), sep="/")
    for path, leaf in flatten_dict(gradient(remat)(params, *inputs()), sep="/").items():
        assert_close(leaf, expected[path], reduction=100, what=path)


def test_the_null_caption_is_no_weight(params):
    gradients = flatten_dict(gradient("none")(params, *inputs()), sep="/")
    for path, leaf in gradients.items():
        assert np.any(leaf) == (path != NULL), path


def test_eight_devices_compute_what_one_does(params):
    mesh = sharding.make_mesh(2, 4)
    model = pixart.PixArt(CONFIG, dtype=jnp.float32)
    rows = sharding.batch_sharding(mesh)
    placed = jax.device_put(params, sharding.fsdp_sharding(params, mesh))

    def apply(params, *arguments):
        return model.apply({"params": params}, *arguments)

    sharded = jax.jit(sharding.on_mesh(apply, mesh))(placed, *jax.device_put(inputs(), rows))
    assert_close(sharded, jax.jit(apply)(params, *inputs()), reduction=100)


def test_modulations_are_summed_in_float32(params):
    """In a bfloat16 model too, where a scale near 1 has but two digits."""
    x, t, condition, drop = inputs()
    apply = pixart.PixArt(CONFIG).apply
    # Four tokens: six would have the shape of a modulation.
    found = equations(apply, {"params": params}, x[:, :, :4], t, condition, drop)
    sums = [e.outvars[0].aval for e in found if e.primitive.name == "add"]
    modulations = [aval.dtype for aval in sums if aval.shape == (len(x), 6, CONFIG.width)]
    assert modulations == [jnp.float32]  # one, in the loop over the blocks


def test_the_last_layer_rounds_nothing():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 3, 8)), jnp.bfloat16)
    t = rng.standard_normal((2, 8)).astype(np.float32)
    layer = pixart.FinalLayer(5)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x, t)
    variables = jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32), shapes)
    expected = layer.apply(variables, x.astype(jnp.float32), t)
    np.testing.assert_array_equal(layer.apply(variables, x, t), expected)


def test_t_keeps_its_fraction(params):
    """A t in bfloat16 would be 1000 for 999: both give one output, and these two do not."""
    x, t, condition, drop = inputs()
    model = pixart.PixArt(CONFIG)
    run = jax.jit(lambda t: model.apply({"params": params}, x, t, condition, drop))
    assert np.any(run(np.full(8, 999.0, np.float32)) != run(np.full(8, 999.4, np.float32)))


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(caption=np.zeros((8, 6, 12), np.float32)), "at most 5 tokens with 12 channels"),
        (dict(caption=np.zeros((8, 5, 11), np.float32)), r"12 channels, got \(5, 11\)"),
    ],
)
def test_a_caption_of_another_shape_is_refused(params, change, match):
    x, t, condition, drop = inputs()
    with pytest.raises(ValueError, match=match):
        pixart.PixArt(CONFIG).apply({"params": params}, x, t, condition | change, drop)
