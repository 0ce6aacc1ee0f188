"""LiT-XL/2 of which every fourth layer keeps the softmax attention of DiT-XL/2.

    python -m lit_jax.main --config=configs/workbench/hybrid.py
    python -m lit_jax.main --config=configs/workbench/hybrid.py --mode=sample
    python -m lit_jax.main --config=configs/workbench/hybrid.py --mode=evaluate

Aims at: nothing published for this teacher; the ratio is that of Sana-Video 2.

Data, teacher and time are those of configs/imagenet256_lit_xl.py. Not run here: there was no
ImageNet. docs/workbench.md has the pattern.
"""

from configs import imagenet256_lit_xl


def get_config():
    config = imagenet256_lit_xl.get_config()
    config.model.update(softmax_every=4, softmax_heads=16)
    return config
