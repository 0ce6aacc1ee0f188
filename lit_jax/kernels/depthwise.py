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
    # float32 before the taps and not at each: so
    # the gradient of x is summed in float32 too.
    image = x.astype(jnp.float32).reshape(B, *grid, D)
    out = _convolve(image, kernel.astype(jnp.float32)) + bias.astype(jnp.float32)[None, None, None]
    return out.reshape(B, T, D)


@jax.custom_vjp
def _convolve(image, kernel):
    """(B, h, w, D) by (K, K, D), both float32, to (B, h, w, D)."""
    return by_cudnn(image, kernel) if _on_gpu() else _by_windows(image, kernel)


def _on_gpu():
    # With its gradients cuDNN's form takes an H100 less than half the time that windows take.
    # Not lax.platform_dependent, with which every program takes a sixth longer to compile.
    return jax.default_backend() == "gpu"


def _forward(image, kernel):
    return _convolve(image, kernel), (image, kernel)


def _backward(saved, cotangent):
    image, kernel = saved
    gradients = gradients_by_cudnn if _on_gpu() else _gradients_by_windows
    return gradients(image, kernel, cotangent)


_convolve.defvjp(_forward, _backward)


# ---- As shifted windows --------------------------------------------------------------------------


def _by_windows(image, kernel):
    taps = kernel[:, :, None, None, None]  # (K, K, 1, 1, 1, D)
    windows = _windows(image, len(kernel))
    return sum(window * taps[place] for place, window in windows.items())


def _windows(image, K):
    """By (dy, dx) the part of the padded image that this tap reads, (B, h, w, D)."""
    _, h, w, _ = image.shape
    pad = K // 2
    padded = jnp.pad(image, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    return {
        (dy, dx): padded[:, dy : dy + h, dx : dx + w]
        for dy in range(K)
        for dx in range(K)
    }  # fmt: skip


def _gradients_by_windows(image, kernel, cotangent):
    # JAX's own rule adds K * K padded images, which XLA's CPU does ten times as slowly.
    dimage = _by_windows(cotangent, kernel[::-1, ::-1])
    windows = _windows(image, len(kernel))
    sums = [jnp.sum(window * cotangent, axis=(0, 1, 2)) for window in windows.values()]
    return dimage, jnp.stack(sums).reshape(kernel.shape)


# ---- By the GPU's library ------------------------------------------------------------------------


def by_cudnn(image: jax.Array, kernel: jax.Array) -> jax.Array:
    """(B, h, w, D) by (K, K, D), both float32, to (B, h, w, D)."""
    return jax.lax.conv_general_dilated(
        image,
        kernel[:, :, None],
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=image.shape[-1],
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def gradients_by_cudnn(
    image: jax.Array, kernel: jax.Array, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The gradients of image and kernel for a cotangent (B, h, w, D)."""
    _, vjp = jax.vjp(by_cudnn, image, kernel)
    return vjp(cotangent)
