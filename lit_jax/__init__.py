"""LiT: a pretrained diffusion transformer becomes one with linear attention (arXiv 2501.12976).

    model, params, config = lit_jax.load("workdir/quickstart")
    settings = lit_jax.SamplerSettings("dpm++", steps=20, cfg_scale=3.0, clip_denoised=True)
    sampler = lit_jax.Sampler(model, settings, batch_size=10)
    images = sampler(params, range(10), {"label": range(10)})    # (10, h, w, C), about [-1, 1]

Shapes are written with one letter a dimension, everywhere in this package:

    B  batch                  N  heads                   h, w  token grid, or height and width
    T  tokens, h * w          H  head width, D / N       p     patch size
    D  width of the model     F  features, MLP width     K     convolution size
    C  channels               S  steps of a process or a sampler

`t` is always the timestep, (B,).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_jax.diffusion import GaussianDiffusion, RectifiedFlow
    from lit_jax.models.dit import DiT, DiTConfig
    from lit_jax.porting.load import load
    from lit_jax.samplers import SamplerSettings
    from lit_jax.sampling import Sampler

__all__ = [
    "DiT",
    "DiTConfig",
    "GaussianDiffusion",
    "RectifiedFlow",
    "Sampler",
    "SamplerSettings",
    "load",
]

_HOMES = {
    "DiT": "lit_jax.models.dit",
    "DiTConfig": "lit_jax.models.dit",
    "GaussianDiffusion": "lit_jax.diffusion",
    "RectifiedFlow": "lit_jax.diffusion",
    "Sampler": "lit_jax.sampling",
    "SamplerSettings": "lit_jax.samplers",
    "load": "lit_jax.porting.load",
}


def __getattr__(name: str) -> Any:
    # On first use: JAX takes seconds to load, and the command line fails sooner without it.
    if name not in _HOMES:
        raise AttributeError(f"module lit_jax has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
