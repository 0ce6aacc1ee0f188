"""DiT-XL/2 at ImageNet 256 by plain diffusion training: the baseline, and how DiT-XL-2-256x256.pt was made.

    python -m lit_jax.main --config=configs/imagenet256_dit_xl.py
    python -m lit_jax.main --config=configs/imagenet256_dit_xl.py --mode=sample --config.sample.cfg_scale=1.0
    python -m lit_jax.main --config=configs/imagenet256_dit_xl.py --mode=evaluate

The published weights need no training; they are sampled and evaluated like ours:

    python -m lit_jax.main --config=configs/imagenet256_dit_xl.py --mode=sample --workdir=workdir/dit_xl_published \
        --config.sample.checkpoint=DiT-XL-2-256x256.pt
    python -m lit_jax.main --config=configs/imagenet256_dit_xl.py --mode=evaluate --workdir=workdir/dit_xl_published

Expected: 400,000 steps, no guidance, FID 19.47 (DiT's figure in LiT's same-budget table, decoded by sd-vae-ft-mse); the
published weights, 7M steps, FID 2.27, IS 278.2, precision 0.83, recall 0.57 with guidance 1.5 and 9.62 with none. 400,000
steps of 0.71 TFLOP an image are 7.3e19 FLOPs: two days on a GPU that sustains 400 TFLOP/s. Not run here.
"""

from configs import imagenet256_lit_xl


def get_config():
    config = imagenet256_lit_xl.get_config()
    config.model.attention = "softmax"
    config.teacher.update(checkpoint="", size="")
    config.student.init = "random"
    config.train.steps = 400_000
    return config
