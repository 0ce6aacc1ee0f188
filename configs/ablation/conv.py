r"""Ablation, step 2: adds the 5 x 5 depth-wise convolution of the values.

    python -m lit_jax.main --config=configs/ablation/conv.py \
        --workdir=workdir/ablation/conv
    python -m lit_jax.main --config=configs/ablation/conv.py --mode=sample \
        --workdir=workdir/ablation/conv
    python -m lit_jax.main --config=configs/ablation/conv.py --mode=evaluate \
        --workdir=workdir/ablation/conv

Expected: FID 63.66, IS 22.16 (LiT, ablation).
See configs/ablation/scratch.py for the whole path, with hardware and time.
"""

from configs.ablation import scratch


def get_config():
    config = scratch.get_config()
    config.model.conv_size = 5
    return config
