"""The two attentions of the one model: DiT's softmax and LiT's linear attention with a depth-wise convolution."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lit_jax.kernels.linear_attention import linear_attention, take_or_xla
from lit_jax.partitioning import split_rows

xavier_uniform = nn.initializers.xavier_uniform()
SOFTMAX_IMPLEMENTATIONS = ("xla", "cudnn", "pallas_tpu")
PROJECTED = "projected"  # what remat saves of the projections: the sum with the bias, which is what the attention reads
FLASH_BLOCK = (
    128  # tokens, and columns of wide heads: what the TPU flash kernel's default blocks divide
)


def softmax_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, implementation: str | None = None
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v on (B, T, N, H), by the fastest implementation the platform has.

    Args:
      implementation: "xla"; "cudnn" (NVIDIA, 16 bit); "pallas_tpu" (JAX's flash kernel, T a multiple of 128). A named one
        runs or raises. None takes cudnn or pallas_tpu where they can run, else xla, and logs which.
    Raises: ValueError for an unknown name, or a named implementation that does not offer the case.
    """
    B, T, N, H = q.shape
    case = dict(tokens=T, head_width=H, dtype=q.dtype)
    if implementation is None:
        implementation = _choose(**case)
    elif implementation not in SOFTMAX_IMPLEMENTATIONS:
        raise ValueError(
            f"softmax attention's implementation must be one of {', '.join(SOFTMAX_IMPLEMENTATIONS)}; "
            f"got {implementation!r}"
        )
    elif reason := softmax_refusal(implementation, **case):
        raise ValueError(reason)
    if implementation != "pallas_tpu":
        return jax.nn.dot_product_attention(q, k, v, implementation=implementation)
    from jax.experimental.pallas.ops.tpu.flash_attention import (
        flash_attention,  # here: it imports only where Pallas has TPUs
    )

    def flash(q, k, v):
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # (B, N, T, H)
        return flash_attention(q, k, v, sm_scale=H**-0.5).swapaxes(1, 2)

    return split_rows(flash, (q, k, v))


def softmax_refusal(implementation: str, *, tokens: int, head_width: int, dtype: jnp.dtype) -> str:
    """Why an implementation does not offer a case, or "" where it does; for "cudnn" on the GPU at hand."""
    if implementation == "pallas_tpu" and tokens % FLASH_BLOCK:
        return f"the TPU flash kernel takes T in multiples of {FLASH_BLOCK}, got {tokens} tokens; use xla"
    if (
        implementation == "pallas_tpu"
        and tokens > FLASH_BLOCK < head_width
        and head_width % FLASH_BLOCK
    ):
        return f"the TPU flash kernel takes heads of {FLASH_BLOCK} columns, fewer or multiples; got {head_width}; use xla"
    if implementation == "cudnn":
        major = getattr(jax.devices()[0], "compute_capability", "").partition(".")[
            0
        ]  # "9.0" is Hopper
        if not major.isdigit():
            return f"cudnn runs on NVIDIA's GPUs, this is {jax.devices()[0].device_kind}"
        if dtype not in (jnp.bfloat16, jnp.float16):
            return f"cudnn takes bfloat16 and float16, got {jnp.dtype(dtype)}"
        widest = 256 if int(major) >= 9 else 128
        if head_width > widest or head_width % 8:
            return f"cudnn takes heads of at most {widest} columns, in multiples of 8, on this GPU; got {head_width}"
    return ""


def _choose(**case):
    """Returns the fastest implementation this platform has for the case."""
    device = jax.devices()[0]
    implementation = {"gpu": "cudnn", "tpu": "pallas_tpu"}.get(device.platform, "xla")
    return take_or_xla(
        "softmax_attention",
        implementation,
        device.device_kind,
        softmax_refusal(implementation, **case),
    )


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
        return nn.Dense(D, True, self.dtype, kernel_init=xavier_uniform, name="proj")(
            x.reshape(B, T, D)
        )


class DepthwiseConv(nn.Module):
    """Holds the filters and bias that LiT's attention convolves v with: one filter a head channel, shared by the heads.

    Initialised as PyTorch's Conv2d: uniform in +-1 / sqrt(K * K), bias too (paper section 3.2's plain random start).
    """

    size: int  # K
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
    conv_size: int = 5  # 0: no convolution
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
            conv_kernel, conv_bias = DepthwiseConv(
                self.conv_size, D // self.num_heads, name="dwc"
            )()
        x = linear_attention(
            q,
            kv,
            conv_kernel,
            conv_bias,
            num_heads=self.num_heads,
            grid=grid,
            kernel_function=self.kernel_function,
            implementation=self.implementation,
        )
        return nn.Dense(D, True, self.dtype, kernel_init=xavier_uniform, name="proj")(x)
