"""DiT and LiT, one model: a diffusion transformer with adaLN-Zero blocks.

DiT: Peebles & Xie, arXiv 2212.09748. LiT: Wang et al., arXiv 2501.12976. The config chooses the
attention. Parameters carry the names of DiT's checkpoints; the blocks are scanned, so every leaf
under `blocks` has a leading layer axis.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lit_jax import ranges
from lit_jax.kernels.linear_attention import KERNEL_FUNCTIONS
from lit_jax.models.attention import ATTENTIONS, PROJECTED, make_attention, xavier_uniform
from lit_jax.partitioning import constrain_rows, gather_weights

# size: depth, width, softmax heads, linear heads. S to XL are DiT's table 1; the few linear heads
# are LiT's. Ti is the quickstart's.
SIZES = {
    "Ti": (5, 160, 4, 2),
    "S": (12, 384, 6, 2),
    "B": (12, 768, 12, 3),
    "L": (24, 1024, 16, 4),
    "XL": (28, 1152, 16, 4),
}
FREQUENCIES = 256  # width of the sinusoidal timestep embedding
MAX_COUNT = 10**6  # of any size in a config: a checkpoint from a stranger may name anything
REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(PROJECTED),
    ),
}


# ---- The architecture ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """The architecture of a DiT or LiT: all that decides which function its parameters compute.

    Checkpoints, exported files and `config.json` hold it as JSON (`to_json`). It checks itself.

    Raises: ValueError whose text starts with the field's name.
    """

    depth: int
    width: int  # D
    num_heads: int | None  # None: a checkpoint that does not tell; such a config builds no model
    attention: str = "softmax"  # softmax: DiT; linear: LiT
    patch_size: int = 2  # p
    in_channels: int = 4  # C
    num_classes: int = 1000  # the null class is one row more
    learn_sigma: bool = True  # the output holds the variance's values too: 2C channels
    qkv_bias: bool = True
    conv_size: int = 5  # linear: the K x K depth-wise convolution of v; 0: none
    kernel_function: str = "relu"  # linear: relu, gelu, focused, focused_gelu
    timestep_freq_shift: int = 0  # 0: official DiT; 1: diffusers, which divides by 127 and not 128
    mlp_norm_epsilon: float = 1e-6  # 1e-6: official DiT; 1e-5: diffusers
    grid: tuple[int, int] | None = None  # tokens that it was trained on, h x w; None: not known

    def __post_init__(self):
        if self.attention == "softmax":
            # Softmax has neither, so two equal models must not differ in them.
            object.__setattr__(self, "conv_size", 0)
            object.__setattr__(self, "kernel_function", "relu")
        check_fields(dataclasses.asdict(self))
        if self.width % 4:
            raise ValueError(
                f"width = {self.width} is not a multiple of 4, as the position table needs"
            )
        if self.num_heads and self.width % self.num_heads:
            raise ValueError(f"num_heads = {self.num_heads} does not divide the width {self.width}")

    @classmethod
    def of_size(
        cls,
        size: str,
        *,
        attention: str = "softmax",
        depth: int = 0,
        width: int = 0,
        num_heads: int = 0,
        **fields: Any,
    ) -> "DiTConfig":
        """The config of a size's name; depth, width and num_heads of 0 are the size's own."""
        if size not in SIZES:
            raise ValueError(f"size must be one of {', '.join(SIZES)}; got {size!r}")
        size_depth, size_width, softmax_heads, linear_heads = SIZES[size]
        size_heads = softmax_heads if attention == "softmax" else linear_heads
        return cls(
            depth=depth or size_depth,
            width=width or size_width,
            num_heads=num_heads or size_heads,
            attention=attention,
            **fields,
        )

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "DiTConfig":
        """The config that `to_json` wrote.

        Raises: ValueError for fields that are unknown or missing, or hold what they cannot.
        """
        known = check_fields(fields)
        missing = [
            field.name
            for field in dataclasses.fields(cls)
            if field.default is dataclasses.MISSING and field.name not in known
        ]
        if missing:
            raise ValueError(f"{missing[0]} is missing from the architecture")
        return cls(**known)

    def to_json(self) -> dict[str, Any]:
        """All fields, as JSON values."""
        fields = dataclasses.asdict(self)
        return fields | {"grid": list(self.grid) if self.grid else None}

    @property
    def shared_with_teacher(self) -> tuple[str, ...]:
        """Fields in which a teacher must be as its student, whatever its size."""
        return ("in_channels", "num_classes", "learn_sigma")

    @property
    def conventions(self) -> tuple[str, ...]:
        """Fields that say how a checkpoint's own code computes, which no shape tells."""
        return ("timestep_freq_shift", "mlp_norm_epsilon")

    @property
    def teacher_defaults(self) -> tuple[str, ...]:
        """Fields that a teacher has as its student, as long as no checkpoint says otherwise."""
        return ("patch_size", "qkv_bias", *self.conventions, *self.shared_with_teacher)

    @property
    def out_channels(self) -> int:
        """Channels of the output: C, or 2C with `learn_sigma`."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    def condition_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """What the model is told of each image besides x and t: its label, (B,) int32."""
        return {"label": jax.ShapeDtypeStruct((batch_size,), jnp.int32)}

    def attention_flops(self, input_size: tuple[int, int]) -> float:
        """FLOPs of one image's attention without its projections, in all layers."""
        T = math.prod(input_size) // self.patch_size**2
        attention = make_attention(self, parent=None)
        return 2.0 * self.depth * attention.macs(T, self.width)

    def forward_flops(self, input_size: tuple[int, int]) -> float:
        """FLOPs of one image's forward pass: two a multiply-add.

        Counts matrix products and the depth-wise convolution, nothing else. `num_heads` must be
        known.

        Args: input_size: (h, w) of the images or latents.
        """
        D = self.width
        p = self.patch_size
        T = math.prod(input_size) // p**2
        projections = 4 * T * D * D
        block = projections + 8 * T * D * D + 6 * D * D  # with the MLP and the modulation
        patches = T * p * p * (self.in_channels + self.out_channels) * D
        ends = patches + FREQUENCIES * D + D * D + 2 * D * D
        return 2.0 * (self.depth * block + ends) + self.attention_flops(input_size)


def _is_count(value: Any, low: int = 1) -> bool:
    # A bool is an int to Python, and no size.
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= MAX_COUNT


def _is_grid(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_count, value))


_COUNT = ranges.Range(f"a whole number from 1 to {MAX_COUNT}", _is_count)
_FLAG = ranges.Range("True or False", lambda x: isinstance(x, bool))
RANGES = {
    **dict.fromkeys(("depth", "width", "patch_size", "in_channels", "num_classes"), _COUNT),
    "num_heads": ranges.Range(f"{_COUNT.words}, or None", lambda x: x is None or _is_count(x)),
    "attention": ranges.one_of(*ATTENTIONS),
    "learn_sigma": _FLAG,
    "qkv_bias": _FLAG,
    "conv_size": ranges.Range("odd, or 0", lambda x: _is_count(x, 0) and (x == 0 or x % 2 == 1)),
    "kernel_function": ranges.one_of(*KERNEL_FUNCTIONS),
    "timestep_freq_shift": ranges.Range("0 or 1", lambda x: _is_count(x, 0) and x <= 1),
    "mlp_norm_epsilon": ranges.Range(
        "a number between 0 and 1", lambda x: isinstance(x, float) and 0 < x < 1
    ),
    "grid": ranges.Range("two whole numbers, or None", lambda x: x is None or _is_grid(x)),
}


def check_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Checks some or all fields of a `DiTConfig`, such as a checkpoint from a stranger names.

    Returns: the fields, `grid` as a tuple.
    Raises: ValueError naming the first field that is unknown or holds what it cannot.
    """
    if not isinstance(fields, Mapping):
        raise ValueError(f"the architecture is a {type(fields).__name__}, not an object")
    for name, value in fields.items():
        if name not in RANGES:
            raise ValueError(f"{str(name)[:40]} = {str(value)[:40]} is no field of an architecture")
        words, holds = RANGES[name]
        if not holds(value):
            raise ValueError(f"{name} must be {words}; got {repr(value)[:40]}")
    grid = fields.get("grid")
    return dict(fields) | ({"grid": tuple(grid)} if grid is not None else {})


# ---- Embeddings ----------------------------------------------------------------------------------


def timestep_embedding(t: jax.Array, freq_shift: int = 0) -> jax.Array:
    """Sinusoids of t (B,) as cos | sin, (B, 256) float32.

    freq_shift 0 is DiT's; 1 is what diffusers computes, up to a tenth of the output away.
    """
    half = FREQUENCIES // 2
    frequencies = np.exp(-np.log(10000.0) * np.arange(half) / (half - freq_shift))
    angles = t.astype(jnp.float32)[:, None] * jnp.asarray(frequencies, jnp.float32)[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def position_embedding(grid: tuple[int, int], width: int) -> np.ndarray:
    """DiT's fixed 2-d table for a grid of h x w tokens.

    The first half of the width encodes the column, the second half the row.

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
    """(B, h, w, C) to patches (B, h/p, w/p, D): the strided convolution `proj`."""

    width: int
    patch_size: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        p = self.patch_size
        # Xavier's bounds for the linear map of a patch that the convolution is, as in DiT.
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
    """One adaLN-Zero block on x (B, T, D) with the activated condition c (B, D).

    It is scanned over the depth, with (x, c) as the carry.
    """

    config: DiTConfig
    grid: tuple[int, int]
    implementation: str | None  # of the attention
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
        attn = make_attention(self.config, self.implementation, self.dtype, name="attn")
        x = x + gate_msa[:, None] * attn(
            modulate(LayerNorm(name="norm1")(x), shift_msa, scale_msa), self.grid
        )
        mlp = Mlp(self.dtype, name="mlp")
        x = x + gate_mlp[:, None] * mlp(
            modulate(LayerNorm(self.config.mlp_norm_epsilon, name="norm2")(x), shift_mlp, scale_mlp)
        )
        return (x, c), None


class FinalLayer(nn.Module):
    """Modulated norm and the zero-initialised projection to patches.

    (B, T, D) to (B, T, p * p * C_out) float32.
    """

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
    """Diffusion transformer: x (B, h, w, C), t (B,) and a condition to (B, h, w, C_out) float32.

    Any h x w that the patch size divides works: the position table is computed from the grid.
    Matmuls and the residual stream are in `dtype`. Norms, the timestep's and the label's embedding
    and the output are float32, and so are the parameters.
    """

    config: DiTConfig
    dtype: Any = jnp.bfloat16
    remat: str = "none"  # none, full, dots: what the backward pass recomputes
    implementation: str | None = None  # of the attention; None picks by platform

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        condition: Mapping[str, jax.Array],
        drop: jax.Array | None = None,
    ) -> jax.Array:
        """The predicted noise and, with `learn_sigma`, the variance's raw values.

        Args:
          x: (B, h, w, C). t: (B,) timesteps, integer or float32.
          condition: {"label": (B,) int32}.
          drop: (B,) bool, the rows that get the null class; None: no row.
        Raises: ValueError for other channels, or sides that the patch size does not divide.
        """
        config = self.config
        B, height, width, C = x.shape
        D = config.width
        p = config.patch_size
        if C != config.in_channels:
            raise ValueError(
                f"the model takes {config.in_channels} channels, the images {x.shape} have {C}"
            )
        if height % p or width % p:
            raise ValueError(f"patch size {p} does not divide the {height} x {width} images")
        h = height // p
        w = width // p

        x = PatchEmbedder(D, p, self.dtype, name="x_embedder")(x).reshape(B, h * w, D)
        x = x + jnp.asarray(position_embedding((h, w), D), self.dtype)[None]  # (B, T, D)
        c = TimestepEmbedder(D, config.timestep_freq_shift, name="t_embedder")(t)
        label = condition["label"]
        y = label if drop is None else jnp.where(drop, config.num_classes, label)
        c = nn.silu(c + LabelEmbedder(config.num_classes, D, name="y_embedder")(y))  # (B, D)

        # Inside remat: the backward pass gathers a layer's weights again, and does not keep all.
        block = nn.map_variables(
            Block,
            "params",
            functools.partial(gather_weights, dtype=self.dtype),
            init=self.is_initializing(),
            mutable=self.is_initializing(),
        )
        if self.remat != "none":
            block = nn.remat(block, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        blocks = nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True}, length=config.depth
        )
        # c never changes, yet is carried. As an input that the forward and the backward loop share,
        # libtpu 0.0.52 places it twice in the same vector memory and fails ("Value while ...
        # overlaps with another chunk") from 8 rows a chip down.
        stack = blocks(config, (h, w), self.implementation, self.dtype, name="blocks")
        (x, c), _ = stack((x, c), None)

        C_out = config.out_channels
        x = FinalLayer(p * p * C_out, self.dtype, name="final_layer")(x, c)
        return unpatchify(x, (h, w), p)


def unpatchify(x: jax.Array, grid: tuple[int, int], patch_size: int) -> jax.Array:
    """(B, T, p * p * C) to (B, h p, w p, C): a token's vector is (row, column, channel)."""
    h, w = grid
    p = patch_size
    B, T, F = x.shape
    C = F // (p * p)
    x = x.reshape(B, h, w, p, p, C)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(B, h * p, w * p, C)
