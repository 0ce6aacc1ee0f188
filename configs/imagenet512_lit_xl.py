"""LiT-XL/2 at ImageNet 512 from the published DiT-XL/2 of that size.

    python -m lit_jax.main --config=configs/imagenet512_lit_xl.py --mode=prepare
    python -m lit_jax.main --config=configs/imagenet512_lit_xl.py
    python -m lit_jax.main --config=configs/imagenet512_lit_xl.py --mode=sample
    python -m lit_jax.main --config=configs/imagenet512_lit_xl.py --mode=evaluate

700,000 steps of batch 128 are 70 epochs, 23 % of the teacher's 3M steps. The paper's text was not
at hand. That DiT-XL/2-512 is both the start and the teacher is our inference.

Hardware and time: a training image costs 3.9 TFLOP, teacher included, so the run is 3.5e20 FLOPs.
On GPUs that sustain 400 TFLOP/s that is ten days on one, 30 hours on eight. Not run here.

Expected (LiT, table of ImageNet 512): FID 3.69, IS 208.0, precision 0.85, recall 0.53 with
guidance 1.5; FID 14.00, IS 92.84, precision 0.76, recall 0.62 without guidance.
"""

from configs import imagenet256_lit_xl


def get_config():
    config = imagenet256_lit_xl.get_config()
    config.model.input_size = 64
    config.teacher.checkpoint = "DiT-XL-2-512x512.pt"
    config.prepare.image_size = 512
    config.data.name = "imagenet512_latents"
    config.train.update(batch_size=128, steps=700_000)
    config.sample.batch_size = 128
    config.evaluate.reference = "VIRTUAL_imagenet512.npz"
    return config
