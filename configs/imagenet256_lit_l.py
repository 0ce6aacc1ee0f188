"""LiT-L/2 at ImageNet 256: it starts from our own DiT-L/2, the published DiT-XL/2 teaches it.

    python -m lit_jax.main --config=configs/imagenet256_dit_l.py --config.train.steps=800000
    python -m lit_jax.main --config=configs/imagenet256_lit_l.py
    python -m lit_jax.main --config=configs/imagenet256_lit_l.py --mode=sample
    python -m lit_jax.main --config=configs/imagenet256_lit_l.py --mode=evaluate

Hardware and time: a training image costs 0.72 TFLOP, teacher included, so 400,000 steps are
7.4e19 FLOPs. That is two days on a GPU that sustains 400 TFLOP/s. Not run here.

Expected (LiT, same-budget table, no guidance): after 100,000 steps a FID below 23.33, which is
that of DiT-L/2 after 400,000 steps. The table's own values, at 100,000 and at 400,000
steps, were not at hand.
"""

from configs import imagenet256_lit_xl


def get_config():
    config = imagenet256_lit_xl.get_config()
    config.model.size = "L"
    config.student.init = "workdir/imagenet256_dit_l"  # its newest checkpoint's EMA weights
    config.train.steps = 400_000
    config.autoencoder.checkpoint = "sd-vae-ft-mse"  # as its DiT: the table's rows without guidance
    config.sample.cfg_scale = 1.0
    return config
