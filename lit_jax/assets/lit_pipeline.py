"""Draws images of classes from a LiT, in diffusers.

from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True)
images = pipeline(class_labels=[207, 360]).images

LiT: Wang et al., arXiv 2501.12976. Guidance and learned variance are DiT's, arXiv 2212.09748.
"""

# mypy: disable-error-code="attr-defined"
# diffusers sets the parts of a pipeline by name, and its lazy imports hide the classes.
import inspect
import itertools
from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor


class LiTPipeline(DiffusionPipeline):
    """Noise to images by a LiT, one of diffusers' schedulers and, for latents, a decoder.

    Args:
      transformer: a LiTTransformer2DModel. Its label num_classes is the null class.
      scheduler: any for predicted noise; another one may be put in its place.
      vae: decodes the latents; None: the model draws pixels.
      num_inference_steps, guidance_scale: where a call names none.
      guidance_channels: "3": the first three channels are guided, as in DiT; "all".
      guidance_interval: guided where low <= t <= high; None: everywhere.
      eta: noise of a DDIMScheduler.
      respaced: a DDPMScheduler visits DiT's timesteps: both ends, evenly spaced.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]

    def __init__(
        self,
        transformer,
        scheduler,
        vae: AutoencoderKL | None = None,
        num_inference_steps: int = 250,
        guidance_scale: float = 1.5,
        guidance_channels: str = "3",
        guidance_interval: list[float] | None = None,
        eta: float = 0.0,
        respaced: bool = True,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_channels=guidance_channels,
            guidance_interval=guidance_interval or [0.0, 1000.0],
            eta=eta,
            respaced=respaced,
        )

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int],
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draws an image of each class.

        Args:
          class_labels: numbers of classes, from 0.
          guidance_scale: 1: none. None: the model's own, as are the steps.
          generator: of the noise.
          latents: (B, C, h, w), the noise to start from, in place of the generator's.
          output_type: "pil"; "np", (B, h, w, C) in [0, 1]; "pt", (B, C, h, w) in [0, 1];
            "latent", what the model drew, before the decoder.

        Returns: `.images`; with `return_dict=False` a tuple of them.
        Raises: ValueError for a label that is no class, or latents without a decoder.
        """
        model = self.transformer.config
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        steps = num_inference_steps or self.config.num_inference_steps
        numbers = [class_labels] if isinstance(class_labels, int) else list(class_labels)
        if bad := [number for number in numbers if not 0 <= number < model.num_classes]:
            raise ValueError(
                f"class_labels: {bad} are none of the classes 0 to {model.num_classes - 1}"
            )
        if self.vae is None and model.in_channels not in (1, 3) and output_type != "latent":
            raise ValueError(
                f"the model draws latents of {model.in_channels} channels and the pipeline has no "
                "vae to decode them: pass one to from_pretrained, or output_type='latent'"
            )

        # ---- Noise and timesteps ---------------------------------------------
        device = self._execution_device
        B, C = len(numbers), model.in_channels
        shape = (B, C, *(side * model.patch_size for side in model.grid))
        x = latents
        if x is None:
            x = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        # float32 from first to last, whatever type the model works in.
        x = x.to(device, torch.float32) * self.scheduler.init_noise_sigma
        self._set_timesteps(steps, device)

        # ---- Steps -----------------------------------------------------------
        labels = torch.tensor(numbers, device=device)
        null = torch.full_like(labels, model.num_classes)
        low, high = self.config.guidance_interval
        learned = self.scheduler.config.get("variance_type") in ("learned", "learned_range")
        if learned and not isinstance(self.scheduler, DDPMScheduler):
            # Another scheduler that was made from DDPM's settings would take
            # three channels for the noise, whatever their number.
            self.scheduler.register_to_config(variance_type=None)
            learned = False
        for t in self.progress_bar(self.scheduler.timesteps):
            seen = self.scheduler.scale_model_input(x, t).to(self.transformer.dtype)
            if scale != 1.0 and low <= t <= high:
                cond, uncond = self._predict(
                    torch.cat([seen, seen]), t, torch.cat([labels, null])
                ).chunk(2)
                n = C if self.config.guidance_channels == "all" else min(3, C)
                mixed = uncond[:, :n] + scale * (cond - uncond)[:, :n]
                out = torch.cat([mixed, cond[:, n:]], dim=1)
            else:
                out = self._predict(seen, t, labels)
            out = out if learned else out[:, :C]
            x = self.scheduler.step(out, t, x, **self._step_arguments(generator)).prev_sample

        # ---- Pixels ----------------------------------------------------------
        images = x
        if output_type != "latent":
            if self.vae is not None:
                about = self.vae.config
                x = x / about.scaling_factor + (about.get("shift_factor") or 0.0)
                images = self.vae.decode(x.to(self.vae.dtype)).sample.float()
            images = (images / 2 + 0.5).clamp(0, 1)
        if output_type in ("np", "pil"):
            images = images.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _predict(self, x, t, labels):
        """The model's output in float32; t is one number."""
        out = self.transformer(x, timestep=t.expand(len(x)).to(x.device), class_labels=labels)
        return out.sample.float()

    def _set_timesteps(self, steps, device):
        if self.config.respaced and isinstance(self.scheduler, DDPMScheduler):
            last = self.scheduler.config.num_train_timesteps - 1
            # Accumulated, not multiplied: halves round as in DiT's code.
            strides = itertools.accumulate([0.0] + [last / (steps - 1)] * (steps - 1))
            timesteps = [round(position) for position in strides][::-1]
            self.scheduler.set_timesteps(timesteps=timesteps, device=device)
        else:
            self.scheduler.set_timesteps(steps, device=device)

    def _step_arguments(self, generator):
        """What this scheduler's step takes of all that there is."""
        offered = {
            "generator": generator,
            "eta": self.config.eta,
            # The noise that belongs to a clipped image; without clipping the same.
            "use_clipped_model_output": True,
        }
        takes = inspect.signature(self.scheduler.step).parameters
        return {name: value for name, value in offered.items() if name in takes}
