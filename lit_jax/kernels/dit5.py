"""Attention as one step of descent on a small network (DiT5, arXiv 2605.02772).

Each head has a network f(x) = silu(x W1) W2 with learned first weights.
It takes one step, of rate 1, towards giving each key's value, and is then
asked the queries:

    loss = H^-1/2 / (2 T) sum_j |f(k_j) - v_j|^2
    W1   = W1 - dloss/dW1
    W2   = W2 - dloss/dW2
    o    = f(q)
"""

import functools

import jax
import jax.numpy as jnp


def dit5(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    w1: jax.Array,
    w2: jax.Array,
) -> jax.Array:
    """The attention above.

    Products take operands in the dtype of q and accumulate in float32.

    Args:
      q, k, v: (B, T, N, H).
      w1, w2: (N, H, H), the network's first weights.
    Returns: (B, T, N, H) in the dtype of q.
    """
    B, T, N, H = q.shape
    dtype = q.dtype
    einsum = functools.partial(
        jnp.einsum,
        preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None,
    )

    def times(x, w):  # (B, N, T, H) and (B, N, H, H)
        return einsum("bnth,bnhm->bntm", x.astype(dtype), w.astype(dtype))

    def outer(x, y):  # a sum over the tokens
        return einsum("bnth,bntm->bnhm", x.astype(dtype), y.astype(dtype))

    # Heads before tokens, and weights for each image:
    # XLA's CPU backend lacks other products of bfloat16.
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    shape = (B, N, H, H)
    w1 = jnp.broadcast_to(w1[None], shape)
    w2 = jnp.broadcast_to(w2[None], shape)

    # In closed form: autodiff within autodiff would
    # keep more than it needs.
    before = times(k, w1)
    share = jax.nn.sigmoid(before)
    hidden = before * share
    slope = share * (1.0 + before * (1.0 - share))  # of silu
    error = times(hidden, w2) - v.astype(jnp.float32)
    error = error * (H**-0.5 / T)
    back = times(error, w2.swapaxes(2, 3)) * slope
    w1 = w1 - outer(k, back)
    w2 = w2 - outer(hidden, error)

    out = times(jax.nn.silu(times(q, w1)), w2)
    return out.transpose(0, 2, 1, 3).astype(dtype)


def centre_keys(k: jax.Array, epsilon: float = 1.0) -> jax.Array:
    """Instance norm of k (B, T, D): each channel over the tokens.

    Statistics are float32.
    """
    x = k.astype(jnp.float32)
    x = x - x.mean(axis=1, keepdims=True)
    variance = jnp.square(x).mean(axis=1, keepdims=True)
    out = x * jax.lax.rsqrt(variance + epsilon)
    return out.astype(k.dtype)
