"""A LiT on CIFAR-10 from the DiT of configs/cifar10_dit.py: the paper's path on one GPU.

    python -m lit_jax.main --config=configs/cifar10_lit.py --config.data.dir=DIRECTORY_OF_TFDS

The student inherits everything but attention. The teacher's noise and variance are distilled into
it. It sees a sixth of the images that the teacher saw; the paper's share is a fifth (ImageNet 256,
section 5). launch/guidelines.py and launch/workbench.py have runs of 300 steps of it
(docs/guidelines.md); to its end it was not run yet.
"""

from configs import cifar10_dit


def get_config():
    config = cifar10_dit.get_config()
    config.model.attention = "linear"
    # A workdir: the EMA weights of its newest checkpoint.
    config.teacher.checkpoint = "workdir/cifar10_dit"
    config.student.init = "teacher"
    # The paper's weight is 0.5; in so few steps a larger one teaches faster.
    config.distill.noise_weight = 8.0
    config.train.update(batch_size=128, steps=2_000, log_every=50, preview_every=1_000)
    config.optimizer.warmup = 50
    config.ema.decay = 0.99
    config.checkpoint.every = 1_000
    return config
