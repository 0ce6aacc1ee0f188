"""Ablation, step 3: two heads for six. FID 63.24, IS 22.07 (LiT, head ablation; see scratch.py).

python -m lit_jax.main --config=configs/ablation/few_heads.py --workdir=workdir/ablation/few_heads
python -m lit_jax.main --config=configs/ablation/few_heads.py --workdir=workdir/ablation/few_heads --mode=sample
python -m lit_jax.main --config=configs/ablation/few_heads.py --workdir=workdir/ablation/few_heads --mode=evaluate
"""

from configs.ablation import conv


def get_config():
    config = conv.get_config()
    config.model.num_heads = 2
    return config
