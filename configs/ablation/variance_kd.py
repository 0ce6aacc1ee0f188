"""Ablation, step 9, the whole of LiT: + the teacher's variance, weight 0.05. FID 50.79, IS 29.17 (LiT, distillation; see
scratch.py).

    python -m lit_jax.main --config=configs/ablation/variance_kd.py --workdir=workdir/ablation/variance_kd
    python -m lit_jax.main --config=configs/ablation/variance_kd.py --workdir=workdir/ablation/variance_kd --mode=sample
    python -m lit_jax.main --config=configs/ablation/variance_kd.py --workdir=workdir/ablation/variance_kd --mode=evaluate

The variance alone (--config.distill.noise_weight=0.0) gives FID 53.49.
"""

from configs.ablation import noise_kd


def get_config():
    config = noise_kd.get_config()
    config.distill.variance_weight = 0.05
    return config
