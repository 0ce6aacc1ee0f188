"""DiT-S/2 on the pixels of CIFAR-10, a size for one GPU: the teacher of configs/cifar10_lit.py.

    python -m lit_jax.main --config=configs/cifar10_dit.py --config.data.dir=DIRECTORY_OF_TFDS

Images of 32 x 32 pixels are 256 tokens, as many as at ImageNet 256.

Hardware and time: a training image costs 0.036 TFLOP, so 100,000 steps are 9e17 FLOPs. That is
less than an hour on a GPU that sustains 300 TFLOP/s. Nobody ran it to its end yet, so there is no
expected number.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.model.update(
        size="S", patch_size=2, attention="softmax", num_classes=10, input_size=32, in_channels=3
    )
    config.student.init = "random"
    config.data.update(name="cifar10", flip=True)
    config.train.update(
        batch_size=256, steps=100_000, remat="none", preview_every=5_000, preview_images=20
    )
    config.optimizer.update(learning_rate=4e-4, b2=0.99, clip_norm=1.0, warmup=1_000)
    config.checkpoint.update(every=5_000, keep=2, keep_every=0)
    config.sample.update(
        steps=250,
        num_images=10_000,
        batch_size=400,
        cfg_scale=1.5,
        cfg_channels="all",
        clip_denoised=True,
    )
    config.evaluate.update(reference="cifar10:train", num_images=0)  # as many as were drawn
    return config
