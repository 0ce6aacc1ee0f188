"""The teacher in lit_jax/assets: a small DiT on 4,500 MNIST digits, by plain diffusion training.

    python -m lit_jax.main --config=configs/quickstart_teacher.py

Hardware and time: 7,000 steps take 40 minutes on two free CPU cores.

Expected: a loss of 0.028 at the end (measured). The shipped teacher was trained for another 7,000
steps, to 0.025. lit_jax/assets/README.md has the commands and every line of the metrics.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.model.update(
        size="Ti",
        patch_size=4,
        attention="softmax",
        num_classes=10,
        input_size=28,
        in_channels=1,
        dtype="float32",
    )
    config.student.init = "random"
    config.data.update(name="mnist_digits", dir="data", flip=False, num_threads=1, prefetch=4)
    config.train.update(
        batch_size=64, steps=7000, remat="none", log_every=50, preview_every=500, preview_images=10
    )
    config.optimizer.update(
        learning_rate=1e-3, b2=0.99, clip_norm=1.0, schedule="cosine", warmup=200
    )
    config.ema.update(decay=0.999, warmup=True)
    config.mesh.cpu_devices = 2  # one a core: twice as fast as one device with two threads
    config.checkpoint.update(every=500, keep=2, keep_every=0)
    config.sample.update(
        sampler="dpm++",
        steps=20,
        num_images=200,
        batch_size=40,
        cfg_scale=3.0,
        cfg_channels="all",
        clip_denoised=True,
    )
    return config
