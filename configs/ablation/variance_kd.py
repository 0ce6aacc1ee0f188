r"""Ablation, step 9, the whole of LiT: adds distillation of the variance, weight 0.05.

    python -m lit_jax.main --config=configs/ablation/variance_kd.py \
        --workdir=workdir/ablation/variance_kd
    python -m lit_jax.main --config=configs/ablation/variance_kd.py --mode=sample \
        --workdir=workdir/ablation/variance_kd
    python -m lit_jax.main --config=configs/ablation/variance_kd.py --mode=evaluate \
        --workdir=workdir/ablation/variance_kd

Expected: FID 50.79, IS 29.17 (LiT, distillation). The variance without the noise
(--config.distill.noise_weight=0.0) gives FID 53.49.

See configs/ablation/scratch.py for the whole path, with hardware and time.
"""

from configs.ablation import noise_kd


def get_config():
    config = noise_kd.get_config()
    config.distill.variance_weight = 0.05
    return config
