r"""DiT-XL/2 at ImageNet 512 by plain diffusion training: the baseline of LiT-XL/2 at that size.

DiT-XL-2-512x512.pt was made in this way.

    python -m lit_jax.main --config=configs/imagenet512_dit_xl.py --mode=prepare
    python -m lit_jax.main --config=configs/imagenet512_dit_xl.py
    python -m lit_jax.main --config=configs/imagenet512_dit_xl.py --mode=sample
    python -m lit_jax.main --config=configs/imagenet512_dit_xl.py --mode=evaluate

The published weights need no training. They are sampled and evaluated like ours:

    python -m lit_jax.main --config=configs/imagenet512_dit_xl.py --mode=sample \
        --workdir=workdir/dit_xl_512_published --config.sample.checkpoint=DiT-XL-2-512x512.pt
    python -m lit_jax.main --config=configs/imagenet512_dit_xl.py --mode=evaluate \
        --workdir=workdir/dit_xl_512_published

Hardware and time: a training image costs 3.15 TFLOP, so the run is 2.4e21 FLOPs. On GPUs that
sustain 400 TFLOP/s that is ten weeks on one, nine days on eight. Not run here.

Expected of the published weights, 3M steps of batch 256 (LiT, table of ImageNet 512): FID 3.04,
IS 240.8, precision 0.84, recall 0.54 with guidance 1.5; FID 12.03, IS 105.25, precision 0.75,
recall 0.64 without guidance (sample.cfg_scale=1.0).
"""

from configs import imagenet512_lit_xl


def get_config():
    config = imagenet512_lit_xl.get_config()
    config.model.attention = "softmax"
    config.teacher.update(checkpoint="", size="")
    config.student.init = "random"
    config.train.update(batch_size=256, steps=3_000_000)
    return config
