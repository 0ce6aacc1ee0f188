r"""Ablation, step 6: everything but attention comes from a DiT-S/2 after 600,000 steps.

    python -m lit_jax.main --config=configs/imagenet256_dit_s.py --config.train.steps=800000
    python -m lit_jax.main --config=configs/ablation/inherit_600k.py \
        --workdir=workdir/ablation/inherit_600k
    python -m lit_jax.main --config=configs/ablation/inherit_600k.py --mode=sample \
        --workdir=workdir/ablation/inherit_600k
    python -m lit_jax.main --config=configs/ablation/inherit_600k.py --mode=evaluate \
        --workdir=workdir/ablation/inherit_600k

Expected: FID 54.80 (LiT, weight inheritance).
See configs/ablation/scratch.py for the whole path, with hardware and time.
"""

from configs.ablation import inherit_200k


def get_config():
    config = inherit_200k.get_config()
    config.student.init = "workdir/imagenet256_dit_s/checkpoints/600000"
    return config
