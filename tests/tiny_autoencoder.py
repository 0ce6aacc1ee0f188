"""An AutoencoderKL of a few thousand random parameters, as a checkpoint; it halves the side."""

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lit_jax import checkpoint
from lit_jax.models.autoencoder import AutoencoderKL

ARCHITECTURE = dict(
    in_channels=3,
    out_channels=3,
    latent_channels=4,
    block_out_channels=(8, 8),
    layers_per_block=1,
    norm_num_groups=4,
    use_quant_conv=True,
    use_post_quant_conv=True,
    mid_block_add_attention=False,
)
FACTOR = 2


def write_autoencoder(path, seed=0, decoder_seed=None):
    """Writes it to `path` and returns that.

    With another `decoder_seed` it is a decoder that was fine-tuned for the same latents.
    """
    encoder_rng = np.random.default_rng(seed)
    decoder_rng = np.random.default_rng(seed if decoder_seed is None else decoder_seed)
    images = np.zeros((1, 8, 8, 3), np.float32)
    shapes = jax.eval_shape(AutoencoderKL(**ARCHITECTURE).init, jax.random.key(0), images)
    params = {}
    for name, leaf in flatten_dict(shapes["params"], sep="/").items():
        rng = encoder_rng if name.startswith(("encoder", "quant_conv")) else decoder_rng
        fan_in = int(np.prod(leaf.shape[:-1]))
        params[name] = (rng.standard_normal(leaf.shape) / np.sqrt(fan_in)).astype(np.float32)
        if name.endswith("scale"):
            params[name] = 1 + 0.1 * params[name]
    architecture = ARCHITECTURE | {"scaling_factor": 0.5, "shift_factor": 0.1}
    checkpoint.save_params(path, unflatten_dict(params, sep="/"), {"autoencoder": architecture})
    return path
