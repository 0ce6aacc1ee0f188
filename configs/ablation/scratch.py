"""Ablation, step 1 of 9: DiT-S/2 with plain ReLU linear attention in the place of softmax, from scratch.

    python -m lit_jax.main --config=configs/ablation/scratch.py --workdir=workdir/ablation/scratch
    python -m lit_jax.main --config=configs/ablation/scratch.py --workdir=workdir/ablation/scratch --mode=sample
    python -m lit_jax.main --config=configs/ablation/scratch.py --workdir=workdir/ablation/scratch --mode=evaluate

The path of the paper at ImageNet 256, S/2, 400,000 steps of batch 256, no guidance, FID-50K; each file is the one before
it and one change:

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

(LiT, ablation tables; the order of these numbers matters more than their last digit.) FID-50K is --mode=evaluate with
the same --config and --workdir. A run is 0.036 TFLOP an image, three hours on a GPU that sustains 400 TFLOP/s, and 19 hours
with the teacher of the last two. Images are decoded with sd-vae-ft-mse, as DiT's rows without guidance were. Not run here.
"""

from configs import imagenet256_dit_s


def get_config():
    config = imagenet256_dit_s.get_config()
    config.model.update(attention="linear", num_heads=6, conv_size=0)
    return config
