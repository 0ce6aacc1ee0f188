"""DiT-S/2 at ImageNet 256 by plain diffusion training: a baseline, and the initialiser of LiT-S/2.

    python -m lit_jax.main --config=configs/imagenet256_dit_s.py
    python -m lit_jax.main --config=configs/imagenet256_dit_s.py --mode=sample
    python -m lit_jax.main --config=configs/imagenet256_dit_s.py --mode=evaluate

The same command with --config.train.steps=800000 goes on to what LiT-S/2 inherits from. Its
checkpoints at 200,000 to 800,000 steps are what configs/ablation/inherit_*.py start from.

Expected: FID 68.40 at 400,000 steps without guidance (DiT's figure in LiT's same-budget table), images decoded by
sd-vae-ft-mse, as DiT's rows at 400,000 steps were. 0.036 TFLOP an image are 3.7e18 FLOPs: under three hours on a GPU that
sustains 400 TFLOP/s. Not run here.
"""

from configs import imagenet256_dit_xl


def get_config():
    config = imagenet256_dit_xl.get_config()
    config.model.size = "S"
    config.autoencoder.checkpoint = "sd-vae-ft-mse"  # decodes; its encoder is that of sd-vae-ft-ema
    config.sample.cfg_scale = 1.0
    return config
