"""LiT-S/2 on CIFAR-10 from the DiT-S/2 of configs/cifar10_dit.py: the paper's path on one GPU.

    python -m lit_jax.main --config=configs/cifar10_lit.py --config.data.dir=DIRECTORY_OF_TFDS

The student inherits everything but attention. The teacher's noise and variance are distilled into
it. 20,000 steps are a fifth of the teacher's, which is the paper's share (20 % at ImageNet 256,
section 5). Nobody ran it to its end yet, so there is no expected number.
"""

from configs import cifar10_dit


def get_config():
    config = cifar10_dit.get_config()
    config.model.attention = "linear"  # two heads: LiT-S
    # A workdir: the EMA weights of its newest checkpoint.
    config.teacher.checkpoint = "workdir/cifar10_dit"
    config.student.init = "teacher"
    config.train.update(steps=20_000, preview_every=2_000)
    config.optimizer.update(learning_rate=2e-4)
    config.ema.update(decay=0.999, warmup=True)
    return config
