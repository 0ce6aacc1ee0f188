"""LiT-XL/2 at ImageNet 256 from the published DiT-XL/2: the paper's main result.

    python -m lit_jax.main --config=configs/imagenet256_lit_xl.py --mode=prepare
    python -m lit_jax.main --config=configs/imagenet256_lit_xl.py
    python -m lit_jax.main --config=configs/imagenet256_lit_xl.py --mode=sample
    python -m lit_jax.main --config=configs/imagenet256_lit_xl.py --mode=evaluate

docs/imagenet.md has the whole sequence, with the files that it needs.

Hardware and time: a training image costs 0.95 TFLOP, the teacher's forward pass included, so the
run is 3.4e20 FLOPs. On GPUs that sustain 400 TFLOP/s that is ten days on one, 30 hours on eight.
The paper does not say its hardware. Not run here: there was no ImageNet.

Expected (LiT, table of ImageNet 256, FID-50K by ADM's evaluator, 250 DDPM steps): FID 2.32,
IS 265.2, precision 0.824, recall 0.574 with guidance 1.5; FID 3.60 with guidance 1.25; FID 10.24
without guidance (sample.cfg_scale=1.0). After 100,000 steps, without guidance: FID 12.90, IS 95.80.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.model.update(
        size="XL", patch_size=2, attention="linear", num_classes=1000, input_size=32, in_channels=4
    )
    config.teacher.update(checkpoint="DiT-XL-2-256x256.pt", size="XL")
    config.student.init = "teacher"
    config.autoencoder.checkpoint = "sd-vae-ft-ema"  # a folder of diffusers, or the file in it
    config.prepare.update(source="imagenet2012", image_size=256)
    # ADM and DiT know of neither, and scores depend on the pixels.
    config.prepare.update(exif_orientation=False, background="")
    config.data.update(name="imagenet256_latents", dir="data")
    # 280 epochs: a fifth of the teacher's 7M steps.
    config.train.update(batch_size=256, steps=1_400_000)
    config.sample.update(num_images=50_000, batch_size=256, cfg_scale=1.5)
    config.evaluate.update(
        features="inception_adm",
        weights="pt_inception-2015-12-05-6726825d.pth",
        reference="VIRTUAL_imagenet256_labeled.npz",
    )
    return config
