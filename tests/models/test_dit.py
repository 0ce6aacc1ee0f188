"""DiT and LiT: embeddings, sizes and FLOPs, start, refusals; test_dit_as_torch.py compares."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jaxprs import products
from oracles import assert_close

from lit_jax import models
from lit_jax.models import architecture, dit


def make_inputs(grid=(4, 4), patch_size=2, in_channels=4, seed=0):
    """x, t, condition and drop: the third of three images is told nothing."""
    rng = np.random.default_rng(seed)
    shape = (3, grid[0] * patch_size, grid[1] * patch_size, in_channels)
    x = rng.standard_normal(shape).astype(np.float32)
    condition = {"label": np.array([0, 3, 5])}
    return x, np.array([0, 17, 63]), condition, np.array([False, False, True])


@pytest.mark.parametrize("freq_shift", [0, 1])
def test_timestep_embedding_matches_the_formula(freq_shift):
    t = np.array([0.0, 1.0, 13.5, 500.0, 999.0], np.float32)
    angles = [[float(ti) * 10000.0 ** (-i / (128 - freq_shift)) for i in range(128)] for ti in t]
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    # An angle up to t carries the rounding of its float32 frequency, t * 2^-24, and the product's.
    assert_close(dit.timestep_embedding(jnp.asarray(t), freq_shift), expected, factor=1200)
    assert_close(dit.timestep_embedding(jnp.asarray(t[:3]), freq_shift), expected[:3], factor=20)


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 6)])
def test_position_table_is_that_of_its_grid(grid):
    width = 24
    table = dit.position_embedding(grid, width)
    assert table.dtype == np.float64 and table.shape == (grid[0] * grid[1], width)
    for row in range(grid[0]):
        for column in range(grid[1]):
            expected = [
                f(position / 10000 ** (i / 6))
                for position in (column, row)
                for f in (np.sin, np.cos)
                for i in range(6)
            ]
            np.testing.assert_allclose(table[row * grid[1] + column], expected, atol=1e-14)
    with pytest.raises(ValueError, match="30"):
        dit.position_embedding(grid, 30)


def test_layer_norm_rounds_once():
    """In bfloat16 too: statistics and the division are float32. A mean of 8 costs three bits."""
    x = jnp.asarray(8 + np.random.default_rng(0).standard_normal((4, 96)), jnp.bfloat16)
    exact = np.asarray(x, np.float64)
    centred = exact - exact.mean(axis=1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-6)
    actual = dit.LayerNorm().apply({}, x)
    assert actual.dtype == jnp.bfloat16
    # Half a unit of eight bits. float32 has the difference to a mean of 8 to 1e-6.
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=2**-8, atol=2e-6)


def test_both_ends_are_float32_in_a_bfloat16_model():
    """bfloat16 has no timestep between 996 and 1000, and the output is a regression target."""
    config = dit.DiTConfig(1, 16, 2, attention="linear", num_classes=10)
    variables = {"params": models.param_shapes(config)}
    found = products(dit.DiT(config).apply, variables, *make_inputs())
    results = [equation.outvars[0].aval for equation in found]
    widths = [
        (equation.invars[1].aval.shape, result.dtype)
        for equation, result in zip(found, results)
        if equation.invars[1].aval.dtype == jnp.float32
    ]
    float32 = jnp.dtype(jnp.float32)
    # The timestep's two layers, and the last projection to 2 x 2 patches of 8 channels.
    assert widths == [((256, 16), float32), ((16, 16), float32), ((16, 32), float32)]


# ---- Sizes ---------------------------------------------------------------------------------------

# DiT with its position table at 32 x 32 x 4 and 1,000 classes, as the official checkpoints hold it.
DIT_COUNTS = {
    ("S", 2): 32_963_360,
    ("S", 4): 32_945_024,
    ("S", 8): 33_148_160,
    ("B", 2): 130_512_416,
    ("B", 4): 130_475_648,
    ("B", 8): 130_881_536,
    ("L", 2): 458_102_816,
    ("L", 4): 458_053_760,
    ("L", 8): 458_594_816,
    ("XL", 2): 675_129_632,
    ("XL", 4): 675_074_432,
    ("XL", 8): 675_683_072,
}


LIT_ADDS = {"S": 59_904, "B": 79_872, "L": 159_744, "XL": 209_664}


def parameter_count(config):
    return sum(leaf.size for leaf in jax.tree.leaves(models.param_shapes(config)))


@pytest.mark.parametrize("size, patch_size", DIT_COUNTS)
def test_parameter_counts_of_every_size(size, patch_size):
    tokens_times_width = (32 // patch_size) ** 2 * architecture.SIZES[size][1]
    softmax = parameter_count(dit.DiTConfig.of_size(size, patch_size=patch_size))
    assert softmax + tokens_times_width == DIT_COUNTS[size, patch_size]
    linear = dit.DiTConfig.of_size(size, patch_size=patch_size, attention="linear")
    assert parameter_count(linear) == softmax + LIT_ADDS[size]


def test_published_gmacs_of_dit_xl_2():
    config = dit.DiTConfig.of_size("XL")
    # The DiT paper's counter also takes some elementwise work: 2e-4 more.
    assert config.forward_flops((32, 32)) / 2e9 == pytest.approx(118.64, rel=2.5e-4)
    assert config.forward_flops((64, 64)) / 2e9 == pytest.approx(524.60, rel=2.5e-4)


# Table 1.3 of the LiT fact sheet: GMACs of the attention core over all layers, softmax and linear.
@pytest.mark.parametrize(
    "size, input_size, softmax, linear",
    [
        ("S", 32, 0.60, 0.48),
        ("B", 32, 1.21, 1.27),
        ("L", 32, 3.22, 3.38),
        ("XL", 32, 4.23, 4.96),
        ("S", 64, 9.66, 1.93),
        ("XL", 64, 67.7, 19.9),
        ("XL", 256, 17317, 318),
    ],
)
def test_gmacs_that_linear_attention_saves(size, input_size, softmax, linear):
    saved = [
        dit.DiTConfig.of_size(size, attention=kind).forward_flops((input_size,) * 2)
        for kind in ("softmax", "linear")
    ]
    # The table has three digits.
    assert (saved[0] - saved[1]) / 2e9 == pytest.approx(
        softmax - linear, abs=6e-3 * max(softmax, 1)
    )


def test_linear_attention_macs_follow_the_formula():
    """L (2 N D^2 / h + 25 N D) for the core, paper section 2.3."""
    softmax = dit.DiTConfig(depth=5, width=96, num_heads=3)
    linear = dit.DiTConfig(depth=5, width=96, num_heads=3, attention="linear")
    without = softmax.forward_flops((8, 12)) - 2 * 5 * 2 * 24**2 * 96
    core = 2 * 24 * 96**2 / 3 + 25 * 24 * 96
    assert linear.forward_flops((8, 12)) - without == 2 * 5 * core


# ---- Start and refusals --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fresh():
    """A fresh LiT's parameters, wide enough for its uniform ranges to show."""
    config = dit.DiTConfig(depth=2, width=96, num_heads=2, num_classes=10, attention="linear")
    model = dit.DiT(config, dtype=jnp.float32)
    return model, jax.jit(functools.partial(models.init_params, model))(jax.random.key(0))


def test_a_fresh_model_outputs_zero(fresh):
    model, params = fresh
    out = jax.jit(model.apply)({"params": params}, *make_inputs())
    np.testing.assert_array_equal(out, 0.0)


def test_a_fresh_model_is_initialised_as_the_paper_says(fresh):
    _, params = fresh
    flat = flatten_dict(jax.tree.map(np.asarray, params), sep="/")
    D = 96
    bounds = {
        "blocks/attn/q/kernel": (6 / (2 * D)) ** 0.5,
        "blocks/attn/kv/kernel": (6 / (3 * D)) ** 0.5,
        "blocks/attn/proj/kernel": (6 / (2 * D)) ** 0.5,
        "blocks/mlp/fc1/kernel": (6 / (5 * D)) ** 0.5,
        "blocks/attn/dwc/kernel": 0.2,
        "blocks/attn/dwc/bias": 0.2,
        # The convolution seen as a linear map of 2 x 2 x 4 inputs.
        "x_embedder/proj/kernel": (6 / (16 + D)) ** 0.5,
    }
    for path, bound in bounds.items():
        largest = float(np.abs(flat[path]).max())
        assert 0.95 * bound < largest <= bound, path
        assert float(flat[path].std()) == pytest.approx(bound / 3**0.5, rel=0.1), path
        if flat[path].ndim > 1 and path.startswith("blocks/"):
            assert (flat[path][0] != flat[path][1]).any(), f"{path}: both layers start alike"
    for path in (
        "t_embedder/mlp_0/kernel",
        "t_embedder/mlp_2/kernel",
        "y_embedder/embedding_table/embedding",
    ):
        assert float(flat[path].std()) == pytest.approx(0.02, rel=0.1), path
    zeros = {path for path, leaf in flat.items() if not np.any(leaf)}
    assert zeros == {
        path
        for path in flat
        if path.endswith("/bias")
        and "dwc" not in path
        or "adaLN" in path
        or path == "final_layer/linear/kernel"
    }


def test_few_heads_are_the_default_of_the_linear_model():
    heads = {
        size: dit.DiTConfig.of_size(size, attention="linear").num_heads
        for size in ("S", "B", "L", "XL")
    }
    assert heads == {"S": 2, "B": 3, "L": 4, "XL": 4}
    assert dit.DiTConfig.of_size("XL", attention="mhla").num_heads == 16  # as the teacher's


@pytest.mark.parametrize(
    "override, message",
    [
        (dict(size="XXL"), "size must be one of .*; got 'XXL'"),
        (dict(attention="sigmoid"), "attention must be one of softmax, linear, .*; got 'sigmoid'"),
        (dict(num_heads=5), "num_heads = 5 does not divide the width 384"),
        (dict(width=382), "width = 382 is not a multiple of 4"),
        (dict(conv_size=4, attention="linear"), "conv_size must be odd, or 0; got 4"),
        (dict(num_classes=0), "num_classes must be a whole number from 1"),
        (dict(patch_size=True), "patch_size must be a whole number from 1"),
        (dict(kernel_function="elu", attention="linear"), "kernel_function must be one of relu"),
    ],
)
def test_impossible_models_are_named(override, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        dit.DiTConfig.of_size(**dict(size="S") | override)


def test_images_that_do_not_fit_are_named():
    model = dit.DiT(dit.DiTConfig.of_size("Ti", patch_size=4, in_channels=3, num_classes=10))
    t = jnp.zeros((1,), jnp.int32)
    for shape, message in (
        ((1, 8, 8, 4), "3 channels.* 4"),
        ((1, 8, 10, 3), "4 does not divide the 8 x 10"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape), t, {"label": t})


def test_an_architecture_is_the_same_out_of_its_json():
    config = dit.DiTConfig(3, 48, 4, attention="linear", qkv_bias=False, grid=(4, 6))
    fields = json.loads(json.dumps(config.to_json()))
    assert dit.DiTConfig.from_json(fields) == config
    assert dit.DiTConfig.from_json(fields | {"grid": None, "num_heads": None}).num_heads is None
    # Softmax has neither convolution nor kernel: equal models are equal.
    assert dit.DiTConfig(3, 48, 4, conv_size=3) == dit.DiTConfig(3, 48, 4, kernel_function="gelu")
    for change, message in (
        ({"depht": 3}, "depht = 3 is no field of an architecture"),
        ({"grid": [4]}, "grid must be two whole numbers"),
        ({"depth": 10**9}, "depth must be a whole number from 1 to"),
    ):
        with pytest.raises(ValueError, match=message):
            dit.DiTConfig.from_json(fields | change)
    with pytest.raises(ValueError, match="width is missing from the architecture"):
        dit.DiTConfig.from_json({"depth": 3})


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_the_forward_and_the_backward_loop_share_no_condition(remat):
    """libtpu 0.0.52 fails on a small one that enters both: XL/2's at 8 images a chip."""
    config = dit.DiTConfig(2, 16, 2, attention="linear", patch_size=4, in_channels=1, num_classes=3)
    model = dit.DiT(config, remat=remat)
    x = jnp.zeros((3, 8, 8, 1))
    t = jnp.zeros(3, int)
    condition = {"label": t}
    loss = jax.grad(lambda params: model.apply({"params": params}, x, t, condition).sum())
    gradient = jax.make_jaxpr(loss)(models.param_shapes(config))
    loops = [equation for equation in gradient.eqns if equation.primitive.name == "scan"]
    assert [loop.params["reverse"] for loop in loops] == [False, True]

    def between_layers(variables):
        """The arrays without the axis of the two layers; a carry enters and comes out again."""
        shapes = [variable.aval.shape for variable in variables]
        return sorted(shape for shape in shapes if shape and shape[0] != config.depth)

    for loop in loops:
        assert between_layers(loop.invars) == between_layers(loop.outvars)
