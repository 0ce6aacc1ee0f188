"""The text encoder against its formulas in NumPy: positions, padding, dtypes, the mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jaxprs import products
from oracles import assert_close
from tiny_text import CONFIG, random_params

from lit_jax import sharding
from lit_jax.models import t5
from lit_jax.models.t5 import T5Config, T5Encoder


def t5_reference(params, ids, count, config):
    """One prompt, the first `count` of its tokens valid, in float64: (S, D)."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    S = len(ids)
    N, H = config.num_heads, config.head_width

    def rms(x, scale):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale

    def bucket(distance):
        half = 16 if distance > 0 else 0
        distance = abs(distance)
        if distance < 8:
            return half + distance
        # The hair makes 16, 32 and 64, whose logarithms are whole, no matter of rounding.
        return half + min(15, 8 + int(8 * np.log(distance / 8) / np.log(16) + 1e-9))

    table = params["relative_attention_bias"]["embedding"]
    bias = np.array([[table[bucket(k - q)] for k in range(S)] for q in range(S)])

    x = params["shared"]["embedding"][ids]
    for i in range(config.depth):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
        attention = layer["layer_0"]["SelfAttention"]
        h = rms(x, layer["layer_0"]["layer_norm"]["scale"])
        q, k, v = ((h @ attention[name]["kernel"]).reshape(S, N, H) for name in "qkv")
        out = np.zeros((S, N, H))
        for n in range(N):
            scores = q[:, n] @ k[:count, n].T + bias[:, :count, n]
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            out[:, n] = weights / weights.sum(axis=-1, keepdims=True) @ v[:count, n]
        x = x + out.reshape(S, N * H) @ attention["o"]["kernel"]

        mlp = layer["layer_1"]["DenseReluDense"]
        h = rms(x, layer["layer_1"]["layer_norm"]["scale"])
        gate = h @ mlp["wi_0"]["kernel"]
        gelu = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        x = x + gelu * (h @ mlp["wi_1"]["kernel"]) @ mlp["wo"]["kernel"]
    return rms(x, params["final_layer_norm"]["scale"])


@pytest.fixture(scope="module")
def params():
    return random_params()


def make_batch(length, counts, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, CONFIG.vocab_size, (len(counts), length)).astype(np.int32)
    return ids, np.arange(length)[None] < np.array(counts)[:, None]


def run(params, ids, mask, dtype=jnp.float32):
    return jax.jit(T5Encoder(CONFIG, dtype=dtype).apply)({"params": params}, ids, mask)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_encoder_is_that_of_the_formulas(params, dtype):
    """At 150 tokens every bucket is visited; padding rows are compared too."""
    counts = (150, 9, 1)
    ids, mask = make_batch(150, counts)
    actual = run(params, ids, mask, jnp.dtype(dtype).type)
    assert actual.dtype == dtype
    for row, count in enumerate(counts):
        expected = t5_reference(params, ids[row], count, CONFIG)
        assert_close(np.asarray(actual[row], np.float64), expected, reduction=64, dtype=dtype)


def test_scores_of_bfloat16_are_summed_in_float32(params):
    """Theirs is the one float32 product; T5 does not divide them, so they are large."""
    ids, mask = make_batch(8, (8,))
    model = T5Encoder(CONFIG, dtype=jnp.bfloat16)
    found = products(model.apply, {"params": params}, ids, mask)
    results = [equation.outvars[0].aval for equation in found]
    assert len(results) == 9  # q, k, v, o, three of the MLP, and the two of the attention
    (scores,) = (result for result in results if result.dtype == jnp.float32)
    assert scores.shape == (1, CONFIG.num_heads, 8, 8)


def test_valid_tokens_do_not_depend_on_the_padding(params):
    ids, mask = make_batch(30, (7, 12))
    long = run(params, ids, mask)
    for length in (12, 16):
        short = run(params, ids[:, :length], mask[:, :length])
        for row, count in enumerate((7, 12)):
            assert_close(short[row, :count], long[row, :count], reduction=64)
    other = np.where(mask, ids, 5)
    np.testing.assert_array_equal(run(params, other, mask)[mask], long[mask])


def test_a_row_without_tokens_is_finite(params):
    """Such rows fill the last batch."""
    ids, mask = make_batch(8, (0, 3))
    assert np.isfinite(run(params, ids, mask)).all()


def test_a_small_encoder_can_be_trained(params):
    """As together with a teacher: every parameter gets a finite gradient."""
    ids, mask = make_batch(8, (3, 8))

    def loss_fn(params):
        out = T5Encoder(CONFIG, dtype=jnp.float32).apply({"params": params}, ids, mask)
        return jnp.sum(jnp.where(mask[..., None], out, 0) ** 3)

    for path, grad in flatten_dict(jax.jit(jax.grad(loss_fn))(params), sep="/").items():
        assert np.isfinite(grad).all(), path
        layers = grad if path.startswith("blocks/") else grad[None]
        assert all(np.any(layer != 0) for layer in layers), path


def test_edges_of_the_buckets():
    """Of |key - query|, from the fact that T5's buckets are 8 * 16^(k/8)."""
    buckets = t5.relative_buckets(300)
    before, after = buckets[:, 0], buckets[0]
    edges = [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91]
    np.testing.assert_array_equal(np.flatnonzero(np.diff(before, prepend=-1)), edges)
    np.testing.assert_array_equal(after[1:], before[1:] + 16)
    assert before.max() == 15


def test_a_fresh_encoder_tells_the_order_of_words():
    """Of two words that change places each has other features: it looks at its neighbours."""
    config = dataclasses.replace(CONFIG, width=64, num_heads=4, head_width=16, mlp_width=64)
    params = t5.init_params(config, jax.random.key(0))
    words = np.array([[3, 5, 7, 9, 11, 1], [3, 9, 7, 5, 11, 1]], np.int32)
    features = T5Encoder(config, jnp.float32).apply({"params": params}, words, words > 0)
    there, back = np.asarray(features)
    norm = np.linalg.norm(there, axis=-1).mean()
    assert np.linalg.norm(there[1] - back[3]) > 0.3 * norm
    assert np.linalg.norm(there[3] - back[1]) > 0.3 * norm


def test_the_first_biases_look_back_and_ahead_by_turns():
    """Rows are distances of keys before a query, itself first, then of those after it."""
    bias = np.asarray(t5.near_first(jax.random.key(0), (t5.BUCKETS, 4)))
    half = t5.BUCKETS // 2
    expected = {0: [-4] * 4, 1: [0, -4, 0, -4], 2: [-2, -4, -0.5, -4], 3: [-4, -4, -1, -4]}
    for row, values in expected.items():
        np.testing.assert_array_equal(bias[row], values)
        # Those after are for the other heads.
        np.testing.assert_array_equal(bias[half + row], np.array(values)[[1, 0, 3, 2]])
    assert bias.min() == -4


def test_the_mesh_changes_nothing(params):
    mesh = sharding.make_mesh(data=4, fsdp=2)
    shardings = sharding.fsdp_sharding(params, mesh, min_size=1)
    placed = jax.device_put(params, shardings)
    assert not placed["blocks"]["layer_1"]["DenseReluDense"]["wo"]["kernel"].is_fully_replicated
    ids, mask = make_batch(16, range(1, 9))
    rows = sharding.batch_sharding(mesh)

    def apply(params, ids, mask):
        return T5Encoder(CONFIG, dtype=jnp.float32).apply({"params": params}, ids, mask)

    whole = jax.jit(sharding.on_mesh(apply, mesh), out_shardings=rows)
    actual = whole(placed, *jax.device_put((ids, mask), rows))
    assert_close(actual, run(params, ids, mask), reduction=64)


def test_the_defaults_are_the_xxl():
    assert sum(leaf.size for leaf in jax.tree.leaves(t5.param_shapes(T5Config()))) == 4_762_310_656


def test_fresh_features_have_unit_variance():
    """T5's own initialisation, which scales no product, keeps sizes in bounds."""
    config = T5Config(64, 32, 2, 4, 8, 64)
    ids, mask = make_batch(16, (16, 16))
    fresh = jax.jit(functools.partial(t5.init_params, config))(jax.random.key(0))
    out = jax.jit(T5Encoder(config, dtype=jnp.float32).apply)({"params": fresh}, ids, mask)
    assert np.mean(np.square(out)) == pytest.approx(1, rel=1e-3)
    q = fresh["blocks"]["layer_0"]["SelfAttention"]["q"]["kernel"]
    assert q.std() == pytest.approx((32 * 8) ** -0.5, rel=0.1)


def test_the_config_survives_json_and_refuses_what_it_cannot_hold():
    assert T5Config.from_json(CONFIG.to_json()) == CONFIG
    fields = CONFIG.to_json()
    with pytest.raises(ValueError, match="^depth must be a whole number from 1 to 1000000; got 0"):
        T5Config.from_json(fields | {"depth": 0})
    for value in (True, 2.0, "2", 10**7, None, [2]):
        with pytest.raises(ValueError, match="^width must be a whole number"):
            T5Config.from_json(fields | {"width": value})
    with pytest.raises(ValueError, match="^size is no field of a T5's architecture"):
        T5Config.from_json(fields | {"size": 3})
    with pytest.raises(ValueError, match="^num_heads is missing"):
        T5Config.from_json({name: 2 for name in fields if name != "num_heads"})
    with pytest.raises(ValueError, match="the architecture is a list, not an object"):
        T5Config.from_json([1])


def test_refusals(params):
    ids, mask = make_batch(8, (3, 8))
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16; got float16"):
        run(params, ids, mask, jnp.float16)
    with pytest.raises(ValueError, match=r"must both be \(B, S\); got \(2, 8\), \(2, 7\)"):
        run(params, ids, mask[:, :7])
