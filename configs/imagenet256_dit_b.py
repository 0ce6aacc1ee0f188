"""DiT-B/2 at ImageNet 256 by plain diffusion training: a baseline, and the start of LiT-B/2.

    python -m lit_jax.main --config=configs/imagenet256_dit_b.py
    python -m lit_jax.main --config=configs/imagenet256_dit_b.py --mode=sample
    python -m lit_jax.main --config=configs/imagenet256_dit_b.py --mode=evaluate

The first command with --config.train.steps=800000 goes on to the checkpoint that LiT-B/2
inherits from.

Hardware and time: a training image costs 0.14 TFLOP, so 400,000 steps are 1.4e19 FLOPs. That is
ten hours on a GPU that sustains 400 TFLOP/s. Not run here.

Expected: FID 43.47 at 400,000 steps without guidance. LiT's same-budget table gives it as DiT's
figure. sd-vae-ft-mse decodes the images, as it did for DiT's rows at 400,000 steps.
"""

from configs import imagenet256_dit_xl


def get_config():
    config = imagenet256_dit_xl.get_config()
    config.model.size = "B"
    config.autoencoder.checkpoint = "sd-vae-ft-mse"  # decodes; its encoder is that of sd-vae-ft-ema
    config.sample.cfg_scale = 1.0
    return config
