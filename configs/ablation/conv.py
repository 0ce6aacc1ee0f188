"""Ablation, step 2: + the 5 x 5 depth-wise convolution of the values. FID 63.66, IS 22.16 (LiT, ablation; see scratch.py).

python -m lit_jax.main --config=configs/ablation/conv.py --workdir=workdir/ablation/conv
python -m lit_jax.main --config=configs/ablation/conv.py --workdir=workdir/ablation/conv --mode=sample
python -m lit_jax.main --config=configs/ablation/conv.py --workdir=workdir/ablation/conv --mode=evaluate
"""

from configs.ablation import scratch


def get_config():
    config = scratch.get_config()
    config.model.conv_size = 5
    return config
