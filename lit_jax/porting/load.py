"""A checkpoint as a model that can be called: the Python API's first line."""

from typing import Any

import jax.numpy as jnp

from lit_jax.models import model_of
from lit_jax.porting.pixart import NoNullCaptionError
from lit_jax.porting.read import load_params, read_checkpoint


def load(path: Any, *, weights: str = "ema") -> tuple[Any, Any, Any]:
    """Loads a checkpoint of any layout: torch file, diffusers or Orbax folder, workdir.

    Args:
      path: what `read_checkpoint` takes.
      weights: "ema" or "model", where a training checkpoint has both.
    Returns: the model in float32, its parameters on the default device, and its architecture.
    Raises: what `read_checkpoint` raises; ValueError where nothing tells the number of heads, or
      the null caption.
    """
    try:
        checkpoint = read_checkpoint(path, weights=weights)
    except NoNullCaptionError as error:
        raise ValueError(
            f'{path} has no null caption, the text encoder\'s features of ""; port it with '
            f"--config.port.null_caption=FOLDER_OF_THE_TEXT_ENCODER first"
        ) from error
    config = checkpoint.config
    if not config.num_heads:
        raise ValueError(
            f"{path} does not say how many heads its width of {config.width} has; port it with "
            f"--config.port.num_heads=N first"
        )
    model = model_of(config)(config, dtype=jnp.float32)
    return model, load_params(checkpoint.params), config
