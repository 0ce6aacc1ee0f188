"""PixArt with its text encoder as one model, for teachers that are trained from nothing.

A text encoder of the size of a T5-XXL is a download, and stays as it is. Where there is none, it
learns together with the transformer: this model is told the tokens of a caption. When both are
trained, `--mode=port` writes them as a pipeline's folder (porting/pixart_t5.py), and from then on
the text encoder is frozen and the transformer a PixArt like any other.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from lit_jax.models.architecture import COUNT
from lit_jax.models.pixart import PixArt, PixArtConfig
from lit_jax.models.t5 import END, PAD, T5Config, T5Encoder


@dataclasses.dataclass(frozen=True)
class PixArtT5Config(PixArtConfig):
    """A PixArt, and beside it the fields of its T5; `caption_channels` is the T5's width.

    Raises: ValueError whose text starts with the field's name.
    """

    text_vocab_size: int = 32128
    text_depth: int = 24
    text_num_heads: int = 64
    text_head_width: int = 64
    text_mlp_width: int = 10240

    ranges: ClassVar = PixArtConfig.ranges | dict.fromkeys(
        ("text_vocab_size", "text_depth", "text_num_heads", "text_head_width", "text_mlp_width"),
        COUNT,
    )
    # What guidance compares with is computed from "": no leaf of the transformer.
    frozen: ClassVar = ("transformer/y_embedder/y_embedding",)
    text_encoder_name: ClassVar = "text_encoder"

    @property
    def text_encoder(self) -> T5Config:
        return T5Config(
            vocab_size=self.text_vocab_size,
            width=self.caption_channels,
            depth=self.text_depth,
            num_heads=self.text_num_heads,
            head_width=self.text_head_width,
            mlp_width=self.text_mlp_width,
        )

    @property
    def transformer(self) -> PixArtConfig:
        names = [field.name for field in dataclasses.fields(PixArtConfig)]
        return PixArtConfig(**{name: getattr(self, name) for name in names})

    def condition_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """{"caption_ids": (B, S) int32, "caption_mask": (B, S) bool}: the caption's tokens."""
        shape = (batch_size, self.caption_length)
        return {
            "caption_ids": jax.ShapeDtypeStruct(shape, jnp.int32),
            "caption_mask": jax.ShapeDtypeStruct(shape, jnp.bool),
        }

    def forward_flops(self, input_size: tuple[int, int]) -> float:
        """As `Architecture.forward_flops`, with the text encoder, for a caption of full length."""
        S = self.caption_length
        C = self.caption_channels
        inner = self.text_num_heads * self.text_head_width
        layer = S * (4 * C * inner + 3 * C * self.text_mlp_width) + 2 * S * S * inner
        return super().forward_flops(input_size) + 2.0 * self.text_depth * layer


class PixArtT5(nn.Module):
    """x (B, h, w, C), t (B,) and the tokens of a caption to (B, h, w, C_out) float32."""

    config: PixArtT5Config
    dtype: Any = jnp.bfloat16
    remat: str = "none"  # of the transformer
    implementation: str | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        condition: Mapping[str, jax.Array],
        drop: jax.Array | None = None,
    ) -> jax.Array:
        """As `PixArt`, told {"caption_ids": (B, S) int32, "caption_mask": (B, S) bool}.

        Args: drop: (B,) bool, the rows that get the features of "", under their caption's mask.
        """
        config = self.config
        ids = condition["caption_ids"]
        mask = condition["caption_mask"]
        readable = mask
        if drop is not None:
            first = (jnp.arange(ids.shape[1]) == 0)[None]
            ids = jnp.where(drop[:, None], jnp.where(first, END, PAD), ids)
            readable = jnp.where(drop[:, None], first, mask)
            if "null_mask" in condition:
                mask = jnp.where(drop[:, None], condition["null_mask"], mask)
        encoder = T5Encoder(config.text_encoder, self.dtype, name="text_encoder")
        told = {"caption": encoder(ids, readable), "caption_mask": mask}
        transformer = PixArt(
            config.transformer, self.dtype, self.remat, self.implementation, name="transformer"
        )
        return transformer(x, t, told)
