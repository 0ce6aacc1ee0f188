"""The attentions of the one model: DiT's softmax, LiT's linear attention, and other linear ones.

Each is a Flax module on (B, T, D). Its `refusal` tells whether an
implementation offers its case, and `macs` what it costs, so that nobody else
needs to know what the case consists of.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lit_jax.kernels import dit5, linear_attention, mala, mhla
from lit_jax.kernels.depthwise import depthwise_conv
from lit_jax.kernels.linear_attention import Case, take_or_xla
from lit_jax.models.dense import Dense
from lit_jax.partitioning import split_rows

xavier_uniform = nn.initializers.xavier_uniform()
SOFTMAX_IMPLEMENTATIONS = ("xla", "cudnn", "pallas_tpu")

# What remat saves of the projections: their sum with the bias, which is
# what the attention reads. Saved before the bias, they were written twice
# in the forward pass, and the bias was added again in the backward.
PROJECTED = "projected"

# The tokens of a block of the TPU flash kernel,
# and what columns of wide heads are multiples of.
FLASH_BLOCK = 128

# Scores of an image that XLA's form computes at a time: 1 GiB of float32.
SCORES = 2**28


# ---- Softmax attention -------------------------------------------------------


def softmax_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    implementation: str | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v, by the fastest implementation the platform has.

    Args:
      q, k, v: (B, T, N, H).
      implementation: "xla"; "cudnn" (NVIDIA, 16 bit); "pallas_tpu" (JAX's flash
        kernel, T at least 128). A named one runs or raises. None takes cudnn
        or pallas_tpu where they can run, else xla, and logs which.
    Returns: (B, T, N, H) in the dtype of q.
    Raises: ValueError for an unknown name, or a named implementation that does
      not offer the case.
    """
    B, T, N, H = q.shape
    if implementation is None:
        implementation = choose_softmax(T, H, q.dtype)
    elif implementation not in SOFTMAX_IMPLEMENTATIONS:
        raise ValueError(
            f"softmax attention's implementation must be one of "
            f"{', '.join(SOFTMAX_IMPLEMENTATIONS)}; got {implementation!r}"
        )
    elif reason := softmax_refusal(implementation, T, H, q.dtype):
        raise ValueError(reason)

    if implementation == "xla":
        return _softmax_xla(q, k, v)
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    return split_rows(_flash_attention, (q, k, v))


def _softmax_xla(q, k, v):
    """The formula on (B, T, N, H), by blocks of queries where all scores are too many."""
    B, T, N, H = q.shape
    # (B N, T, H): with heads left inside, XLA copies around each product.
    q, k, v = (x.transpose(0, 2, 1, 3).reshape(B * N, T, H) for x in (q, k, v))
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def read(q):
        scores = einsum("nth,nsh->nts", q, k) * H**-0.5
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        return einsum("nts,nsh->nth", weights, v).astype(v.dtype)

    blocks = -(-N * T * T // SCORES)
    blocks = next(n for n in range(min(blocks, T), T + 1) if T % n == 0)
    if blocks == 1:
        out = read(q)
    else:
        rows = q.reshape(B * N, blocks, T // blocks, H).swapaxes(0, 1)
        out = jax.lax.map(jax.checkpoint(read), rows).swapaxes(0, 1)
    return out.reshape(B, N, T, H).transpose(0, 2, 1, 3)


def _flash_attention(q, k, v):
    """JAX's TPU kernel on (B, T, N, H), any T."""
    # Imported here: it imports only where Pallas has TPUs.
    from jax.experimental.pallas.ops.tpu import flash_attention as kernel

    B, T, N, H = q.shape
    padding = -T % FLASH_BLOCK
    edges = ((0, 0), (0, 0), (0, padding), (0, 0))
    q, k, v = (jnp.pad(x.swapaxes(1, 2), edges) for x in (q, k, v))  # (B, N, T + padding, H)
    segments = None
    if padding:
        # What fills the last block is a segment of its own: no token sees it.
        ids = jnp.broadcast_to(jnp.arange(T + padding) >= T, (B, T + padding))
        ids = ids.astype(jnp.int32)
        segments = kernel.SegmentIds(ids, ids)
    out = kernel.flash_attention(q, k, v, segment_ids=segments, sm_scale=H**-0.5)
    return out[:, :, :T].swapaxes(1, 2)


def softmax_refusal(
    implementation: str,
    tokens: int,
    head_width: int,
    dtype: Any,
) -> str:
    """Why an implementation does not offer a case, or "" where it does.

    For "cudnn" that depends on this machine's GPU.
    """
    if implementation == "pallas_tpu":
        # XLA's form holds the scores of so few in one tile.
        if tokens < FLASH_BLOCK:
            return (
                f"the TPU flash kernel takes at least {FLASH_BLOCK} tokens, got {tokens}; use xla"
            )
        # One block of tokens takes heads of any width; several do not.
        if tokens > FLASH_BLOCK < head_width and head_width % FLASH_BLOCK:
            return (
                f"the TPU flash kernel takes heads of {FLASH_BLOCK} columns, fewer "
                f"or multiples; got {head_width}; use xla"
            )

    if implementation == "cudnn":
        device = jax.devices()[0]
        capability = getattr(device, "compute_capability", "")  # "9.0" is Hopper
        major = capability.partition(".")[0]
        if not major.isdigit():
            return f"cudnn runs on NVIDIA's GPUs, this is {device.device_kind}"
        if dtype not in (jnp.bfloat16, jnp.float16):
            return f"cudnn takes bfloat16 and float16, got {jnp.dtype(dtype)}"
        widest = 256 if int(major) >= 9 else 128
        if head_width > widest or head_width % 8:
            return (
                f"cudnn takes heads of at most {widest} columns, in multiples of 8, "
                f"on this GPU; got {head_width}"
            )
    return ""


def choose_softmax(tokens: int, head_width: int, dtype: Any) -> str:
    """The fastest implementation of a case on this machine's devices; logs which."""
    device = jax.devices()[0]
    fastest = {"gpu": "cudnn", "tpu": "pallas_tpu"}
    implementation = fastest.get(device.platform, "xla")
    reason = softmax_refusal(implementation, tokens, head_width, dtype)
    return take_or_xla("softmax_attention", implementation, device.device_kind, reason)


class SoftmaxAttention(nn.Module):
    """Multi-head softmax attention on (B, T, D).

    The fused `qkv` projection is DiT's: columns q | k | v, each head-major.
    """

    num_heads: int
    qkv_bias: bool = True
    implementation: str | None = None  # of softmax_attention
    dtype: Any = jnp.bfloat16

    def refusal(self, implementation: str, width: int, grid: tuple[int, int]) -> str:
        """Why an implementation does not offer this attention, or "" where it does."""
        tokens = grid[0] * grid[1]
        head_width = width // self.num_heads
        return softmax_refusal(implementation, tokens, head_width, self.dtype)

    def macs(self, tokens: int, width: int) -> int:
        """Multiply-adds for one image without the projections: scores and read-out."""
        return 2 * tokens * tokens * width

    @nn.compact
    def __call__(self, x: jax.Array, grid: tuple[int, int]) -> jax.Array:
        del grid  # softmax attention does not know where a token lies
        B, T, D = x.shape
        N = self.num_heads
        implementation = self.implementation or choose_softmax(T, D // N, self.dtype)
        qkv = self._by_heads("qkv", implementation)
        if qkv is None:
            projected = _dense(3 * D, self.qkv_bias, self.dtype, "qkv")(x)
            q, k, v = jnp.moveaxis(projected.reshape(B, T, 3, N, D // N), 2, 0)
        else:
            x = x.astype(self.dtype)
            kernel = qkv["kernel"].reshape(D, 3 * N, D // N)
            heads = [jnp.einsum("btd,dnh->btnh", x, part) for part in jnp.split(kernel, 3, axis=1)]
            if self.qkv_bias:
                bias = qkv["bias"].reshape(1, 1, 3 * N, D // N)
                parts = jnp.split(bias, 3, axis=2)
                heads = [y + part for y, part in zip(heads, parts)]
            q, k, v = (checkpoint_name(y, PROJECTED) for y in heads)
        x = softmax_attention(q, k, v, implementation)  # (B, T, N, H)
        proj = self._by_heads("proj", implementation)
        if proj is None:
            return _dense(D, True, self.dtype, "proj")(x.reshape(B, T, D))
        kernel = proj["kernel"].reshape(N, D // N, D)
        x = jnp.einsum("btnh,nhd->btd", x, kernel)
        return x + proj["bias"][None, None]

    def _by_heads(self, name: str, implementation: str) -> dict[str, jax.Array] | None:
        """A projection's parameters where it is computed head by head, else None.

        The flash kernel takes (B, N, T, H). Such products read and
        write just that; around one product of all heads the
        TPU's compiler copies the arrays three times.
        """
        if implementation != "pallas_tpu" or self.is_initializing():
            return None
        params: Any = self.get_variable("params", name)
        # A kernel in int8 is no array, and only Dense knows how to multiply it.
        if not isinstance(params["kernel"], jax.Array):
            return None
        return {key: p.astype(self.dtype) for key, p in params.items()}


# ---- Linear attention --------------------------------------------------------


class DepthwiseConv(nn.Module):
    """The filters and the bias of a depth-wise convolution of tokens.

    In LiT's attention there is one filter a head channel, shared by the heads;
    in other designs one for each of the D channels. They start as PyTorch's
    Conv2d does, uniform in +-1 / sqrt(K * K), the bias too: the plain random
    start of the paper's section 3.2.
    """

    size: int  # K
    channels: int  # H, or D

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        """Returns: filters (K, K, channels) and bias (channels,), float32."""
        limit = 1.0 / self.size

        def uniform(key, shape, dtype=jnp.float32):
            return jax.random.uniform(key, shape, dtype, -limit, limit)

        # Stored as a Flax convolution's kernel,
        # with an axis for the one input channel.
        shape = (self.size, self.size, 1, self.channels)
        kernel = self.param("kernel", uniform, shape)
        bias = self.param("bias", uniform, (self.channels,))
        return kernel[:, :, 0, :], bias


class LinearAttention(nn.Module):
    """LiT's attention on (B, T, D): normalised linear attention plus a convolution of v.

    The convolution is added to the attention's output before `proj`. The
    formula is in kernels/linear_attention.py.
    """

    num_heads: int
    qkv_bias: bool = True
    kernel_function: str = "relu"
    conv_size: int = 5  # 0: no convolution
    implementation: str | None = None  # of kernels.linear_attention
    dtype: Any = jnp.bfloat16

    def case(self, width: int, grid: tuple[int, int]) -> Case:
        """What the kernels are asked for, at a width and a grid of tokens."""
        return Case(
            width=width,
            num_heads=self.num_heads,
            grid=grid,
            conv_size=self.conv_size,
            kernel_function=self.kernel_function,
            dtype=jnp.dtype(self.dtype),
        )

    def refusal(self, implementation: str, width: int, grid: tuple[int, int]) -> str:
        """Why an implementation does not offer this attention, or "" where it does."""
        return linear_attention.refusal(implementation, self.case(width, grid))

    def macs(self, tokens: int, width: int) -> int:
        """Multiply-adds for one image without the projections (paper, section 3.2).

        State and read-out, 2 T D H, then the convolution, K K T D.
        """
        head_width = width // self.num_heads
        # The normaliser, T D more, is left out, as in the paper's table of MACs.
        products = 2 * tokens * width * head_width
        return products + self.conv_size**2 * tokens * width

    @nn.compact
    def __call__(self, x: jax.Array, grid: tuple[int, int]) -> jax.Array:
        D = x.shape[-1]
        q, kv = _project(x, self.qkv_bias, self.dtype)
        conv_kernel = None
        conv_bias = None
        if self.conv_size:
            conv = DepthwiseConv(self.conv_size, D // self.num_heads, name="dwc")
            conv_kernel, conv_bias = conv()
        x = linear_attention.linear_attention(
            q,
            kv,
            conv_kernel,
            conv_bias,
            num_heads=self.num_heads,
            grid=grid,
            kernel_function=self.kernel_function,
            implementation=self.implementation,
        )
        return _dense(D, True, self.dtype, "proj")(x)


# ---- Other linear attentions -------------------------------------------------


class BlockAttention(nn.Module):
    """MHLA on (B, T, D): a state for each block of the image, mixed for each block.

    A convolution of v with a filter for each channel is added before `proj`. The
    formula is in kernels/mhla.py.
    """

    num_heads: int
    qkv_bias: bool = True
    kernel_function: str = "relu"
    conv_size: int = 3  # 0: no convolution
    num_blocks: int = 16  # M, a square
    implementation: str | None = None  # xla is the only one
    dtype: Any = jnp.bfloat16

    def refusal(self, implementation: str, width: int, grid: tuple[int, int]) -> str:
        """Why an implementation or a grid does not offer it, or ""."""
        return _xla_alone(implementation) or mhla.refusal(self.num_blocks, grid)

    def macs(self, tokens: int, width: int) -> int:
        """Multiply-adds for one image without the projections.

        States and read-out, 2 T D H, and their mixing, M M D H, or pairs, 2 T T D; the
        convolution, K K T D.
        """
        products = min(mhla.macs(tokens, width // self.num_heads, self.num_blocks))
        return products * width + self.conv_size**2 * tokens * width

    @nn.compact
    def __call__(self, x: jax.Array, grid: tuple[int, int]) -> jax.Array:
        D = x.shape[-1]
        q, k, v = _split(*_project(x, self.qkv_bias, self.dtype))
        N = self.num_heads
        mix = self.param("mix", lambda _: jnp.asarray(mhla.initial_mix(self.num_blocks)))
        out = v
        # Parameters are made for one token, which has no blocks.
        if not self.is_initializing():
            heads = (_heads(q, N), _heads(k, N), _heads(v, N))
            out = mhla.mhla(*heads, mix, grid=grid, kernel_function=self.kernel_function)
            out = out.reshape(x.shape)
        if self.conv_size:
            conv = DepthwiseConv(self.conv_size, D, name="dwc")
            out = (out + depthwise_conv(v, *conv(), grid)).astype(self.dtype)
        return _dense(D, True, self.dtype, "proj")(out)


class MagnitudeAttention(nn.Module):
    """MALA on (B, T, D): the magnitude of a query counts.

    A convolution of v is added; the sum is multiplied by a linear gate of x, then
    `proj`. The formula is in kernels/mala.py.
    """

    num_heads: int
    qkv_bias: bool = True
    conv_size: int = 5  # 0: no convolution
    implementation: str | None = None  # xla is the only one
    dtype: Any = jnp.bfloat16

    def refusal(self, implementation: str, width: int, grid: tuple[int, int]) -> str:
        """Why an implementation does not offer it, or ""."""
        return _xla_alone(implementation)

    def macs(self, tokens: int, width: int) -> int:
        """Multiply-adds for one image without q, k, v and proj.

        State and read-out, 2 T D H, the convolution, K K T D, the gate, T D D.
        """
        head_width = width // self.num_heads
        return tokens * width * (2 * head_width + self.conv_size**2 + width)

    @nn.compact
    def __call__(self, x: jax.Array, grid: tuple[int, int]) -> jax.Array:
        D = x.shape[-1]
        q, k, v = _split(*_project(x, self.qkv_bias, self.dtype))
        N = self.num_heads
        out = mala.mala(_heads(q, N), _heads(k, N), _heads(v, N)).reshape(x.shape)
        if self.conv_size:
            conv = DepthwiseConv(self.conv_size, D, name="dwc")
            out = (out + depthwise_conv(v, *conv(), grid)).astype(self.dtype)
        gate = _dense(D, True, self.dtype, "gate")(x)
        return _dense(D, True, self.dtype, "proj")(out * gate)


class FastWeightAttention(nn.Module):
    """DiT5's attention on (B, T, D): one closed-form step of a small network a head.

    Keys are centred over the tokens; a convolution of q and one of k are added to
    them. All four projections are those of softmax attention, which a student can
    inherit. The formula is in kernels/dit5.py.
    """

    num_heads: int
    qkv_bias: bool = True
    conv_size: int = 3  # of q and of k; 0: no convolutions
    implementation: str | None = None  # xla is the only one
    dtype: Any = jnp.bfloat16

    def refusal(self, implementation: str, width: int, grid: tuple[int, int]) -> str:
        """Why an implementation does not offer it, or ""."""
        return _xla_alone(implementation)

    def macs(self, tokens: int, width: int) -> int:
        """Multiply-adds for one image without the projections.

        Five products of T D H for the step, two for the queries, 2 K K T D.
        """
        head_width = width // self.num_heads
        return tokens * width * (7 * head_width + 2 * self.conv_size**2)

    @nn.compact
    def __call__(self, x: jax.Array, grid: tuple[int, int]) -> jax.Array:
        D = x.shape[-1]
        N = self.num_heads
        q, k, v = _split(*_project(x, self.qkv_bias, self.dtype))
        k = dit5.centre_keys(k)
        if self.conv_size:
            of_q = DepthwiseConv(self.conv_size, D, name="dwc_q")
            of_k = DepthwiseConv(self.conv_size, D, name="dwc_k")
            q = (q + depthwise_conv(q, *of_q(), grid)).astype(self.dtype)
            k = (k + depthwise_conv(k, *of_k(), grid)).astype(self.dtype)
        # timm's trunc_normal_ of 0.02, whose bounds are 100 deviations away.
        start = nn.initializers.normal(0.02)
        w1 = self.param("w1", start, (N, D // N, D // N))
        w2 = self.param("w2", start, (N, D // N, D // N))
        out = dit5.dit5(_heads(q, N), _heads(k, N), _heads(v, N), w1, w2)
        return _dense(D, True, self.dtype, "proj")(out.reshape(x.shape))


# ---- The table ---------------------------------------------------------------


class Design(NamedTuple):
    """An attention that a model may have.

    Its module takes (B, T, D) and the grid, and answers `refusal` and `macs`.
    """

    module: type[nn.Module]
    implementations: tuple[str, ...]
    fields: tuple[str, ...] = ()  # of the model's config, that not every attention reads
    few_heads: bool = False  # a size has LiT's few heads; otherwise those of its softmax


# `attention` of a config names one.
ATTENTIONS = {
    "softmax": Design(SoftmaxAttention, SOFTMAX_IMPLEMENTATIONS),
    "linear": Design(
        LinearAttention,
        linear_attention.IMPLEMENTATIONS,
        ("kernel_function", "conv_size"),
        few_heads=True,
    ),
    "mhla": Design(BlockAttention, ("xla",), ("kernel_function", "conv_size", "num_blocks")),
    "mala": Design(MagnitudeAttention, ("xla",), ("conv_size",)),
    "dit5": Design(FastWeightAttention, ("xla",), ("conv_size",)),
}

# The parts that a module of an attention computes, side by side on the last
# axis of its parameters. A student can inherit them one by one.
PARTS = {
    "qkv": ("q", "k", "v"),
    "q": ("q",),
    "kv": ("k", "v"),
    "proj": ("o",),
    "dwc": ("conv",),
}


def make_attention(
    config: Any,
    implementation: str | None = None,
    dtype: Any = jnp.bfloat16,
    **module_fields: Any,
) -> Any:
    """The attention that a model's config describes, as a Flax module.

    Args:
      config: has `attention`, `num_heads`, `qkv_bias` and the design's own fields.
      implementation: one of the design's, or None: chosen by platform.
      module_fields: Flax's `name` and `parent`. A module with parent=None has no
        parameters and answers `refusal` and `macs`.
    """
    design = ATTENTIONS[config.attention]
    if implementation not in (None, *design.implementations):
        raise ValueError(
            f"implementation must be one of {', '.join(design.implementations)} for "
            f"{config.attention} attention; got {implementation!r}"
        )
    return design.module(
        num_heads=config.num_heads,
        qkv_bias=config.qkv_bias,
        implementation=implementation,
        dtype=dtype,
        **{name: getattr(config, name) for name in design.fields},
        **module_fields,
    )


def _xla_alone(implementation):
    return "" if implementation == "xla" else f"{implementation} has no such attention; use xla"


def _project(x, use_bias, dtype):
    """q (B, T, D) and kv (B, T, 2D), by modules of the caller; remat can save them."""
    D = x.shape[-1]
    q = _dense(D, use_bias, dtype, "q")(x)
    kv = _dense(2 * D, use_bias, dtype, "kv")(x)
    return checkpoint_name(q, PROJECTED), checkpoint_name(kv, PROJECTED)


def _split(q, kv):
    """(B, T, D) and (B, T, 2D) to q, k and v."""
    return q, *jnp.split(kv, 2, axis=-1)


def _heads(x, num_heads):
    """(B, T, D) to (B, T, N, H)."""
    B, T, D = x.shape
    return x.reshape(B, T, num_heads, D // num_heads)


def _dense(features, use_bias, dtype, name):
    return Dense(features, use_bias, dtype, kernel_init=xavier_uniform, name=name)
