"""The two attentions of the one model: DiT's softmax and LiT's linear attention with a depth-wise convolution."""
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lit_jax.kernels.linear_attention import linear_attention
from lit_jax.kernels.split import split_rows

xavier_uniform = nn.initializers.xavier_uniform()
SOFTMAX_IMPLEMENTATIONS = ("xla", "cudnn", "pallas_tpu")
PROJECTED = "projected"  # what remat saves of the projections: the sum with the bias, which is what the attention reads
FLASH_BLOCK = 128  # tokens: what the TPU flash kernel's default blocks divide


def softmax_attention(q: jax.Array, k: jax.Array, v: jax.Array, implementation: str | None = None) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v on (B, T, N, H), by the fastest implementation the platform has.

    Args:
      implementation: "xla"; "cudnn" (NVIDIA, 16 bit); "pallas_tpu" (JAX's flash kernel, T a multiple of 128). A named one
        runs or raises. None takes cudnn or pallas_tpu where they can run, else xla.
    Raises: ValueError for an unknown name or a T that the flash kernel does not take.
    """
    B, T, N, H = q.shape
    if implementation is None:
        platform = jax.default_backend()
        if platform == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16):
            implementation = "cudnn"
        else:
            implementation = "pallas_tpu" if platform == "tpu" and T % FLASH_BLOCK == 0 else "xla"
    if implementation not in SOFTMAX_IMPLEMENTATIONS:
        raise ValueError(f"softmax attention's implementation must be one of {', '.join(SOFTMAX_IMPLEMENTATIONS)}; "
                         f"got {implementation!r}")
    if implementation != "pallas_tpu":
        return jax.nn.dot_product_attention(q, k, v, implementation=implementation)
    if T % FLASH_BLOCK:
        raise ValueError(f"the TPU flash kernel takes T in multiples of {FLASH_BLOCK}, got {T} tokens; use xla")
    from jax.experimental.pallas.ops.tpu.flash_attention import (
        flash_attention,  # here: it imports only where Pallas has TPUs
    )

    def flash(q, k, v):
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # (B, N, T, H)
        return flash_attention(q, k, v, sm_scale=H**-0.5).swapaxes(1, 2)

    return split_rows(flash, (q, k, v))


class SoftmaxAttention(nn.Module):
    """Multi-head softmax attention on (B, T, D); the fused `qkv` projection of DiT, columns q | k | v, head-major."""

    num_heads: int
    qkv_bias: bool = True
    implementation: str | None = None  # of softmax_attention
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, x: jax.Array, grid: tuple[int, int]) -> jax.Array:
        del grid  # softmax attention does not know where a token lies
        B, T, D = x.shape
        qkv = nn.Dense(3 * D, self.qkv_bias, self.dtype, kernel_init=xavier_uniform, name="qkv")(x)
        q, k, v = jnp.moveaxis(qkv.reshape(B, T, 3, self.num_heads, D // self.num_heads), 2, 0)
        x = softmax_attention(q, k, v, self.implementation)  # (B, T, N, H)
        return nn.Dense(D, True, self.dtype, kernel_init=xavier_uniform, name="proj")(x.reshape(B, T, D))


class DepthwiseConv(nn.Module):
    """Holds the filters and bias that LiT's attention convolves v with: one filter a head channel, shared by the heads.

    Initialised as PyTorch's Conv2d: uniform in +-1 / sqrt(K * K), bias too (paper section 3.2's plain random start).
    """

    size: int      # K
    channels: int  # H

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        def uniform(key, shape, dtype=jnp.float32):
            return jax.random.uniform(key, shape, dtype, -1.0 / self.size, 1.0 / self.size)

        kernel = self.param("kernel", uniform, (self.size, self.size, 1, self.channels))
        bias = self.param("bias", uniform, (self.channels,))
        return kernel[:, :, 0, :], bias


class LinearAttention(nn.Module):
    """LiT's attention on (B, T, D): normalised linear attention of relu(q), relu(k), plus a depth-wise convolution of v.

    The convolution is added to the attention output before `proj`; see kernels/linear_attention.py for the formula.
    """

    num_heads: int
    qkv_bias: bool = True
    kernel_function: str = "relu"
    conv_size: int = 5                 # 0: no convolution
    implementation: str | None = None  # of kernels.linear_attention
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, x: jax.Array, grid: tuple[int, int]) -> jax.Array:
        B, T, D = x.shape
        q = nn.Dense(D, self.qkv_bias, self.dtype, kernel_init=xavier_uniform, name="q")(x)
        kv = nn.Dense(2 * D, self.qkv_bias, self.dtype, kernel_init=xavier_uniform, name="kv")(x)
        q, kv = checkpoint_name(q, PROJECTED), checkpoint_name(kv, PROJECTED)
        conv_kernel = conv_bias = None
        if self.conv_size:
            conv_kernel, conv_bias = DepthwiseConv(self.conv_size, D // self.num_heads, name="dwc")()
        x = linear_attention(q, kv, conv_kernel, conv_bias, num_heads=self.num_heads, grid=grid,
                             kernel_function=self.kernel_function, implementation=self.implementation)
        return nn.Dense(D, True, self.dtype, kernel_init=xavier_uniform, name="proj")(x)
