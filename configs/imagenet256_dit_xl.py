r"""DiT-XL/2 at ImageNet 256 by plain diffusion training: the baseline of LiT-XL/2.

DiT-XL-2-256x256.pt was made in this way.

    python -m lit_jax.main --config=configs/imagenet256_dit_xl.py
    python -m lit_jax.main --config=configs/imagenet256_dit_xl.py --mode=sample \
        --config.sample.cfg_scale=1.0
    python -m lit_jax.main --config=configs/imagenet256_dit_xl.py --mode=evaluate

The published weights need no training. They are sampled and evaluated like ours:

    python -m lit_jax.main --config=configs/imagenet256_dit_xl.py --mode=sample \
        --workdir=workdir/dit_xl_published --config.sample.checkpoint=DiT-XL-2-256x256.pt
    python -m lit_jax.main --config=configs/imagenet256_dit_xl.py --mode=evaluate \
        --workdir=workdir/dit_xl_published

Hardware and time: a training image costs 0.71 TFLOP, so 400,000 steps are 7.3e19 FLOPs. That is
two days on a GPU that sustains 400 TFLOP/s. Not run here.

Expected after 400,000 steps, without guidance: FID 19.47. LiT's same-budget table gives it as
DiT's figure, and sd-vae-ft-mse decoded its images.

Expected of the published weights (7M steps): FID 2.27, IS 278.2, precision 0.83, recall 0.57 with
guidance 1.5; FID 9.62 without guidance.
"""

from configs import imagenet256_lit_xl


def get_config():
    config = imagenet256_lit_xl.get_config()
    config.model.attention = "softmax"
    config.teacher.update(checkpoint="", size="")
    config.student.init = "random"
    config.train.steps = 400_000
    return config
