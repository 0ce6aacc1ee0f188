"""An AutoencoderKL of a few thousand random parameters, as a checkpoint: latents of half the image's side."""
import jax
import jax.numpy as jnp

from lit_jax import checkpoint
from lit_jax.models.autoencoder import AutoencoderKL

FIELDS = dict(in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
              use_quant_conv=True, use_post_quant_conv=True, mid_block_add_attention=False)
FACTOR = 2


def write_autoencoder(path, seed=0, decoder_seed=None, scaling_factor=0.5, shift_factor=0.1):
    """Writes it to `path` and returns that; with another `decoder_seed` it is a decoder fine-tuned for the same latents."""
    module = AutoencoderKL(**FIELDS)

    def params(seed):
        return jax.jit(module.init)(jax.random.key(seed), jnp.zeros((1, 8, 8, 3)))["params"]

    tree = params(seed)
    if decoder_seed is not None:
        tree = {**params(decoder_seed), "encoder": tree["encoder"], "quant_conv": tree["quant_conv"]}
    checkpoint.save_params(path, tree, {"autoencoder": FIELDS | {"scaling_factor": scaling_factor, "shift_factor": shift_factor}})
    return path
