r"""Ablation, step 5: everything but attention comes from a DiT-S/2 after 400,000 steps.

    python -m lit_jax.main --config=configs/imagenet256_dit_s.py --config.train.steps=800000
    python -m lit_jax.main --config=configs/ablation/inherit_400k.py \
        --workdir=workdir/ablation/inherit_400k
    python -m lit_jax.main --config=configs/ablation/inherit_400k.py --mode=sample \
        --workdir=workdir/ablation/inherit_400k
    python -m lit_jax.main --config=configs/ablation/inherit_400k.py --mode=evaluate \
        --workdir=workdir/ablation/inherit_400k

Expected: FID 56.07 (LiT, weight inheritance).
See configs/ablation/scratch.py for the whole path, with hardware and time.
"""

from configs.ablation import inherit_200k


def get_config():
    config = inherit_200k.get_config()
    config.student.init = "workdir/imagenet256_dit_s/checkpoints/400000"
    return config
