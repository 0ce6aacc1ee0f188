"""LiT-XL/2 at ImageNet 256 from the published SiT-XL/2, whose models predict velocities.

    python -m lit_jax.main --config=configs/imagenet256_lit_xl_sit.py --mode=prepare
    python -m lit_jax.main --config=configs/imagenet256_lit_xl_sit.py
    python -m lit_jax.main --config=configs/imagenet256_lit_xl_sit.py --mode=sample
    python -m lit_jax.main --config=configs/imagenet256_lit_xl_sit.py --mode=evaluate

The data are those of configs/imagenet256_lit_xl.py: a folder that one of the two has prepared
serves both. SiT-XL-2-256x256.pt is the download of SiT's authors (docs/porting.md). The same
teacher, trained with REPA, is a checkpoint with `ema` and projectors, which are left out.

The student keeps the unused half of SiT's last layer (learn_sigma): it inherits the layer whole.

Hardware and time: those of configs/imagenet256_lit_xl.py. Not run here: there was no ImageNet.

Expected: nobody has published a LiT of a SiT. The teacher, by the paper of SiT (arXiv 2401.08740):
FID-50K 2.06 with guidance 1.5, 250 steps of its SDE, as here; 2.15 with its ODE.
"""

from configs import imagenet256_lit_xl


def get_config():
    config = imagenet256_lit_xl.get_config()
    config.model.prediction = "velocity"
    config.teacher.checkpoint = "SiT-XL-2-256x256.pt"
    # Of the velocity: at equal x_t the error of the noise is t times that of the velocity.
    config.distill.noise_weight = 0.5
    config.sample.update(sampler="euler_maruyama", steps=250, cfg_scale=1.5)
    return config
