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
      id2label: names of the labels, as in DiT's pipelines.
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
        id2label: dict[str, str] | None = None,
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
            id2label=id2label or {},
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
        own = self.config
        model = self.transformer.config
        scale = guidance_scale
        if scale is None:
            scale = own.guidance_scale
        steps = num_inference_steps or own.num_inference_steps
        numbers = class_labels
        if isinstance(numbers, int):
            numbers = [numbers]
        self._check(numbers, output_type)

        # ---- Noise and timesteps ---------------------------------------------
        device = self._execution_device
        B = len(numbers)
        C = model.in_channels
        h, w = (side * model.patch_size for side in model.grid)
        x = latents
        if x is None:
            x = randn_tensor(
                (B, C, h, w),
                generator=generator,
                device=device,
                dtype=torch.float32,
            )
        # float32 from first to last, whatever type the model works in.
        x = x.to(device, torch.float32)
        x = x * self.scheduler.init_noise_sigma
        self._set_timesteps(steps, device)

        # ---- Steps -----------------------------------------------------------
        labels = torch.tensor(list(numbers), device=device)
        null = torch.full_like(labels, model.num_classes)
        low, high = own.guidance_interval
        keeps_variance = self._keeps_variance()
        told = self._step_arguments(generator)
        for t in self.progress_bar(self.scheduler.timesteps):
            seen = self.scheduler.scale_model_input(x, t)
            if scale != 1.0 and low <= t <= high:
                both = torch.cat([labels, null])
                out = self._predict(torch.cat([seen, seen]), t, both)
                cond, uncond = out.chunk(2)
                n = C if own.guidance_channels == "all" else min(3, C)
                mixed = uncond[:, :n] + scale * (cond - uncond)[:, :n]
                out = torch.cat([mixed, cond[:, n:]], dim=1)
            else:
                out = self._predict(seen, t, labels)
            if not keeps_variance:
                out = out[:, :C]
            x = self.scheduler.step(out, t, x, **told).prev_sample

        # ---- Pixels ----------------------------------------------------------
        images = x
        if output_type != "latent":
            if self.vae is not None:
                images = self._decode(x)
            images = (images / 2 + 0.5).clamp(0, 1)
        if output_type in ("np", "pil"):
            images = images.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images,)
        return ImagePipelineOutput(images=images)

    def _check(self, numbers, output_type):
        model = self.transformer.config
        count = model.num_classes
        bad = [n for n in numbers if not 0 <= n < count]
        if bad:
            raise ValueError(f"class_labels: {bad} are none of the classes 0 to {count - 1}")
        C = model.in_channels
        has_pixels = self.vae is not None or C in (1, 3)
        if not has_pixels and output_type != "latent":
            raise ValueError(
                f"the model draws latents of {C} channels and the "
                "pipeline has no vae to decode them: pass one to "
                "from_pretrained, or output_type='latent'"
            )

    def _keeps_variance(self):
        """Whether the scheduler takes the predicted variance too."""
        asked = self.scheduler.config.get("variance_type")
        if asked not in ("learned", "learned_range"):
            return False
        if isinstance(self.scheduler, DDPMScheduler):
            return True
        # Another scheduler that was made from DDPM's settings would take
        # three channels for the noise, whatever their number.
        self.scheduler.register_to_config(variance_type=None)
        return False

    def _decode(self, x):
        about = self.vae.config
        shift = about.get("shift_factor") or 0.0
        x = x / about.scaling_factor + shift
        return self.vae.decode(x.to(self.vae.dtype)).sample.float()

    def _predict(self, x, t, labels):
        """The model's output in float32; t is one number."""
        x = x.to(self.transformer.dtype)
        t = t.expand(len(x)).to(x.device)
        out = self.transformer(x, timestep=t, class_labels=labels)
        return out.sample.float()

    def _set_timesteps(self, steps, device):
        scheduler = self.scheduler
        if not self.config.respaced or not isinstance(scheduler, DDPMScheduler):
            scheduler.set_timesteps(steps, device=device)
            return
        last = scheduler.config.num_train_timesteps - 1
        # Accumulated, not multiplied: halves round as in DiT's code.
        strides = [0.0] + [last / (steps - 1)] * (steps - 1)
        positions = itertools.accumulate(strides)
        timesteps = [round(position) for position in positions]
        scheduler.set_timesteps(timesteps=timesteps[::-1], device=device)

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
