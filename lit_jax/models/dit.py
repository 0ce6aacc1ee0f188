"""DiT and LiT, one model: a diffusion transformer with adaLN-Zero blocks.

DiT: Peebles & Xie, arXiv 2212.09748. LiT: Wang et al., arXiv 2501.12976. The config chooses the
attention. Parameters carry the names of DiT's checkpoints; the blocks are scanned, so every leaf
under `blocks` has a leading layer axis.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lit_jax.models.architecture import COUNT, Architecture, is_count
from lit_jax.models.attention import make_attention, xavier_uniform
from lit_jax.models.blocks import attend, scan_blocks
from lit_jax.models.dense import Dense
from lit_jax.partitioning import constrain_rows
from lit_jax.ranges import Range

FREQUENCIES = 256  # width of the sinusoidal timestep embedding


# ---- The architecture ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class DiTConfig(Architecture):
    """The architecture of a DiT or LiT.

    Raises: ValueError whose text starts with the field's name.
    """

    num_classes: int = 1000  # the null class is one row more
    timestep_freq_shift: int = 0  # 0: official DiT; 1: diffusers, which divides by 127 and not 128
    mlp_norm_epsilon: float = 1e-6  # 1e-6: official DiT; 1e-5: diffusers

    ranges: ClassVar = Architecture.ranges | {
        "num_classes": COUNT,
        "timestep_freq_shift": Range("0 or 1", lambda x: is_count(x, 0) and x <= 1),
        "mlp_norm_epsilon": Range(
            "a number between 0 and 1", lambda x: isinstance(x, float) and 0 < x < 1
        ),
    }
    shared_with_teacher: ClassVar = (*Architecture.shared_with_teacher, "num_classes")
    conventions: ClassVar = (*Architecture.conventions, "timestep_freq_shift", "mlp_norm_epsilon")

    def condition_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """What the model is told of each image besides x and t: its label, (B,) int32."""
        return {"label": jax.ShapeDtypeStruct((batch_size,), jnp.int32)}

    def forward_flops(self, input_size: tuple[int, int]) -> float:
        D = self.width
        p = self.patch_size
        T = math.prod(input_size) // p**2
        projections = 4 * T * D * D
        block = projections + 8 * T * D * D + 6 * D * D  # with the MLP and the modulation
        patches = T * p * p * (self.in_channels + self.out_channels) * D
        ends = patches + FREQUENCIES * D + D * D + 2 * D * D
        return 2.0 * (self.depth * block + ends) + self.attention_flops(input_size)


# ---- Embeddings ----------------------------------------------------------------------------------


def timestep_embedding(t: jax.Array, freq_shift: int = 0) -> jax.Array:
    """Sinusoids of t (B,) as cos | sin, (B, 256) float32.

    freq_shift 0 is DiT's; 1 is what diffusers computes, up to a tenth of the output away.
    """
    frequencies = jnp.asarray(timestep_frequencies(freq_shift), jnp.float32)
    angles = t.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def timestep_frequencies(freq_shift: int = 0) -> np.ndarray:
    """Of `timestep_embedding`: (128,) float64, of a cosine and of a sine each."""
    half = FREQUENCIES // 2
    return np.exp(-np.log(10000.0) * np.arange(half) / (half - freq_shift))


def position_embedding(
    grid: tuple[int, int], width: int, base: int | None = None, scale: float = 1.0
) -> np.ndarray:
    """The fixed 2-d table for a grid of h x w tokens: DiT's, or PixArt-Sigma's.

    The first half of the width encodes the column, the second half the row.

    Args:
      base: both axes span [0, base / scale), whatever their number of tokens, as in PixArt-Sigma;
        None: positions are whole numbers, as in DiT.
    Returns: (h * w, width) float64, tokens in raster order; each half is sin | cos.
    """
    if width % 4:
        raise ValueError(f"the position table needs a width that 4 divides, got {width}")
    frequencies = 1.0 / 10000.0 ** (np.arange(width // 4, dtype=np.float64) / (width // 4))

    def positions(count):
        # float32, in this order: the original code rounds so before the float64 sine.
        whole = np.arange(count, dtype=np.float32)
        return whole if base is None else whole / np.float32(count / base) / np.float32(scale)

    rows, columns = np.meshgrid(positions(grid[0]), positions(grid[1]), indexing="ij")

    def encode(position):
        angles = position.reshape(-1, 1).astype(np.float64) * frequencies
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
        x = Dense(self.width, kernel_init=init, name="mlp_0")(
            timestep_embedding(t, self.freq_shift)
        )
        return Dense(self.width, kernel_init=init, name="mlp_2")(nn.silu(x))


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
        x = Dense(4 * D, dtype=self.dtype, kernel_init=xavier_uniform, name="fc1")(x)
        return Dense(D, dtype=self.dtype, kernel_init=xavier_uniform, name="fc2")(
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
        modulation = Dense(
            6 * D, dtype=self.dtype, kernel_init=nn.initializers.zeros, name="adaLN_modulation"
        )(c)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = jnp.split(
            modulation, 6, axis=-1
        )
        attn = make_attention(self.config, self.implementation, self.dtype, name="attn")
        modulated = modulate(LayerNorm(name="norm1")(x), shift_msa, scale_msa)
        x = x + gate_msa[:, None] * attend(self, attn, modulated, self.grid)
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
        modulation = Dense(2 * D, dtype=self.dtype, kernel_init=zeros, name="adaLN_modulation")(c)
        shift, scale = jnp.split(modulation, 2, axis=-1)
        x = modulate(LayerNorm(name="norm_final")(x), shift, scale)
        # The output is a regression target: its product accumulates and stays in float32.
        return Dense(self.features, dtype=jnp.float32, kernel_init=zeros, name="linear")(
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

        A velocity model predicts the velocity; with `learn_sigma` its second half is unused.

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

        blocks = scan_blocks(
            self,
            Block,
            config.depth,
            dtype=self.dtype,
            remat=self.remat,
            group=config.softmax_every,
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
