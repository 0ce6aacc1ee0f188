"""Sana's attention from DiT-XL/2: LiT's operator with heads of 32 columns, no convolution.

    python -m lit_jax.main --config=configs/workbench/sana.py
    python -m lit_jax.main --config=configs/workbench/sana.py --mode=sample
    python -m lit_jax.main --config=configs/workbench/sana.py --mode=evaluate

Aims at: nothing published; Sana (arXiv 2410.10629) was trained from scratch on text.

Data, teacher and time are those of configs/imagenet256_lit_xl.py. Not run here: there was no
ImageNet. docs/workbench.md has the design.
"""

from configs import imagenet256_lit_xl


def get_config():
    config = imagenet256_lit_xl.get_config()
    # 1152 / 32. The sum normaliser is the mean one but for its epsilon: the fused kernels run it.
    config.model.update(attention="linear", num_heads=36, conv_size=0)
    return config
