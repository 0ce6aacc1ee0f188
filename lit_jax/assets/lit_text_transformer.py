"""A text-to-image LiT as a model of diffusers, which loads, casts and saves it as one of its own.

The weights have the official names. config.json holds the fields of
`lit_torch.CaptionArchitecture`, and what pipelines ask a PixArtTransformer2DModel for.
"""

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from .lit_torch import CaptionArchitecture, CaptionLiT


class LiTTextTransformer2DModel(CaptionLiT, ModelMixin, ConfigMixin):
    """LiT under the name and the arguments that PixArt's pipelines expect.

    Args:
      sample_size: latent cells a side of the nominal size.
      out_channels: twice the input's where it predicts the variance.
      The others are those of `lit_torch.CaptionArchitecture`.
    """

    @register_to_config
    def __init__(
        self,
        attention: str,
        depth: int,
        width: int,
        num_heads: int,
        patch_size: int,
        in_channels: int,
        out_channels: int,
        learn_sigma: bool,
        qkv_bias: bool,
        conv_size: int,
        kernel_function: str,
        cross_heads: int,
        caption_channels: int,
        caption_length: int,
        position_base: int,
        position_scale: float,
        sample_size: int,
    ):
        arch = CaptionArchitecture(
            attention,
            depth,
            width,
            num_heads,
            patch_size,
            in_channels,
            learn_sigma,
            qkv_bias,
            conv_size,
            kernel_function,
            (position_base, position_base),
            cross_heads,
            caption_channels,
            caption_length,
            position_base,
            position_scale,
        )
        CaptionLiT.__init__(self, arch)

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        added_cond_kwargs: dict[str, Any] | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """The output (B, C_out, h, w) for hidden_states (B, C, h, w) and timestep (B,).

        encoder_hidden_states (B, S, channels) are the text encoder's features, and
        encoder_attention_mask (B, S) is 1 for tokens; None: all are. added_cond_kwargs, which
        other PixArts have, is not read.
        """
        mask = encoder_attention_mask
        if mask is None:
            mask = torch.ones(encoder_hidden_states.shape[:2], device=hidden_states.device)
        sample = CaptionLiT.forward(
            self, hidden_states, timestep, encoder_hidden_states, mask.bool()
        )
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)
