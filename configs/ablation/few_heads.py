r"""Ablation, step 3: two heads in the place of six.

    python -m lit_jax.main --config=configs/ablation/few_heads.py \
        --workdir=workdir/ablation/few_heads
    python -m lit_jax.main --config=configs/ablation/few_heads.py --mode=sample \
        --workdir=workdir/ablation/few_heads
    python -m lit_jax.main --config=configs/ablation/few_heads.py --mode=evaluate \
        --workdir=workdir/ablation/few_heads

Expected: FID 63.24, IS 22.07 (LiT, head ablation).
See configs/ablation/scratch.py for the whole path, with hardware and time.
"""

from configs.ablation import conv


def get_config():
    config = conv.get_config()
    config.model.num_heads = 2
    return config
