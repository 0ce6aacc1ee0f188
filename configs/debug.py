"""The whole main job in seconds on a CPU: what the test suite runs.

The teacher's weights are random, so its samples show nothing.
"""

from configs import quickstart


def get_config():
    config = quickstart.get_config()
    config.model.update(depth=2, width=32, num_heads=2)
    config.mesh.cpu_devices = 0
    config.teacher.checkpoint = ""  # the tests write one
    config.train.update(batch_size=16, steps=3, log_every=1, preview_every=3, preview_images=8)
    config.optimizer.warmup = 1
    config.sample.update(steps=4, num_images=10, batch_size=8)
    config.report.num_images = 8
    config.distill.noise_weight = 0.5
    config.sample.cfg_scale = 2.0
    return config
