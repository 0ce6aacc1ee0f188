"""LiT-0.6B at 1024 pixels, from the LiT at 512: the second stage of the paper's text-to-image.

    python -m lit_jax.main --config=configs/pixart_sigma_1024.py --mode=prepare
    python -m lit_jax.main --config=configs/pixart_sigma_1024.py --workdir=runs/pixart_sigma_1024
    python -m lit_jax.main --config=configs/pixart_sigma_1024.py --workdir=runs/pixart_sigma_1024 \\
        --mode=sample

The student goes on from the workdir of configs/pixart_sigma_512.py, attention and all, and is
distilled from PixArt-Sigma-XL-2-1024-MS. Its positions span the same interval at twice the tokens.

Hardware and time: an image costs 20.5 TFLOP, and 25 with the rematerialisation of this recipe. So
the 14.9 million images of the run are 3.7e20 FLOPs: eleven days on one GPU that sustains 400
TFLOP/s, 33 hours on eight. --mode=plan says at most 90 images/s for 16 chips of v5e: 46 hours. Not
run here: there was no PixArt-Sigma.

Expected (LiT, arXiv 2501.12976, text-to-image): GenEval overall 0.48; PixArt-Sigma has 0.52. The
standard error of such a score is 0.008: it does not tell 0.48 from the first stage's 0.47.
"""

from configs import pixart_sigma_512


def get_config():
    config = pixart_sigma_512.get_config()
    config.model.update(input_size=128, position_base=64, position_scale=2.0)
    config.teacher.checkpoint = "PixArt-Sigma-XL-2-1024-MS.pth"
    config.student.init = "runs/pixart_sigma_512"
    config.prepare.image_size = 1024
    config.data.name = "text_to_image_1024"
    config.train.update(batch_size=96, steps=155_000)
    config.sample.batch_size = 8
    config.autoencoder.slice_size = 1  # an image of 1024 pixels at once
    return config
