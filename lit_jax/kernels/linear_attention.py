"""Normalised linear attention plus a depth-wise convolution of v.

There are three implementations: plain JAX, and fused kernels for TPUs and GPUs.

With phi(x) = relu(x) + 1e-6, per head (LiT, arXiv 2501.12976, section 3):

    S   = mean_j phi(k_j)^T v_j                          (H, H)
    o_i = phi(q_i) S / (phi(q_i) . mean_j phi(k_j) + 1e-6) + DWC(v)_i

DWC is a K x K zero-padded depth-wise convolution over the token grid. It has H
filters, which all heads share.
"""

import dataclasses
import functools
from types import ModuleType

import jax
import jax.numpy as jnp
from absl import logging

from lit_jax.kernels import linear_attention_gpu_plan
from lit_jax.kernels.depthwise import depthwise_conv
from lit_jax.kernels.linear_attention_case import (
    EPSILON,
    KERNEL_FUNCTIONS,
    Case,
)
from lit_jax.partitioning import split_rows

FOCUSING_FACTOR = 3  # the power of FLatten's focused kernel function
TPU_CONV_SIZES = (0, 3, 5, 7)  # that pallas_tpu offers
IMPLEMENTATIONS = ("xla", "pallas_tpu", "pallas_gpu")

__all__ = [
    "IMPLEMENTATIONS",
    "KERNEL_FUNCTIONS",
    "Case",
    "choose_implementation",
    "feature_map",
    "linear_attention",
    "refusal",
    "take_or_xla",
]


# ---- The op ------------------------------------------------------------------


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
    """Non-causal linear attention plus the convolution of v, on raw projections.

    Differentiable in all four arrays; the fused kernels once.

    Products take operands in the dtype of q and accumulate in float32.
    Normalisers, the kernel function and the convolution are float32. One
    exception: "pallas_tpu" convolves bfloat16 by windows of up to 8 rows, and
    errs by 1e-6 (K = 3, 5) or 2e-5 (K = 7) of the largest value in the window,
    also in rows that the filter does not reach from there.

    Under jax.sharding.use_abstract_mesh a fused kernel takes the batch to be
    split over all axes of the mesh, which are of AxisType.Auto. A jax.shard_map
    around it may have taken some of the axes; it needs check_vma=False.

    Args:
      q: (B, T, D) float32 or bfloat16, head-major on the last axis, T in raster
        order of `grid`.
      kv: (B, T, 2D) of the same dtype, k then v, each head-major.
      conv_kernel: (K, K, H) with odd K and H = D / num_heads, or None for no
        convolution.
      conv_bias: (H,), given if and only if `conv_kernel` is.
      num_heads: N, a divisor of D.
      grid: (h, w) with h * w == T.
      kernel_function: "relu", "gelu", "focused" or "focused_gelu". The focused
        ones raise phi to the power 3 and keep its norm per head (FLatten, arXiv
        2308.00442).
      implementation: "xla" runs everywhere. "pallas_tpu" and "pallas_gpu" are
        fused kernels for relu, and raise where they cannot run. None takes the
        platform's kernel if it offers the case, else "xla", and logs which;
        "pallas_gpu" is for Hopper, bfloat16 and JAX 0.12.
      interpret: run the Pallas kernel in interpret mode, on any platform.

    Returns:
      (B, T, D) in the dtype of q.

    Raises:
      ValueError: shapes or dtypes do not fit together, or the named
        implementation does not offer the case.
    """
    _check_tokens(q, kv)
    case = Case(q.shape[2], num_heads, grid, 0, kernel_function, q.dtype)
    if case.tokens != q.shape[1]:
        raise ValueError(f"the grid must cover the tokens; got grid {grid} and {q.shape[1]} tokens")
    K = _check_filters(conv_kernel, conv_bias, case.head_width)
    case = dataclasses.replace(case, conv_size=K)

    if implementation is None:
        implementation = choose_implementation(case)
    elif implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be None or one of {IMPLEMENTATIONS}; got {implementation!r}"
        )
    elif reason := refusal(implementation, case):
        raise ValueError(reason)

    if implementation == "xla":
        return _linear_attention_xla(q, kv, conv_kernel, conv_bias, case)

    program = _Program(implementation, case, interpret)

    def fused(*arrays):
        return _fused(*arrays, program)

    return split_rows(fused, (q, kv), (conv_kernel, conv_bias))


def _check_tokens(q, kv):
    if q.ndim != 3 or kv.shape != (*q.shape[:2], 2 * q.shape[2]):
        raise ValueError(
            f"q must be (B, T, D) and kv (B, T, 2D); got q {q.shape} and kv {kv.shape}"
        )
    if 0 in q.shape:
        raise ValueError(f"there is nothing to attend to; got q {q.shape}")
    if q.dtype not in (jnp.float32, jnp.bfloat16) or kv.dtype != q.dtype:
        raise ValueError(
            f"q and kv must both be float32 or both bfloat16; got q {q.dtype} and kv {kv.dtype}"
        )


def _check_filters(conv_kernel, conv_bias, H):
    """Returns K; 0 without a convolution."""
    if (conv_kernel is None) != (conv_bias is None):
        present = "conv_bias" if conv_kernel is None else "conv_kernel"
        raise ValueError(
            f"give conv_kernel and conv_bias together or not at all; got only {present}"
        )
    if conv_kernel is None:
        return 0

    K = conv_kernel.shape[0] if conv_kernel.ndim else 0
    if conv_kernel.shape != (K, K, H) or K % 2 == 0 or conv_bias.shape != (H,):
        raise ValueError(
            f"conv_kernel must be (K, K, {H}) with odd K and conv_bias ({H},); "
            f"got {conv_kernel.shape} and {conv_bias.shape}"
        )
    dtypes = (conv_kernel.dtype, conv_bias.dtype)
    if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
        raise ValueError(
            f"conv_kernel and conv_bias must be floating; got {dtypes[0]} and {dtypes[1]}"
        )
    return K


# ---- Which implementation ----------------------------------------------------


def refusal(implementation: str, case: Case) -> str:
    """Why an implementation does not offer a case, or "" where it does.

    For "pallas_tpu" that depends on the VMEM of the TPU, which the mesh in
    context names, and for "pallas_gpu" on the version of JAX.
    """
    if implementation == "xla":
        return ""
    if case.kernel_function != "relu":
        offered = "kernel_function 'relu'"
        return f"{implementation} offers {offered}; got {case.kernel_function!r}"
    if implementation == "pallas_gpu":
        return linear_attention_gpu_plan.refusal(case)
    if case.conv_size not in TPU_CONV_SIZES:
        offered = "convolutions of 3, 5 or 7"
        return f"{implementation} offers {offered}; got {case.conv_size}"
    return _kernel_module(implementation).refusal(case)


def choose_implementation(case: Case) -> str:
    """The fastest implementation of a case on this machine's devices; logs which."""
    device = jax.devices()[0]
    implementation = "xla"
    if device.platform == "tpu":
        implementation = "pallas_tpu"
    elif device.platform == "gpu":
        # The GPU kernels are made of instructions that only Hopper has.
        capability = getattr(device, "compute_capability", None)
        if capability != "9.0":
            reason = f"pallas_gpu needs compute capability 9.0; got {capability}"
            return take_or_xla("linear_attention", "xla", device.device_kind, reason)
        implementation = "pallas_gpu"
    reason = refusal(implementation, case)
    return take_or_xla("linear_attention", implementation, device.device_kind, reason)


# The cache makes each choice be logged once, not at every trace of every layer.
@functools.cache
def take_or_xla(
    operation: str,
    implementation: str,
    device_kind: str,
    reason: str,
) -> str:
    """The implementation, or "xla" if there is a reason against it; logs which."""
    chosen = "xla" if reason else implementation
    because = f"; {reason}" if reason else ""
    logging.info("%s: %s on %s%s", operation, chosen, device_kind, because)
    return chosen


def _kernel_module(implementation: str) -> ModuleType:
    # Imported on use: Pallas' backends do not all import on every platform,
    # and the GPU's not with every JAX.
    if implementation == "pallas_tpu":
        from lit_jax.kernels import linear_attention_tpu

        return linear_attention_tpu
    from lit_jax.kernels import linear_attention_gpu

    return linear_attention_gpu


# ---- The fused kernels and their gradient ------------------------------------


@dataclasses.dataclass(frozen=True)
class _Program:
    """What a fused call is besides its arrays: static, hence hashable."""

    implementation: str
    case: Case
    interpret: bool

    @property
    def kernels(self) -> ModuleType:
        return _kernel_module(self.implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _fused(q, kv, conv_kernel, conv_bias, program):
    return _fused_fwd(q, kv, conv_kernel, conv_bias, program)[0]


# The kernels are long programs, and a model asks for the same one when it is
# initialised, run and rematerialised. The inner jit traces each of them once.
_traced_once = functools.partial(jax.jit, inline=True, static_argnames=("program",))


@_traced_once
def _forward(inputs, *, program):
    return program.kernels.forward(
        inputs,
        case=program.case,
        interpret=program.interpret,
    )


@_traced_once
def _backward(inputs, saved, do, *, program):
    return program.kernels.backward(
        inputs,
        saved,
        do,
        case=program.case,
        interpret=program.interpret,
    )


def _fused_fwd(q, kv, conv_kernel, conv_bias, program):
    inputs = (q, kv, conv_kernel, conv_bias)
    out, saved = _forward(inputs, program=program)
    return out, (inputs, saved)


def _fused_bwd(program, residuals, do):
    return _backward(*residuals, do, program=program)


_fused.defvjp(_fused_fwd, _fused_bwd)


# ---- In plain JAX ------------------------------------------------------------


def _linear_attention_xla(q, kv, conv_kernel, conv_bias, case):
    """The op in plain JAX: what the kernels are tested against."""
    B, T, D = q.shape
    N = case.num_heads
    k, v = jnp.split(kv, 2, axis=-1)
    # (B N, T, H): with heads left inside, XLA copies around each product, and its CPU
    # backend lacks one of them. One axis for both: where it is 1, its sums are slow.
    q_heads, k_heads, v_heads = (
        x.reshape(B, T, N, D // N).transpose(0, 2, 1, 3).reshape(B * N, T, D // N)
        for x in (q, k, v)
    )

    # Float32 operands mean float32 products. A TPU's
    # default precision would round them to bfloat16.
    einsum = functools.partial(
        jnp.einsum,
        preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None,
    )
    phi_q = feature_map(q_heads.astype(jnp.float32), case.kernel_function)
    phi_k = feature_map(k_heads.astype(jnp.float32), case.kernel_function)
    state = einsum("nth,ntm->nhm", phi_k.astype(q.dtype), v_heads) / T
    numerator = einsum("nth,nhm->ntm", phi_q.astype(q.dtype), state.astype(q.dtype))
    key_mean = jnp.mean(phi_k, axis=1, keepdims=True)  # (B N, 1, H)
    denominator = jnp.sum(phi_q * key_mean, axis=-1, keepdims=True)
    out = numerator / (denominator + EPSILON)  # (B N, T, H)
    out = out.reshape(B, N, T, D // N).transpose(0, 2, 1, 3).reshape(B, T, D)
    if conv_kernel is not None:
        filters = jnp.tile(conv_kernel, (1, 1, N))
        out = out + depthwise_conv(v, filters, jnp.tile(conv_bias, N), case.grid)
    return out.astype(q.dtype)


def feature_map(x: jax.Array, kernel_function: str) -> jax.Array:
    """phi: the kernel function of (..., H) float32; norms are per head."""
    if kernel_function in ("relu", "focused"):
        phi = jax.nn.relu(x) + EPSILON
    else:
        phi = jax.nn.gelu(x, approximate=False) + EPSILON
    if kernel_function in ("focused", "focused_gelu"):
        norm = jnp.linalg.norm(phi, axis=-1, keepdims=True)
        # The power of the unit vector: that of phi
        # itself can leave the range of float32.
        power = (phi / norm) ** FOCUSING_FACTOR
        phi = norm / jnp.linalg.norm(power, axis=-1, keepdims=True) * power
    return phi
