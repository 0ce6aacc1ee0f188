"""A DiT on the pixels of CIFAR-10, minutes on one GPU: the teacher of configs/cifar10_lit.py.

    python -m lit_jax.main --config=configs/cifar10_dit.py --config.data.dir=DIRECTORY_OF_TFDS

Images of 32 x 32 pixels are 256 tokens, as many as at ImageNet 256.

Hardware and time: 6,000 steps of 256 images take 190 seconds on one H100, at 8,080 images/s, beside
a minute and a half for the start and the 50,000 images of the reference.

Expected (measured, JAX 0.12): a loss of 0.033 at the end; with --config.evaluate.every=6000
--config.evaluate.every_images=500 a Frechet distance of 58.2 by EfficientNet's features, precision
0.68, recall 0.36. It is no converged teacher: these are 31 epochs.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.model.update(
        size="Ti",  # its heads: four of softmax, two of LiT
        depth=8,
        width=256,
        patch_size=2,
        attention="softmax",
        num_classes=10,
        input_size=32,
        in_channels=3,
    )
    config.student.init = "random"
    config.data.update(name="cifar10", flip=True)
    config.train.update(
        batch_size=256, steps=6_000, remat="none", preview_every=2_000, preview_images=20
    )
    config.optimizer.update(
        learning_rate=1e-3, b2=0.99, clip_norm=1.0, schedule="cosine", warmup=300
    )
    config.ema.update(decay=0.999, warmup=True)
    config.checkpoint.update(every=2_000, keep=2, keep_every=0)
    config.sample.update(
        sampler="dpm++",
        steps=20,
        num_images=10_000,
        batch_size=500,
        cfg_scale=1.5,
        cfg_channels="all",
        clip_denoised=True,
    )
    # num_images=0: as many as were drawn.
    config.evaluate.update(reference="cifar10:train", num_images=0, batch_size=250)
    return config
