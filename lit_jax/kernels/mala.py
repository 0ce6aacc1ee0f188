"""Linear attention that keeps the magnitude of a query (MALA, arXiv 2507.00698).

With phi = elu + 1, s = H^-1/2 and means over the T keys:

    z = s phi(q) . mean phi(k)
    S = s mean phi(k)^T v
    o = phi(q) S (1 + 1 / (z + 1e-6)) - z mean v

The weights of a query sum to one, as in softmax attention, but are not
proportional to phi(q): some are negative.
"""

import functools

import jax
import jax.numpy as jnp

from lit_jax.kernels.linear_attention_case import EPSILON


def mala(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """The attention above.

    Products take operands in the dtype of q and accumulate in float32.

    Args: q, k, v: (B, T, N, H).
    Returns: (B, T, N, H) in the dtype of q.
    """
    T, _, H = q.shape[1:]
    dtype = q.dtype
    scale = H**-0.5
    einsum = functools.partial(
        jnp.einsum,
        preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None,
    )
    # Heads before tokens: with heads left inside, XLA's
    # CPU backend lacks products of bfloat16.
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    phi_q = jax.nn.elu(q.astype(jnp.float32)) + 1.0
    phi_k = jax.nn.elu(k.astype(jnp.float32)) + 1.0

    state = einsum("bnth,bntd->bnhd", phi_k.astype(dtype), v)
    state = state * (scale / T)
    read = einsum(
        "bnth,bnhd->bntd",
        phi_q.astype(dtype),
        state.astype(dtype),
    )
    key_mean = phi_k.mean(axis=2, keepdims=True)
    z = scale * jnp.sum(phi_q * key_mean, axis=-1, keepdims=True)
    value_mean = v.astype(jnp.float32).mean(axis=2, keepdims=True)
    out = read * (1.0 + 1.0 / (z + EPSILON)) - z * value_mean
    return out.transpose(0, 2, 1, 3).astype(dtype)
