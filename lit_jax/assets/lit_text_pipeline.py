"""Draws images of prompts from a LiT, in diffusers.

from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True)
images = pipeline("a red cat on a blue chair").images

LiT: Wang et al., arXiv 2501.12976. The rest is PixArt-Sigma's pipeline, arXiv 2403.04692.
"""

# mypy: disable-error-code="attr-defined, misc"
# diffusers sets the parts of a pipeline by name, and its lazy imports hide the classes.
from typing import Any

import torch
from diffusers import ImagePipelineOutput, PixArtSigmaPipeline
from diffusers.image_processor import PixArtImageProcessor


class LiTTextPipeline(PixArtSigmaPipeline):
    """PixArtSigmaPipeline with the settings that a LiT was made for, and for models of pixels.

    Args:
      tokenizer, text_encoder: a T5's; None: calls give `prompt_embeds` and their mask.
      vae: decodes the latents; None: the model draws pixels.
      transformer: a LiTTextTransformer2DModel.
      scheduler: any for predicted noise; another one may be put in its place.
      num_inference_steps, guidance_scale, eta: where a call names none.
      cleaning: of prompts, as in training: "none" keeps them as they are, "lower" is lower case,
        "clean" what diffusers does with captions from the web.
      max_sequence_length: tokens of a prompt; what is longer is cut.
    """

    _optional_components = ["tokenizer", "text_encoder", "vae"]

    def __init__(
        self,
        tokenizer,
        text_encoder,
        vae,
        transformer,
        scheduler,
        num_inference_steps: int = 20,
        guidance_scale: float = 4.5,
        eta: float = 0.0,
        cleaning: str = "none",
        max_sequence_length: int = 300,
    ):
        super().__init__(tokenizer, text_encoder, vae, transformer, scheduler)
        self.register_to_config(
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            eta=eta,
            cleaning=cleaning,
            max_sequence_length=max_sequence_length,
        )
        if vae is None and self._draws_pixels():
            self.vae_scale_factor = 1
            self.image_processor = PixArtImageProcessor(vae_scale_factor=1)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        **others: Any,
    ) -> ImagePipelineOutput | tuple:
        """Draws an image of each prompt.

        Args:
          num_inference_steps, guidance_scale: None: the model's own.
          output_type: "pil", "np", "pt", or "latent", what the model drew.
          others: those of PixArtSigmaPipeline, such as height, width, latents and generator. A
            height and width are taken as they are, where use_resolution_binning is not asked for.

        Returns: `.images`; with `return_dict=False` a tuple of them.
        Raises: ValueError for latents without a decoder.
        """
        own = self.config
        scale = own.guidance_scale if guidance_scale is None else guidance_scale
        if self.vae is None and output_type != "latent" and not self._draws_pixels():
            raise ValueError(
                f"the model draws latents of {self.transformer.config.in_channels} channels and "
                "the pipeline has no vae to decode them: pass one to from_pretrained, or "
                "output_type='latent'"
            )
        defaults = dict(
            eta=own.eta,
            max_sequence_length=own.max_sequence_length,
            use_resolution_binning=False,
        )
        found = super().__call__(
            prompt,
            num_inference_steps=num_inference_steps or own.num_inference_steps,
            guidance_scale=scale,
            output_type=output_type if self.vae is not None else "latent",
            **(defaults | others),
        )
        images = found.images
        if self.vae is None and output_type != "latent":
            images = self.image_processor.postprocess(images, output_type=output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _draws_pixels(self):
        return self.transformer.config.in_channels in (1, 3)

    def _text_preprocessing(self, text, clean_caption=False):
        """Prompts as the captions in training: `cleaning` decides, not the call."""
        if self.config.cleaning == "none":
            return list(text) if isinstance(text, tuple | list) else [text]
        return super()._text_preprocessing(text, clean_caption=self.config.cleaning == "clean")
