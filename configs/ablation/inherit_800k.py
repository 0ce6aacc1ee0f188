r"""Ablation, step 7: everything but attention comes from a DiT-S/2 after 800,000 steps.

    python -m lit_jax.main --config=configs/imagenet256_dit_s.py --config.train.steps=800000
    python -m lit_jax.main --config=configs/ablation/inherit_800k.py \
        --workdir=workdir/ablation/inherit_800k
    python -m lit_jax.main --config=configs/ablation/inherit_800k.py --mode=sample \
        --workdir=workdir/ablation/inherit_800k
    python -m lit_jax.main --config=configs/ablation/inherit_800k.py --mode=evaluate \
        --workdir=workdir/ablation/inherit_800k

Expected: FID 53.83, IS 27.16 (LiT, weight inheritance).
See configs/ablation/scratch.py for the whole path, with hardware and time.
"""

from configs.ablation import inherit_200k


def get_config():
    config = inherit_200k.get_config()
    config.student.init = "workdir/imagenet256_dit_s/checkpoints/800000"
    return config
