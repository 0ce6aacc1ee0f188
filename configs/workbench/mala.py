"""MALA (arXiv 2507.00698) from DiT-XL/2: linear attention that keeps a query's magnitude.

    python -m lit_jax.main --config=configs/workbench/mala.py
    python -m lit_jax.main --config=configs/workbench/mala.py --mode=sample
    python -m lit_jax.main --config=configs/workbench/mala.py --mode=evaluate

Aims at: no conversion was published; LiT's own recipe is taken.

Data, teacher and time are those of configs/imagenet256_lit_xl.py. Not run here: there was no
ImageNet. docs/workbench.md has the design.
"""

from configs import imagenet256_lit_xl


def get_config():
    config = imagenet256_lit_xl.get_config()
    config.model.update(attention="mala", conv_size=5)
    return config
