"""PixArt-Sigma and its LiT: a diffusion transformer that is told a caption.

PixArt-Sigma: Chen et al., arXiv 2403.04692; the blocks are PixArt-alpha's (arXiv 2310.00426). LiT:
Wang et al., arXiv 2501.12976, section 4.3. The config chooses the self-attention; the attention
to the caption is softmax in both. Parameters carry the names of PixArt's checkpoints; the blocks
are scanned, so every leaf under `blocks` has a leading layer axis.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp

from lit_jax.models.architecture import COUNT, COUNT_OR_NONE, SIZES, Architecture
from lit_jax.models.attention import PROJECTED, make_attention, xavier_uniform
from lit_jax.models.blocks import attend, scan_blocks
from lit_jax.models.dense import Dense
from lit_jax.models.dit import (
    FREQUENCIES,
    LayerNorm,
    Mlp,
    PatchEmbedder,
    TimestepEmbedder,
    modulate,
    position_embedding,
    unpatchify,
)
from lit_jax.partitioning import constrain_rows
from lit_jax.ranges import Range

normal = nn.initializers.normal
zeros = nn.initializers.zeros


# ---- The architecture ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PixArtConfig(Architecture):
    """The architecture of a PixArt-Sigma or of a LiT that was made from one.

    Raises: ValueError whose text starts with the field's name.
    """

    # Heads of the attention to the caption. No shape tells them, and with another number the
    # inherited weights compute another function.
    cross_heads: int | None = None
    caption_channels: int = 4096  # of the text encoder's features
    caption_length: int = 300  # rows of the null caption: the longest caption
    # The position table spans [0, base / scale) on either axis, whatever the grid is.
    position_base: int = 32  # pixels of the nominal size / 16: 16, 32, 64, 128
    position_scale: float = 1.0  # the nominal size / 512: 0.5, 1, 2, 4

    ranges: ClassVar = Architecture.ranges | {
        "cross_heads": COUNT_OR_NONE,
        **dict.fromkeys(("caption_channels", "caption_length", "position_base"), COUNT),
        "position_scale": Range(
            "a number from 0.01 to 100", lambda x: isinstance(x, int | float) and 0.01 <= x <= 100
        ),
    }
    shared_with_teacher: ClassVar = (
        *Architecture.shared_with_teacher,
        "caption_channels",
        "caption_length",
        "position_base",
        "position_scale",
    )
    conventions: ClassVar = (*Architecture.conventions, "cross_heads")
    frozen: ClassVar = ("y_embedder/y_embedding",)

    def __post_init__(self):
        super().__post_init__()
        if self.cross_heads and self.width % self.cross_heads:
            raise ValueError(
                f"cross_heads = {self.cross_heads} does not divide the width {self.width}"
            )

    @classmethod
    def of_size(cls, size: str, **fields: Any) -> Self:
        """The config of a size's name; depth, width and heads of 0 are the size's own."""
        found = super().of_size(size, **fields)
        # Those of the teacher: linear attention has few heads, the caption's keeps all.
        heads = found.cross_heads or SIZES[size][2]
        return dataclasses.replace(found, cross_heads=heads)

    def with_heads(self, num_heads: int) -> Self:
        """The same with the heads that a checkpoint did not tell: the caption's too."""
        cross_heads = self.cross_heads or num_heads
        return dataclasses.replace(self, num_heads=num_heads, cross_heads=cross_heads)

    def condition_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """What the model is told of each image: its caption's features, and which are there.

        {"caption": (B, S, caption_channels) bfloat16, "caption_mask": (B, S) bool}.
        """
        shape = (batch_size, self.caption_length)
        return {
            "caption": jax.ShapeDtypeStruct((*shape, self.caption_channels), jnp.bfloat16),
            "caption_mask": jax.ShapeDtypeStruct(shape, jnp.bool),
        }

    def forward_flops(self, input_size: tuple[int, int]) -> float:
        """As `Architecture.forward_flops`, with a caption of full length."""
        D = self.width
        S = self.caption_length
        p = self.patch_size
        T = math.prod(input_size) // p**2
        # Self-attention's projections, the caption's attention, and the MLP.
        cross = 2 * T * D * D + 2 * S * D * D + 2 * T * S * D
        block = 4 * T * D * D + cross + 8 * T * D * D
        patches = T * p * p * (self.in_channels + self.out_channels) * D
        time = FREQUENCIES * D + D * D + 6 * D * D
        caption = S * (self.caption_channels * D + D * D)
        return 2.0 * (self.depth * block + patches + time + caption) + self.attention_flops(
            input_size
        )


# ---- Modules -------------------------------------------------------------------------------------


class CaptionEmbedder(nn.Module):
    """Caption features (B, S, C) to (B, S, D), with the null caption where `drop` says so.

    The null caption, the text encoder's features of "", is a leaf of the parameters, for it
    travels with the weights. It is no weight: its gradient is zero.
    """

    width: int
    length: int
    dtype: Any

    @nn.compact
    def __call__(self, caption: jax.Array, drop: jax.Array | None) -> jax.Array:
        S, C = caption.shape[1:]
        null = self.param("y_embedding", normal(C**-0.5), (self.length, C))
        caption = caption.astype(self.dtype)
        if drop is not None:
            null = jax.lax.stop_gradient(null)[:S].astype(self.dtype)
            caption = jnp.where(drop[:, None, None], null[None], caption)
        return CaptionMlp(self.width, self.dtype, name="y_proj")(caption)


class CaptionMlp(nn.Module):
    """Two layers with tanh-GELU, both of the model's width.

    PixArt draws their kernels with a deviation of 0.02, which for T5-XXL's 4096 channels keeps the
    features' size. Here the fan-in decides: with 0.02 a small model would not hear its caption.
    """

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.lecun_normal()
        x = Dense(self.width, dtype=self.dtype, kernel_init=init, name="fc1")(x)
        x = nn.gelu(x, approximate=True)
        return Dense(self.width, dtype=self.dtype, kernel_init=init, name="fc2")(x)


class CrossAttention(nn.Module):
    """Softmax attention of the image's tokens (B, T, D) to those of the caption (B, S, D).

    Columns of `kv_linear` are k | v, each head-major. Keys that the mask (B, S) leaves out have no
    weight: with them the output of PixArt-Sigma would be 40 % away.
    """

    num_heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, caption: jax.Array, mask: jax.Array) -> jax.Array:
        B, T, D = x.shape
        S = caption.shape[1]
        N = self.num_heads

        def dense(features, name, init=xavier_uniform):
            return Dense(features, dtype=self.dtype, kernel_init=init, name=name)

        q = dense(D, "q_linear")(x).reshape(B, T, N, D // N)
        kv = dense(2 * D, "kv_linear")(caption).reshape(B, S, 2, N, D // N)
        q = jax.ad_checkpoint.checkpoint_name(q, PROJECTED)
        kv = jax.ad_checkpoint.checkpoint_name(kv, PROJECTED)
        # The scores and their softmax are float32 in there.
        x = jax.nn.dot_product_attention(
            q, kv[:, :, 0], kv[:, :, 1], mask=mask[:, None, None, :], implementation="xla"
        )
        # Zero, as PixArt starts it from a class-conditional model.
        return dense(D, "proj", zeros)(x.reshape(B, T, D))


class Block(nn.Module):
    """One block on x (B, T, D): self-attention, attention to the caption, MLP.

    The modulation of t is one for all blocks, t0 (B, 6, D) float32; each adds its own table to it
    (adaLN-single). The attention to the caption reads x without a norm and has no gate.

    It is scanned over the depth, with (x, t0) as the carry.
    """

    config: PixArtConfig
    grid: tuple[int, int]
    implementation: str | None  # of the self-attention
    dtype: Any

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, jax.Array], caption: jax.Array, mask: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        x, t0 = map(constrain_rows, carry)
        D = x.shape[-1]
        table = self.param("scale_shift_table", normal(D**-0.5), (6, D))
        # Their sum is float32: a bfloat16 scale near 1 would move every channel.
        modulation = (table[None] + t0).astype(self.dtype)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = jnp.moveaxis(
            modulation, 1, 0
        )
        attn = make_attention(self.config, self.implementation, self.dtype, name="attn")
        modulated = modulate(LayerNorm(name="norm1")(x), shift_msa, scale_msa)
        x = x + gate_msa[:, None] * attend(self, attn, modulated, self.grid)
        # A config from a checkpoint may not know its heads; such a one builds no model.
        num_heads = self.config.cross_heads or 1
        cross = CrossAttention(num_heads, self.dtype, name="cross_attn")
        x = x + cross(x, caption, mask)
        mlp = Mlp(self.dtype, name="mlp")
        x = x + gate_mlp[:, None] * mlp(modulate(LayerNorm(name="norm2")(x), shift_mlp, scale_mlp))
        return (x, t0), None


class FinalLayer(nn.Module):
    """Modulated norm and the zero-initialised projection to patches.

    x (B, T, D) and the embedded t (B, D) to (B, T, p * p * C_out) float32. It reads the embedding
    itself, before its SiLU and the blocks' projection.
    """

    features: int

    @nn.compact
    def __call__(self, x: jax.Array, embedded_t: jax.Array) -> jax.Array:
        D = x.shape[-1]
        table = self.param("scale_shift_table", normal(D**-0.5), (2, D))
        shift, scale = jnp.moveaxis(table[None] + embedded_t[:, None], 1, 0)
        # The output is a regression target: its product accumulates and stays in float32.
        x = modulate(LayerNorm(name="norm_final")(x.astype(jnp.float32)), shift, scale)
        return Dense(self.features, dtype=jnp.float32, kernel_init=zeros, name="linear")(x)


class PixArt(nn.Module):
    """PixArt: x (B, h, w, C), t (B,) and a caption to (B, h, w, C_out) float32.

    Any h x w that the patch size divides works: the position table is computed from the grid, and
    spans the same interval on both of its axes. Matmuls and the residual stream are in `dtype`.
    Norms, the embedding of the timestep, the modulation's tables and the output are float32, and
    so are the parameters.
    """

    config: PixArtConfig
    dtype: Any = jnp.bfloat16
    remat: str = "none"  # none, full, dots: what the backward pass recomputes
    implementation: str | None = None  # of the self-attention; None picks by platform

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
          x: (B, h, w, C). t: (B,) timesteps, integer or float32; never bfloat16, whose steps near
            1000 are 4 wide.
          condition: {"caption": (B, S, caption_channels), "caption_mask": (B, S) bool}, S at most
            `caption_length`. Each row of the mask has a true value. "null_mask", (B, S) bool, is
            the mask of rows that are dropped, where it is not the caption's (diffusers' habit).
          drop: (B,) bool, the rows that get the null caption; None: no row.
        Raises: ValueError for other channels, sides that the patch size does not divide, or a
          caption that is too long.
        """
        config = self.config
        B, height, width, C = x.shape
        D = config.width
        p = config.patch_size
        caption = condition["caption"]
        mask = condition["caption_mask"]
        if C != config.in_channels:
            raise ValueError(
                f"the model takes {config.in_channels} channels, the images {x.shape} have {C}"
            )
        if height % p or width % p:
            raise ValueError(f"patch size {p} does not divide the {height} x {width} images")
        longest = (config.caption_length, config.caption_channels)
        if caption.shape[1] > longest[0] or caption.shape[2] != longest[1]:
            raise ValueError(
                f"the model takes captions of at most {longest[0]} tokens with {longest[1]} "
                f"channels, got {caption.shape[1:]}"
            )
        h = height // p
        w = width // p

        x = PatchEmbedder(D, p, self.dtype, name="x_embedder")(x).reshape(B, h * w, D)
        table = position_embedding((h, w), D, config.position_base, config.position_scale)
        x = x + jnp.asarray(table, self.dtype)[None]  # (B, T, D)
        embedded_t = TimestepEmbedder(D, 0, name="t_embedder")(t)  # (B, D)
        t0 = Dense(6 * D, kernel_init=normal(0.02), name="t_block")(nn.silu(embedded_t))
        t0 = t0.reshape(B, 6, D)
        y_embedder = CaptionEmbedder(D, config.caption_length, self.dtype, name="y_embedder")
        y = y_embedder(caption, drop)  # (B, S, D)
        if drop is not None and "null_mask" in condition:
            mask = jnp.where(drop[:, None], condition["null_mask"], mask)

        # The caption is no part of the carry, which the backward pass keeps of every layer.
        blocks = scan_blocks(
            self,
            Block,
            config.depth,
            dtype=self.dtype,
            remat=self.remat,
            shared_inputs=2,
            group=config.softmax_every,
        )
        stack = blocks(config, (h, w), self.implementation, self.dtype, name="blocks")
        (x, _), _ = stack((x, t0), y, mask)

        C_out = config.out_channels
        x = FinalLayer(p * p * C_out, name="final_layer")(x, embedded_t)
        return unpatchify(x, (h, w), p)
