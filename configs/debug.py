"""The whole main job in seconds on a CPU: what the test suite runs.

    python -m lit_jax.main --config=configs/debug.py

A model this small learns nothing in three steps: its samples show nothing. The tests give it a
teacher of random weights: --config.teacher.checkpoint=... --config.student.init=teacher.
"""

from configs import quickstart


def get_config():
    config = quickstart.get_config()
    config.model.update(depth=2, width=32, num_heads=2)
    config.mesh.cpu_devices = 0
    config.teacher.checkpoint = ""
    config.student.init = "random"
    config.inherit.load = ("auto",)
    config.train.update(batch_size=16, steps=3, log_every=1, preview_every=3, preview_images=8)
    config.optimizer.warmup = 1
    config.sample.update(steps=4, num_images=10, batch_size=8)
    config.report.num_images = 8
    config.distill.noise_weight = 0.5
    config.sample.cfg_scale = 2.0
    return config
