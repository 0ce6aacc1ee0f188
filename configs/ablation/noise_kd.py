r"""Ablation, step 8: adds distillation of the noise from the published DiT-XL/2, weight 0.5.

    python -m lit_jax.main --config=configs/ablation/noise_kd.py \
        --workdir=workdir/ablation/noise_kd
    python -m lit_jax.main --config=configs/ablation/noise_kd.py --mode=sample \
        --workdir=workdir/ablation/noise_kd
    python -m lit_jax.main --config=configs/ablation/noise_kd.py --mode=evaluate \
        --workdir=workdir/ablation/noise_kd

Expected: FID 51.13, IS 28.89 (LiT, distillation). A teacher of the student's own size hurts
instead: FID 55.11 with DiT-S/2 and weight 0.1 (the same table).

See configs/ablation/scratch.py for the whole path, with hardware and time.
"""

from configs.ablation import inherit_800k


def get_config():
    config = inherit_800k.get_config()
    config.teacher.update(checkpoint="DiT-XL-2-256x256.pt", size="XL")
    config.distill.update(noise_weight=0.5, variance_weight=0.0)
    return config
