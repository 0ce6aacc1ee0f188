"""Attention as one step of gradient descent on a small network (DiT5, arXiv 2605.02772).

Each head has a network f(x) = silu(x W1) W2 with learned first weights. It takes
one step, of rate 1, towards giving each key's value, and is then asked the queries:

    loss   = H^-1/2 / (2 T) sum_j |f(k_j) - v_j|^2
    W1, W2 = W1 - dloss/dW1, W2 - dloss/dW2        o = f(q)
"""

import jax
import jax.numpy as jnp


def dit5(q: jax.Array, k: jax.Array, v: jax.Array, w1: jax.Array, w2: jax.Array) -> jax.Array:
    """The attention above; products in the dtype of q, accumulated in float32.

    Args:
      q, k, v: (B, T, N, H).
      w1, w2: (N, H, H), the network's first weights.
    Returns: (B, T, N, H) in the dtype of q.
    """
    B, T, N, H = q.shape
    dtype = q.dtype
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None

    def product(letters, a, b):
        a, b = a.astype(dtype), b.astype(dtype)
        return jnp.einsum(letters, a, b, preferred_element_type=jnp.float32, precision=precision)

    # (B, N, T, H), and weights for each image: XLA's CPU backend lacks other products of bfloat16.
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    w1, w2 = (jnp.broadcast_to(w[None], (B, N, H, H)) for w in (w1, w2))
    # In closed form: autodiff within autodiff would keep more than it needs.
    before = product("bnth,bnhm->bntm", k, w1)
    share = jax.nn.sigmoid(before)
    hidden = before * share
    slope = share * (1.0 + before * (1.0 - share))  # of silu
    error = (product("bntm,bnmd->bntd", hidden, w2) - v.astype(jnp.float32)) * (H**-0.5 / T)
    back = product("bntd,bndm->bntm", error, w2.swapaxes(2, 3)) * slope
    w1 = w1 - product("bnth,bntm->bnhm", k, back)
    w2 = w2 - product("bntm,bntd->bnmd", hidden, error)
    hidden = jax.nn.silu(product("bnth,bnhm->bntm", q, w1))
    out = product("bntm,bnmd->bntd", hidden, w2)
    return out.transpose(0, 2, 1, 3).astype(dtype)


def centre_keys(k: jax.Array, epsilon: float = 1.0) -> jax.Array:
    """Instance norm of k (B, T, D): each channel over the tokens; float32 statistics."""
    x = k.astype(jnp.float32)
    x = x - x.mean(axis=1, keepdims=True)
    variance = jnp.square(x).mean(axis=1, keepdims=True)
    return (x * jax.lax.rsqrt(variance + epsilon)).astype(k.dtype)
