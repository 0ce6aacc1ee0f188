"""Own images, first half: a DiT from a folder that has one folder of pictures for each class.

    python -m lit_jax.main --config=own_images_dit --mode=prepare --config.prepare.source=photos/ \\
        --config.model.num_classes=3
    python -m lit_jax.main --config=own_images_dit --config.model.num_classes=3

docs/own_images.md goes on from here to the converted model, its pictures, scores and export.

The sizes are for a few hundred pictures and a CPU: 32 x 32 pixels, 2.4 million parameters, 150
images/s on two free cores, so 2,000 steps take ten minutes. A GPU bears more: model.input_size=64
with model.size=S, or latents (docs/imagenet.md).
"""

from configs import default


def get_config():
    config = default.get_config()
    config.model.update(
        size="Ti", patch_size=4, attention="softmax", num_classes=1, input_size=32, in_channels=3,
        dtype="float32",
    )  # fmt: skip
    config.student.init = "random"
    config.data.update(name="own_images", flip=True, num_threads=1, prefetch=4)
    config.prepare.batch_size = 8
    config.train.update(batch_size=32, steps=2_000, remat="none", log_every=50, preview_every=500)
    config.optimizer.update(
        learning_rate=5e-4, b2=0.99, clip_norm=1.0, schedule="cosine", warmup=100
    )
    config.ema.update(decay=0.998, warmup=True)
    config.checkpoint.update(every=500, keep=2, keep_every=0)
    config.sample.update(
        sampler="dpm++", steps=20, num_images=64, batch_size=32, cfg_scale=2.0,
        cfg_channels="all", clip_denoised=True, labels="balanced",
    )  # fmt: skip
    config.evaluate.update(reference="own_images:train", num_images=0)  # as many as were drawn
    config.report.num_images = 32
    return config
