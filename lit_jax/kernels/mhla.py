"""Linear attention with a state for each block of the image (MHLA, arXiv 2601.07832).

The tokens lie in M square blocks of the grid. With phi that of LiT's attention,
each block b has a state, and the query's block i mixes all of them:

    S_b = sum_{j in b} phi(k_j)^T v_j     z_b = sum_{j in b} phi(k_j)
    o   = phi(q) (sum_b m_ib S_b) / (phi(q) . sum_b m_ib z_b)

m is one learned M x M matrix, the same for all heads. With M = 1 this is LiT's
attention without its convolution. Where the tokens are few, the same sums cost
less pair by pair of tokens:

    w_ij = m_block(i)block(j) phi(q_i) . phi(k_j)     o_i = sum_j w_ij v_j / sum_j w_ij
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from lit_jax.kernels.linear_attention import feature_map
from lit_jax.kernels.linear_attention_case import EPSILON


def refusal(num_blocks: int, grid: tuple[int, int]) -> str:
    """Why a grid has no such blocks, or "" where it has."""
    side = math.isqrt(num_blocks)
    if side * side == num_blocks and not any(n % side for n in grid):
        return ""
    return (
        f"a grid of {grid[0]} x {grid[1]} tokens does not divide into {num_blocks} square "
        f"blocks; name another num_blocks"
    )


def initial_mix(num_blocks: int) -> np.ndarray:
    """m at the start, (M, M) float32: it falls linearly with the distance of two blocks.

    Of the blocks farthest from each other it is 0. The columns sum to one.
    """
    side = math.isqrt(num_blocks)
    places = np.stack(np.divmod(np.arange(num_blocks), side), axis=1)
    distance = np.linalg.norm(places[:, None] - places[None], axis=-1)
    near = 1.0 - distance / max(distance.max(), 1.0)
    return (near / near.sum(axis=0, keepdims=True)).astype(np.float32)


def macs(tokens: int, head_width: int, num_blocks: int) -> tuple[int, int]:
    """Multiply-adds for one column of v, by states and by pairs of tokens."""
    return (2 * tokens + num_blocks**2) * head_width, 2 * tokens * tokens


def mhla(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mix: jax.Array,
    *,
    grid: tuple[int, int],
    kernel_function: str = "relu",
) -> jax.Array:
    """The attention above, by what takes fewer multiply-adds: states, or pairs of tokens.

    Products are in the dtype of q, sums and normaliser in float32.

    Args:
      q, k, v: (B, T, N, H), T in raster order of `grid`.
      mix: m, (M, M).
      kernel_function: phi, as of `linear_attention`.
    Returns: (B, T, N, H) in the dtype of q.
    Raises: ValueError for a grid that does not divide into M square blocks.
    """
    T, H = q.shape[1], q.shape[3]
    if reason := refusal(len(mix), grid):
        raise ValueError(reason)
    by_states, by_pairs = macs(T, H, len(mix))
    form = _by_states if by_states <= by_pairs else _by_pairs
    phi_q = feature_map(q.astype(jnp.float32), kernel_function)
    phi_k = feature_map(k.astype(jnp.float32), kernel_function)
    einsum = functools.partial(
        jnp.einsum,
        preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None,
    )
    return form(phi_q, phi_k, v, mix, grid, einsum).astype(q.dtype)


def _by_states(phi_q, phi_k, v, mix, grid, einsum):
    """A state a block, (M, H, H) of each head; all blocks' states mixed for each query's block."""
    B, T, N, H = v.shape
    side = math.isqrt(len(mix))
    h, w = grid[0] // side, grid[1] // side

    def to_blocks(x):  # (B, T, N, H) to (B, M, N, T / M, H)
        x = x.reshape(B, side, h, side, w, N, H)
        return x.transpose(0, 1, 3, 5, 2, 4, 6).reshape(B, side * side, N, h * w, H)

    phi_q, phi_k, v = map(to_blocks, (phi_q, phi_k, v))
    # Means in place of sums: what is large in both cancels.
    state = einsum("bmnth,bmntd->bmnhd", phi_k.astype(v.dtype), v) / T
    mass = phi_k.sum(axis=3) / T  # (B, M, N, H)
    exactly = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    state = exactly("im,bmnhd->binhd", mix, state)
    mass = exactly("im,bmnh->binh", mix, mass)
    numerator = einsum("bmnth,bmnhd->bmntd", phi_q.astype(v.dtype), state.astype(v.dtype))
    denominator = jnp.sum(phi_q * mass[:, :, :, None], axis=-1, keepdims=True)
    out = numerator / (denominator + EPSILON)

    out = out.reshape(B, side, side, N, h, w, H).transpose(0, 1, 4, 2, 5, 3, 6)
    return out.reshape(B, T, N, H)


def _by_pairs(phi_q, phi_k, v, mix, grid, einsum):
    """A weight a pair of tokens, (T, T) of each head."""
    B, T, N, H = v.shape
    side = math.isqrt(len(mix))
    row, column = np.divmod(np.arange(T), grid[1])
    block = row // (grid[0] // side) * side + column // (grid[1] // side)
    # (B N, T, H): with heads left inside, XLA copies around each product.
    phi_q, phi_k, v = (
        x.astype(v.dtype).transpose(0, 2, 1, 3).reshape(B * N, T, H) for x in (phi_q, phi_k, v)
    )
    pairs = mix[block][:, block] / T
    weights = einsum("nth,nsh->nts", phi_q, phi_k) * pairs[None]
    numerator = einsum("nts,nsh->nth", weights.astype(v.dtype), v)
    out = numerator / (weights.sum(axis=-1, keepdims=True) + EPSILON)
    return out.reshape(B, N, T, H).transpose(0, 2, 1, 3)
