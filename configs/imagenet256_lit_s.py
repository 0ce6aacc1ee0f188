"""LiT-S/2 at ImageNet 256: it starts from our own DiT-S/2, the published DiT-XL/2 teaches it.

    python -m lit_jax.main --config=configs/imagenet256_dit_s.py --config.train.steps=800000
    python -m lit_jax.main --config=configs/imagenet256_lit_s.py
    python -m lit_jax.main --config=configs/imagenet256_lit_s.py --mode=sample
    python -m lit_jax.main --config=configs/imagenet256_lit_s.py --mode=evaluate

Hardware and time: a training image costs 0.27 TFLOP, teacher included, so 400,000 steps are
2.8e19 FLOPs. That is 19 hours on a GPU that sustains 400 TFLOP/s. Not run here.

Expected (LiT, same-budget table, no guidance): after 100,000 steps a FID below 68.40, which is
that of DiT-S/2 after 400,000 steps. The table's own value was not at hand. After 400,000
steps: FID 50.79, IS 29.17, the last row of LiT's ablation, which is this recipe.
"""

from configs import imagenet256_lit_xl


def get_config():
    config = imagenet256_lit_xl.get_config()
    config.model.size = "S"
    config.student.init = "workdir/imagenet256_dit_s"  # its newest checkpoint's EMA weights
    config.train.steps = 400_000
    config.autoencoder.checkpoint = "sd-vae-ft-mse"  # as its DiT: the table's rows without guidance
    config.sample.cfg_scale = 1.0
    return config
