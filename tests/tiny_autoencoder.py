"""An AutoencoderKL of a few thousand random parameters: latents of half the image's side."""

import numpy as np
from flax.traverse_util import unflatten_dict

from lit_jax import checkpoint
from lit_jax.porting.autoencoder import entries

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
    """Writes the checkpoint to `path`, and returns that.

    With another `decoder_seed` it has a decoder fine-tuned for the same latents.
    """
    architecture = ARCHITECTURE | {"scaling_factor": 0.5, "shift_factor": 0.1}
    rngs = {
        True: np.random.default_rng(seed),
        False: np.random.default_rng(seed if decoder_seed is None else decoder_seed),
    }
    params = {}
    for entry in entries(architecture):
        name = entry.path
        shape = entry.shape
        rng = rngs[name.startswith(("encoder", "quant_conv"))]
        fan_in = int(np.prod(shape[:-1]))
        params[name] = (rng.standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32)
        if name.endswith("scale"):
            params[name] = 1 + 0.1 * params[name]
    checkpoint.save_params(path, unflatten_dict(params, sep="/"), {"autoencoder": architecture})
    return path
