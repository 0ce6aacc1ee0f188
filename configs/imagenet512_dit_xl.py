"""DiT-XL/2 at ImageNet 512 by plain diffusion training: the baseline, and how DiT-XL-2-512x512.pt was made.

    python -m lit_jax.main --config=configs/imagenet512_dit_xl.py --mode=prepare
    python -m lit_jax.main --config=configs/imagenet512_dit_xl.py
    python -m lit_jax.main --config=configs/imagenet512_dit_xl.py --mode=sample
    python -m lit_jax.main --config=configs/imagenet512_dit_xl.py --mode=evaluate

The published weights need no training; they are sampled and evaluated like ours:

    python -m lit_jax.main --config=configs/imagenet512_dit_xl.py --workdir=workdir/dit_xl_512_published --mode=sample \\
        --config.sample.checkpoint=DiT-XL-2-512x512.pt
    python -m lit_jax.main --config=configs/imagenet512_dit_xl.py --workdir=workdir/dit_xl_512_published --mode=evaluate

Expected of the published weights, 3M steps of batch 256 (LiT, table of ImageNet 512): FID 3.04, IS 240.8, precision 0.84,
recall 0.54 with guidance 1.5; 12.03, 105.25, 0.75, 0.64 with none (sample.cfg_scale=1.0). Training them anew is 2.4e21
FLOPs, 3.15 TFLOP an image: at 400 TFLOP/s a GPU ten weeks on one, nine days on eight. Not run here.
"""

from configs import imagenet512_lit_xl


def get_config():
    config = imagenet512_lit_xl.get_config()
    config.model.attention = "softmax"
    config.teacher.update(checkpoint="", size="")
    config.student.init = "random"
    config.train.update(batch_size=256, steps=3_000_000)
    return config
