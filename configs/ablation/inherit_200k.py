r"""Ablation, step 4: everything but attention comes from a DiT-S/2 after 200,000 steps.

    python -m lit_jax.main --config=configs/imagenet256_dit_s.py --config.train.steps=800000
    python -m lit_jax.main --config=configs/ablation/inherit_200k.py \
        --workdir=workdir/ablation/inherit_200k
    python -m lit_jax.main --config=configs/ablation/inherit_200k.py --mode=sample \
        --workdir=workdir/ablation/inherit_200k
    python -m lit_jax.main --config=configs/ablation/inherit_200k.py --mode=evaluate \
        --workdir=workdir/ablation/inherit_200k

Expected: FID 57.84 (LiT, weight inheritance).
See configs/ablation/scratch.py for the whole path, with hardware and time.
"""

from configs.ablation import few_heads


def get_config():
    config = few_heads.get_config()
    config.student.init = "workdir/imagenet256_dit_s/checkpoints/200000"
    return config
