"""MHLA, MALA and DiT5's attention against dense float64 oracles; Sana's as a case of LiT's op."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import assert_close

from lit_jax.kernels import dit5, linear_attention, mala, mhla
from lit_jax.kernels.depthwise import by_cudnn, depthwise_conv, gradients_by_cudnn
from lit_jax.models.attention import ATTENTIONS

EPSILON = 1e-6


def tokens(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def relu(x):
    return np.maximum(x, 0) + EPSILON


def elu(x):
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def heads_of(arrays):
    """Each image's and head's q, k, v, (T, H) float64, and where they lie in (B, T, N, H)."""
    B, _, N, _ = arrays[0].shape
    for b in range(B):
        for n in range(N):
            yield b, n, [np.float64(a[b, :, n]) for a in arrays]


def blocks_of(grid, side):
    """The block of each token, row by row."""
    h, w = grid
    return [(i // w) // (h // side) * side + (i % w) // (w // side) for i in range(h * w)]


def mhla_oracle(q, k, v, mix, grid):
    """By the T x T matrix: a pair's weight is that of its blocks times phi(q) . phi(k)."""
    out = np.zeros(q.shape)
    block = blocks_of(grid, round(len(mix) ** 0.5))
    pairs = np.float64(mix)[block][:, block]
    for b, n, (q_head, k_head, v_head) in heads_of((q, k, v)):
        scores = pairs * (relu(q_head) @ relu(k_head).T)
        # LiT's epsilon: it shows where a query has no positive entry.
        out[b, :, n] = scores @ v_head / (scores.sum(axis=1, keepdims=True) + len(scores) * EPSILON)
    return out


def mala_oracle(q, k, v):
    """By the T x T matrix of weights, each of which is moved by the same amount in its row."""
    T, _, H = q.shape[1:]
    out = np.zeros(q.shape)
    for b, n, (q_head, k_head, v_head) in heads_of((q, k, v)):
        scores = elu(q_head) @ elu(k_head).T / (T * H**0.5)
        z = scores.sum(axis=1, keepdims=True)
        weights = scores * (1 + 1 / (z + EPSILON)) - z / T
        np.testing.assert_allclose(weights.sum(axis=1), 1.0, atol=1e-4)
        out[b, :, n] = weights @ v_head
    return out


def dit5_oracle(q, k, v, w1, w2):
    """The step by central differences of the loss, one weight after the other."""
    T, _, H = q.shape[1:]
    out = np.zeros(q.shape)

    def network(x, w):
        a = x @ w[0]
        return a / (1 + np.exp(-a)) @ w[1]

    for b, n, (q_head, k_head, v_head) in heads_of((q, k, v)):
        w = np.stack([w1[n], w2[n]]).astype(np.float64)
        gradient = np.zeros_like(w)
        for place in np.ndindex(w.shape):
            losses = []
            for sign in (1, -1):
                moved = w.copy()
                moved[place] += sign * 1e-5
                losses.append(((network(k_head, moved) - v_head) ** 2).sum())
            gradient[place] = (losses[0] - losses[1]) / 2e-5 * H**-0.5 / (2 * T)
        out[b, :, n] = network(q_head, w - gradient)
    return out


# Lengths and heads that divide nothing; four blocks of 2 x 3 tokens.
GRID = (4, 6)
Q, K, V = (tokens(2, 24, 3, 5, seed=seed) for seed in range(3))
MIX = np.abs(tokens(4, 4, seed=3))
W1, W2 = tokens(3, 5, 5, seed=4), tokens(3, 5, 5, seed=5)
# Of heads so wide, pairs of 24 tokens cost less than states.
WIDE = [tokens(2, 24, 2, 40, seed=seed) for seed in range(3)]
DESIGNS = {
    "mhla": (lambda *x: mhla.mhla(*x, grid=GRID), lambda *x: mhla_oracle(*x, GRID), (Q, K, V, MIX)),
    "mhla, pairs": (
        lambda *x: mhla.mhla(*x, grid=GRID),
        lambda *x: mhla_oracle(*x, GRID),
        (*WIDE, MIX),
    ),
    "mala": (mala.mala, mala_oracle, (Q, K, V)),
    "dit5": (dit5.dit5, dit5_oracle, (Q, K, V, W1, W2)),
}


def test_every_design_has_an_oracle():
    assert ATTENTIONS.keys() - {"softmax", "linear"} <= DESIGNS.keys()


@pytest.mark.parametrize("name", DESIGNS)
def test_a_design_is_its_dense_formula(name):
    design, oracle, arrays = DESIGNS[name]
    expected = oracle(*arrays)
    # MALA's weights of two signs nearly cancel; DiT5's is two steps of a network.
    assert_close(jax.jit(design)(*arrays), expected, reduction=24, factor=64)
    halves = [jnp.asarray(a, jnp.bfloat16) for a in arrays[:3]]
    rounded = jax.jit(design)(*halves, *arrays[3:])
    assert rounded.dtype == jnp.bfloat16
    exact = oracle(*(np.float64(a) for a in halves), *arrays[3:])
    assert_close(rounded, exact, reduction=24, dtype="bfloat16")


@pytest.mark.parametrize("name", DESIGNS)
def test_gradients_are_those_of_the_dense_formula(name):
    """Along one random direction in all arrays at once."""
    design, oracle, arrays = DESIGNS[name]
    do = tokens(*arrays[0].shape, seed=8)
    pull_back = jax.jit(lambda do, *arrays: jax.vjp(design, *arrays)[1](do))
    directions = [tokens(*a.shape, seed=20 + i) for i, a in enumerate(arrays)]
    slope = sum((np.float64(g) * d).sum() for g, d in zip(pull_back(do, *arrays), directions))

    def along(step):
        # Away from the kinks of relu: no entry of Q or K is within 1e-5 of 0.
        moved = [np.float64(a) + step * d for a, d in zip(arrays, directions)]
        return (oracle(*moved) * do).sum()

    expected = (along(1e-6) - along(-1e-6)) / 2e-6
    np.testing.assert_allclose(slope, expected, rtol=1e-3)


@pytest.mark.parametrize("width", [5, 40])
def test_blocks_cost_the_products_that_are_counted(width):
    """The program's own FLOPs: by states for narrow heads, by pairs for wide ones."""
    heads = [tokens(2, 24, 3, width, seed=seed) for seed in range(3)]
    program = jax.jit(functools.partial(mhla.mhla, grid=GRID)).lower(*heads, MIX)
    products = 2 * 3 * width * min(mhla.macs(24, width, len(MIX)))
    flops = program.cost_analysis()["flops"]
    # Besides the products: sums and phi, a few operations an entry.
    assert 2 * products <= flops < 2 * products + 20 * heads[0].size + 4 * 2 * 3 * 24 * 24


def test_one_block_is_lits_attention_without_its_convolution():
    flat = [a.reshape(2, 24, 15) for a in (Q, K, V)]
    kv = np.concatenate(flat[1:], axis=-1)
    attend = functools.partial(linear_attention.linear_attention, num_heads=3, grid=GRID)
    lit = jax.jit(attend)(flat[0], kv)
    one = jax.jit(functools.partial(mhla.mhla, grid=GRID))(Q, K, V, jnp.ones((1, 1)))
    assert_close(one.reshape(2, 24, 15), lit, reduction=24)


def test_blocks_start_by_their_distance():
    mix = mhla.initial_mix(16)
    np.testing.assert_allclose(mix.sum(axis=0), 1.0, atol=1e-6)
    # The corners (0, 0) and (3, 3) are farthest; neighbours are nearer than the others.
    assert mix[0, 15] == 0 and (mix.diagonal() == mix.max(axis=0)).all()
    column = mix[:, 0]
    np.testing.assert_allclose(column[1] / column[0], 1 - 1 / np.sqrt(18), rtol=1e-6)
    assert mhla.initial_mix(1).tolist() == [[1.0]]


def test_a_grid_without_such_blocks_is_named():
    with pytest.raises(ValueError, match="4 x 6 tokens does not divide into 16 square blocks"):
        mhla.mhla(Q, K, V, jnp.ones((16, 16)), grid=GRID)


def test_sanas_normaliser_is_a_case_of_lits():
    """Heads of 32 columns, sums in place of means, no epsilon in phi: o = sum / (sum + 1e-6)."""
    q, k, v = (tokens(1, 24, 2, 32, seed=seed) for seed in range(3))
    expected = np.zeros(q.shape)
    for b, n, (q_head, k_head, v_head) in heads_of((q, k, v)):
        scores = np.maximum(q_head, 0) @ np.maximum(k_head, 0).T
        with_ones = np.concatenate([v_head, np.ones((24, 1))], axis=1)
        read = scores @ with_ones
        expected[b, :, n] = read[:, :-1] / (read[:, -1:] + 1e-6)
    kv = np.concatenate([k.reshape(1, 24, 64), v.reshape(1, 24, 64)], axis=-1)
    attend = functools.partial(linear_attention.linear_attention, num_heads=2, grid=GRID)
    ours = jax.jit(attend)(q.reshape(1, 24, 64), kv)
    # LiT's epsilons are 1e-6 of sums that are near ten.
    assert_close(ours.reshape(q.shape), expected, reduction=24, factor=32)


def test_a_query_without_a_positive_entry_is_where_lits_normaliser_differs_from_sanas():
    """Sana's gives 0. LiT's gives the values weighted by the keys' sums, by its two epsilons."""
    q, k, v = (tokens(1, 24, 2, 32, seed=seed) for seed in range(3))
    q[0, 3] = -1.0
    kv = np.concatenate([k.reshape(1, 24, 64), v.reshape(1, 24, 64)], axis=-1)
    attend = functools.partial(linear_attention.linear_attention, num_heads=2, grid=GRID)
    ours = np.asarray(jax.jit(attend)(q.reshape(1, 24, 64), kv)).reshape(24, 2, 32)[3]
    sums = relu(np.float64(k[0])).sum(axis=-1)  # (T, N)
    expected = np.einsum("tn,tnh->nh", sums, v[0]) / (sums.sum(axis=0)[:, None] + 24)
    assert_close(ours, expected, reduction=24)
    assert np.abs(expected).max() > 0.1


def test_keys_are_centred_channel_by_channel():
    x = np.float64(3.0 + tokens(2, 24, 15))
    expected = (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + 1.0)
    assert_close(dit5.centre_keys(jnp.asarray(x, jnp.float32)), expected, reduction=24)


def test_a_convolution_has_a_filter_for_each_channel():
    x, kernel, bias = tokens(1, 24, 15), tokens(3, 3, 15, seed=1), tokens(15, seed=2)
    padded = np.pad(np.float64(x.reshape(4, 6, 15)), ((1, 1), (1, 1), (0, 0)))
    expected = [
        (padded[row : row + 3, column : column + 3] * kernel).sum(axis=(0, 1)) + bias
        for row in range(4)
        for column in range(6)
    ]
    assert_close(depthwise_conv(x, kernel, bias, GRID)[0], np.array(expected), reduction=9)


def test_the_gradients_of_the_convolution_are_those_of_its_definition():
    """A grid that is no square, by float64 sums over every tap and token."""
    h, w = GRID
    rng = np.random.default_rng(1)
    x, do = rng.standard_normal((2, 2, h, w, 3))
    kernel = rng.standard_normal((3, 3, 3))
    dx, dkernel = np.zeros((2, h, w, 3)), np.zeros((3, 3, 3))
    for row, column, dy, dx_ in itertools.product(range(h), range(w), range(3), range(3)):
        y, z = row + dy - 1, column + dx_ - 1
        if 0 <= y < h and 0 <= z < w:
            dx[:, y, z] += do[:, row, column] * kernel[dy, dx_]
            dkernel[dy, dx_] += (do[:, row, column] * x[:, y, z]).sum(axis=0)

    def convolve(x, kernel, bias):
        return depthwise_conv(x, kernel, bias, GRID)

    arrays = (x.reshape(2, h * w, 3), kernel, np.zeros(3))
    pull_back = jax.jit(lambda do, *arrays: jax.vjp(convolve, *arrays)[1](do))
    found = pull_back(*(np.float32(array) for array in (do.reshape(2, h * w, 3), *arrays)))
    expected = (dx.reshape(2, h * w, 3), dkernel, do.sum(axis=(0, 1, 2)))
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, reduction=2 * h * w)


def test_what_a_gpu_convolves_by_is_the_same_convolution():
    """A CPU never takes this form by itself, but can."""
    image, do = (tokens(2, *GRID, 3, seed=seed) for seed in (0, 1))
    kernel = tokens(5, 5, 3, seed=2)

    @jax.jit
    def on_a_gpu(image, kernel, do):
        return by_cudnn(image, kernel), *gradients_by_cudnn(image, kernel, do)

    @jax.jit
    def on_a_cpu(image, kernel, do):
        def convolve(image, kernel):
            rows = image.reshape(2, -1, 3)
            return depthwise_conv(rows, kernel, jnp.zeros(3), GRID).reshape(image.shape)

        out, vjp = jax.vjp(convolve, image, kernel)
        return out, *vjp(do)

    arrays = (image, kernel, do)
    for ours, theirs in zip(on_a_gpu(*arrays), on_a_cpu(*arrays), strict=True):
        assert_close(ours, np.float64(theirs), reduction=image[..., 0].size)
