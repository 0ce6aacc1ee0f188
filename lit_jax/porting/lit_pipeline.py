"""A LiT of classes as a folder that diffusers runs, with the code that it does not have.

FOLDER/model_index.json     names the parts, and what a call leaves open
FOLDER/lit_pipeline.py      the pipeline, run with trust_remote_code=True
FOLDER/transformer/         weights, config.json, lit_transformer.py and lit_torch.py
FOLDER/scheduler/           the settings of one of diffusers' schedulers
FOLDER/vae/                 a copy of the autoencoder's folder, if it has one
FOLDER/README.md            the model card
"""

import dataclasses
import json
import pathlib
from typing import Any

from etils import epath

from lit_jax.models.dit import DiTConfig
from lit_jax.porting import dit
from lit_jax.porting.torch_checkpoint import DIFFUSERS_FILES, PortingError, component
from lit_jax.porting.torch_file import write_safetensors
from lit_jax.porting.write import whole_folder, write_json
from lit_jax.samplers import SAMPLERS, SamplerSettings

ASSETS = pathlib.Path(__file__).parents[1] / "assets"
# The release that the tests have loaded such folders with.
DIFFUSERS_VERSION = "0.42.1"
WEIGHTS = DIFFUSERS_FILES[0]
# Spacings that diffusers' schedulers visit as our samplers do.
SPACINGS = {
    "ddpm": ("respaced", "linspace", "leading"),
    "ddim": ("leading", "trailing"),
    "dpm++": ("linspace", "leading", "trailing"),
}


@dataclasses.dataclass(frozen=True)
class PipelineSettings:
    """What a folder holds besides the model.

    Attributes:
      sampler: what a call draws with that names nothing else; its variance is named.
      num_steps: of the process that the model was trained on.
      card: the text of README.md.
      autoencoder: the folder of diffusers that is copied; None: there is none.
      scaling_factor: of the latents, in place of that folder's; 0: as it says.
      class_names: of the labels; (): they are not known.
    """

    sampler: SamplerSettings
    num_steps: int
    card: str
    autoencoder: epath.PathLike | None = None
    scaling_factor: float = 0.0
    class_names: tuple[str, ...] = ()


def export_lit(
    params: Any, path: epath.PathLike, config: DiTConfig, settings: PipelineSettings
) -> None:
    """Writes the folder, as a whole or not at all.

    Args: params: the tree of the model, arrays or leaves.
    Raises: PortingError for an architecture that is not known whole; ValueError, whose text
      starts with the setting's name, for a sampler that no scheduler of diffusers is.
    """
    fields = dit.lit_config(config)
    tensors = dit.official_tensors(params, config)
    kind, scheduler = scheduler_config(settings.sampler, settings.num_steps)
    index = {
        "_class_name": ["lit_pipeline", "LiTPipeline"],
        "_diffusers_version": DIFFUSERS_VERSION,
        "transformer": ["lit_transformer", "LiTTransformer2DModel"],
        "scheduler": ["diffusers", kind],
        "vae": ["diffusers", "AutoencoderKL"] if settings.autoencoder else [None, None],
        **_of_calls(settings.sampler),
        "id2label": {str(label): name for label, name in enumerate(settings.class_names)},
    }

    with whole_folder(path) as folder:
        model = folder / "transformer"
        model.mkdir()
        write_json(model / "config.json", fields)
        # Our own reader learns the architecture from here.
        metadata = {"format": "pt", "architecture": json.dumps(config.to_json())}
        write_safetensors(model / WEIGHTS, tensors, metadata)
        for name in ("lit_transformer.py", "lit_torch.py"):
            (model / name).write_text((ASSETS / name).read_text())
        (folder / "scheduler").mkdir()
        write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
        if settings.autoencoder:
            _copy_autoencoder(settings.autoencoder, folder / "vae", settings.scaling_factor)
        (folder / "lit_pipeline.py").write_text((ASSETS / "lit_pipeline.py").read_text())
        (folder / "README.md").write_text(settings.card)
        write_json(folder / "model_index.json", index)


def scheduler_config(settings: SamplerSettings, num_steps: int) -> tuple[str, dict[str, Any]]:
    """The class of diffusers that draws as a sampler does, and its scheduler_config.json.

    Args:
      settings: with the variance named for ddpm.
      num_steps: of the process, S.
    Raises: ValueError whose text starts with the setting's name, for a sampler or timesteps that
      diffusers does not have.
    """
    name = settings.sampler
    if name not in SPACINGS:
        raise ValueError(f"sampler = {name} is none of diffusers': {', '.join(SPACINGS)}")
    spacing = settings.spacing or SAMPLERS[name].spacing
    uneven = spacing == "trailing" and num_steps % settings.steps
    if spacing not in SPACINGS[name] or (name == "ddim" and uneven):
        offered = " or ".join(SPACINGS[name])
        raise ValueError(
            f"spacing = {spacing} with {name} and {settings.steps} steps is what no scheduler of "
            f"diffusers draws; it offers {offered} (trailing with ddim: steps that divide "
            f"{num_steps})"
        )
    common = {
        "num_train_timesteps": num_steps,
        "beta_start": 0.1 / num_steps,
        "beta_end": 20.0 / num_steps,
        "beta_schedule": "linear",
        "prediction_type": "epsilon",
        "_diffusers_version": DIFFUSERS_VERSION,
    }
    if name == "ddpm":
        own: dict[str, Any] = {
            "variance_type": settings.variance,
            "clip_sample": settings.clip_denoised,
        }
        if spacing != "respaced":  # those the pipeline names
            own["timestep_spacing"] = spacing
        kind = "DDPMScheduler"
    elif name == "ddim":
        own = {"clip_sample": settings.clip_denoised, "timestep_spacing": spacing}
        kind = "DDIMScheduler"
    else:
        own = {"solver_order": settings.order, "timestep_spacing": spacing}
        if settings.clip_denoised:
            # Its dynamic threshold with a bound of 1 is a clip.
            own |= {"thresholding": True, "sample_max_value": 1.0}
        kind = "DPMSolverMultistepScheduler"
    return kind, {"_class_name": kind, **common, **own}


def autoencoder_folder(path: epath.PathLike) -> epath.Path | None:
    """The folder of diffusers with an autoencoder's weights in one file; None: it is none.

    Args: path: that folder, or the pipeline's above it; it was read before.
    """
    folder = component(path, "vae")
    is_whole = any((folder / name).exists() for name in DIFFUSERS_FILES)
    return folder if (folder / "config.json").is_file() and is_whole else None


def _of_calls(settings):
    spacing = settings.spacing or SAMPLERS[settings.sampler].spacing
    return {
        "num_inference_steps": settings.steps,
        "guidance_scale": settings.cfg_scale,
        "guidance_channels": settings.cfg_channels,
        "guidance_interval": list(settings.cfg_interval),
        "eta": settings.eta,
        "respaced": spacing == "respaced",
    }


def _copy_autoencoder(source, target, scaling_factor):
    folder = autoencoder_folder(source)
    if folder is None:
        raise PortingError(f"{source}: no folder of diffusers with an autoencoder")
    target.mkdir()
    config = json.loads((folder / "config.json").read_text())
    if scaling_factor:
        config["scaling_factor"] = scaling_factor
    write_json(target / "config.json", config)
    name = next(name for name in DIFFUSERS_FILES if (folder / name).exists())
    (folder / name).copy(target / name)
