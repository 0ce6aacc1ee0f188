"""The PyTorch module of a model, with the same weights: what the benchmark compares us with."""

import dataclasses
import importlib.util
from typing import Any

import numpy as np

from lit_jax.models.dit import DiTConfig
from lit_jax.porting import dit


def torch_peer(params: Any, config: Any) -> Any:
    """The module of `assets/lit_torch.py` that computes what a model with these parameters does.

    Args:
        params: the tree of `models.dit`.
        config: with grid.
    Returns: a torch module in float32; None where PyTorch is not installed, or where the
      file has no such model: another attention, layers of two kinds, captions.
    """
    is_offered = isinstance(config, DiTConfig) and not config.softmax_every
    if not is_offered or config.attention not in ("softmax", "linear"):
        return None
    if importlib.util.find_spec("torch") is None:
        return None
    # Imported here: nothing else of ours needs it.
    import torch

    from lit_jax.assets import lit_torch

    names = [field.name for field in dataclasses.fields(lit_torch.Architecture)]
    architecture = lit_torch.Architecture(**{name: getattr(config, name) for name in names})
    module = lit_torch.LiT(architecture)
    tensors = dit.official_tensors(params, config)
    # A copy: arrays of JAX are not to be written to.
    module.load_state_dict({new.key: torch.from_numpy(np.array(new.read())) for new in tensors})
    return module
