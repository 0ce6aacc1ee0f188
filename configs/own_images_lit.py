"""Own images, second half: the LiT of the DiT that configs/own_images_dit.py trained.

    python -m lit_jax.main --config=own_images_lit --config.model.num_classes=3
    python -m lit_jax.main --config=own_images_lit --config.model.num_classes=3 --mode=sample

docs/own_images.md has the whole sequence. 600 steps take four minutes on two free cores.
"""

from configs import own_images_dit


def get_config():
    config = own_images_dit.get_config()
    config.model.attention = "linear"
    config.teacher.update(checkpoint="workdir/own_images_dit", dtype="float32")
    config.student.init = "teacher"
    # The paper's 0.5 is for 400,000 steps. In hundreds of steps a larger weight teaches faster.
    config.distill.noise_weight = 8.0
    config.train.update(steps=600, preview_every=200)
    config.optimizer.update(learning_rate=1e-3, warmup=25)
    config.ema.decay = 0.98
    return config
