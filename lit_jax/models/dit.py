"""DiT and LiT, one model: a diffusion transformer with adaLN-Zero blocks whose config chooses the attention.

DiT: Peebles & Xie, arXiv 2212.09748. LiT: Wang et al., arXiv 2501.12976. Parameter names are those of DiT's checkpoints;
blocks are scanned, so every leaf under `blocks` carries a leading layer axis.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lit_jax.models.attention import PROJECTED, LinearAttention, SoftmaxAttention, xavier_uniform
from lit_jax.partitioning import constrain_rows, gather_weights

# size: depth, width, softmax heads, linear heads. S to XL: DiT table 1; few heads as in LiT. Ti is the quickstart's.
SIZES = {
    "Ti": (5, 160, 4, 2),
    "S": (12, 384, 6, 2),
    "B": (12, 768, 12, 3),
    "L": (24, 1024, 16, 4),
    "XL": (28, 1152, 16, 4),
}
FREQUENCIES = 256  # width of the sinusoidal timestep embedding
REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(PROJECTED),
    ),
}


def timestep_embedding(t: jax.Array, freq_shift: int = 0) -> jax.Array:
    """Sinusoids of t (B,) as cos | sin, (B, 256) float32; freq_shift 0 is DiT's, 1 is what diffusers computes."""
    half = FREQUENCIES // 2
    frequencies = np.exp(-np.log(10000.0) * np.arange(half) / (half - freq_shift))
    angles = t.astype(jnp.float32)[:, None] * jnp.asarray(frequencies, jnp.float32)[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def position_embedding(grid: tuple[int, int], width: int) -> np.ndarray:
    """DiT's fixed 2-d table for a grid of h x w tokens: first half of the width encodes the column, second the row.

    Returns: (h * w, width) float64, tokens in raster order; each half is sin | cos.
    """
    if width % 4:
        raise ValueError(f"the position table needs a width that 4 divides, got {width}")
    frequencies = 1.0 / 10000.0 ** (np.arange(width // 4, dtype=np.float64) / (width // 4))
    rows, columns = np.meshgrid(
        np.arange(grid[0], dtype=np.float64), np.arange(grid[1], dtype=np.float64), indexing="ij"
    )

    def encode(position):
        angles = position.reshape(-1, 1) * frequencies
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    return np.concatenate([encode(columns), encode(rows)], axis=1)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """x (B, T, D) * (1 + scale) + shift, with scale and shift (B, D)."""
    return x * (1.0 + scale[:, None]) + shift[:, None]


class LayerNorm(nn.Module):
    """Layer norm without parameters; statistics in float32, output in the input's dtype."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.LayerNorm(self.epsilon, dtype=jnp.float32, use_bias=False, use_scale=False)(
            x
        ).astype(x.dtype)


class PatchEmbedder(nn.Module):
    """(B, h, w, C) to patches (B, h/p, w/p, D): the strided convolution `proj`, initialised as the linear map it is."""

    width: int
    patch_size: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        p = self.patch_size
        init = nn.initializers.variance_scaling(
            1.0, "fan_avg", "uniform", in_axis=(0, 1, 2), out_axis=3
        )
        return nn.Conv(
            self.width, (p, p), (p, p), "VALID", dtype=self.dtype, kernel_init=init, name="proj"
        )(x)


class TimestepEmbedder(nn.Module):
    """t (B,) to (B, D) float32: sinusoids, then a two-layer MLP with SiLU."""

    width: int
    freq_shift: int

    @nn.compact
    def __call__(self, t: jax.Array) -> jax.Array:
        init = nn.initializers.normal(0.02)
        x = nn.Dense(self.width, kernel_init=init, name="mlp_0")(
            timestep_embedding(t, self.freq_shift)
        )
        return nn.Dense(self.width, kernel_init=init, name="mlp_2")(nn.silu(x))


class LabelEmbedder(nn.Module):
    """y (B,) to (B, D) float32; row num_classes is the null class of classifier-free guidance."""

    num_classes: int
    width: int

    @nn.compact
    def __call__(self, y: jax.Array) -> jax.Array:
        return nn.Embed(
            self.num_classes + 1,
            self.width,
            embedding_init=nn.initializers.normal(0.02),
            name="embedding_table",
        )(y)


class Mlp(nn.Module):
    """Two layers with tanh-GELU, four times as wide inside."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        D = x.shape[-1]
        x = nn.Dense(4 * D, dtype=self.dtype, kernel_init=xavier_uniform, name="fc1")(x)
        return nn.Dense(D, dtype=self.dtype, kernel_init=xavier_uniform, name="fc2")(
            nn.gelu(x, approximate=True)
        )


class Block(nn.Module):
    """One adaLN-Zero block on x (B, T, D) with the activated condition c (B, D), carried as (x, c); scanned over the depth."""

    attention: type[nn.Module]
    attention_kwargs: dict
    grid: tuple[int, int]
    mlp_norm_epsilon: float
    dtype: Any

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, jax.Array], _: None
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        x, c = map(constrain_rows, carry)
        D = x.shape[-1]
        modulation = nn.Dense(
            6 * D, dtype=self.dtype, kernel_init=nn.initializers.zeros, name="adaLN_modulation"
        )(c)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = jnp.split(
            modulation, 6, axis=-1
        )
        attn = self.attention(**self.attention_kwargs, dtype=self.dtype, name="attn")
        x = x + gate_msa[:, None] * attn(
            modulate(LayerNorm(name="norm1")(x), shift_msa, scale_msa), self.grid
        )
        mlp = Mlp(self.dtype, name="mlp")
        x = x + gate_mlp[:, None] * mlp(
            modulate(LayerNorm(self.mlp_norm_epsilon, name="norm2")(x), shift_mlp, scale_mlp)
        )
        return (x, c), None


class FinalLayer(nn.Module):
    """Modulated norm and the zero-initialised projection to patches: (B, T, D) to (B, T, p * p * out_channels) float32."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        D, zeros = x.shape[-1], nn.initializers.zeros
        modulation = nn.Dense(2 * D, dtype=self.dtype, kernel_init=zeros, name="adaLN_modulation")(
            c
        )
        shift, scale = jnp.split(modulation, 2, axis=-1)
        x = modulate(LayerNorm(name="norm_final")(x), shift, scale)
        # The output is a regression target: its product accumulates and stays in float32.
        return nn.Dense(self.features, dtype=jnp.float32, kernel_init=zeros, name="linear")(
            x.astype(jnp.float32)
        )


class DiT(nn.Module):
    """Diffusion transformer: x (B, h, w, C), t (B,), y (B,) to (B, h, w, C_out) float32, C_out = 2C with learn_sigma.

    Any h x w that the patch size divides works: the position table is computed from the grid. Matmuls and the residual
    stream are in `dtype`; norms, the timestep and label embedding and the output are float32, parameters too.
    """

    depth: int
    width: int
    num_heads: int
    patch_size: int
    in_channels: int
    num_classes: int
    learn_sigma: bool = True
    attention: str = "softmax"  # or "linear": LiT
    qkv_bias: bool = True
    kernel_function: str = "relu"  # linear attention: relu, gelu, focused, focused_gelu
    conv_size: int = 5  # linear attention: 0 for no convolution
    implementation: str | None = None  # of the chosen attention; None picks by platform
    timestep_freq_shift: int = 0  # 0 official DiT, 1 diffusers
    mlp_norm_epsilon: float = 1e-6  # 1e-6 official DiT, 1e-5 diffusers
    dtype: Any = jnp.bfloat16
    remat: str = "none"  # none, full, dots: what the backward pass recomputes

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
        B, height, width, C = x.shape
        p = self.patch_size
        if C != self.in_channels:
            raise ValueError(
                f"the model takes {self.in_channels} channels, the images {x.shape} have {C}"
            )
        if height % p or width % p:
            raise ValueError(f"patch size {p} does not divide the {height} x {width} images")
        h, w = height // p, width // p

        x = PatchEmbedder(self.width, p, self.dtype, name="x_embedder")(x).reshape(
            B, h * w, self.width
        )
        x = x + jnp.asarray(position_embedding((h, w), self.width), self.dtype)[None]
        c = TimestepEmbedder(self.width, self.timestep_freq_shift, name="t_embedder")(t)
        c = nn.silu(c + LabelEmbedder(self.num_classes, self.width, name="y_embedder")(y))

        # Inside remat: the backward pass gathers a layer's weights again instead of keeping them all.
        block = nn.map_variables(
            Block,
            "params",
            functools.partial(gather_weights, dtype=self.dtype),
            init=self.is_initializing(),
            mutable=self.is_initializing(),
        )
        if self.remat != "none":
            block = nn.remat(block, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        # c never changes, yet is carried: as an input that the forward and the backward loop share, libtpu 0.0.52 places it
        # twice in the same vector memory and fails ("Value while ... overlaps with another chunk") from 8 rows a chip down.
        blocks = nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.depth
        )
        (x, c), _ = blocks(
            *self._attention(), (h, w), self.mlp_norm_epsilon, self.dtype, name="blocks"
        )((x, c), None)

        out_channels = C * (2 if self.learn_sigma else 1)
        x = FinalLayer(p * p * out_channels, self.dtype, name="final_layer")(x, c)
        x = x.reshape(B, h, w, p, p, out_channels)
        return x.transpose(0, 1, 3, 2, 4, 5).reshape(B, height, width, out_channels)

    def _attention(self) -> tuple[type[nn.Module], dict]:
        kwargs = dict(
            num_heads=self.num_heads, qkv_bias=self.qkv_bias, implementation=self.implementation
        )
        if self.attention == "softmax":
            return SoftmaxAttention, kwargs
        return LinearAttention, kwargs | dict(
            kernel_function=self.kernel_function, conv_size=self.conv_size
        )


def make_dit(
    *,
    size: str,
    depth: int = 0,
    width: int = 0,
    num_heads: int = 0,
    attention: str = "softmax",
    remat: str = "none",
    dtype: str = "bfloat16",
    **kwargs,
) -> DiT:
    """Builds a model from a size name; depth, width and num_heads of 0 are the size's own.

    Raises: ValueError naming the field and both values for an unknown size, attention, remat or dtype, and for heads that
    do not divide the width.
    """

    def known(field, value, choices):
        if value not in choices:
            raise ValueError(f"{field} must be one of {', '.join(choices)}; got {value!r}")

    known("model.size", size, SIZES)
    known("model.attention", attention, ("softmax", "linear"))
    known("train.remat", remat, REMAT_POLICIES)
    known("model.dtype", dtype, ("bfloat16", "float32"))
    size_depth, size_width, softmax_heads, linear_heads = SIZES[size]
    depth, width = depth or size_depth, width or size_width
    num_heads = num_heads or (softmax_heads if attention == "softmax" else linear_heads)
    if width % 4:
        raise ValueError(
            f"model.width = {width} is not a multiple of 4, as the position table needs"
        )
    if width % num_heads:
        raise ValueError(f"model.num_heads = {num_heads} does not divide the width {width}")
    return DiT(
        depth=depth,
        width=width,
        num_heads=num_heads,
        attention=attention,
        remat=remat,
        dtype=jnp.dtype(dtype).type,
        **kwargs,
    )


# What parameters alone do not tell, or a config may get wrong: a checkpoint's architecture names them all.
ARCHITECTURE = (
    "attention",
    "depth",
    "width",
    "num_heads",
    "patch_size",
    "in_channels",
    "num_classes",
    "learn_sigma",
    "qkv_bias",
    "conv_size",
    "kernel_function",
    "timestep_freq_shift",
    "mlp_norm_epsilon",
)
_LINEAR_ONLY = ("conv_size", "kernel_function")


def check_architecture(model: DiT, architecture: dict[str, Any], path: str) -> None:
    """Raises ValueError naming the first field in which a checkpoint's architecture is not the model's."""
    for name in ARCHITECTURE:
        ours, theirs = getattr(model, name), architecture[name]
        if theirs is None or (model.attention == "softmax" and name in _LINEAR_ONLY):
            continue
        if ours != theirs:
            raise ValueError(f"model.{name} = {ours}, but the checkpoint {path} has {theirs}")


def forward_flops(model: DiT, input_size: tuple[int, int]) -> float:
    """Multiply-adds of one image's forward pass, times two; matrix products and the depth-wise convolution only.

    LiT's core is 2 T D H (state and read-out) + K K T D a layer against softmax's 2 T T D (paper, section 3.2).
    """
    D, p = model.width, model.patch_size
    T = (input_size[0] // p) * (input_size[1] // p)
    out_channels = model.in_channels * (2 if model.learn_sigma else 1)
    core = 2 * T * T * D
    if model.attention == "linear":
        core = 2 * T * D * (D // model.num_heads) + model.conv_size**2 * T * D
    block = 4 * T * D * D + core + 8 * T * D * D + 6 * D * D
    ends = (
        T * p * p * model.in_channels * D
        + FREQUENCIES * D
        + D * D
        + 2 * D * D
        + T * D * p * p * out_channels
    )
    return 2.0 * (model.depth * block + ends)
