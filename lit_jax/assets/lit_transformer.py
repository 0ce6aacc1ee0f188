"""A LiT as a model of diffusers, which loads, casts and saves it as one of its own.

The weights have the official names. config.json holds the fields of `lit_torch.Architecture`.
"""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from .lit_torch import Architecture, LiT


class LiTTransformer2DModel(LiT, ModelMixin, ConfigMixin):
    """LiT under the name and the arguments that pipelines of diffusers expect."""

    @register_to_config
    def __init__(
        self,
        attention: str,
        depth: int,
        width: int,
        num_heads: int,
        patch_size: int,
        in_channels: int,
        num_classes: int,
        learn_sigma: bool,
        qkv_bias: bool,
        conv_size: int,
        kernel_function: str,
        grid: tuple[int, int],
        timestep_freq_shift: int,
        mlp_norm_epsilon: float,
    ):
        arch = Architecture(
            attention,
            depth,
            width,
            num_heads,
            patch_size,
            in_channels,
            num_classes,
            learn_sigma,
            qkv_bias,
            conv_size,
            kernel_function,
            (grid[0], grid[1]),
            timestep_freq_shift,
            mlp_norm_epsilon,
        )
        LiT.__init__(self, arch)

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """The output (B, C_out, h, w) for hidden_states (B, C, h, w), both others (B,).

        The label num_classes is the null class of guidance.
        """
        sample = LiT.forward(self, hidden_states, timestep, class_labels)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)
