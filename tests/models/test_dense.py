"""The dense layer: Flax's own values and parameters, and a weight gradient without a copy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lit_jax.models.dense import Dense

RNG = np.random.default_rng(0)


def case(*rows):
    x = RNG.standard_normal((*rows, 5))
    kernel = RNG.standard_normal((5, 7))
    bias = RNG.standard_normal(7)
    cotangent = RNG.standard_normal((*rows, 7))
    return x, kernel, bias, cotangent


@pytest.mark.parametrize("rows", [(3,), (2, 3), (2, 1, 3)])
def test_values_and_gradients_are_those_of_a_product(rows):
    x, kernel, bias, cotangent = case(*rows)
    params = {"kernel": jnp.float32(kernel), "bias": jnp.float32(bias)}
    layer = Dense(7)
    out, pull = jax.vjp(lambda p, x: layer.apply({"params": p}, x), params, jnp.float32(x))
    grads, dx = pull(jnp.float32(cotangent))
    # Five and seven products a sum, and as many rows: float32 holds 1e-5 of it.
    flat = x.reshape(-1, 5), cotangent.reshape(-1, 7)
    np.testing.assert_allclose(out, x @ kernel + bias, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, cotangent @ kernel.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grads["kernel"], flat[0].T @ flat[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grads["bias"], flat[1].sum(0), rtol=1e-5, atol=1e-5)


def test_parameters_and_dtypes_are_those_of_flax():
    x = jnp.ones((2, 3, 5), jnp.float32)
    ours, theirs = Dense(7, dtype=jnp.bfloat16), nn.Dense(7, dtype=jnp.bfloat16)
    params = theirs.init(jax.random.key(0), x)
    same = jax.tree.map(np.array_equal, ours.init(jax.random.key(0), x), params)
    assert jax.tree.all(same)
    grads = [jax.grad(lambda p, m=m: m.apply(p, x).sum())(params) for m in (ours, theirs)]
    for a, b in zip(*map(jax.tree.leaves, grads), strict=True):
        assert a.dtype == b.dtype == jnp.float32


def weight_gradient(layer):
    """The compiled program of a weight gradient, as text."""
    x = jax.ShapeDtypeStruct((4, 8, 16), jnp.float32)
    params = {"kernel": jax.ShapeDtypeStruct((16, 32), jnp.float32)}

    def gradient(params, x, cotangent):
        return jax.vjp(lambda p: layer.apply({"params": p}, x), params)[1](cotangent)[0]

    cotangent = jax.ShapeDtypeStruct((4, 8, 32), jnp.float32)
    return jax.jit(gradient).lower(params, x, cotangent).compile().as_text()


def test_a_weight_gradient_copies_the_smaller_operand_at_most():
    """The rule of JAX makes XLA's CPU turn the cotangent round: (32, 4, 8), four times as wide."""
    turned = "f32[32,4,8]"
    assert turned in weight_gradient(nn.Dense(32, use_bias=False))
    assert turned not in weight_gradient(Dense(32, use_bias=False))
