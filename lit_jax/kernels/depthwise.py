"""The depth-wise convolution of tokens over their grid, in plain JAX."""

import jax
import jax.numpy as jnp


def depthwise_conv(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    grid: tuple[int, int],
) -> jax.Array:
    """Each channel's K x K filter over the zero-padded grid; sums in float32.

    Args:
      x: (B, T, D), T in raster order of `grid`.
      kernel: (K, K, D) with odd K. bias: (D,).
      grid: (h, w) with h * w == T.
    Returns: (B, T, D) float32.
    """
    B, T, D = x.shape
    h, w = grid
    K = len(kernel)
    pad = K // 2
    # float32 before the taps and not at each: so
    # the gradient of x is summed in float32 too.
    image = x.astype(jnp.float32).reshape(B, h, w, D)
    padded = jnp.pad(image, ((0, 0), (pad, pad), (pad, pad), (0, 0)))

    taps = kernel.astype(jnp.float32)[:, :, None, None, None]  # (K, K, 1, 1, 1, D)
    out = bias.astype(jnp.float32)[None, None, None]
    for dy in range(K):
        for dx in range(K):
            out = out + padded[:, dy : dy + h, dx : dx + w] * taps[dy, dx]
    return out.reshape(B, T, D)
