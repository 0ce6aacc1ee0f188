"""Normalised linear attention plus a depth-wise convolution of the values, in three implementations.

With phi(x) = relu(x) + 1e-6, per head (LiT, arXiv 2501.12976, section 3):

    S   = mean_j phi(k_j)^T v_j                          (H, H)
    o_i = phi(q_i) S / (phi(q_i) . mean_j phi(k_j) + 1e-6) + DWC(v)_i

where DWC is a K x K zero-padded depth-wise convolution over the token grid whose H filters all heads share.
"""

import functools

import jax
import jax.numpy as jnp
from absl import logging

from lit_jax.partitioning import split_rows

EPSILON = 1e-6  # added to phi(q), to phi(k) and to the denominator
FOCUSING_FACTOR = 3  # the power of FLatten-Transformer's focused kernel function
KERNEL_FUNCTIONS = ("relu", "gelu", "focused", "focused_gelu")
FUSED = {"pallas_tpu": float("inf"), "pallas_gpu": 512}  # and the widest heads that each offers
FUSED_CONV_SIZES = (3, 5, 7)
IMPLEMENTATIONS = ("xla", *FUSED)


def linear_attention(
    q: jax.Array,
    kv: jax.Array,
    conv_kernel: jax.Array | None = None,
    conv_bias: jax.Array | None = None,
    *,
    num_heads: int,
    grid: tuple[int, int],
    kernel_function: str = "relu",
    implementation: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Non-causal linear attention plus the depth-wise convolution of v, on raw projections.

    Differentiable in all four arrays, the fused kernels once. Products take the dtype of q as operands and accumulate in
    float32; normalisers, the kernel function and the convolution are float32. In "pallas_tpu" a convolution in bfloat16 errs
    by 1e-6 (K = 3, 5) or 2e-5 (K = 7) of the largest value within 8 rows, also where the filter does not reach that value.

    Args:
        q: (B, T, D) float32 or bfloat16, head-major on the last axis, T in raster order of `grid`.
        kv: (B, T, 2D) of the same dtype, k then v, each head-major.
        conv_kernel: (K, K, H) with odd K and H = D / num_heads, or None for no convolution.
        conv_bias: (H,), given if and only if `conv_kernel` is.
        num_heads: N, a divisor of D.
        grid: (h, w) with h * w == T.
        kernel_function: "relu", "gelu", "focused" or "focused_gelu". "focused" raises phi to the power 3
            and keeps its norm per head (FLatten, arXiv 2308.00442).
        implementation: "xla" runs everywhere; "pallas_tpu" and "pallas_gpu" are fused kernels for relu, and
            raise where they cannot run. None takes the platform's kernel if it offers the case, else "xla",
            and logs which.
        interpret: run the Pallas kernel in interpret mode, on any platform.

    Traced under jax.sharding.use_abstract_mesh, a fused kernel takes the batch to be split over all axes of the mesh (of
    AxisType.Auto), but for those that a jax.shard_map around has taken, which has to be of check_vma=False.

    Returns:
        (B, T, D) in the dtype of q.

    Raises:
        ValueError: shapes or dtypes do not fit together, or the named implementation does not offer the case.
    """
    _validate(q, kv, conv_kernel, conv_bias, num_heads, grid, kernel_function, implementation)
    grid = tuple(grid)
    case = dict(
        width=q.shape[2],
        num_heads=num_heads,
        grid=grid,
        conv_size=0 if conv_kernel is None else len(conv_kernel),
        kernel_function=kernel_function,
        dtype=q.dtype,
    )
    if implementation is None:
        implementation = _choose(**case)
    elif reason := refusal(implementation, **case):
        raise ValueError(reason)
    if implementation == "xla":
        return _linear_attention_xla(
            q, kv, conv_kernel, conv_bias, num_heads, grid, kernel_function
        )

    def fused(*arrays):
        return _fused(*arrays, num_heads, grid, implementation, interpret)

    return split_rows(fused, (q, kv), (conv_kernel, conv_bias))


def _validate(q, kv, conv_kernel, conv_bias, num_heads, grid, kernel_function, implementation):
    if q.ndim != 3 or kv.shape != (*q.shape[:2], 2 * q.shape[2]):
        raise ValueError(
            f"q must be (B, T, D) and kv (B, T, 2D); got q {q.shape} and kv {kv.shape}"
        )
    B, T, D = q.shape
    if 0 in q.shape:
        raise ValueError(f"there is nothing to attend to; got q {q.shape}")
    if q.dtype not in (jnp.float32, jnp.bfloat16) or kv.dtype != q.dtype:
        raise ValueError(
            f"q and kv must both be float32 or both bfloat16; got q {q.dtype} and kv {kv.dtype}"
        )
    if not isinstance(num_heads, int) or num_heads < 1 or D % num_heads:
        raise ValueError(
            f"the width must divide into heads; got width {D} and num_heads {num_heads}"
        )
    if (
        len(grid) != 2
        or not all(isinstance(side, int) and side > 0 for side in grid)
        or grid[0] * grid[1] != T
    ):
        raise ValueError(f"the grid must cover the tokens; got grid {grid} and {T} tokens")
    if (conv_kernel is None) != (conv_bias is None):
        present = "conv_bias" if conv_kernel is None else "conv_kernel"
        raise ValueError(
            f"give conv_kernel and conv_bias together or not at all; got only {present}"
        )
    H = D // num_heads
    if conv_kernel is not None:
        K = conv_kernel.shape[0] if conv_kernel.ndim else 0
        if conv_kernel.shape != (K, K, H) or K % 2 == 0 or conv_bias.shape != (H,):
            raise ValueError(
                f"conv_kernel must be (K, K, {H}) with odd K and conv_bias ({H},); "
                f"got {conv_kernel.shape} and {conv_bias.shape}"
            )
        if not all(jnp.issubdtype(x.dtype, jnp.floating) for x in (conv_kernel, conv_bias)):
            raise ValueError(
                f"conv_kernel and conv_bias must be floating; got {conv_kernel.dtype} and {conv_bias.dtype}"
            )
    if kernel_function not in KERNEL_FUNCTIONS:
        raise ValueError(
            f"kernel_function must be one of {KERNEL_FUNCTIONS}; got {kernel_function!r}"
        )
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be None or one of {IMPLEMENTATIONS}; got {implementation!r}"
        )


def refusal(
    implementation: str,
    *,
    width: int,
    num_heads: int,
    grid: tuple[int, int],
    conv_size: int,
    kernel_function: str,
    dtype: jnp.dtype,
) -> str:
    """Why an implementation does not offer a case, or "" where it does; for "pallas_tpu" on the TPU of the mesh in context.

    Args: conv_size: 0 for no convolution. The others as in `linear_attention`, `width` being D.
    """
    if implementation == "xla":
        return ""
    if kernel_function != "relu":
        return f"{implementation} offers kernel_function 'relu'; got {kernel_function!r}"
    if conv_size not in (0, *FUSED_CONV_SIZES):
        return f"{implementation} offers convolutions of 3, 5 or 7; got {conv_size}"
    if width // num_heads > FUSED[implementation]:
        return f"{implementation} offers heads of at most {FUSED[implementation]} columns; got {width // num_heads}"
    if implementation == "pallas_tpu":
        return _kernel_module(implementation).refusal(
            width=width, num_heads=num_heads, grid=grid, conv_size=conv_size, dtype=dtype
        )
    return ""


def _choose(**case):
    """Returns the fastest implementation this platform has for the case."""
    device = jax.devices()[0]
    # The GPU kernels are written for Hopper; on Ampere they spill, and XLA's form is left to run.
    hopper = device.platform == "gpu" and getattr(device, "compute_capability", None) == "9.0"
    implementation = "pallas_tpu" if device.platform == "tpu" else "pallas_gpu" if hopper else "xla"
    return take_or_xla(
        "linear_attention", implementation, device.device_kind, refusal(implementation, **case)
    )


@functools.cache
def take_or_xla(operation: str, implementation: str, device_kind: str, reason: str) -> str:
    """The implementation, or "xla" where there is a reason against it; logs each new choice once, for it remembers them."""
    chosen = "xla" if reason else implementation
    logging.info("%s: %s on %s%s", operation, chosen, device_kind, reason and f"; {reason}")
    return chosen


def _kernel_module(implementation):
    if implementation == "pallas_tpu":
        from lit_jax.kernels import linear_attention_tpu

        return linear_attention_tpu
    from lit_jax.kernels import linear_attention_gpu

    return linear_attention_gpu


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _fused(q, kv, conv_kernel, conv_bias, num_heads, grid, implementation, interpret):
    return _fused_fwd(q, kv, conv_kernel, conv_bias, num_heads, grid, implementation, interpret)[0]


# The kernels are long, and a model asks for the same one when it is initialised, run and rematerialised: each is traced once.
_traced_once = functools.partial(
    jax.jit, inline=True, static_argnames=("num_heads", "grid", "implementation", "interpret")
)


@_traced_once
def _forward(*arrays, implementation, **kwargs):
    return _kernel_module(implementation).forward(*arrays, **kwargs)


@_traced_once
def _backward(*arrays, implementation, **kwargs):
    return _kernel_module(implementation).backward(*arrays, **kwargs)


def _fused_fwd(q, kv, conv_kernel, conv_bias, num_heads, grid, implementation, interpret):
    out, saved = _forward(
        q,
        kv,
        conv_kernel,
        conv_bias,
        num_heads=num_heads,
        grid=grid,
        implementation=implementation,
        interpret=interpret,
    )
    return out, (q, kv, conv_kernel, conv_bias, saved)


def _fused_bwd(num_heads, grid, implementation, interpret, residuals, do):
    return _backward(
        *residuals,
        do,
        num_heads=num_heads,
        grid=grid,
        implementation=implementation,
        interpret=interpret,
    )


_fused.defvjp(_fused_fwd, _fused_bwd)


def _linear_attention_xla(q, kv, conv_kernel, conv_bias, num_heads, grid, kernel_function):
    """The op in plain JAX: runs anywhere, and is what the kernels are tested against."""
    B, T, D = q.shape
    k, v = jnp.split(kv, 2, axis=-1)
    # (B, N, T, H): with heads left inside, XLA copies around each product, and its CPU backend lacks one.
    q_heads, k_heads, v_heads = (
        x.reshape(B, T, num_heads, D // num_heads).transpose(0, 2, 1, 3) for x in (q, k, v)
    )

    # Float32 operands mean float32 products: a TPU's default precision would round them to bfloat16.
    einsum = functools.partial(
        jnp.einsum,
        preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None,
    )
    phi_q = _phi(q_heads.astype(jnp.float32), kernel_function)
    phi_k = _phi(k_heads.astype(jnp.float32), kernel_function)
    state = einsum("bnth,bntm->bnhm", phi_k.astype(q.dtype), v_heads) / T  # (B, N, H, H)
    numerator = einsum("bnth,bnhm->bntm", phi_q.astype(q.dtype), state.astype(q.dtype))
    denominator = jnp.sum(phi_q * jnp.mean(phi_k, axis=2, keepdims=True), axis=-1, keepdims=True)
    out = numerator / (denominator + EPSILON)  # (B, N, T, H)
    out = out.transpose(0, 2, 1, 3).reshape(B, T, D)
    if conv_kernel is not None:
        out = out + _depthwise_conv(v, conv_kernel, conv_bias, num_heads, grid)
    return out.astype(q.dtype)


def _phi(x, kernel_function):
    """The kernel function of (..., H) float32; "focused" norms are per head."""
    if kernel_function in ("relu", "focused"):
        phi = jax.nn.relu(x) + EPSILON
    else:
        phi = jax.nn.gelu(x, approximate=False) + EPSILON
    if kernel_function in ("focused", "focused_gelu"):
        norm = jnp.linalg.norm(phi, axis=-1, keepdims=True)
        # The power of the unit vector: that of a raw one can leave the range of float32.
        power = (phi / norm) ** FOCUSING_FACTOR
        phi = norm / jnp.linalg.norm(power, axis=-1, keepdims=True) * power
    return phi


def _depthwise_conv(v, conv_kernel, conv_bias, num_heads, grid):
    """Zero-padded K x K depth-wise convolution of (B, T, D) over the grid, in float32, plus the bias."""
    B, T, D = v.shape
    h, w = grid
    K = conv_kernel.shape[0]
    pad = K // 2
    # float32 before the taps, not at each: the gradient of v is then summed in float32 too.
    padded = jnp.pad(
        v.astype(jnp.float32).reshape(B, h, w, D), ((0, 0), (pad, pad), (pad, pad), (0, 0))
    )
    conv_kernel = jnp.tile(conv_kernel.astype(jnp.float32), (1, 1, num_heads))[
        :, :, None, None, None
    ]
    out = jnp.tile(conv_bias.astype(jnp.float32), num_heads)[None, None, None]
    for dy in range(K):
        for dx in range(K):
            out = out + padded[:, dy : dy + h, dx : dx + w] * conv_kernel[dy, dx]
    return out.reshape(B, T, D)
