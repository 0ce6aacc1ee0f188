r"""Ablation, step 1 of 9: DiT-S/2 from scratch, with linear attention in the place of softmax.

    python -m lit_jax.main --config=configs/ablation/scratch.py \
        --workdir=workdir/ablation/scratch
    python -m lit_jax.main --config=configs/ablation/scratch.py --mode=sample \
        --workdir=workdir/ablation/scratch
    python -m lit_jax.main --config=configs/ablation/scratch.py --mode=evaluate \
        --workdir=workdir/ablation/scratch

The nine steps are the path of the paper at ImageNet 256: S/2, 400,000 steps of batch 256, no
guidance. Each file changes one thing in the file before it. FID-50K is what --mode=evaluate
reports, with the same --config and --workdir:

    softmax (configs/imagenet256_dit_s.py)     68.40
    scratch        linear attention, six heads 88.46
    conv           + 5 x 5 convolution of v    63.66
    few_heads      two heads                   63.24
    inherit_200k   + inherit from DiT-S/2      57.84
    inherit_400k                               56.07
    inherit_600k                               54.80
    inherit_800k                               53.83
    noise_kd       + noise distillation        51.13
    variance_kd    + variance distillation     50.79

The numbers are those of LiT's ablation tables. Their order matters more than their last digit.
sd-vae-ft-mse decodes the images, as it did for DiT's rows without guidance.

Hardware and time: a training image costs 0.036 TFLOP. A run takes three hours on a GPU that
sustains 400 TFLOP/s, and 19 hours with the teacher of the last two steps. Not run here.
"""

from configs import imagenet256_dit_s


def get_config():
    config = imagenet256_dit_s.get_config()
    config.model.update(attention="linear", num_heads=6, conv_size=0)
    return config
